"""The ``kms`` command."""

import gc
from typing import Final, NoReturn

COLLECT_AFTER: Final = 50_000  # objects: more than a short command makes


def start() -> NoReturn:
    """Entry point. Imports the command with few garbage collections, which take a tenth of a short one."""
    gc.set_threshold(COLLECT_AFTER)
    from kms_cli.main import main  # noqa: PLC0415 -- see above

    main()
