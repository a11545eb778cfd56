"""``kms migrate``: options, input, output and report of its commands that migrate lines."""

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
from kms_cli.migrate.pipeline import (
    Lines,
    Migration,
    MigrationReport,
    MigrationSource,
    Output,
    OutputFolder,
    lines_of,
)
from kms_cli.options import context_option, key_option
from kms_cli.session import connect, session
from kms_protocol.errors import EXIT_BAD_DATA, InvalidRequest
from kms_protocol.wire import ContextIn

migrate_command = LazyGroup(
    "migrate", MIGRATE_COMMANDS, "Migrate ciphertexts of other systems to the service."
)

Shape = TypeVar("Shape", bound=msgspec.Struct)
Command = TypeVar("Command", bound=Callable[..., object])
a_path = click.Path(path_type=Path)


class MigrationOptions(TypedDict):
    """Options of the commands that migrate lines."""

    inputs: tuple[Path, ...]
    output: Path | None
    output_dir: Path | None
    dry_run: bool
    context: ContextIn
    key_id: str | None


def line_options(command: Command) -> Command:
    """Add the options of ``MigrationOptions`` to a command."""
    folder = click.Path(path_type=Path, file_okay=False, exists=True)
    for option in (
        key_option,
        context_option,
        click.option("--dry-run", is_flag=True, help="Decrypt all lines; encrypt and write nothing."),
        click.option(
            "--output-dir",
            type=folder,
            help="Write a file for each ciphertext: REFERENCE.age, or line-NUMBER.age.",
        ),
        click.option(
            "--output",
            "-o",
            type=a_path,
            help="Append lines of JSON to this file, and skip lines that it contains.",
        ),
        click.argument("inputs", nargs=-1, type=a_path),
    ):
        command = option(command)
    return command


def migrate(source: MigrationSource, options: MigrationOptions) -> int:
    """Migrate the inputs and show the report. Return the exit code. Raises Unavailable after the report."""
    if options["output"] and options["output_dir"]:
        raise click.UsageError("give --output or --output-dir, not both")
    with contextlib.ExitStack() as stack:
        client = None if options["dry_run"] else stack.enter_context(connect())
        moving = Migration(source, client, stack.enter_context(_output(options)))
        try:
            moving.run(lines_of(options["inputs"], sys.stdin.buffer))
        finally:
            stdout_is_free = bool(options["dry_run"] or options["output"] or options["output_dir"])
            show(moving.report, dry_run=options["dry_run"], on_stdout=stdout_is_free)
    return EXIT_BAD_DATA if moving.report.failed else 0


def show(report: MigrationReport, *, dry_run: bool, on_stdout: bool) -> None:
    """Print the counts: on stdout, or as a message if the ciphertexts are on stdout."""
    counts = asdict(report)
    if dry_run:
        counts["would_move"] = counts.pop("moved")
    if on_stdout:
        terminal.record(counts, as_json=session().as_json)
    else:
        terminal.say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))


@contextlib.contextmanager
def _output(options: MigrationOptions) -> Iterator[Output]:
    if options["output_dir"]:
        yield OutputFolder(options["output_dir"])
    elif options["output"] and not options["dry_run"]:
        with contextlib.closing(Lines.continued(options["output"])) as lines:
            yield lines
    else:
        yield Lines(sys.stdout.buffer)


def read_line(text: bytes, name: str, shape: type[Shape]) -> Shape:
    """Read JSON, or only the value of ``name``. Raises InvalidRequest, which does not quote the line."""
    try:
        given = text if text.startswith(b"{") else msgspec.json.encode({name: text.decode("ascii")})
        return msgspec.json.decode(given, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        reason = str(exc) if isinstance(exc, msgspec.ValidationError) else "it is not JSON, nor ASCII"
        raise InvalidRequest(f"Expected a ciphertext, or JSON with {name}: {reason}") from exc
