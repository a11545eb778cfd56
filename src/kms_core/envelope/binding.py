"""What binds an age file to its context, tenant, key id and origin: our ``kms-service/*`` stanzas.

Stock age tools ignore these stanzas, and refuse the file when one is removed, changed or moved, since
the header MAC covers them. Knows no backend: who wraps the file key is a parameter (DESIGN §2).
"""

import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kms_core.context import Context, length_prefixed
from kms_core.envelope.header import Header, Stanza, b64decode, b64encode, render_stanza
from kms_core.envelope.kdf import hkdf
from kms_core.errors import DecryptFailed

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
_HANDED_INFO: Final = b"kms-service/origin/2"
_COMMITMENT_INFO: Final = b"kms-service/commitment/1"
_WRAP_LABEL: Final = b"kms-service/wrap/1"
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
class Bound:
    """What our stanzas of a header say, read but not yet verified."""

    key_id: str
    key_version: str
    context: Stanza
    origin: bytes | None
    wraps: tuple[Wrap, ...] = ()
    names_nonce: bool = True


def read(header: Header) -> Bound | None:
    """As ``read_stanzas``, of those in a header."""
    return read_stanzas(header.stanzas)


def read_stanzas(stanzas: Sequence[Stanza]) -> Bound | None:
    """Our own among the stanzas of a file, or None for a foreign one (made by stock age).

    Raises DecryptFailed if one is of unknown type, version or shape, or stands twice, or if some but not
    the context stanza are there.
    """
    own = [stanza for stanza in stanzas if stanza.type.startswith(OWN_PREFIX)]
    if not own:
        return None
    context = _one(own, CONTEXT)
    origin = _one(own, ORIGIN)
    pad = _one(own, PAD)
    known = len([stanza for stanza in (context, origin, pad) if stanza])
    wraps = tuple(read_wrap(stanza) for stanza in own if stanza.type == WRAP)
    if context is None or len(own) != known + len(wraps):
        raise DecryptFailed
    if len({(wrap.backend, wrap.key_id) for wrap in wraps}) != len(wraps) or len(wraps) > MAX_WRAPS:
        raise DecryptFailed
    _check_shapes(context, origin, pad)
    handed = origin is not None and origin.args[1] == ORIGIN_HANDED
    tag = origin.body if origin else None
    return Bound(context.args[2], context.args[3], context, tag, wraps, names_nonce=not handed)


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
    tag = _context_tag(file_key, salt, key, context)
    return Stanza((CONTEXT, FORMAT_VERSION, key.key_id, key.version, b64encode(salt).decode("ascii")), tag)


def check_context(stanza: Stanza, file_key: bytes, key: KeyRef, context: Context) -> None:
    """Raise DecryptFailed unless tenant, key id, version and context are those of the sealing."""
    salt = b64decode(stanza.args[4].encode("ascii"))
    if not hmac.compare_digest(stanza.body, _context_tag(file_key, salt, key, context)):
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
    named = _names(key)
    if nonce is None:
        message = length_prefixed(_HANDED_INFO, *named, context.canonical(), commitment)
    else:
        message = length_prefixed(_ORIGIN_INFO, *named, context.canonical(), nonce, commitment)
    return hmac.digest(mac_key, message, "sha256")


def wrap_aad(key: KeyRef, context: Stanza) -> bytes:
    """What a remote wrap authenticates: names and the context stanza's body, never a context value."""
    return length_prefixed(
        _WRAP_LABEL,
        key.tenant.encode(),
        key.key_id.encode(),
        key.backend.encode(),
        key.version.encode(),
        context.body,
    )


def pad_stanza(rendered: Sequence[Stanza], mac_line_bytes: int, head_bytes: int, multiple: int) -> Stanza:
    """Filler that brings a header of these stanzas to a multiple of ``multiple`` bytes."""
    taken = head_bytes + sum(len(render_stanza(stanza)) for stanza in rendered) + mac_line_bytes
    smallest = len(render_stanza(Stanza((PAD, "0"), b"")))
    return Stanza((PAD, "0" * (1 + -(taken + smallest) % multiple)), b"")


def _context_tag(file_key: bytes, salt: bytes, key: KeyRef, context: Context) -> bytes:
    mac_key = hkdf(file_key, salt=salt, info=_CONTEXT_INFO)
    return hmac.digest(mac_key, length_prefixed(_CONTEXT_INFO, *_names(key), context.canonical()), "sha256")


def _names(key: KeyRef) -> tuple[bytes, bytes, bytes]:
    return key.tenant.encode(), key.key_id.encode(), key.version.encode()


def _one(stanzas: Sequence[Stanza], kind: str) -> Stanza | None:
    found = [stanza for stanza in stanzas if stanza.type == kind]
    if len(found) > 1:
        raise DecryptFailed
    return found[0] if found else None


def _check_shapes(context: Stanza, origin: Stanza | None, pad: Stanza | None) -> None:
    try:
        _, version, key_id, key_version, salt = context.args
    except ValueError as exc:
        raise DecryptFailed from exc
    named = _NAME.fullmatch(key_id) and _NAME.fullmatch(key_version)
    if version != FORMAT_VERSION or not named or len(b64decode(salt.encode("ascii"))) != SALT_BYTES:
        raise DecryptFailed
    if len(context.body) != TAG_BYTES:
        raise DecryptFailed
    shapes = {(ORIGIN, FORMAT_VERSION), (ORIGIN, ORIGIN_HANDED)}
    if origin and (origin.args not in shapes or len(origin.body) != TAG_BYTES):
        raise DecryptFailed
    if pad and (pad.body or len(pad.args) != 2 or set(pad.args[1]) != {"0"}):  # noqa: PLR2004 -- type and filler
        raise DecryptFailed
