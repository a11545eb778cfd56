"""The ``kms-service/*`` stanzas, which bind an age file to its context, tenant, key id and origin.

Stock age tools ignore these stanzas, but refuse a file from which one was removed, changed or moved: the
header MAC covers them. Keys are parameters. Format: docs/design.md.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from msgspec import Struct

from kms_core.age.header import (
    FILE_KEY_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    Stanza,
    b64decode,
    b64encode,
    hkdf,
    render_stanza,
)
from kms_core.age.recipients import Recipient
from kms_core.age.x25519 import NoMatch
from kms_protocol.context import Context, length_prefixed
from kms_protocol.errors import DecryptFailed

DEFAULT_TENANT: Final = "default"
DEFAULT_KEY_ID: Final = "default"
KEY_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,80}")
"""Names of keys, of their versions and of backends."""
OWN_PREFIX: Final = "kms-service/"
WRAP: Final = "kms-service/wrap"
CONTEXT: Final = "kms-service/context"
ORIGIN: Final = "kms-service/origin"
PAD: Final = "kms-service/pad"
FORMAT_VERSION: Final = "1"
ORIGIN_WITHOUT_NONCE: Final = "2"
"""The version of an origin stanza that binds no payload nonce: an age plugin does not receive one."""
SALT_BYTES: Final = 16
TAG_BYTES: Final = 32
MAX_WRAPS: Final = 4  # each may cost a call to a backend
MAX_WRAP_BYTES: Final = 4096
ID_DIGITS: Final = 32
WRAP_KEY_INFO: Final = b"kms-service/job/1"
AGE_WRAP_INFO: Final = b"kms-service/wrap-age/1"
_SEAL_SALT_BYTES: Final = 32
_SEALED_BYTES: Final = _SEAL_SALT_BYTES + FILE_KEY_BYTES + 16
_SEAL_NONCE: Final = bytes(12)  # each derived key seals once
_CONTEXT_INFO: Final = b"kms-service/context/1"
_ORIGIN_INFO: Final = b"kms-service/origin/1"
_COMMITMENT_INFO: Final = b"kms-service/commitment/1"
_CONTEXT_LABEL: Final = length_prefixed(_CONTEXT_INFO)
_ORIGIN_LABEL: Final = length_prefixed(_ORIGIN_INFO)
_ORIGIN_2_LABEL: Final = length_prefixed(b"kms-service/origin/2")
_WRAP_LABEL: Final = length_prefixed(b"kms-service/wrap/1")
_FILE_ID_LABEL: Final = length_prefixed(b"kms-service/file-id/1") + NONCE_BYTES.to_bytes(4, "big")
_TAG_LENGTH: Final = TAG_BYTES.to_bytes(4, "big")
_STANZAS_LABEL: Final = length_prefixed(b"kms-service/stanzas/1")
_ONCE: Final = frozenset({CONTEXT, ORIGIN, PAD})
_ORIGINS: Final = frozenset({(ORIGIN, FORMAT_VERSION), (ORIGIN, ORIGIN_WITHOUT_NONCE)})


class KeyRef(Struct, frozen=True):
    """A version of a tenant's key in a backend."""

    tenant: str
    key_id: str
    version: str
    backend: str


def version_of(recipient: Recipient) -> str:
    """The key version: the first 8 hexadecimal digits of SHA-256 over the recipient string."""
    return hashlib.sha256(str(recipient).encode("ascii")).hexdigest()[:8]


class Wrap(Struct, frozen=True):
    """A ``kms-service/wrap`` stanza: a backend, a key version, and the file key that it wrapped.

    ``job`` is empty, or a wrapped job key under which ``body`` is the wrapped file key.
    """

    backend: str
    key_id: str
    version: str
    body: bytes
    job: bytes = b""


class BoundStanzas(Struct, frozen=True):
    """The content of our stanzas in a header, parsed but not verified."""

    key_id: str
    key_version: str
    context: Stanza
    salt: bytes
    origin: bytes | None
    wraps: tuple[Wrap, ...] = ()
    binds_nonce: bool = True


def file_id(nonce: bytes) -> str:
    """The id of a file: 32 hex digits, derived from its 16-byte payload nonce, which a rewrap keeps.

    A label, and no proof: the maker of a file chooses its nonce.
    """
    return hashlib.sha256(_FILE_ID_LABEL + nonce).hexdigest()[:ID_DIGITS]


def stanzas_digest(stanzas: Sequence[Stanza]) -> str:
    """The name of stanzas without their file, whose nonce an age plugin does not receive: 32 hex digits."""
    text = b"".join(map(render_stanza, stanzas))
    return hashlib.sha256(_STANZAS_LABEL + length_prefixed(text)).hexdigest()[:ID_DIGITS]


def read(stanzas: Sequence[Stanza]) -> BoundStanzas | None:
    """Parse our stanzas among those of a file; None for a foreign file, made by stock age.

    Raises DecryptFailed for an unknown type, version or shape, a stanza that occurs twice, and a missing
    context stanza.
    """
    found: dict[str, Stanza] = {}
    wraps: list[Wrap] = []
    for stanza in stanzas:
        kind = stanza.type
        if not kind.startswith(OWN_PREFIX):
            continue
        if kind == WRAP:
            wraps.append(read_wrap(stanza))
        elif kind in found or kind not in _ONCE:
            raise DecryptFailed
        else:
            found[kind] = stanza
    if not found and not wraps:
        return None
    if len({(wrap.backend, wrap.key_id) for wrap in wraps}) != len(wraps) or len(wraps) > MAX_WRAPS:
        raise DecryptFailed
    return _bound(found.get(CONTEXT), found.get(ORIGIN), found.get(PAD), tuple(wraps))


def wrap_stanza(key: KeyRef, body: bytes, job: bytes = b"") -> Stanza:
    """Make ``-> kms-service/wrap <backend> <key-id> <key-version> [job]`` with ``body`` from the backend."""
    more = (b64encode(job).decode("ascii"),) if job else ()
    return Stanza((WRAP, key.backend, key.key_id, key.version, *more), body)


def wrap_keys_in(stanzas: Sequence[Stanza]) -> tuple[bytes, ...]:
    """The wrapped keys in wrap stanzas that ``wrap_stanza`` made."""
    shared = [stanza.args[4] for stanza in stanzas if stanza.args[0] == WRAP and stanza.args[4:]]
    return tuple(b64decode(job.encode("ascii")) for job in shared) if shared else ()


def read_wrap(stanza: Stanza) -> Wrap:
    """Parse a wrap stanza. Raises DecryptFailed for another shape."""
    try:
        kind, backend, key_id, version, *job = stanza.args
    except ValueError as exc:
        raise DecryptFailed from exc
    named = all(map(KEY_ID.fullmatch, (backend, key_id, version)))
    if kind != WRAP or not named or len(job) > 1 or not 0 < len(stanza.body) <= MAX_WRAP_BYTES:
        raise DecryptFailed
    wrapped_job = b64decode(job[0].encode("ascii")) if job else b""
    return Wrap(backend, key_id, version, stanza.body, wrapped_job)


def wrap_of(stanza: Stanza, key: KeyRef) -> Wrap:
    """Parse the wrap stanza of this key version.

    Raises NoMatch for any other stanza, DecryptFailed for a malformed one.
    """
    if stanza.type != WRAP:
        raise NoMatch
    wrap = read_wrap(stanza)
    if (wrap.backend, wrap.key_id, wrap.version) != (key.backend, key.key_id, key.version):
        raise NoMatch
    return wrap


def seal_file_key(secret: bytes, file_key: bytes, aad: bytes, info: bytes) -> bytes:
    """Seal a file key or a wrap key under HKDF(secret, 32 random bytes): salt, sealed key and tag.

    ``secret`` has 32 bytes, and the result 48 more than ``file_key``. ``info`` names the use of the secret.
    """
    salt = os.urandom(_SEAL_SALT_BYTES)
    return salt + ChaCha20Poly1305(hkdf(secret, salt=salt, info=info)).encrypt(_SEAL_NONCE, file_key, aad)


def open_file_key(secret: bytes, body: bytes, aad: bytes, info: bytes) -> bytes:
    """Open what ``seal_file_key`` returned for a 16-byte file key. Raises DecryptFailed."""
    if len(body) != _SEALED_BYTES or len(secret) != KEY_BYTES:
        raise DecryptFailed
    return open_sealed(secret, body, aad, info)


def open_sealed(secret: bytes, body: bytes, aad: bytes, info: bytes) -> bytes:
    """Open what ``seal_file_key`` returned for a key of any size. Raises DecryptFailed."""
    wrap_key = hkdf(secret, salt=body[:_SEAL_SALT_BYTES], info=info)
    try:
        return ChaCha20Poly1305(wrap_key).decrypt(_SEAL_NONCE, body[_SEAL_SALT_BYTES:], aad)
    except InvalidTag as exc:
        raise DecryptFailed from exc


def age_wrap(secret: bytes, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
    """Make the wrap stanza of an Age key without a native stanza.

    ``secret`` is that of the identity: a recipient is public, so nothing derived from it could prove who
    made the file.
    """
    return wrap_stanza(key, seal_file_key(secret, file_key, aad, AGE_WRAP_INFO))


def open_age_wrap(secret: bytes, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
    """Open what ``age_wrap`` returned. Raises NoMatch for the wrap of another key, DecryptFailed."""
    wrap = wrap_of(stanza, key)
    if wrap.job:
        raise DecryptFailed
    return open_file_key(secret, wrap.body, aad, AGE_WRAP_INFO)


def context_stanza(file_key: bytes, key: KeyRef, context: Context) -> Stanza:
    """Make ``-> kms-service/context 1 <key-id> <key-version> <salt>`` and its 32-byte tag."""
    salt = os.urandom(SALT_BYTES)
    tag = _context_tag(file_key, salt, _names(key.tenant, key.key_id, key.version), context)
    return Stanza((CONTEXT, FORMAT_VERSION, key.key_id, key.version, b64encode(salt).decode("ascii")), tag)


def check_context(bound: BoundStanzas, file_key: bytes, tenant: str, context: Context) -> None:
    """Raise DecryptFailed unless the file was sealed with this tenant, key id, version and context."""
    names = _names(tenant, bound.key_id, bound.key_version)
    if not hmac.compare_digest(bound.context.body, _context_tag(file_key, bound.salt, names, context)):
        raise DecryptFailed


def origin_key(identity_secret: bytes) -> bytes:
    """Derive the 32-byte MAC key of an Age identity: only its holders can make valid origin stanzas."""
    return hkdf(identity_secret, salt=b"", info=_ORIGIN_INFO)


def origin_stanza(
    mac_key: bytes, file_key: bytes, nonce: bytes | None, *, key: KeyRef, context: Context
) -> Stanza:
    """Make ``-> kms-service/origin 1`` and a 32-byte tag; version 2 without a nonce."""
    tag = origin_tag(mac_key, file_key, nonce, key=key, context=context)
    return Stanza((ORIGIN, ORIGIN_WITHOUT_NONCE if nonce is None else FORMAT_VERSION), tag)


def origin_tag(
    mac_key: bytes, file_key: bytes, nonce: bytes | None, *, key: KeyRef, context: Context
) -> bytes:
    """The 32-byte tag of the origin stanza. Age recipients are public, so a wrap proves no origin."""
    commitment = hkdf(file_key, salt=b"", info=_COMMITMENT_INFO)
    named = _names(key.tenant, key.key_id, key.version)
    if nonce is None:
        message = _ORIGIN_2_LABEL + named + context.prefixed + length_prefixed(commitment)
    else:
        message = _ORIGIN_LABEL + named + context.prefixed + length_prefixed(nonce, commitment)
    return hmac.digest(mac_key, message, "sha256")


def wrap_aad(key: KeyRef, context: Stanza) -> bytes:
    """The AAD of a remote wrap: names and the body of the context stanza, never a context value."""
    named = _names(key.tenant, key.key_id, key.backend, key.version)
    return _WRAP_LABEL + named + _TAG_LENGTH + context.body


def pad_stanza(header_bytes: int, multiple: int) -> Stanza:
    """Make the stanza that pads a header of this size to a multiple of ``multiple`` bytes."""
    smallest = header_bytes + len(render_stanza(Stanza((PAD, "0"), b"")))
    return Stanza((PAD, "0" * (1 + -smallest % multiple)), b"")


def _context_tag(file_key: bytes, salt: bytes, names: bytes, context: Context) -> bytes:
    mac_key = hkdf(file_key, salt=salt, info=_CONTEXT_INFO)
    message = _CONTEXT_LABEL + names + context.prefixed
    return hmac.digest(mac_key, message, "sha256")


@lru_cache(maxsize=256)
def _names(*names: str) -> bytes:
    """Length-prefixed names, cached: most files name one of a few keys."""
    return length_prefixed(*(name.encode() for name in names))


def _bound(
    context: Stanza | None, origin: Stanza | None, pad: Stanza | None, wraps: tuple[Wrap, ...]
) -> BoundStanzas:
    if context is None:
        raise DecryptFailed
    try:
        _, version, key_id, key_version, salt_text = context.args
    except ValueError as exc:
        raise DecryptFailed from exc
    named = KEY_ID.fullmatch(key_id) and KEY_ID.fullmatch(key_version)
    salt = b64decode(salt_text.encode("ascii"))
    if version != FORMAT_VERSION or not named or len(salt) != SALT_BYTES or len(context.body) != TAG_BYTES:
        raise DecryptFailed
    _check_others(origin, pad)
    tag = origin.body if origin else None
    binds_nonce = origin is None or origin.args[1] != ORIGIN_WITHOUT_NONCE
    return BoundStanzas(key_id, key_version, context, salt, tag, wraps, binds_nonce=binds_nonce)


def _check_others(origin: Stanza | None, pad: Stanza | None) -> None:
    if origin and (origin.args not in _ORIGINS or len(origin.body) != TAG_BYTES):
        raise DecryptFailed
    if pad and (pad.body or len(pad.args) != 2 or set(pad.args[1]) != {"0"}):  # noqa: PLR2004 -- type and filler
        raise DecryptFailed
