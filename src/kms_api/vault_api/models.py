"""The bodies of the façade and its answers, as Vault's clients write and read them.

Read laxly where these clients are lax: ``null`` or nothing for an object, numbers and booleans as strings
(the ``bao`` command). What is not listed is refused, since a field that is passed over without a word would
promise something.
"""

import re
from base64 import b64decode, b64encode
from binascii import a2b_base64
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from kms_api import json_body
from kms_core import audit
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import Body

MAX_ITEMS: Final = 1000
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):(.+)", re.ASCII)
T = TypeVar("T", bound=Body)
_decoders: Final[dict[type[Body], msgspec.json.Decoder[Any]]] = {}


class BoundFields(Body, frozen=True, kw_only=True):
    """What may bind any call: both are authenticated, and told apart from each other.

    Bytes are base64 here, which ``octets`` decodes: a lax decoder would take the text ``null``, which is
    base64 too, for nothing, and what was to be bound would not be.
    """

    context: str | None = None
    associated_data: str | None = None
    nonce: str | None = None
    type: str | None = None
    convergent_encryption: bool | None = None
    key_version: int | None = None
    reference: str | None = None


class VaultCall(BoundFields, frozen=True, kw_only=True):
    """One call, an item of several, or the several."""

    plaintext: str | None = None
    ciphertext: str | None = None
    batch_input: list[msgspec.Raw] | None = None
    partial_failure_response_code: int | None = None


class DataKeyIn(BoundFields, frozen=True, kw_only=True):
    """A data key; 256 bits if it does not say."""

    bits: int | None = None


class KeyIn(Body, frozen=True, kw_only=True):
    """Of a key that is there: what is asked for may only be what it is."""

    name: str | None = None
    type: str | None = None
    derived: bool | None = None
    convergent_encryption: bool | None = None
    exportable: bool | None = None
    allow_plaintext_backup: bool | None = None
    deletion_allowed: bool | None = None
    key_size: int | None = None
    auto_rotate_period: str | int | None = None
    min_decryption_version: int | None = None
    min_encryption_version: int | None = None


class PathsIn(Body, frozen=True, kw_only=True):
    """Paths to be told the capabilities of; one of both. ``token`` is the caller's own, once more."""

    path: str | None = None
    paths: list[str] | None = None
    token: str | None = None


class Nothing(Body, frozen=True, kw_only=True):
    """A call that takes nothing; a renewal may ask for seconds."""

    increment: str | int | None = None


class VaultCiphertext(Struct, frozen=True):
    """What was sealed; a data key has its plaintext beside it."""

    ciphertext: str
    key_version: int
    plaintext: bytes | UnsetType = UNSET

    def __repr__(self) -> str:
        return "Sealed(…)"


class VaultPlaintext(Struct, frozen=True):
    """What was opened."""

    plaintext: bytes

    def __repr__(self) -> str:
        return "Opened(…)"


class Item(Struct, frozen=True):
    """The outcome of one item, in the order of the request; ``reference`` is the caller's."""

    reference: str = ""
    ciphertext: str | UnsetType = UNSET
    key_version: int | UnsetType = UNSET
    plaintext: bytes | UnsetType = UNSET
    error: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return "Item(…)"


class Results(Struct, frozen=True):
    """All items."""

    batch_results: list[Item]


class VaultKey(Struct, frozen=True, kw_only=True):
    """A key as its record says: ``keys`` are version numbers and Unix seconds."""

    name: str
    keys: dict[str, int]
    latest_version: int
    type: str = "chacha20-poly1305"
    allow_plaintext_backup: bool = False
    auto_rotate_period: int = 0
    deletion_allowed: bool = False
    derived: bool = False
    exportable: bool = False
    imported_key: bool = False
    min_available_version: int = 0
    min_decryption_version: int = 1
    min_encryption_version: int = 0
    soft_deleted: bool = False
    supports_decryption: bool = True
    supports_derivation: bool = False
    supports_encryption: bool = True
    supports_signing: bool = False


class VaultAnswer(Struct):
    """What every answer with ``data`` has around it."""

    request_id: str
    data: object
    lease_id: str = ""
    renewable: bool = False
    lease_duration: int = 0
    wrap_info: None = None
    warnings: None = None
    auth: None = None


def around(data: object) -> bytes:
    """The body of an answer."""
    return wire.encode(VaultAnswer(audit.request_id.get(), data))


def read(body: bytes | msgspec.Raw, shape: type[T]) -> T:
    """A body, or an item of one. Raises InvalidRequest saying where and why, never with a value."""
    decoder = _decoders.get(shape)
    if decoder is None:
        decoder = _decoders[shape] = msgspec.json.Decoder(shape | None, strict=False)
    try:
        decoded: T | None = decoder.decode(body or b"null")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(json_body.why(exc, shape)) from None
    return shape() if decoded is None else decoded


def octets(text: str | None, field: str) -> bytes:
    """What a field holds in base64, nothing if it is not there. Raises InvalidRequest, naming the field."""
    try:
        return a2b_base64(text or "", strict_mode=True)
    except ValueError:
        raise InvalidRequest(f"Invalid base64 encoded string - at `$.{field}`") from None


def parse(ciphertext: str) -> tuple[int, bytes]:
    """The version's number and the age file. Raises InvalidRequest in Vault's words."""
    found = _CIPHERTEXT.fullmatch(ciphertext)
    if found is None:
        raise InvalidRequest("invalid ciphertext: expected vault:v<number>:<base64>")
    try:
        return int(found[1]), b64decode(found[2], validate=True)
    except ValueError:
        raise InvalidRequest("invalid ciphertext: could not decode base64") from None


def render(number: int, file: bytes) -> str:
    return f"vault:v{number}:{b64encode(file).decode('ascii')}"
