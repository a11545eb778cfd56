"""The ``kms`` program: runs one command line and reports how it ended, as text and as an exit code."""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn, TextIO, cast

import click

from kms_cli import command_line, session, terminal
from kms_core import secure_memory
from kms_protocol.errors import ConfigurationError, KmsError

BROKEN_PIPE: Final = 141  # the exit code that a shell reports for SIGPIPE
TERMINATED: Final = 143


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: ``sys.argv``). Return its exit code."""
    line, meta = sys.argv[1:] if args is None else list(args), dict[str, object]()
    try:
        code = command_line.invoke(line, meta)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except (click.UsageError, click.Abort, KeyboardInterrupt, KmsError, OSError) as exc:
        is_read = isinstance(exc, click.BadParameter) or getattr(getattr(exc, "ctx", None), "params", True)
        code = terminal.failed(exc, as_json=session.AS_JSON in meta or (not is_read and _asks_json(line)))
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
    return code if isinstance(code, int) else 0


def _asks_json(line: Sequence[str]) -> bool:
    """Return whether --json is in a command line, before the ``--`` after which other programs are named."""
    return "--json" in (line[: line.index("--")] if "--" in line else line)


def main() -> NoReturn:
    """Entry point. SIGTERM ends a command as Ctrl-C does, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, _terminated)
    _replace_closed()
    try:
        secure_memory.forbid_dumps()
    except ConfigurationError as exc:
        sys.exit(terminal.failed(exc, as_json=_asks_json(sys.argv)))
    code = _completed() if command_line.COMPLETION_VARIABLE in os.environ else run()
    gc.freeze()  # no collection of all loaded modules at exit, which takes a fifth of a short command
    sys.exit(code)


def _replace_closed() -> None:
    """Open the closed standard streams, which are None: the use of two fails, stderr swallows all."""
    sys.stdin = sys.stdin or _stand_in(os.O_WRONLY, "r")
    sys.stdout = sys.stdout or _stand_in(os.O_RDONLY, "w")
    sys.stderr = sys.stderr or _stand_in(os.O_WRONLY, "w")


def _stand_in(flags: int, mode: str) -> TextIO:
    return cast("TextIO", open(os.open(os.devnull, flags), mode))  # noqa: PTH123 -- for the whole run


def _completed() -> int:
    from kms_cli.commands import completion  # noqa: PLC0415 -- as a command

    return completion.answer(os.environ[command_line.COMPLETION_VARIABLE])


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _drop_stdout() -> None:
    """Point stdout at /dev/null: at exit Python would report what is wrong with it a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
