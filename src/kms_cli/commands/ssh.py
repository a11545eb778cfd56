"""``kms ssh``: SSH keys that live for a while, whose private part is on disk sealed or not at all."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypedDict, Unpack

import click

from kms_cli import terminal
from kms_cli.atomic_file import OutputExists, placed
from kms_cli.commands import ssh_keys
from kms_cli.commands.files import SUFFIX
from kms_cli.commands.ssh_keys import KINDS, Kind, Public
from kms_cli.durations import span
from kms_cli.main import SSH_COMMANDS, LazyGroup
from kms_cli.options import context_option, force_option, key_option
from kms_cli.remote_service import connect
from kms_cli.session import session
from kms_core.age import armor
from kms_protocol.context import NOT_AFTER, Context
from kms_protocol.errors import EXIT_OTHER, ConfigurationError, DecryptFailed, InvalidRequest, NotACiphertext
from kms_protocol.wire import ContextIn

PUBLIC: Final = ".pub"
LONGEST_BYTES: Final = 64 * 1024  # of a sealed key
NEVER: Final = "never"

ssh_command = LazyGroup("ssh", SSH_COMMANDS, "Make and use SSH keys whose private part is sealed.")
name_argument = click.argument("name", type=click.Path(path_type=Path))


class Expired(DecryptFailed):
    """Said before the service is asked: it would only say that decryption failed."""

    hint = 'make another with "kms ssh new"'


class OfAnother(DecryptFailed):
    """Both files are genuine, and do not belong together."""

    hint = "get both files again from where they were made"


class NewOptions(TypedDict):
    """What ``kms ssh new`` is given."""

    name: Path
    kind: Kind
    ttl: str
    comment: str | None
    context: ContextIn
    key_id: str | None
    force: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Where the two parts of a key are: NAME.enc and NAME.pub."""

    name: Path

    @classmethod
    def of(cls, given: Path) -> "Pair":
        """From either file's name, or from NAME."""
        return cls(given.with_suffix("") if given.suffix in {SUFFIX, PUBLIC} else given)

    @property
    def sealed(self) -> Path:
        return self.name.with_name(self.name.name + SUFFIX)

    @property
    def public(self) -> Path:
        return self.name.with_name(self.name.name + PUBLIC)


# -- making ------------------------------------------------------------------------------------------


@click.command(
    "new",
    short_help="Make a key.",
    epilog="Example: kms ssh new temp_key --ttl 8h --context infra=prod,purpose=deployment",
)
@name_argument
@click.option("--type", "kind", type=click.Choice(KINDS), default="ed25519", show_default=True)
@click.option(
    "--ttl", default="24h", show_default=True, help='How long it opens: 30m, 8h, 7d, or "never" an end.'
)
@click.option("--comment", help="For the public part [default: NAME].")
@context_option
@key_option
@force_option
def new_command(**given: Unpack[NewOptions]) -> None:
    """Make a key pair: NAME.pub, and NAME.enc with the private part, which is sealed before it is written.

    Its end goes into the context as not_after, so the service itself opens it no later; NAME.pub says it too.
    A key that was opened before is not affected: let servers expire it, too.
    """
    pair = Pair.of(given["name"])
    for path in (pair.sealed, pair.public):
        if path.exists() and not given["force"]:
            raise OutputExists(f"{path} exists")
    until = _end(given["context"], given["ttl"])
    made = ssh_keys.generate(given["kind"])
    public = Public(made.public, ssh_keys.comment(given["comment"] or pair.name.name), until)
    with connect() as kms:
        sealed = kms.encrypt(made.private, context=_with_end(given["context"], until), key_id=given["key_id"])
    with placed(pair.sealed, overwrite=given["force"]) as file:
        file.write(sealed.ciphertext)
    with placed(pair.public, overwrite=given["force"]) as file:
        file.write(f"{public.line()}\n".encode())
    pair.public.chmod(0o644)
    if session().as_json:
        named = {"private": str(pair.sealed), "public": str(pair.public)}
        terminal.record({**named, "key": public.line(), "not_after": until}, as_json=True)
    else:
        terminal.result(public.line())


def _end(context: ContextIn, ttl: str) -> str | None:
    given = Context.parse(context)
    if given.not_after() is not None:
        return given.get(NOT_AFTER)
    if ttl == NEVER:
        return None
    end = datetime.now(UTC) + span("--ttl", ttl)
    return end.isoformat(timespec="seconds").replace("+00:00", "Z")


def _with_end(context: ContextIn, until: str | None) -> dict[str, str]:
    pairs = dict(Context.parse(context).pairs)
    return pairs if until is None else {**pairs, NOT_AFTER: until}


# -- using -------------------------------------------------------------------------------------------


@click.command(
    "open",
    short_help="Write the private part to a file.",
    epilog="Example: kms ssh open temp_key --context infra=prod,purpose=deployment",
)
@name_argument
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: NAME]")
@context_option
@force_option
def open_command(name: Path, output: Path | None, context: ContextIn, *, force: bool) -> None:
    """Write the private part (0600). From then on its end is no longer enforced: "kms ssh add" is better."""
    pair = Pair.of(name)
    target = output or pair.name
    if target.exists() and not force:
        raise OutputExists(f"{target} exists")
    private, _ = _opened(pair, context)
    with placed(target, overwrite=force) as file:
        file.write(private)
    terminal.say(f"opened {pair.sealed} to {target}: remove it when it is no longer needed")


@click.command(
    "add",
    short_help="Hand the private part to the ssh agent.",
    epilog="Example: kms ssh add temp_key --context infra=prod,purpose=deployment",
)
@name_argument
@click.option("--confirm", is_flag=True, help="The agent asks before each use.")
@context_option
def add_command(name: Path, context: ContextIn, *, confirm: bool) -> int:
    """Give the private part to the agent through a pipe; the agent forgets it at its end."""
    program = shutil.which("ssh-add")
    if program is None:
        raise ConfigurationError("ssh-add is not on the PATH: install the OpenSSH client")
    if not os.environ.get("SSH_AUTH_SOCK"):
        raise ConfigurationError("No ssh agent is running here: start one with eval $(ssh-agent)")
    private, until = _opened(Pair.of(name), context)
    argv = [program, "-q", *(["-c"] if confirm else []), *_lifetime(until), "-"]
    done = subprocess.run(argv, input=private, check=False)
    if done.returncode == 0:
        terminal.say(f"the agent has {name}" + (f" until {until}" if until else ""))
    return EXIT_OTHER if done.returncode else 0


@click.command("list", short_help="Show keys of a directory.")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path())
@click.option("--expired", is_flag=True, help="Only those whose end has come.")
def list_command(directory: Path, *, expired: bool) -> None:
    """Show the keys of DIRECTORY whose private part is sealed there. Nothing is opened or verified."""
    rows = [row for row in _rows(directory) if row["state"] == "expired" or not expired]
    if session().as_json:
        terminal.result(json.dumps(rows))
    else:
        head = ("name", "type", "fingerprint", "not_after", "state")
        terminal.table(
            tuple(each.replace("_", " ") for each in head), [[row[each] for each in head] for row in rows]
        )


def _rows(directory: Path) -> Iterator[dict[str, str]]:
    for sealed in sorted(directory.glob(f"*{SUFFIX}")):
        public = _public(Pair.of(sealed))
        if public is not None:
            yield {
                "name": sealed.with_suffix("").name,
                "type": public.kind,
                "fingerprint": public.fingerprint,
                "not_after": public.until or NEVER,
                "state": "expired" if public.is_over() else "valid",
            }


def _opened(pair: Pair, context: ContextIn) -> tuple[bytes, str | None]:
    """The private part in OpenSSH's format, checked against the public one where that is at hand.

    And the end that it was opened with, which is bound to it. Raises Expired, OfAnother, NotACiphertext, and
    what the service refuses.
    """
    public = _public(pair)
    if public is not None and public.is_over():
        raise Expired(f"{pair.name} ended at {public.until}")
    pairs = _with_end(context, public.until if public else None)
    with connect() as kms:
        opened = kms.decrypt(_sealed(pair.sealed), context=pairs)
    try:
        derived = ssh_keys.public_of(opened.plaintext)
    except ValueError as exc:
        raise InvalidRequest(f"{pair.sealed} opens, and holds no SSH key in OpenSSH's format") from exc
    if public is not None and derived != public.key:
        raise OfAnother(f"{pair.sealed} holds another key than {pair.public}")
    return opened.plaintext, pairs.get(NOT_AFTER)


def _sealed(path: Path) -> bytes:
    with path.open("rb") as file:
        given = file.read(LONGEST_BYTES + 1)
    if len(given) > LONGEST_BYTES:
        raise NotACiphertext(f"{path} is too large to be a sealed SSH key")
    return armor.dearmor(given) if given.lstrip().startswith(armor.BEGIN) else given


def _public(pair: Pair) -> Public | None:
    try:
        return Public.parse(pair.public.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _lifetime(until: str | None) -> list[str]:
    return [] if until is None else ["-t", str(max(1, int(ssh_keys.left(until) / timedelta(seconds=1))))]
