"""``kms help`` and ``kms completion``: what the command can do, for people and for their shells.

A completion script runs ``kms`` with a variable that makes it answer as ``answer`` does.
"""

import contextlib
import json
import os
from typing import ClassVar, Final

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class, shell_complete

from kms_cli.main import COMPLETION_VARIABLE, LazyGroup, group

SHELLS: Final = ("bash", "zsh", "fish", "nushell")
_NUSHELL: Final = """\
let kms_completer_before = $env.config.completions.external.completer?
$env.config.completions.external.enable = true
$env.config.completions.external.completer = {|spans: list<string>|
    if $spans.0 != %(prog_name)s {
        return (if $kms_completer_before == null { null } else { do $kms_completer_before $spans })
    }
    with-env {%(complete_var)s: nushell_complete, COMP_WORDS: ($spans | to json)} {
        ^%(prog_name)s | from json
    }
}
"""


@add_completion_class
class NushellComplete(ShellComplete):
    """Nushell, by its external completer: a list of records, or null for the names of files."""

    name: ClassVar[str] = "nushell"
    source_template: ClassVar[str] = _NUSHELL

    def get_completion_args(self) -> tuple[list[str], str]:
        words = json.loads(os.environ["COMP_WORDS"])
        return words[1:-1], words[-1]

    def complete(self) -> str:
        items = self.get_completions(*self.get_completion_args())
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


def _names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Return the commands below the words that were given."""
    del parameter
    command: click.Command | None = group()
    for word in ctx.params.get("words") or ():
        command = command.get_command(ctx, word) if isinstance(command, click.Group) else None
    return command.commands_from(incomplete) if isinstance(command, LazyGroup) else []


@click.command("help", epilog="Example: kms help job list")
@click.argument("words", nargs=-1, metavar="[COMMAND]...", shell_complete=_names)
def help_command(words: tuple[str, ...]) -> None:
    """Show the help of a command, as COMMAND --help does."""
    group().main([*words, "--help"], prog_name="kms", standalone_mode=False)
