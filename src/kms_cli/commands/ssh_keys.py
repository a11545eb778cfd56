"""SSH key pairs in OpenSSH's formats, in memory; knows no file and no service.

Source: openssh PROTOCOL.key for the private part, sshd(8) "AUTHORIZED_KEYS FILE FORMAT" for the public one.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, Self, get_args

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from kms_protocol.context import NOT_AFTER
from kms_protocol.errors import InvalidRequest

Kind = Literal["ed25519", "ecdsa", "rsa"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
RSA_BITS: Final = 3072
RSA_EXPONENT: Final = 65537
_COMMENT: Final = re.compile(r"[ -~]{0,200}")
_UNTIL: Final = re.compile(rf"^(.*?) ?\b{NOT_AFTER}=(\S+)$")


@dataclass(frozen=True, slots=True)
class Made:
    """A new pair: the private part as a file would hold it, the public one without its comment."""

    private: bytes
    public: str

    def __repr__(self) -> str:
        return f"Made({self.public})"


@dataclass(frozen=True, slots=True)
class Public:
    """A public key, its comment, and in it until when the sealed part opens (RFC 3339)."""

    key: str
    comment: str
    until: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for what is no public key."""
        kind, blob, *rest = text.strip().split(" ", 2)
        _decoded(blob)
        comment = rest[0] if rest else ""
        if found := _UNTIL.fullmatch(comment):
            _time(found[2])
            return cls(f"{kind} {blob}", found[1], found[2])
        return cls(f"{kind} {blob}", comment)

    def line(self) -> str:
        """As a .pub file or authorized_keys has it."""
        parts = [self.key, self.comment, f"{NOT_AFTER}={self.until}" if self.until else ""]
        return " ".join(part for part in parts if part)

    @property
    def kind(self) -> str:
        return self.key.split(" ")[0]

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` shows it."""
        digest = hashlib.sha256(_decoded(self.key.split(" ")[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")

    def left(self) -> timedelta | None:
        """Until its end, below zero after it; None if it has none."""
        return None if self.until is None else left(self.until)

    def is_over(self) -> bool:
        left = self.left()
        return left is not None and left <= timedelta()


def left(until: str) -> timedelta:
    """From now until a time in RFC 3339, below zero after it. Raises ValueError for what is none."""
    return _time(until) - datetime.now(UTC)


def generate(kind: Kind) -> Made:
    """A new pair: Ed25519, ECDSA on P-256, or RSA with 3072 bits."""
    match kind:
        case "ed25519":
            key: _Private = ed25519.Ed25519PrivateKey.generate()
        case "ecdsa":
            key = ec.generate_private_key(ec.SECP256R1())
        case _:
            key = rsa.generate_private_key(RSA_EXPONENT, RSA_BITS)
    return Made(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), _public(key))


def public_of(private: bytes) -> str:
    """The public part of a private one, as ``ssh-keygen -y`` prints it. Raises ValueError if it is none."""
    try:
        key = load_ssh_private_key(private, password=None)
    except (UnsupportedAlgorithm, TypeError) as exc:  # TypeError: it has a passphrase of its own
        raise ValueError("not a private key that can be read") from exc
    if not isinstance(key, _Private):
        raise ValueError("not a kind of key that is made here")  # noqa: TRY004 -- of a value, not of a call
    return _public(key)


def comment(text: str) -> str:
    """Raises InvalidRequest for what would break the line, or say an end that is none."""
    if not _COMMENT.fullmatch(text) or f"{NOT_AFTER}=" in text:
        raise InvalidRequest(f"A comment is up to 200 printable ASCII characters, without {NOT_AFTER}=")
    return text.strip()


_Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _public(key: _Private) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def _decoded(blob: str) -> bytes:
    try:
        return base64.b64decode(blob, validate=True)
    except binascii.Error as exc:
        raise ValueError("not a public key") from exc


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("a time without an offset")
    return found
