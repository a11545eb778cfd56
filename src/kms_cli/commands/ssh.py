"""``kms ssh``: SSH keys that expire, with a private part that is stored only encrypted.

Source: openssh PROTOCOL.key for the private part, sshd(8) "AUTHORIZED_KEYS FILE FORMAT" for the public part.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, Self, TypedDict, Unpack, get_args

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from kms_cli import terminal
from kms_cli.commands.files import SUFFIXES
from kms_cli.main import SSH_COMMANDS, LazyGroup
from kms_cli.options import OutputExists, context_option, duration, force_option, key_option, placed
from kms_cli.session import connect, printed_as_json, session
from kms_core.age import armor
from kms_protocol.context import NOT_AFTER, Context
from kms_protocol.errors import EXIT_OTHER, ConfigurationError, DecryptFailed, InvalidRequest, NotACiphertext
from kms_protocol.units import parse_time, time_text
from kms_protocol.wire import ContextIn

Kind = Literal["ed25519", "ecdsa", "rsa"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
RSA_BITS: Final = 3072
RSA_EXPONENT: Final = 65537
_COMMENT: Final = re.compile(r"[ -~]{0,200}")
_UNTIL: Final = re.compile(rf"^(.*?) ?\b{NOT_AFTER}=(\S+)$")


@dataclass(frozen=True, slots=True)
class SshKeyPair:
    """A key pair: the private part as the content of a file, the public part without a comment."""

    private: bytes
    public: str

    def __repr__(self) -> str:
        return f"SshKeyPair({self.public})"


@dataclass(frozen=True, slots=True)
class SshPublicKey:
    """A public key, its comment, and its expiry (RFC 3339), which the comment contains."""

    key: str
    comment: str
    until: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a line. Raises ValueError if it is not a public key."""
        kind, blob, *rest = text.strip().split(" ", 2)
        _decoded(blob)
        comment = rest[0] if rest else ""
        if found := _UNTIL.fullmatch(comment):
            parse_time(found[2])
            return cls(f"{kind} {blob}", found[1], found[2])
        return cls(f"{kind} {blob}", comment)

    def line(self) -> str:
        """Return the line of a .pub file or of authorized_keys."""
        parts = [self.key, self.comment, f"{NOT_AFTER}={self.until}" if self.until else ""]
        return " ".join(part for part in parts if part)

    @property
    def kind(self) -> str:
        return self.key.split(" ")[0]

    @property
    def fingerprint(self) -> str:
        """The fingerprint that ``ssh-keygen -l`` shows."""
        digest = hashlib.sha256(_decoded(self.key.split(" ")[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")

    def has_expired(self) -> bool:
        return self.until is not None and time_left(self.until) <= timedelta()


def time_left(until: str) -> timedelta:
    """Return the time from now until an RFC 3339 time, negative after it. Raises ValueError."""
    return parse_time(until) - datetime.now(UTC)


def generate(kind: Kind) -> SshKeyPair:
    """Generate a key pair: Ed25519, ECDSA on P-256, or RSA with 3072 bits."""
    match kind:
        case "ed25519":
            key: _Private = ed25519.Ed25519PrivateKey.generate()
        case "ecdsa":
            key = ec.generate_private_key(ec.SECP256R1())
        case _:
            key = rsa.generate_private_key(RSA_EXPONENT, RSA_BITS)
    return SshKeyPair(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), _public_key_line(key)
    )


def public_of(private: bytes) -> str:
    """Return the public part of a private key, as ``ssh-keygen -y`` prints it. Raises ValueError."""
    try:
        key = load_ssh_private_key(private, password=None)
    except (UnsupportedAlgorithm, TypeError) as exc:  # TypeError: it has a passphrase
        raise ValueError("not a readable private key") from exc
    if not isinstance(key, _Private):
        raise ValueError("not a supported kind of key")  # noqa: TRY004 -- a value of a file, not of a call
    return _public_key_line(key)


def key_comment(text: str) -> str:
    """Return a checked comment. Raises InvalidRequest if it would break the line or forge an expiry."""
    if not _COMMENT.fullmatch(text) or f"{NOT_AFTER}=" in text:
        raise InvalidRequest(f"A comment is up to 200 printable ASCII characters, without {NOT_AFTER}=")
    return text.strip()


_Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _public_key_line(key: _Private) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def _decoded(blob: str) -> bytes:
    try:
        return base64.b64decode(blob, validate=True)
    except binascii.Error as exc:
        raise ValueError("not a public key") from exc


PUBLIC: Final = ".pub"
MAX_KEY_BYTES: Final = 64 * 1024  # of an encrypted key
NEVER: Final = "never"

ssh_command = LazyGroup("ssh", SSH_COMMANDS, "Create and use SSH keys with an encrypted private part.")
name_argument = click.argument("name", type=click.Path(path_type=Path))


class SshKeyExpired(DecryptFailed):
    """An expired key, known before the service refuses to decrypt it without a reason."""

    hint = "create another with `kms ssh new`"


class KeyMismatch(DecryptFailed):
    """A private and a public part of different keys."""

    hint = "restore both files from their source"


class NewOptions(TypedDict):
    """Options of ``kms ssh new``."""

    name: Path
    kind: Kind
    ttl: str
    comment: str | None
    context: ContextIn
    key_id: str | None
    force: bool


@dataclass(frozen=True, slots=True)
class SshKeyFiles:
    """The files of a key: NAME.age, or NAME.enc of earlier versions, and NAME.pub."""

    name: Path

    @classmethod
    def of(cls, given: Path) -> "SshKeyFiles":
        """Return the files of NAME, or of the key that one of them belongs to."""
        return cls(given.with_suffix("") if given.suffix in {*SUFFIXES, PUBLIC} else given)

    @property
    def sealed(self) -> Path:
        made, *earlier = (self.name.with_name(self.name.name + suffix) for suffix in SUFFIXES)
        return next((path for path in (made, *earlier) if path.exists()), made)

    @property
    def public(self) -> Path:
        return self.name.with_name(self.name.name + PUBLIC)


# -- creating ----------------------------------------------------------------------------------------


@click.command(
    "new",
    epilog="Example: kms ssh new temp_key --ttl 8h --context infra=prod,purpose=deployment",
)
@name_argument
@click.option("--type", "kind", type=click.Choice(KINDS), default="ed25519", show_default=True)
@click.option(
    "--ttl", default="24h", show_default=True, help='Lifetime: 30m, 8h, 7d, or "never" for no expiry.'
)
@click.option("--comment", help="Comment of the public part [default: NAME].")
@context_option
@key_option
@force_option
def new_command(**given: Unpack[NewOptions]) -> None:
    """Create a key pair: NAME.pub, and NAME.age with the private part, encrypted before it is written.

    The context holds the expiry as not_after, so the service refuses to decrypt the key later; NAME.pub shows
    it. A key that was decrypted before is not affected: let servers expire it as well.
    """
    pair = SshKeyFiles.of(given["name"])
    for path in (pair.sealed, pair.public):
        if path.exists() and not given["force"]:
            raise OutputExists(f"{path} exists")
    until = _expiry(given["context"], given["ttl"])
    made = generate(given["kind"])
    public = SshPublicKey(made.public, key_comment(given["comment"] or pair.name.name), until)
    with connect() as kms:
        sealed = kms.encrypt(
            made.private, context=_with_expiry(given["context"], until), key_id=given["key_id"]
        )
    with placed(pair.sealed, overwrite=given["force"]) as file:
        file.write(sealed.ciphertext)
    with placed(pair.public, overwrite=given["force"]) as file:
        file.write(f"{public.line()}\n".encode())
    pair.public.chmod(0o644)
    named = {"private": str(pair.sealed), "public": str(pair.public)}
    if not printed_as_json({**named, "key": public.line(), "not_after": until}):
        terminal.result(public.line())


def _expiry(context: ContextIn, ttl: str) -> str | None:
    given = Context.parse(context)
    if given.not_after() is not None:
        return given.get(NOT_AFTER)
    if ttl == NEVER:
        return None
    return time_text(datetime.now(UTC) + duration("--ttl", ttl))


def _with_expiry(context: ContextIn, until: str | None) -> dict[str, str]:
    pairs = dict(Context.parse(context).pairs)
    return pairs if until is None else {**pairs, NOT_AFTER: until}


# -- using -------------------------------------------------------------------------------------------


@click.command(
    "open",
    epilog="Example: kms ssh open temp_key --context infra=prod,purpose=deployment",
)
@name_argument
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: NAME]")
@context_option
@force_option
def open_command(name: Path, output: Path | None, context: ContextIn, *, force: bool) -> None:
    """Write the private part to a file (0600). Its expiry is then not enforced: prefer "kms ssh add"."""
    pair = SshKeyFiles.of(name)
    target = output or pair.name
    if target.exists() and not force:
        raise OutputExists(f"{target} exists")
    private, _ = _opened(pair, context)
    with placed(target, overwrite=force) as file:
        file.write(private)
    terminal.say(f"decrypted {pair.sealed} to {target}: remove it when it is no longer needed")


@click.command(
    "add",
    epilog="Example: kms ssh add temp_key --context infra=prod,purpose=deployment",
)
@name_argument
@click.option("--confirm", is_flag=True, help="Have the agent ask before each use.")
@context_option
def add_command(name: Path, context: ContextIn, *, confirm: bool) -> int:
    """Load the private part into the SSH agent through a pipe; the agent removes it when it expires."""
    program = shutil.which("ssh-add")
    if program is None:
        raise ConfigurationError("ssh-add is not on the PATH: install the OpenSSH client")
    if not os.environ.get("SSH_AUTH_SOCK"):
        raise ConfigurationError("No SSH agent is running: start one with eval $(ssh-agent)")
    private, until = _opened(SshKeyFiles.of(name), context)
    argv = [program, "-q", *(["-c"] if confirm else []), *_lifetime(until), "-"]
    done = subprocess.run(argv, input=private, check=False)
    if done.returncode == 0:
        terminal.say(f"the agent has {name}" + (f" until {until}" if until else ""))
    return EXIT_OTHER if done.returncode else 0


@click.command("list")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path())
@click.option("--expired", is_flag=True, help="Only expired keys.")
def list_command(directory: Path, *, expired: bool) -> None:
    """List the keys of DIRECTORY with an encrypted private part. Nothing is decrypted or verified."""
    rows = [row for row in _rows(directory) if row["state"] == "expired" or not expired]
    if session().as_json:
        terminal.result(json.dumps(rows))
    else:
        head = ("name", "type", "fingerprint", "not_after", "state")
        terminal.table(
            tuple(each.replace("_", " ") for each in head), [[row[each] for each in head] for row in rows]
        )


def _rows(directory: Path) -> Iterator[dict[str, str]]:
    found = {sealed.with_suffix("") for suffix in SUFFIXES for sealed in directory.glob(f"*{suffix}")}
    for name in sorted(found):
        public = _public(SshKeyFiles(name))
        if public is not None:
            yield {
                "name": name.name,
                "type": public.kind,
                "fingerprint": public.fingerprint,
                "not_after": public.until or NEVER,
                "state": "expired" if public.has_expired() else "valid",
            }


def _opened(pair: SshKeyFiles, context: ContextIn) -> tuple[bytes, str | None]:
    """Decrypt the private part, in OpenSSH's format. Return it with its expiry, which is bound to it.

    It is compared with the public part, if there is one. Raises SshKeyExpired, KeyMismatch, NotACiphertext,
    and the errors of the service.
    """
    public = _public(pair)
    if public is not None and public.has_expired():
        raise SshKeyExpired(f"{pair.name} expired at {public.until}")
    pairs = _with_expiry(context, public.until if public else None)
    with connect() as kms:
        opened = kms.decrypt(_sealed(pair.sealed), context=pairs)
    try:
        derived = public_of(opened.plaintext)
    except ValueError as exc:
        raise InvalidRequest(f"{pair.sealed} contains no SSH key in OpenSSH's format") from exc
    if public is not None and derived != public.key:
        raise KeyMismatch(f"{pair.sealed} contains another key than {pair.public}")
    return opened.plaintext, pairs.get(NOT_AFTER)


def _sealed(path: Path) -> bytes:
    with path.open("rb") as file:
        given = file.read(MAX_KEY_BYTES + 1)
    if len(given) > MAX_KEY_BYTES:
        raise NotACiphertext(f"{path} is too large for an encrypted SSH key")
    return armor.dearmor(given) if given.lstrip().startswith(armor.BEGIN) else given


def _public(pair: SshKeyFiles) -> SshPublicKey | None:
    try:
        return SshPublicKey.parse(pair.public.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _lifetime(until: str | None) -> list[str]:
    return [] if until is None else ["-t", str(max(1, int(time_left(until) / timedelta(seconds=1))))]
