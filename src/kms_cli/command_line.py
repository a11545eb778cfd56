"""The subcommands of ``kms`` by name, and one command line that runs one of them.

The module of a subcommand is imported when the subcommand is used: ``kms --help`` imports none.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from kms_cli import connection, session
from kms_protocol import __version__
from kms_protocol.errors import EXIT_USAGE

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETION_VARIABLE: Final = "_KMS_COMPLETE"  # set by the completion scripts
Commands = Mapping[str, tuple["str | Commands", str]]
"""The module of each command, or the commands of a group, and its help; by name."""
JOB_COMMANDS: Final = {
    "submit": ("commands.jobs", "Submit a job over files on the host of the service."),
    "list": ("commands.jobs", "List jobs, newest first."),
    "show": ("commands.jobs", "Show one job."),
    "wait": ("commands.jobs", "Wait until a job ends."),
    "cancel": ("commands.jobs", "Cancel a job."),
    "result": ("commands.jobs", "Fetch the result of a job."),
    "group": ("commands.jobs", "Show a group of jobs."),
    "release": ("commands.jobs", "Delete the result of an ended job."),
    "dead": ("commands.jobs", "List dead letters: jobs that used up their attempts."),
    "retry": ("commands.jobs", "Retry a job that used up its attempts."),
}

CONFIG_COMMANDS: Final = {
    "show": ("commands.config", "Show the settings in use, and where each comes from."),
    "lint": ("commands.config", "List settings that weaken security."),
    "init": ("commands.config", "Print a settings file to begin with."),
}
KEYS_COMMANDS: Final = {
    "list": ("commands.service", "List keys, with the age and use of their current version."),
    "usage": ("commands.service", "Show how much each version of a key has encrypted."),
    "rotate": ("commands.service", "Create a new version of a key."),
    "adopt": ("commands.adopt", "Take sealed key files into a document, or accept one put back."),
}

MIGRATE_COMMANDS: Final = {
    "transit": ("commands.migrate", "Migrate from the transit engine of Vault or OpenBao."),
    "aws": ("commands.migrate", "Migrate from AWS KMS."),
    "sops": ("commands.migrate_sops", "Add the service as a recipient of SOPS files."),
}

AUDIT_COMMANDS: Final = {
    "verify": ("commands.audit", "Check that the log is complete and unchanged."),
    "tail": ("commands.audit", "Show the last operations, and follow new ones."),
    "receipt": ("commands.audit", "Write a proof that an operation was recorded."),
    "check-receipt": ("commands.audit", "Check such a proof on any machine."),
    "key": ("commands.audit", "Print the public key of the signatures."),
    "acknowledge-loss": ("commands.audit", "Record that lines are permanently lost."),
}

TOKEN_COMMANDS: Final = {
    "create": ("commands.tokens", "Create a token; it is shown once."),
    "list": ("commands.tokens", "List tokens and their scopes."),
    "rotate": ("commands.tokens", "Replace the secret of a token."),
    "revoke": ("commands.tokens", "Revoke a token immediately."),
    "adopt": ("commands.tokens", "Go on with a document of tokens that was put back."),
}

COSMIAN_COMMANDS: Final = {"init-key": ("commands.cosmian", "Create the keys that the settings name.")}

COMMANDS: Final[Commands] = {
    "up": ("local.up", "Run the whole service on this machine."),
    "encrypt": ("commands.secrets", "Encrypt stdin and print base64."),
    "decrypt": ("commands.secrets", "Decrypt base64 from stdin."),
    "generate-key": ("commands.secrets", "Generate a data key, in plaintext and encrypted."),
    "rewrap": ("commands.secrets", "Rewrap a ciphertext under the current key, or another."),
    "encrypt-file": ("commands.files", "Encrypt a file of any size."),
    "decrypt-file": ("commands.files", "Decrypt a file of any size."),
    "job": (JOB_COMMANDS, "Submit, list, wait for and cancel jobs."),
    "keys": (KEYS_COMMANDS, "List and rotate keys, and see their use."),
    "status": ("commands.service", "Show the state and the counters of the service."),
    "health": ("commands.service", "Check that the key backend works."),
    "rewrap-file": ("commands.rewrap_file", "Rewrap a file under the current key, or another."),
    "seal": ("commands.offline", "Encrypt a file or stdin without a service."),
    "open": ("commands.offline", "Decrypt any age file without a service."),
    "run": ("commands.run", "Run a program with decrypted values in its environment."),
    "keygen": ("commands.keygen", "Generate an age key pair."),
    "recipient": ("commands.keygen", "Print a recipient for age -r, rage and sops."),
    "identity": ("commands.keygen", "Print an identity for age -d -i, rage and sops."),
    "inspect": ("commands.offline", "Show the header of an encrypted file."),
    "token": (TOKEN_COMMANDS, "Create, list, rotate and revoke API tokens."),
    "migrate": (MIGRATE_COMMANDS, "Migrate ciphertexts from Vault, AWS KMS or SOPS."),
    "audit": (AUDIT_COMMANDS, "Verify and read the audit log of this machine."),
    "cosmian": (COSMIAN_COMMANDS, "Set up the keys of the service on a Cosmian KMS server."),
    "backup": ("backup.commands", "Back up the service of this machine to one encrypted file."),
    "restore": ("backup.commands", "Verify a backup and put it in place."),
    "config": (CONFIG_COMMANDS, "Show, check and begin the settings."),
    "doctor": ("commands.doctor", "Check keys, settings and the service."),
    "completion": ("commands.completion", "Print the completion script of a shell."),
    "help": ("commands.completion", "Show the help of a command or a topic."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def __init__(self, name: str, table: Commands, help_: str) -> None:
        super().__init__(
            name,
            help=help_,
            invoke_without_command=True,
            callback=self._without_command,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        )
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in self._table:
            return None
        place, help_ = self._table[cmd_name]
        if isinstance(place, str):
            module = importlib.import_module(f"kms_cli.{place}")
            command: click.Command = getattr(module, cmd_name.replace("-", "_") + "_command")
        else:
            command = LazyGroup(cmd_name, place, help_)
        known = {parameter.name for parameter in command.params}
        command.params += [new for new in session.options(after_command=True) if new.name not in known]
        command.context_settings = {"help_option_names": ["-h", "--help"]}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and ctx.resilient_parsing:
            return None, None, args
        if command is None:
            raise UnknownCommand(name, list(self._table), ctx)
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self._listed())
        if ctx.parent is None:
            with formatter.section("Topics of kms help"):
                formatter.write_dl(summaries())

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem[str]]":
        return self.commands_from(incomplete) + click.Command.shell_complete(self, ctx, incomplete)

    def commands_from(self, incomplete: str) -> "list[CompletionItem[str]]":
        """Return the commands whose names begin so, for a shell. Imports none."""
        return connection.completions(self._listed(), incomplete)

    def _listed(self) -> list[tuple[str, str]]:
        return [(name, help_) for name, (_, help_) in self._table.items()]

    def _without_command(self) -> int:
        ctx = click.get_current_context()
        if ctx.invoked_subcommand is not None:
            return 0
        if session.global_options().as_json:
            raise click.UsageError("a command is missing", ctx)
        sys.stderr.write(ctx.get_help() + "\n")
        return EXIT_USAGE


class UnknownCommand(click.UsageError):
    """An unknown command name. ``possibilities`` holds the most similar known name, if any."""

    def __init__(self, name: str, known: Sequence[str], ctx: click.Context) -> None:
        import difflib  # noqa: PLC0415 -- only misspelt commands need it

        super().__init__(f'unknown command "{name}"', ctx)
        self.possibilities = difflib.get_close_matches(name, known, n=1, cutoff=0.6)


def topics() -> dict[str, str]:
    """Return the texts of ``kms help TOPIC`` by topic; the first line of each is its summary."""
    sections = Path(__file__).with_name("topics.md").read_text("utf-8").split("\n## ")[1:]
    return {name: text for name, _, text in (section.partition("\n") for section in sections)}


def summaries() -> list[tuple[str, str]]:
    """Return the topics with their summaries."""
    return [(name, text.partition("\n")[0]) for name, text in topics().items()]


def group() -> click.Group:
    """Return the ``kms`` command with its global options."""
    top = LazyGroup(
        "kms", COMMANDS, "Encrypt, decrypt and run encryption jobs with the key management service."
    )
    top.params += session.options(after_command=False)
    version = click.version_option(__version__, message="%(prog)s %(version)s", help="Show the version.")
    return version(top)


def invoke(line: Sequence[str], meta: dict[str, object]) -> object:
    """Run one command line as ``Group.main`` does, but leave broken pipes and Ctrl-C to the caller.

    ``meta`` receives the global options, also if it fails.
    """
    top = group()
    try:
        with top.make_context("kms", list(line)) as ctx:
            try:
                return top.invoke(ctx)
            finally:
                meta.update(ctx.meta)
    except click.exceptions.Exit as end:
        return end.exit_code
