"""The ``kms-service`` program: load settings, check the exposure, serve alone or as several."""

import argparse
import os
import sys
from pathlib import Path

from kms_core import logs, secure_memory, settings, settings_lint
from kms_core.errors import EXIT_CONFIGURATION, ConfigurationError


def main() -> int:
    """Run until a signal. Exit codes: 78 wrong configuration, 69 port not free."""
    arguments = _arguments()
    try:
        secure_memory.forbid_dumps()
        loaded = settings.load(arguments.config, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        settings.check_exposure(loaded)
        if not arguments.listener:  # else the leader has told
            settings_lint.warn(loaded)
        if loaded.kms.server.processes > 1 and not arguments.listener:
            from kms_api import leader  # noqa: PLC0415 -- a leader serves nothing

            return leader.lead(loaded, arguments.config)
        from kms_api import serving  # noqa: PLC0415 -- and needs none of this

        return serving.serve(loaded, arguments.listener)
    except ConfigurationError as exc:
        sys.stderr.write(f"kms-service: error: {exc.detail}\n")
        return EXIT_CONFIGURATION


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kms-service", description="The HTTP front of the KMS.")
    parser.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual places)")
    parser.add_argument("--listener", type=int, action="append", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
