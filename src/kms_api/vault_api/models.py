"""Bodies and answers of the Vault API, as Vault's clients write and read them.

Bodies are decoded as leniently as these clients need: ``null`` or nothing for an object, numbers and booleans
as strings (the ``bao`` command). An unlisted field is refused, since ignoring it would promise something.
"""

import re
from base64 import b64decode, b64encode
from binascii import a2b_base64
from typing import Final

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

from kms_core import audit
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import Body, Hidden

POLICIES: Final = ("kms-service",)
"""Vault's name for rights, which are scopes here."""
MAX_ITEMS: Final = 1000
_HEADER_CHARS: Final = 44 * 1024
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):(.+)", re.ASCII)


class BoundFields(Body, frozen=True, kw_only=True):
    """The fields of any call; ``context`` and ``associated_data`` are both authenticated, and differ.

    Bytes are base64 text, which ``octets`` decodes: the lenient decoder would read the text ``null``, which
    is base64 too, as nothing, and leave it unbound.
    """

    context: str | None = None
    associated_data: str | None = None
    nonce: str | None = None
    type: str | None = None
    convergent_encryption: bool | None = None
    key_version: int | None = None
    reference: str | None = None


class TransitItem(BoundFields, frozen=True, kw_only=True):
    """An item of a batch."""

    plaintext: str | None = None
    ciphertext: str | None = None


class TransitIn(TransitItem, frozen=True, kw_only=True):
    """One call, or a batch (``batch_input``). ``name`` repeats the key of the path, as in other bodies."""

    name: str | None = None
    batch_input: list[msgspec.Raw] | None = None
    partial_failure_response_code: int | None = None


class DataKeyIn(BoundFields, frozen=True, kw_only=True):
    """A data key, of 256 bits by default."""

    name: str | None = None
    bits: int | None = None


class KeyIn(Body, frozen=True, kw_only=True):
    """Settings of an existing key, which must be those that it has."""

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
    """The paths whose capabilities are wanted, in one of both fields. ``token`` repeats the caller's."""

    path: str | None = None
    paths: list[str] | None = None
    token: str | None = None


class EmptyIn(Body, frozen=True, kw_only=True):
    """A call without fields; a renewal may have ``increment``, in seconds."""

    name: str | None = None
    increment: str | int | None = None


class VaultCiphertext(Hidden, frozen=True):
    """A ciphertext; that of a data key comes with the plaintext."""

    ciphertext: str
    key_version: int
    plaintext: bytes | UnsetType = UNSET


class VaultPlaintext(Hidden, frozen=True):
    """A plaintext."""

    plaintext: bytes


class Item(Hidden, frozen=True):
    """The outcome of one item, in the order of the request; ``reference`` is the caller's."""

    reference: str = ""
    ciphertext: str | UnsetType = UNSET
    key_version: int | UnsetType = UNSET
    plaintext: bytes | UnsetType = UNSET
    error: str | UnsetType = UNSET


class Results(Struct, frozen=True):
    """All items."""

    batch_results: list[Item]


class VaultKey(Struct, frozen=True, kw_only=True):
    """A key; ``keys`` maps version numbers to Unix seconds."""

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


class LoginIn(Body, frozen=True, kw_only=True):
    """A JWT and the name of a role; or a token of this service (``secret_id``) and its name (``role_id``)."""

    role: str | None = None
    jwt: str | None = None
    role_id: str | None = None
    secret_id: str | None = None


class VaultAuth(Hidden, frozen=True, kw_only=True):
    """The token that a login hands out: of Vault's type ``batch``, which is neither renewed nor revoked."""

    client_token: str
    lease_duration: int
    metadata: dict[str, str]
    policies: tuple[str, ...] = POLICIES
    token_policies: tuple[str, ...] = POLICIES
    accessor: str = ""
    entity_id: str = ""
    mfa_requirement: None = None
    num_uses: int = 0
    orphan: bool = True
    renewable: bool = False
    token_type: str = "batch"  # noqa: S105 -- the name of a kind


class VaultAnswer(Struct):
    """The envelope around ``data``."""

    request_id: str
    data: object
    lease_id: str = ""
    renewable: bool = False
    lease_duration: int = 0
    wrap_info: None = None
    warnings: None = None
    auth: VaultAuth | None = None


def octets(text: str | None, field: str) -> bytes:
    """The bytes of a base64 field; empty without it. Raises InvalidRequest, which names the field."""
    try:
        return a2b_base64(text or "", strict_mode=True)
    except ValueError:
        raise InvalidRequest(f"Invalid base64 encoded string - at `$.{field}`") from None


def parse(ciphertext: str) -> tuple[int, bytes]:
    """The number of the key version, and the age file. Raises InvalidRequest in Vault's words."""
    found = _CIPHERTEXT.fullmatch(ciphertext)
    if found is None:
        raise InvalidRequest("invalid ciphertext: expected vault:v<number>:<base64>")
    try:
        return int(found[1]), b64decode(found[2], validate=True)
    except ValueError:
        raise InvalidRequest("invalid ciphertext: could not decode base64") from None


def header_of(ciphertext: str) -> bytes:
    """The first 32 KiB of the age file of a ciphertext, which hold its header; empty if it is not one."""
    text = ciphertext[:_HEADER_CHARS].rpartition(":")[2]
    try:
        return a2b_base64(text[: len(text) // 4 * 4])
    except ValueError:
        return b""


def render(number: int, file: bytes) -> str:
    """Return a ciphertext in the form of Vault transit: ``vault:v<version>:<base64>``."""
    return f"vault:v{number}:{b64encode(file).decode('ascii')}"


def answer(data: object, status: int = 200) -> Response:
    """An answer in Vault's envelope."""
    return bare(VaultAnswer(audit.request_id.get(), data), status)


def bare(body: object, status: int = 200) -> Response:
    """An answer without an envelope."""
    return Response(wire.encode(body), status, media_type="application/json")
