"""Seals and opens age files with our stanzas: file key, header MAC, context and origin, in this order.

Every new file gets a random 16-byte file key and a random 16-byte payload nonce; no file key is used for two
payloads.
"""

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kms_core.age import header, stream
from kms_core.age.header import FILE_KEY_BYTES, Header, Stanza
from kms_core.age.recipients import Recipient
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding
from kms_core.envelope.binding import BoundStanzas, KeyRef
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed

SCRYPT: Final = "scrypt"  # the stanza of a file with a passphrase
PAD_FROM_BYTES: Final = 1024 * 1024
PADDED_HEADER_BYTES: Final = 4096


class Wrapper(Protocol):
    """A backend that wraps file keys. It authenticates the AAD, or proves the origin by ``origin_key``."""

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """Wrap a 16-byte file key."""

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """Unwrap a file key. Raises NoMatch for a stanza of another key, DecryptFailed for a damaged one."""

    def origin_key(self, key: KeyRef) -> bytes | None:
        """The 32-byte MAC key of the origin stanza; None where the wrap itself authenticates the AAD."""


WrappingKey = tuple[Wrapper, KeyRef]
"""A backend, and the version of its key with which it wraps or unwraps."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """The header of a file, its 16-byte payload nonce and its 16-byte file key."""

    header: bytes
    nonce: bytes
    file_key: bytes = field(repr=False)
    wrap_keys: tuple[bytes, ...] = ()
    """The wrapped forms of the shared keys that sealed the file key."""

    @property
    def head(self) -> bytes:
        """The bytes before the first chunk: header and nonce."""
        return self.header + self.nonce

    @property
    def payload_key(self) -> bytes:
        """The 32-byte key of the payload."""
        return stream.payload_key(self.file_key, self.nonce)


@dataclass(frozen=True, slots=True)
class UnwrappedKey:
    """A 16-byte file key, the stanza that it was unwrapped from, and whether its origin is proven.

    ``is_proven``: a holder of the key, and not only of its recipient, sealed the file key with this context.
    """

    file_key: bytes = field(repr=False)
    stanza: Stanza
    is_proven: bool


def begin(
    keys: Sequence[WrappingKey],
    context: Context,
    *,
    padded: bool = False,
    payload: tuple[bytes, bytes] | None = None,
    recipients: Sequence[Recipient] = (),
) -> Sealing:
    """Write the header of a new file, or of a sealed payload whose file key and nonce are given.

    Each of ``keys`` wraps the file key, so that any of them opens the file; the context stanza names the
    first. ``padded`` brings the header to a multiple of 4 KiB, for payloads of 1 MiB or more. ``recipients``
    can open the file as well, with any age tool.
    """
    if payload is None:
        drawn = os.urandom(FILE_KEY_BYTES + header.NONCE_BYTES)
        payload = drawn[:FILE_KEY_BYTES], drawn[FILE_KEY_BYTES:]
    file_key, nonce = payload
    stanzas = [*_stanzas(file_key, nonce, keys, context), *(each.wrap(file_key) for each in recipients)]
    return with_stanzas(stanzas, file_key, nonce, padded=padded)


def with_stanzas(stanzas: Sequence[Stanza], file_key: bytes, nonce: bytes, *, padded: bool) -> Sealing:
    """Write the header of a file whose file key is wrapped in ``stanzas``; ``padded`` as in ``begin``."""
    if padded:
        size = len(header.render(stanzas, file_key))
        stanzas = [*stanzas, binding.pad_stanza(size, PADDED_HEADER_BYTES)]
    return Sealing(header.render(stanzas, file_key), nonce, file_key, binding.wrap_keys_in(stanzas))


def seal(
    plaintext: bytes, keys: Sequence[WrappingKey], context: Context, recipients: Sequence[Recipient] = ()
) -> bytes:
    """Seal bytes in memory into a complete age v1 file; ``recipients`` as in ``begin``."""
    started = begin(keys, context, padded=len(plaintext) >= PAD_FROM_BYTES, recipients=recipients)
    return started.head + stream.seal(started.payload_key, plaintext)


def wrap_for_plugin(file_key: bytes, keys: Sequence[WrappingKey], context: Context) -> Stanza:
    """Wrap a file key for a header and a payload that an age tool writes: the stanzas as one bundle."""
    return header.bundle(_stanzas(file_key, None, keys, context))


def unwrap_file(
    head: Header, wrapper: Wrapper, key: KeyRef, *, context: Context, bound: BoundStanzas | None = None
) -> UnwrappedKey:
    """Unwrap the file key and verify header MAC, context and origin. Raises DecryptFailed for every failure.

    Without ``bound`` the context stanza must name this version of ``key``. With ``bound``, which the caller
    read from this header, it may name the version of another backend that wrapped the file first.
    """
    bound, unwrapped = _unwrap_bound(head.stanzas, wrapper, key, bound)
    head.check_mac(unwrapped[0])
    found = _checked(unwrapped, bound, head.nonce, wrapper, (key, context))
    if not found.is_proven:
        raise DecryptFailed
    return found


def unwrap_unchecked(head: Header, wrapper: Wrapper, key: KeyRef, bound: BoundStanzas) -> bytes:
    """Unwrap the file key and verify the header MAC, but neither context nor origin: for break-glass."""
    _, (file_key, _) = _unwrap_bound(head.stanzas, wrapper, key, bound)
    head.check_mac(file_key)
    return file_key


def unwrap_for_plugin(  # noqa: PLR0913 -- a header in parts
    stanzas: Sequence[Stanza],
    wrapper: Wrapper,
    key: KeyRef,
    *,
    context: Context,
    bound: BoundStanzas | None = None,
    nonce: bytes = b"",
) -> UnwrappedKey:
    """Unwrap the file key for a caller who verifies the header MAC. Raises as ``unwrap_file``.

    The payload nonce may be empty, as an age plugin does not receive it. The origin of a file key from a
    native stanza is then not proven, unless the origin stanza binds no nonce.
    """
    bound, unwrapped = _unwrap_bound(stanzas, wrapper, key, bound)
    return _checked(unwrapped, bound, nonce, wrapper, (key, context))


def foreign_file_key(head: Header, wrapper: Wrapper, keys: Sequence[KeyRef]) -> tuple[bytes, KeyRef]:
    """Unwrap the file key of a file without our stanzas, trying each key version; verify the header MAC.

    Raises DecryptFailed, also if any stanza is of a passphrase: the sender would choose its cost.
    """
    if any(stanza.type == SCRYPT for stanza in head.stanzas):
        raise DecryptFailed
    for key in keys:
        try:
            file_key, _ = _unwrap(head.stanzas, wrapper, key, b"")
        except NoMatch:
            continue
        head.check_mac(file_key)
        return file_key, key
    raise DecryptFailed


def open_(ciphertext: bytes, head: Header, file_key: bytes) -> bytes:
    """Open the payload of a file in memory. Raises DecryptFailed."""
    payload = memoryview(ciphertext)[head.payload_offset :]
    return stream.open_(stream.payload_key(file_key, head.nonce), payload)


def _stanzas(
    file_key: bytes, nonce: bytes | None, keys: Sequence[WrappingKey], context: Context
) -> list[Stanza]:
    """The wraps, the context and the origins of a file."""
    bound = binding.context_stanza(file_key, keys[0][1], context)
    stanzas = [wrapper.wrap(file_key, key, binding.wrap_aad(key, bound)) for wrapper, key in keys]
    stanzas.append(bound)
    for wrapper, key in keys:
        mac_key = wrapper.origin_key(key)
        if mac_key is not None:
            stanzas.append(binding.origin_stanza(mac_key, file_key, nonce, key=key, context=context))
    return stanzas


def _unwrap_bound(
    stanzas: Sequence[Stanza], wrapper: Wrapper, key: KeyRef, known: BoundStanzas | None
) -> tuple[BoundStanzas, tuple[bytes, Stanza]]:
    bound = known or binding.read(stanzas)
    if bound is None or bound.key_id != key.key_id or (known is None and bound.key_version != key.version):
        raise DecryptFailed
    return bound, _unwrap(stanzas, wrapper, key, binding.wrap_aad(key, bound.context))


def _unwrap(stanzas: Sequence[Stanza], wrapper: Wrapper, key: KeyRef, aad: bytes) -> tuple[bytes, Stanza]:
    """Unwrap the first stanza of this key: the file key, and that stanza.

    Raises DecryptFailed if one is malformed, NoMatch without one.
    """
    for stanza in stanzas:
        if stanza.type.startswith(binding.OWN_PREFIX) and stanza.type != binding.WRAP:
            continue
        try:
            return wrapper.unwrap(stanza, key, aad), stanza
        except NoMatch:
            continue
    raise NoMatch


def _checked(
    unwrapped: tuple[bytes, Stanza],
    bound: BoundStanzas,
    nonce: bytes,
    wrapper: Wrapper,
    names: tuple[KeyRef, Context],
) -> UnwrappedKey:
    """Verify context and origin. Raises DecryptFailed for another context and a wrong origin stanza.

    Where no origin stanza can be verified, the origin is proven by the stanza that was unwrapped, if that is
    a wrap, which authenticates its AAD. Other stanzas of the header prove nothing: anyone can add them.
    """
    (file_key, stanza), (key, context) = unwrapped, names
    binding.check_context(bound, file_key, key.tenant, context)
    mac_key = wrapper.origin_key(key)
    if mac_key is None or (bound.binds_nonce and not nonce):
        return UnwrappedKey(file_key, stanza, is_proven=stanza.type == binding.WRAP)
    bound_nonce = nonce if bound.binds_nonce else None
    expected = binding.origin_tag(mac_key, file_key, bound_nonce, key=key, context=context)
    if not hmac.compare_digest(bound.origin or b"", expected):
        raise DecryptFailed
    return UnwrappedKey(file_key, stanza, is_proven=True)
