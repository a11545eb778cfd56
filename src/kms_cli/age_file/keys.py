"""Recipients, identities and passphrases as files, arguments and prompts give them; knows no age file."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
import pyrage

from kms_cli import terminal
from kms_core.age import mlkem768x25519
from kms_core.age.header import Stanza
from kms_core.age.recipients import Identity, Recipient, parse_identity, parse_recipient, version_of
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding
from kms_core.envelope.binding import DEFAULT_KEY_ID, DEFAULT_TENANT, KeyRef
from kms_protocol.errors import InvalidRequest

LIMIT_BYTES: Final = 1024 * 1024
OTHERS: Final = 0o077
TERMINAL: Final = "/dev/tty"
BACKEND: Final = "age"
_PEM: Final = "-----BEGIN "
_AGE_FILE: Final = ("age-encryption.org/", "-----BEGIN AGE ENCRYPTED FILE-----")


@dataclass(frozen=True, slots=True)
class Identities:
    """Private keys as a backend offers them (``sealing.Wrapper``), but without one.

    ``native`` is by key version, in the order of the files, of which the last seals; ``ssh`` are pyrage's.
    """

    native: Mapping[str, Identity] = field(default_factory=dict, repr=False)
    ssh: Sequence[pyrage.ssh.Identity] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.native or self.ssh)

    def ref(self, version: str, key_id: str = DEFAULT_KEY_ID) -> KeyRef:
        """The names that the service gives to this key version."""
        return KeyRef(DEFAULT_TENANT, key_id, version, BACKEND)

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A native stanza; the AAD is bound by the origin stanza instead."""
        del aad
        return self._named(key).recipient.wrap(file_key)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """The 16-byte file key; NoMatch without this key version, or if the stanza is not for it."""
        del aad
        return self._named(key).unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes:
        """The MAC key that proves who sealed a file."""
        return binding.origin_key(self._named(key).secret)

    def _named(self, key: KeyRef) -> Identity:
        if key.backend != BACKEND or key.version not in self.native:
            raise NoMatch
        return self.native[key.version]


def identities(paths: Iterable[Path]) -> Identities:
    """Age identity files and ssh private keys. Raises InvalidRequest, naming the line that is neither."""
    native: dict[str, Identity] = {}
    ssh: list[pyrage.ssh.Identity] = []
    for path in paths:
        text = _text(path)
        if text.startswith(_AGE_FILE):
            raise InvalidRequest(
                f'{path} is itself encrypted: "kms open -o KEYFILE {path}", then use KEYFILE'
            )
        if text.startswith(_PEM):
            ssh.append(_ssh(path, text))
        else:
            for identity in _identities(path, text):
                version = version_of(identity.recipient)
                native.pop(version, None)  # the last one counts
                native[version] = identity
        _warn_if_open_to_others(path)
    return Identities(native, ssh)


def recipients(given: Iterable[str], paths: Iterable[Path]) -> list[Recipient]:
    """Each recipient once. Raises InvalidRequest, UsageError if classic and post-quantum ones are mixed."""
    found = [_recipient(text, "-r") for text in given]
    for path in paths:
        listed = [_recipient(line, f"Line {number} of {path}") for number, line in _lines(_text(path))]
        if not listed:
            raise InvalidRequest(f"{path} holds no recipient")
        found += listed
    if len({isinstance(recipient, mlkem768x25519.HybridRecipient) for recipient in found}) > 1:
        raise click.UsageError(
            "post-quantum and classic recipients do not mix: the file would be as weak as the classic ones",
            click.get_current_context(),
        )
    return list({str(recipient): recipient for recipient in found}.values())


def passphrase(path: Path | None, *, confirm: bool) -> str:
    """From a file, without the end of its last line, or from the terminal, whatever stdin is."""
    if path is not None:
        _warn_if_open_to_others(path)
        given = _text(path).removesuffix("\n").removesuffix("\r")
        if not given:
            raise InvalidRequest(f"{path} is empty: a passphrase is needed")
        return given
    _require_terminal()
    prompted: str = click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return prompted


def _require_terminal() -> None:
    """Without one the prompt would read the passphrase from stdin, where the data is."""
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError as exc:
        raise click.UsageError(
            "there is no terminal to ask for the passphrase: name a file with --passphrase-file",
            click.get_current_context(),
        ) from exc


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(LIMIT_BYTES + 1)
    if len(data) > LIMIT_BYTES:
        raise InvalidRequest(f"{path} is above {terminal.size(LIMIT_BYTES)}: it is no key file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{path} is not text") from exc


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line and not line.startswith("#"):
            yield number, line


def _identities(path: Path, text: str) -> list[Identity]:
    found = []
    for number, line in _lines(text):
        try:
            found.append(parse_identity(line))
        except ValueError as exc:
            raise InvalidRequest(f"Line {number} of {path} is not an age identity ({exc})") from exc
    if not found:
        raise InvalidRequest(f"{path} holds no identity")
    return found


def _recipient(text: str, where: str) -> Recipient:
    try:
        return parse_recipient(text)
    except ValueError as exc:
        raise InvalidRequest(f"{where} is not an age recipient ({exc})") from exc


def _ssh(path: Path, text: str) -> pyrage.ssh.Identity:
    try:
        return pyrage.ssh.Identity.from_buffer(text.encode())
    except pyrage.IdentityError as exc:
        raise InvalidRequest(
            f'{path} is an ssh key that cannot be used: "ssh-keygen -p" takes the passphrase off a copy of it'
        ) from exc


def _warn_if_open_to_others(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) and mode & OTHERS:
        terminal.say(f"warning: {path} can be read by others: run chmod 600 {path}")
