"""Recipients and identities from files and arguments."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from kms_cli import terminal
from kms_core.age import mlkem768x25519
from kms_core.age.header import Stanza, is_age_file
from kms_core.age.recipients import (
    Identity,
    Recipient,
    key_lines,
    parse_identity,
    parse_recipient,
    version_of,
)
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding
from kms_core.envelope.binding import DEFAULT_KEY_ID, DEFAULT_TENANT, KeyRef
from kms_core.secure_files import open_to_others
from kms_protocol.errors import InvalidRequest
from kms_protocol.shapes import KEY_ID_PATTERN
from kms_protocol.units import size_text

LIMIT_BYTES: Final = 1024 * 1024
BACKEND: Final = "age"
_PEM: Final = "-----BEGIN "
_PLUGIN_RECIPIENT: Final = re.compile(
    r"age1[^1]+1"
)  # Bech32 data has no 1, so the name of a plugin precedes it


@dataclass(frozen=True, slots=True)
class Identities:
    """Private keys with the interface of a backend (``sealing.Wrapper``).

    ``native`` is by key version, in the order of the files; the last one encrypts.
    """

    native: Mapping[str, Identity] = field(default_factory=dict, repr=False)

    def ref(self, version: str, key_id: str = DEFAULT_KEY_ID, tenant: str = DEFAULT_TENANT) -> KeyRef:
        """Return the reference of a key version, as in the service."""
        return KeyRef(tenant, key_id, version, BACKEND)

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """Return a native stanza. The AAD is ignored: the origin stanza binds it."""
        del aad
        return self._named(key).recipient.wrap(file_key)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """Return the 16-byte file key. Raises NoMatch for an unknown version or a stanza of another key."""
        if stanza.type == binding.WRAP:
            return binding.open_age_wrap(self._named(key).secret, stanza, key, aad)
        return self._named(key).unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes:
        """Return the MAC key of the origin stanza."""
        return binding.origin_key(self._named(key).secret)

    def _named(self, key: KeyRef) -> Identity:
        if key.backend != BACKEND or key.version not in self.native:
            raise NoMatch
        return self.native[key.version]


def identities(paths: Iterable[Path]) -> Identities:
    """Read age identity files. Raises InvalidRequest, naming the invalid line."""
    native: dict[str, Identity] = {}
    for path in paths:
        text = _text(path)
        if is_age_file(text.encode()):
            raise InvalidRequest(
                f"{path} is itself encrypted: run `age -d -o KEYFILE {path}` and use KEYFILE"
            )
        if text.startswith(_PEM):
            raise InvalidRequest(f"{path} is no age key; SSH keys: `age -d -i {path}`")
        for identity in parse_identities(path, text):
            version = version_of(identity.recipient)
            native.pop(version, None)  # the last one encrypts
            native[version] = identity
        if open_to_others(path):
            terminal.say(f"warning: {path} can be read by others: run chmod 600 {path}")
    return Identities(native)


def recipients(given: Iterable[str], paths: Iterable[Path]) -> list[Recipient]:
    """Read recipients, each once. Raises InvalidRequest, and UsageError for a post-quantum mix."""
    found = [_recipient(text, "-r") for text in given]
    for path in paths:
        listed = [_recipient(line, f"Line {number} of {path}") for number, line in key_lines(_text(path))]
        if not listed:
            raise InvalidRequest(f"{path} contains no recipient")
        found += listed
    if len({isinstance(recipient, mlkem768x25519.HybridRecipient) for recipient in found}) > 1:
        raise click.UsageError(
            "post-quantum and classic recipients do not mix: the file would be as weak as the classic ones",
        )
    return list({str(recipient): recipient for recipient in found}.values())


def check_key_id(key_id: str | None) -> None:
    """Raise InvalidRequest for an option that is given and no key id."""
    if key_id is not None and not re.fullmatch(KEY_ID_PATTERN, key_id):
        raise InvalidRequest("A key id is 1 to 80 of A-Z a-z 0-9 _ . -")


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(LIMIT_BYTES + 1)
    if len(data) > LIMIT_BYTES:
        raise InvalidRequest(f"{path} exceeds {size_text(LIMIT_BYTES)} and is not a key file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{path} is not text") from exc


def parse_identities(path: Path, text: str) -> list[Identity]:
    """Read the content of an age identity file. Raises InvalidRequest, naming the invalid line."""
    found = []
    for number, line in key_lines(text):
        try:
            found.append(parse_identity(line))
        except ValueError as exc:
            raise InvalidRequest(f"Line {number} of {path} is not an age identity ({exc})") from exc
    if not found:
        raise InvalidRequest(f"{path} contains no identity")
    return found


def _recipient(text: str, where: str) -> Recipient:
    try:
        return parse_recipient(text)
    except ValueError as exc:
        if _PLUGIN_RECIPIENT.match(text):
            raise InvalidRequest(f"{where} is a plugin recipient: use `age -r`") from exc
        raise InvalidRequest(f"{where} is not an age recipient ({exc})") from exc
