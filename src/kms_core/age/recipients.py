"""Native recipients and identities of age, of either type, and the files that hold them."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from kms_core.age.mlkem768x25519 import IDENTITY_PREFIX, RECIPIENT_PREFIX, HybridIdentity, HybridRecipient
from kms_core.age.x25519 import X25519Identity, X25519Recipient
from kms_protocol.errors import ConfigurationError
from kms_protocol.units import time_or_none, time_text

_CREATED: Final = "# created: "
_T = TypeVar("_T")

Identity = X25519Identity | HybridIdentity
"""A private key that unwraps file keys."""
Recipient = X25519Recipient | HybridRecipient
"""A public key that wraps file keys."""


def key_lines(text: str) -> list[tuple[int, str]]:
    """The stripped lines of a file of identities or recipients, without comments; their numbers from 1."""
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def identity_file(identity: Identity) -> bytes:
    """Return the content of a file with a new identity, as age-keygen writes it."""
    created = time_text(datetime.now(UTC))
    return f"{_CREATED}{created}\n# public key: {identity.recipient}\n{identity.export()}\n".encode()


def identities_of(
    content: bytes, where: Path | str, parse: Callable[[str], _T], *, remedy: str
) -> Iterator[tuple[_T, datetime | None]]:
    """The identities in the content of a file ``where``, and the times of their creation if they are noted.

    ``parse`` reads a line, and raises ValueError. Raises ConfigurationError, which names the line and not its
    text; with the ``remedy`` for content that is not text, or has no identity.
    """
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{where} is not text: {remedy}") from exc
    created: datetime | None = None
    count = 0
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line.startswith(_CREATED):
            created = time_or_none(line.removeprefix(_CREATED))
        if not line or line.startswith("#"):
            continue
        try:
            yield parse(line), created
        except ValueError as exc:
            raise ConfigurationError(f"Line {number} of {where} is not an age identity ({exc})") from exc
        created, count = None, count + 1
    if not count:
        raise ConfigurationError(f"{where} holds no age identity: {remedy}")


def parse_identity(text: str) -> Identity:
    """Parse an identity of either native type. Raises ValueError, without the text, if it is neither."""
    if text.upper().startswith(IDENTITY_PREFIX):
        return HybridIdentity.parse(text)
    return X25519Identity.parse(text)


def parse_recipient(text: str) -> Recipient:
    """Parse a recipient of either native type. Raises ValueError, without the text, if it is neither."""
    if text.lower().startswith(RECIPIENT_PREFIX + "1"):
        return HybridRecipient.parse(text)
    return X25519Recipient.parse(text)
