"""``kms migrate``: what its commands that move lines have in common: options, input, output, report."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, TypeVar

import click
import msgspec

from kms_cli import terminal
from kms_cli.main import MIGRATE_COMMANDS, LazyGroup
from kms_cli.migrate.output import Lines, Output, OutputFolder
from kms_cli.migrate.pipeline import MigrationReport, MigrationSource, Move, lines_of
from kms_cli.options import context_option, key_option
from kms_cli.remote_service import connect
from kms_cli.session import session
from kms_protocol.errors import EXIT_BAD_DATA, InvalidRequest
from kms_protocol.wire import ContextIn

migrate_command = LazyGroup("migrate", MIGRATE_COMMANDS, "Move ciphertexts from elsewhere into the service.")

Shape = TypeVar("Shape", bound=msgspec.Struct)
Command = TypeVar("Command", bound=Callable[..., object])
a_path = click.Path(path_type=Path)


class Where(TypedDict):
    """Options of every migration of lines."""

    inputs: tuple[Path, ...]
    output: Path | None
    output_dir: Path | None
    dry_run: bool
    context: ContextIn
    key_id: str | None


def line_options(command: Command) -> Command:
    """The options of ``Where``."""
    folder = click.Path(path_type=Path, file_okay=False, exists=True)
    for option in (
        key_option,
        context_option,
        click.option("--dry-run", is_flag=True, help="Open everything; seal and write nothing."),
        click.option(
            "--output-dir",
            type=folder,
            help="Write a file for each ciphertext: REFERENCE.age, or line-NUMBER.age.",
        ),
        click.option(
            "--output", "-o", type=a_path, help="Write lines of JSON here, and go on where it ends."
        ),
        click.argument("inputs", nargs=-1, type=a_path),
    ):
        command = option(command)
    return command


def move(source: MigrationSource, where: Where) -> int:
    """Move what the inputs hold, show the report; the exit code. Raises Unavailable after the report."""
    if where["output"] and where["output_dir"]:
        raise click.UsageError("give --output or --output-dir, not both", click.get_current_context())
    with contextlib.ExitStack() as stack:
        client = None if where["dry_run"] else stack.enter_context(connect())
        moving = Move(source, client, stack.enter_context(_output(where)))
        try:
            moving.run(lines_of(where["inputs"], sys.stdin.buffer))
        finally:
            elsewhere = bool(where["dry_run"] or where["output"] or where["output_dir"])
            show(moving.report, dry_run=where["dry_run"], on_stdout=elsewhere)
    return EXIT_BAD_DATA if moving.report.failed else 0


def show(report: MigrationReport, *, dry_run: bool, on_stdout: bool) -> None:
    """The counts: a result, or words where stdout has the ciphertexts."""
    counts = asdict(report)
    if dry_run:
        counts["would_move"] = counts.pop("moved")
    if on_stdout:
        terminal.record(counts, as_json=session().as_json)
    else:
        terminal.say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))


@contextlib.contextmanager
def _output(where: Where) -> Iterator[Output]:
    if where["output_dir"]:
        yield OutputFolder(where["output_dir"])
    elif where["output"] and not where["dry_run"]:
        with contextlib.closing(Lines.continued(where["output"])) as lines:
            yield lines
    else:
        yield Lines(sys.stdout.buffer)


def read_line(text: bytes, name: str, shape: type[Shape]) -> Shape:
    """JSON, or the value of ``name`` alone. Raises InvalidRequest, which does not quote the line."""
    try:
        given = text if text.startswith(b"{") else msgspec.json.encode({name: text.decode("ascii")})
        return msgspec.json.decode(given, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        reason = str(exc) if isinstance(exc, msgspec.ValidationError) else "it is not JSON, nor ASCII"
        raise InvalidRequest(f"Expected a ciphertext, or JSON with {name}: {reason}") from exc
