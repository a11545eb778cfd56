"""``kms help`` and ``kms completion``: what the command can do, for people and for their shells.

A completion script runs ``kms`` with a variable that makes it answer as ``answer`` does.
"""

import contextlib
import json
import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Final

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class, shell_complete

from kms_cli import command_line, connection, session, terminal
from kms_cli.command_line import COMPLETION_VARIABLE, LazyGroup, group
from kms_protocol import errors

SHELLS: Final = ("bash", "zsh", "fish", "nushell")
_NUSHELL: Final = Path(__file__).with_name("completion.nu")  # with the names of click's templates
WIDTH: Final = 80
EXIT_CODES: Final[Mapping[int, str]] = {
    0: "success",
    errors.EXIT_OTHER: "another error; findings of `kms config lint`; an open end in `kms audit verify`",
    errors.EXIT_USAGE: "wrong usage",
    errors.EXIT_BAD_DATA: "bad data, `decrypt_failed`, a damaged audit log",
    errors.EXIT_UNAVAILABLE: "service, backend or another peer unavailable; `document_outdated`: a signed "
    "document is older than one seen before",
    errors.EXIT_EXISTS: "the target exists, or another conflict",
    errors.EXIT_REFUSED: "refused: authentication, permission, path",
    errors.EXIT_CONFIGURATION: "wrong configuration",
}


@add_completion_class
class NushellComplete(ShellComplete):
    """Nushell, by its external completer: a list of records, or null for the names of files."""

    name: ClassVar[str] = "nushell"

    def source(self) -> str:
        return _NUSHELL.read_text("utf-8") % self.source_vars()

    def complete(self) -> str:
        words = json.loads(os.environ["COMP_WORDS"])
        items = self.get_completions(words[1:-1], words[-1])
        if any(item.type != "plain" for item in items):
            return "null"
        return json.dumps([{"value": item.value, "description": item.help or ""} for item in items])


def answer(instruction: str) -> int:
    """Answer the completion script of a shell. Shows no errors: they would disturb the line being typed."""
    with contextlib.suppress(Exception):
        return shell_complete(group(), {}, "kms", COMPLETION_VARIABLE, instruction)
    return 1


@click.command("completion", epilog='Example: eval "$(kms completion bash)"')
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> int:
    """Print the script that completes commands, options, key ids and job ids in a shell.

    docs/terminal.md says where to put it.
    """
    return shell_complete(group(), {}, "kms", COMPLETION_VARIABLE, f"{shell}_source")


def _names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Return the commands below the words that were given; topics, too, if there are none."""
    command: click.Command | None = group()
    words = ctx.params.get("words") or ()
    for word in words:
        command = command.get_command(ctx, word) if isinstance(command, click.Group) else None
    found = command.commands_from(incomplete) if isinstance(command, LazyGroup) else []
    return found if words else found + connection.completions(command_line.summaries(), incomplete)


def topic(name: str) -> str:
    """Return the text of a topic, with exit codes and variables as they are declared."""
    text = command_line.topics()[name].rstrip("\n")
    if "{codes}" in text:
        return text.replace("{codes}", _rows((str(code), means) for code, means in EXIT_CODES.items()))
    if "{settings}" in text:
        from kms_core.settings.load import VARIABLES  # noqa: PLC0415 -- the service, which takes a moment

        options = [each for each in session.options(after_command=False) if each.envvar]
        shown = _rows((str(each.envvar), f"{each.opts[0]}: {each.help or ''}") for each in options)
        return text.replace("{options}", shown).replace("{settings}", _rows(VARIABLES.items()))
    return text


def _rows(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a block with names and what they mean."""
    rows = dict(pairs)
    width = max(map(len, rows))
    return "\n".join(
        textwrap.fill(
            text.replace("`", ""),
            WIDTH,
            initial_indent=f"    {name:<{width}}  ",
            subsequent_indent=" " * (width + 6),
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    )


@click.command("help", epilog="Example: kms help job list")
@click.argument("words", nargs=-1, metavar="[COMMAND | TOPIC]...", shell_complete=_names)
def help_command(words: tuple[str, ...]) -> None:
    """Show the help of a command, as COMMAND --help does, or a text on a topic."""
    if len(words) == 1 and words[0] in command_line.topics():
        terminal.result(topic(words[0]))
    elif len(words) == 1 and words[0] not in command_line.COMMANDS:
        known = (*command_line.COMMANDS, *command_line.topics())
        raise command_line.UnknownCommand(words[0], known, click.get_current_context().find_root())
    else:
        command_line.invoke([*words, "--help"], {})
