"""Seal and open whole age files: file key, header, context and origin in the right order.

The wrapping key is a parameter (``Wrapper``); this module knows no settings, policy, tenant list or disk.
Every seal makes a fresh 16-byte file key and a fresh 16-byte payload nonce; no file key is ever used for
two payloads.
"""

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kms_core.age import header, scrypt, stream
from kms_core.age.header import FILE_KEY_BYTES, VERSION_LINE, Header, Stanza
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding
from kms_core.envelope.binding import BoundStanzas, KeyRef
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed

PAD_FROM_BYTES: Final = 1024 * 1024
PADDED_HEADER_BYTES: Final = 4096
_FOOT_BYTES: Final = len("--- ") + 43 + 1


class Wrapper(Protocol):
    """Who wraps file keys: a backend. It authenticates the AAD it is given, or says how origin is proven."""

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """Wrap a 16-byte file key."""

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """The file key. NoMatch if the stanza is not for this key, DecryptFailed if it is damaged."""

    def origin_key(self, key: KeyRef) -> bytes | None:
        """The MAC key of the origin stanza, or None where the wrap itself authenticates the AAD."""


Wrap = tuple[Wrapper, KeyRef]
"""A further wrapper of the same file key, with the name of its own version."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """A file about to be written: its header, its payload nonce, and the key of its payload."""

    header: bytes
    nonce: bytes
    payload_key: bytes = field(repr=False)

    @property
    def head(self) -> bytes:
        """What stands before the first chunk: header and nonce."""
        return self.header + self.nonce


def begin(
    wrapper: Wrapper, key: KeyRef, context: Context, *, padded: bool = False, others: Sequence[Wrap] = ()
) -> Sealing:
    """Start a new file under a fresh file key. ``padded`` rounds the header to 4 KiB, from 1 MiB on."""
    drawn = os.urandom(FILE_KEY_BYTES + stream.NONCE)
    file_key, nonce = drawn[:FILE_KEY_BYTES], drawn[FILE_KEY_BYTES:]
    rendered = write_header(file_key, nonce, wrapper, key=key, context=context, padded=padded, others=others)
    return Sealing(rendered, nonce, stream.payload_key(file_key, nonce))


def write_header(  # noqa: PLR0913 -- a header binds all of these
    file_key: bytes,
    nonce: bytes,
    wrapper: Wrapper,
    *,
    key: KeyRef,
    context: Context,
    padded: bool,
    others: Sequence[Wrap] = (),
) -> bytes:
    """The header that wraps ``file_key`` for ``key`` and binds context and origin; rewrap writes it too.

    ``others`` wrap the same file key, so that any of them opens the file; the context stanza names ``key``.
    """
    stanzas = _stanzas(file_key, nonce, [(wrapper, key), *others], context)
    if padded:
        stanzas.append(binding.pad_stanza(stanzas, _FOOT_BYTES, len(VERSION_LINE), PADDED_HEADER_BYTES))
    return header.render(stanzas, file_key)


def hand_over(
    file_key: bytes, wrapper: Wrapper, key: KeyRef, context: Context, others: Sequence[Wrap]
) -> Stanza:
    """A bundle of the same stanzas, for a header and a payload that an age tool makes."""
    return header.bundle(_stanzas(file_key, None, [(wrapper, key), *others], context))


def seal(
    plaintext: bytes, wrapper: Wrapper, key: KeyRef, context: Context, others: Sequence[Wrap] = ()
) -> bytes:
    """Seal in memory; the answer is a complete age v1 file."""
    sealing = begin(wrapper, key, context, padded=len(plaintext) >= PAD_FROM_BYTES, others=others)
    return sealing.head + stream.seal(sealing.payload_key, plaintext)


def file_key_of(
    head: Header, wrapper: Wrapper, key: KeyRef, *, context: Context, bound: BoundStanzas | None = None
) -> bytes:
    """Unwrap and verify: header MAC, then context, then origin. DecryptFailed for every failure alike.

    ``key`` is the wrapper's own version, and the one in the context stanza, unless the caller chose it by
    ``bound``, which it read of this header: a file that several backends wrap names the first one's. A wrap
    that authenticates its AAD needs no origin.
    """
    bound = _of_key(head.stanzas, key, bound)
    file_key = _unwrap(head.stanzas, wrapper, key, binding.wrap_aad(key, bound.context))
    head.check_mac(file_key)
    binding.check_context(bound, file_key, key.tenant, context)
    _check_origin(bound, head.nonce, file_key, wrapper, (key, context))
    return file_key


def take_over(
    stanzas: Sequence[Stanza],
    wrapper: Wrapper,
    key: KeyRef,
    *,
    context: Context,
    bound: BoundStanzas | None = None,
) -> tuple[bytes, bool]:
    """As ``file_key_of``, for an age tool that checks the header MAC itself, and whether origin is proven.

    It is not where the origin stanza binds a nonce: that is behind the header, and not handed over.
    """
    bound = _of_key(stanzas, key, bound)
    file_key = _unwrap(stanzas, wrapper, key, binding.wrap_aad(key, bound.context))
    binding.check_context(bound, file_key, key.tenant, context)
    if wrapper.origin_key(key) is not None and bound.names_nonce:
        return file_key, False
    _check_origin(bound, b"", file_key, wrapper, (key, context))
    return file_key, True


def foreign_file_key(head: Header, wrapper: Wrapper, keys: Sequence[KeyRef]) -> tuple[bytes, KeyRef]:
    """Unwrap a file without our stanzas, by trying each key version. Only the header MAC vouches for it."""
    if scrypt.stanza_of(head.stanzas):  # a passphrase file: only the command, where a person is, opens it
        raise DecryptFailed
    for key in keys:
        try:
            file_key = _unwrap(head.stanzas, wrapper, key, b"")
        except NoMatch:
            continue
        head.check_mac(file_key)
        return file_key, key
    raise DecryptFailed


def open_(ciphertext: bytes, head: Header, file_key: bytes) -> bytes:
    """The plaintext of a file in memory whose file key is known."""
    payload = memoryview(ciphertext)[head.payload_offset :]
    return stream.open_(stream.payload_key(file_key, head.nonce), payload)


def _stanzas(file_key: bytes, nonce: bytes | None, wraps: Sequence[Wrap], context: Context) -> list[Stanza]:
    """Wraps, context and origin; the context stanza names the key of the first wrap."""
    bound = binding.context_stanza(file_key, wraps[0][1], context)
    stanzas = [each.wrap(file_key, ref, binding.wrap_aad(ref, bound)) for each, ref in wraps]
    stanzas.append(bound)
    for each, ref in wraps:
        mac_key = each.origin_key(ref)
        if mac_key is not None:
            stanzas.append(binding.origin_stanza(mac_key, file_key, nonce, key=ref, context=context))
    return stanzas


def _of_key(stanzas: Sequence[Stanza], key: KeyRef, known: BoundStanzas | None) -> BoundStanzas:
    bound = known or binding.read_stanzas(stanzas)
    if bound is None or bound.key_id != key.key_id or (known is None and bound.key_version != key.version):
        raise DecryptFailed
    return bound


def _check_origin(
    bound: BoundStanzas, nonce: bytes, file_key: bytes, wrapper: Wrapper, names: tuple[KeyRef, Context]
) -> None:
    key, context = names
    mac_key = wrapper.origin_key(key)
    if mac_key is None:  # the wrap authenticates its AAD
        return
    expected = binding.origin_tag(
        mac_key, file_key, nonce if bound.names_nonce else None, key=key, context=context
    )
    if not hmac.compare_digest(bound.origin or b"", expected):
        raise DecryptFailed


def _unwrap(stanzas: Sequence[Stanza], wrapper: Wrapper, key: KeyRef, aad: bytes) -> bytes:
    """The first stanza that opens. A malformed one fails the file, one for somebody else is passed over."""
    for stanza in stanzas:
        if stanza.type.startswith(binding.OWN_PREFIX) and stanza.type != binding.WRAP:
            continue
        try:
            return wrapper.unwrap(stanza, key, aad)
        except NoMatch:
            continue
    raise NoMatch
