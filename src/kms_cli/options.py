"""Options that several commands share, and output files. Imports no client, which offline commands lack."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import click
import msgspec

from kms_cli import terminal
from kms_cli.connection import complete_keys
from kms_protocol.errors import InvalidContext, InvalidRequest, SpoolFull, TargetExists
from kms_protocol.units import parse_duration, parse_time, size_text
from kms_protocol.whole_files import replacing
from kms_protocol.wire import PRIORITIES, ContextIn

C = TypeVar("C", bound=Callable[..., Any])

FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
"""A file that is read."""
PATH: Final = click.Path(path_type=Path)
"""Any path."""
key_option = click.option(
    "--key-id", shell_complete=complete_keys, help="Key to use instead of the default one."
)
priority_option = click.option(
    "--priority", type=click.Choice(PRIORITIES), help="Run before (high) or after (low) other queued jobs."
)
callback_option = click.option(
    "--callback", help="Webhook endpoint, from the settings of the service, to notify at the end."
)
STDIO: Final = Path("-")  # stdin or stdout
output_option = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Output file (0600); - is stdout.",
)
force_option = click.option("--force", "-f", is_flag=True, help="Overwrite the output if it exists.")


def duration(option: str, text: str) -> timedelta:
    """Read the duration that an option gives. Raises InvalidRequest, naming the option."""
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise InvalidRequest(f"{option} {exc}") from exc


def context_of(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> ContextIn:
    """Return the value of a context option: ``key=value,…`` as text, a JSON object as a mapping."""
    if value is None or not value.startswith("{"):
        return value
    try:
        return msgspec.json.decode(value, type=dict[str, str])
    except msgspec.DecodeError as exc:
        raise InvalidContext("The context is not a JSON object of strings") from exc


def pairs_of(ctx: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
    """Return the pairs of an option that is given once for each; None without any."""
    del ctx
    if bad := next((text for text in given if "=" not in text), None):
        raise click.BadParameter(f'"{bad}" is not name=value', param=parameter)
    return dict(text.split("=", 1) for text in given) or None


context_option = click.option(
    "--context", callback=context_of, help="Encryption context, as env=prod,service=api, or a JSON object."
)
label_option = click.option(
    "--label", "labels", multiple=True, callback=pairs_of, help="Label, as name=value; may be repeated."
)
metadata_option = click.option(
    "--metadata",
    multiple=True,
    callback=pairs_of,
    help="Text for answers and events, as name=value; repeated.",
)


def _moment(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    """Return the value of a deadline option: a time, or a duration from now."""
    if value is None:
        return None
    try:
        return parse_time(value) if "T" in value else datetime.now(UTC) + parse_duration(value)
    except ValueError:
        name = parameter.opts[0]
        raise InvalidRequest(f"{name} takes a duration, as 30m or 2d, or an RFC 3339 time") from None


def _seconds(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else int(duration(parameter.opts[0], value).total_seconds())


def deadline_options(command: C) -> C:
    """Add the options of the deadlines of a job."""
    start = "Fail if it has not started by then: a duration, as 30m, or an RFC 3339 time."
    run = "Fail if it has not ended by then: a duration, as 12h, or an RFC 3339 time."
    keep = "Keep the result for so long after its end, as 7d."
    for name, callback, text in (
        ("--keep-for", _seconds, keep),
        ("--run-by", _moment, run),
        ("--start-by", _moment, start),
    ):
        command = click.option(name, callback=callback, help=text)(command)
    return command


class IsDirectory(click.UsageError):
    """A directory where a file is needed."""

    hint = "give one file or, on stdin, what tar writes; `kms job submit` takes all files of a directory"


class SourceName(click.Path):
    """The name of a file that is read, or - for stdin."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401  # click's own
        if Path(value).is_dir():
            raise IsDirectory(f'"{value}" is a directory', ctx)
        return super().convert(value, param, ctx)


source_argument = click.argument("source", metavar="SOURCE", type=SourceName())


class OutputExists(TargetExists):
    """The output file exists."""

    hint = "--force overwrites it, --output names another"


@contextlib.contextmanager
def placed(target: Path, *, overwrite: bool, room_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open ``whole_files.replacing``, with room for so many bytes, all of which the caller writes.

    Raises OutputExists, UsageError if its directory is missing, OSError, which names a target that is full.
    """
    if target.exists() and not overwrite:
        raise OutputExists(f"{terminal.printable(str(target))} exists")
    if not target.parent.is_dir():
        raise click.UsageError(f'there is no directory "{target.parent}"')
    try:
        with replacing(target, overwrite=overwrite) as file:
            file.write(bytes(room_bytes))
            file.seek(0)  # which writes them
            yield file
    except FileExistsError as exc:
        raise OutputExists(f"{terminal.printable(str(target))} exists") from exc
    except (SpoolFull, OSError) as exc:
        error = exc.__cause__ if isinstance(exc, SpoolFull) else exc  # threads raise it of a full disk
        if not isinstance(error, OSError):  # the service has no room
            raise
        if error.errno in terminal.OS_HINTS or f"/.{target.name}." in f"/{error.filename}":
            error.filename = str(target)  # in place of the temporary file, which has no name once it is open
        raise error from None


def name_of(source: Path) -> str:
    """Return what messages call an input."""
    return "stdin" if source == STDIO else str(source)


def is_stdout(target: Path | None) -> bool:
    """Return whether an output is stdout: by default, or because ``-`` names it."""
    return target is None or target == STDIO


def writing(target: Path | None, *, overwrite: bool) -> AbstractContextManager[BinaryIO]:
    """Open an output: a file as ``placed``, a device or named pipe as it is, stdout for ``-`` and None.

    For None a terminal gets only text. Raises OutputExists, BinaryOutput, UsageError, OSError.
    """
    if target is None or target == STDIO:
        return terminal.stdout(forced=target is not None)
    if target.exists() and not target.is_file() and not target.is_dir():
        return target.open("wb")
    return placed(target, overwrite=overwrite)


def report_written(done: str, source: Path, output: Path | None, **more: str) -> None:
    """Print what was done, unless to stdout or a device, and the size of the output. ``more``: for --json."""
    if output is None or is_stdout(output) or not output.is_file():
        return
    size_bytes = output.stat().st_size
    if not terminal.printed_as_json(
        {"source": name_of(source), "output": str(output), "bytes": size_bytes, **more}
    ):
        terminal.say(f"{done} {name_of(source)} to {output} ({size_text(size_bytes)})")
