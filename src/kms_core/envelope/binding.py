"""What binds an age file to its context, tenant, key id and origin: our ``kms-service/*`` stanzas.

Stock age tools ignore these stanzas, and refuse the file when one is removed, changed or moved, since
the header MAC covers them. Knows no backend: who wraps the file key is a parameter (DESIGN §2).
"""

import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from kms_core.age.header import Header, Stanza, b64decode, b64encode, render_stanza
from kms_core.age.kdf import hkdf, mac
from kms_protocol.context import Context, length_prefixed
from kms_protocol.errors import DecryptFailed

DEFAULT_TENANT: Final = "default"
DEFAULT_KEY_ID: Final = "default"
OWN_PREFIX: Final = "kms-service/"
WRAP: Final = "kms-service/wrap"
CONTEXT: Final = "kms-service/context"
ORIGIN: Final = "kms-service/origin"
PAD: Final = "kms-service/pad"
FORMAT_VERSION: Final = "1"
ORIGIN_HANDED: Final = "2"
"""The version of an origin stanza that binds no payload nonce: an age plugin is not told any."""
SALT_BYTES: Final = 16
TAG_BYTES: Final = 32
MAX_WRAPS: Final = 4  # each may cost a call to a backend
MAX_WRAP_BYTES: Final = 4096
_CONTEXT_INFO: Final = b"kms-service/context/1"
_ORIGIN_INFO: Final = b"kms-service/origin/1"
_COMMITMENT_INFO: Final = b"kms-service/commitment/1"
_CONTEXT_BOUND: Final = length_prefixed(_CONTEXT_INFO)
_MADE: Final = length_prefixed(_ORIGIN_INFO)
_HANDED: Final = length_prefixed(b"kms-service/origin/2")
_WRAPPED: Final = length_prefixed(b"kms-service/wrap/1")
_ONCE: Final = frozenset({CONTEXT, ORIGIN, PAD})
_ORIGINS: Final = frozenset({(ORIGIN, FORMAT_VERSION), (ORIGIN, ORIGIN_HANDED)})
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,80}")


@dataclass(frozen=True, slots=True)
class KeyRef:
    """One version of one tenant's key in one backend."""

    tenant: str
    key_id: str
    version: str
    backend: str


@dataclass(frozen=True, slots=True)
class Wrap:
    """A ``kms-service/wrap`` stanza: who wrapped the file key, under which version, and what came out.

    ``job`` is empty, or a wrapped job key, under which the body then is the file key.
    """

    backend: str
    key_id: str
    version: str
    body: bytes
    job: bytes = b""


@dataclass(frozen=True, slots=True)
class BoundStanzas:
    """What our stanzas of a header say, read but not yet verified."""

    key_id: str
    key_version: str
    context: Stanza
    salt: bytes
    origin: bytes | None
    wraps: tuple[Wrap, ...] = ()
    names_nonce: bool = True


def read(header: Header) -> BoundStanzas | None:
    """As ``read_stanzas``, of those in a header."""
    return read_stanzas(header.stanzas)


def read_stanzas(stanzas: Sequence[Stanza]) -> BoundStanzas | None:
    """Our own among the stanzas of a file, or None for a foreign one (made by stock age).

    Raises DecryptFailed if one is of unknown type, version or shape, or stands twice, or if some but not
    the context stanza are there.
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
    """``-> kms-service/wrap <backend> <key-id> <key-version> [job]`` and what the backend made."""
    more = (b64encode(job).decode("ascii"),) if job else ()
    return Stanza((WRAP, key.backend, key.key_id, key.version, *more), body)


def read_wrap(stanza: Stanza) -> Wrap:
    """Raises DecryptFailed for a stanza of any other shape."""
    try:
        kind, backend, key_id, version, *job = stanza.args
    except ValueError as exc:
        raise DecryptFailed from exc
    named = all(map(_NAME.fullmatch, (backend, key_id, version)))
    if kind != WRAP or not named or len(job) > 1 or not 0 < len(stanza.body) <= MAX_WRAP_BYTES:
        raise DecryptFailed
    wrapped_job = b64decode(job[0].encode("ascii")) if job else b""
    return Wrap(backend, key_id, version, stanza.body, wrapped_job)


def context_stanza(file_key: bytes, key: KeyRef, context: Context) -> Stanza:
    """``-> kms-service/context 1 <key-id> <key-version> <salt>`` and a 32-byte tag, also for no context."""
    salt = os.urandom(SALT_BYTES)
    tag = _context_tag(file_key, salt, _names(key.tenant, key.key_id, key.version), context)
    return Stanza((CONTEXT, FORMAT_VERSION, key.key_id, key.version, b64encode(salt).decode("ascii")), tag)


def check_context(bound: BoundStanzas, file_key: bytes, tenant: str, context: Context) -> None:
    """Raise DecryptFailed unless tenant, key id, version and context are those of the sealing."""
    names = _names(tenant, bound.key_id, bound.key_version)
    if not hmac.compare_digest(bound.context.body, _context_tag(file_key, bound.salt, names, context)):
        raise DecryptFailed


def origin_key(identity_secret: bytes) -> bytes:
    """The 32-byte MAC key of an Age identity: who seals with it must hold the identity."""
    return hkdf(identity_secret, salt=b"", info=_ORIGIN_INFO)


def origin_stanza(
    mac_key: bytes, file_key: bytes, nonce: bytes | None, *, key: KeyRef, context: Context
) -> Stanza:
    """``-> kms-service/origin 1`` and a 32-byte tag; version 2 where the nonce is not known."""
    tag = origin_tag(mac_key, file_key, nonce, key=key, context=context)
    return Stanza((ORIGIN, ORIGIN_HANDED if nonce is None else FORMAT_VERSION), tag)


def origin_tag(
    mac_key: bytes, file_key: bytes, nonce: bytes | None, *, key: KeyRef, context: Context
) -> bytes:
    """The 32 bytes of the origin stanza: an age recipient is public, so the wrap alone proves nothing."""
    commitment = hkdf(file_key, salt=b"", info=_COMMITMENT_INFO)
    named = _names(key.tenant, key.key_id, key.version)
    if nonce is None:
        message = _HANDED + named + length_prefixed(context.canonical(), commitment)
    else:
        message = _MADE + named + length_prefixed(context.canonical(), nonce, commitment)
    return hmac.digest(mac_key, message, "sha256")


def wrap_aad(key: KeyRef, context: Stanza) -> bytes:
    """What a remote wrap authenticates: names and the context stanza's body, never a context value."""
    named = _names(key.tenant, key.key_id, key.backend, key.version)
    return _WRAPPED + named + length_prefixed(context.body)


def pad_stanza(rendered: Sequence[Stanza], mac_line_bytes: int, head_bytes: int, multiple: int) -> Stanza:
    """Filler that brings a header of these stanzas to a multiple of ``multiple`` bytes."""
    taken = head_bytes + sum(len(render_stanza(stanza)) for stanza in rendered) + mac_line_bytes
    smallest = len(render_stanza(Stanza((PAD, "0"), b"")))
    return Stanza((PAD, "0" * (1 + -(taken + smallest) % multiple)), b"")


def _context_tag(file_key: bytes, salt: bytes, names: bytes, context: Context) -> bytes:
    mac_key = hkdf(file_key, salt=salt, info=_CONTEXT_INFO)
    return mac(mac_key, _CONTEXT_BOUND + names + length_prefixed(context.canonical()))


@lru_cache(maxsize=256)
def _names(*names: str) -> bytes:
    """Length-prefixed: a handful of keys is named in file after file."""
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
    named = _NAME.fullmatch(key_id) and _NAME.fullmatch(key_version)
    salt = b64decode(salt_text.encode("ascii"))
    if version != FORMAT_VERSION or not named or len(salt) != SALT_BYTES or len(context.body) != TAG_BYTES:
        raise DecryptFailed
    _check_others(origin, pad)
    tag = origin.body if origin else None
    handed = origin is not None and origin.args[1] == ORIGIN_HANDED
    return BoundStanzas(key_id, key_version, context, salt, tag, wraps, names_nonce=not handed)


def _check_others(origin: Stanza | None, pad: Stanza | None) -> None:
    if origin and (origin.args not in _ORIGINS or len(origin.body) != TAG_BYTES):
        raise DecryptFailed
    if pad and (pad.body or len(pad.args) != 2 or set(pad.args[1]) != {"0"}):  # noqa: PLR2004 -- type and filler
        raise DecryptFailed
