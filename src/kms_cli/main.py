"""The ``kms`` command: finds the subcommand, runs it, and turns whatever ends it into words and an exit code.

Modules of subcommands are imported when one is used: ``kms --help`` loads none of them.
"""

import difflib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn

import click

from kms_cli import session, terminal
from kms_core import secure_memory
from kms_protocol import __version__
from kms_protocol.errors import EXIT_OTHER, EXIT_USAGE, ConfigurationError, KmsError

INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141  # as a shell shows death by SIGPIPE
TERMINATED: Final = 143
COMMANDS: Final = {  # name: module, what it does
    "up": ("local.launch", "Run the whole service on this machine."),
    "encrypt": ("commands.secrets", "Encrypt stdin; base64 to stdout."),
    "decrypt": ("commands.secrets", "Decrypt base64 from stdin; plaintext to stdout."),
    "generate-key": ("commands.secrets", "Make a data key, plain and encrypted."),
    "rewrap": ("commands.secrets", "Move a ciphertext to the current key, or another."),
    "encrypt-file": ("commands.files", "Encrypt a file of any size."),
    "decrypt-file": ("commands.files", "Decrypt a file of any size."),
    "job": ("commands.jobs", "List, show, follow and cancel jobs."),
    "keys": ("commands.keys", "List, show and rotate keys."),
    "status": ("commands.status", "Show what the service does and has done."),
    "health": ("commands.status", "Ask whether the key backend works."),
    "rewrap-file": ("commands.rewrap_file", "Move a file of any size to the current key, or another."),
    "seal": ("commands.offline", "Encrypt a file or stdin without a service."),
    "open": ("commands.offline", "Decrypt any age file without a service."),
    "ssh": ("commands.ssh", "Make and use SSH keys whose private part is sealed."),
    "run": ("commands.run", "Run a program with sealed values in its environment."),
    "keygen": ("commands.keygen", "Make an age key pair."),
    "recipient": ("commands.recipient", "Name a key for age -r, rage and sops."),
    "identity": ("commands.recipient", "Name a key for age -d -i, rage and sops."),
    "inspect": ("commands.inspect", "Show what an encrypted file says of itself."),
    "token": ("commands.tokens", "Create, list, rotate and revoke API tokens."),
    "migrate": ("migrate.command", "Move ciphertexts from Vault, AWS KMS or SOPS into the service."),
    "audit": ("commands.audit", "Verify and read the audit trail of this machine."),
    "cosmian": ("commands.cosmian", "Make the keys of the service on a Cosmian KMS server."),
    "config": ("commands.config", "Check settings."),
    "doctor": ("doctor.command", "Check keys, settings and the service."),
    "messages": ("commands.messages", "List refused messages of kms.submit."),
}
JOB_COMMANDS: Final = {
    "submit": ("commands.submit", "Hand in a job over files where the service runs."),
    "list": ("commands.jobs", "List jobs, newest first."),
    "show": ("commands.jobs", "Show one job."),
    "wait": ("commands.jobs", "Wait until a job has ended."),
    "cancel": ("commands.jobs", "Ask for the end of a job."),
    "result": ("commands.jobs", "Fetch the result of a job."),
    "dead": ("commands.jobs", "List jobs that used up their attempts."),
    "retry": ("commands.jobs", "Give a dead letter all its attempts again."),
}

CONFIG_COMMANDS: Final = {
    "lint": ("commands.config", "Tell what the settings allow that is weaker than need be."),
}
KEYS_COMMANDS: Final = {
    "list": ("commands.keys", "List keys, with age and use of the version that seals."),
    "usage": ("commands.keys", "Show what each version of a key has sealed."),
    "rotate": ("commands.keys", "Make a new version of a key."),
}

MIGRATE_COMMANDS: Final = {
    "transit": ("migrate.transit", "From the transit engine of Vault or OpenBao."),
    "aws": ("migrate.aws", "From AWS KMS."),
    "sops": ("migrate.sops", "Give SOPS files a key of the service."),
}

AUDIT_COMMANDS: Final = {
    "verify": ("commands.audit", "Check that the trail is whole and unchanged."),
    "tail": ("commands.audit", "Show the last operations, and follow them."),
    "receipt": ("commands.audit", "Write a proof that one operation was recorded."),
    "check-receipt": ("commands.audit", "Check such a proof, anywhere."),
    "key": ("commands.audit", "Print the public key that checks signatures."),
    "acknowledge-loss": ("commands.audit", "Put on record that lines are lost for good."),
}

TOKEN_COMMANDS: Final = {
    "create": ("commands.tokens", "Make a token; it is shown once."),
    "list": ("commands.tokens", "List tokens and what they may do."),
    "rotate": ("commands.tokens", "Give a token a new secret."),
    "revoke": ("commands.tokens", "Take a token out, at once."),
}

SSH_COMMANDS: Final = {
    "new": ("commands.ssh", "Make a key pair; the private part is sealed at once."),
    "add": ("commands.ssh", "Hand the private part to the ssh agent, until its end."),
    "open": ("commands.ssh", "Write the private part to a file (0600)."),
    "list": ("commands.ssh", "Show the keys of a directory, and which have ended."),
}

COSMIAN_COMMANDS: Final = {"init-key": ("commands.cosmian", "Make the keys that settings name.")}


class LazyGroup(click.Group):
    """A group whose commands are imported when used; ``table`` says where they are."""

    def __init__(self, name: str, table: dict[str, tuple[str, str]], help_: str) -> None:
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
        module = importlib.import_module(f"kms_cli.{self._table[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_") + "_command")
        known = {parameter.name for parameter in command.params}
        command.params += [new for new in session.options(after_command=True) if new.name not in known]
        command.context_settings = {"help_option_names": ["-h", "--help"]}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None:
            raise UnknownCommand(name, list(self._table), ctx)
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in self._table.items()])

    def _without_command(self) -> int:
        ctx = click.get_current_context()
        if ctx.invoked_subcommand is not None:
            return 0
        sys.stderr.write(ctx.get_help() + "\n")
        return EXIT_USAGE


class UnknownCommand(click.UsageError):
    """A name that no command has; ``possibilities`` are the nearest."""

    def __init__(self, name: str, known: Sequence[str], ctx: click.Context) -> None:
        super().__init__(f'unknown command "{name}"', ctx)
        self.possibilities = difflib.get_close_matches(name, known, n=1, cutoff=0.6)


def group() -> click.Group:
    """The whole command."""
    top = LazyGroup(
        "kms", COMMANDS, "Encrypt, decrypt and run encryption jobs with the key management service."
    )
    top.params += session.options(after_command=False)
    top.params.append(_version_option())
    return top


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    line = sys.argv[1:] if args is None else list(args)
    try:
        code = _invoke(line)
        sys.stdout.flush()
    except click.UsageError as exc:
        return terminal.misused(exc)
    except (KeyboardInterrupt, click.exceptions.Abort):
        terminal.say("interrupted")
        return INTERRUPTED
    except KmsError as exc:
        return terminal.failed(exc, as_json="--json" in line)
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as exc:
        place = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, str | bytes) else ""
        terminal.say(f"error: {place}{terminal.plain(exc.strerror or type(exc).__name__)}")
        return EXIT_OTHER
    return code if isinstance(code, int) else 0


def _invoke(line: list[str]) -> object:
    """What ``Group.main`` does, without its own way of ending on a broken pipe and on Ctrl-C."""
    top = group()
    try:
        with top.make_context("kms", list(line)) as ctx:
            return top.invoke(ctx)
    except click.exceptions.Exit as end:
        return end.exit_code


def main() -> NoReturn:
    """Entry point. SIGTERM ends a command as Ctrl-C does, so that no half-written file stays."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        secure_memory.forbid_dumps()
    except ConfigurationError as exc:
        sys.exit(terminal.failed(exc, as_json=False))
    code = run()
    gc.freeze()  # or the interpreter ends by looking for garbage in all it loaded, a fifth of a short command
    sys.exit(code)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(TERMINATED)


def _drop_stdout() -> None:
    """Nobody reads it any more; without this Python complains once again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version_option() -> click.Option:
    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        del parameter
        if value and not ctx.resilient_parsing:
            terminal.result(f"kms {__version__}")
            ctx.exit()

    return click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version.",
    )


if __name__ == "__main__":
    main()
