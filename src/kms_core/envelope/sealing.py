"""Seal and open whole age files: file key, header, context and origin in the right order.

The wrapping key is a parameter (``Wrapper``); this module knows no settings, policy, tenant list or disk.
Every seal makes a fresh 16-byte file key and a fresh 16-byte payload nonce; no file key is ever used for
two payloads.
"""

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from kms_core.context import Context
from kms_core.envelope import binding, header, scrypt, stream
from kms_core.envelope.binding import KeyRef
from kms_core.envelope.header import FILE_KEY_BYTES, VERSION_LINE, Header, Stanza
from kms_core.envelope.x25519 import NoMatch
from kms_core.errors import DecryptFailed

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
    file_key, nonce = os.urandom(FILE_KEY_BYTES), os.urandom(stream.NONCE)
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
    bound = binding.context_stanza(file_key, key, context)
    wraps = [(wrapper, key), *others]
    stanzas = [each.wrap(file_key, ref, binding.wrap_aad(ref, bound)) for each, ref in wraps]
    stanzas.append(bound)
    for each, ref in wraps:
        mac_key = each.origin_key(ref)
        if mac_key is not None:
            tag = binding.origin_tag(mac_key, file_key, nonce, key=ref, context=context)
            stanzas.append(Stanza((binding.ORIGIN, binding.FORMAT_VERSION), tag))
    if padded:
        stanzas.append(binding.pad_stanza(stanzas, _FOOT_BYTES, len(VERSION_LINE), PADDED_HEADER_BYTES))
    return header.render(stanzas, file_key)


def seal(
    plaintext: bytes, wrapper: Wrapper, key: KeyRef, context: Context, others: Sequence[Wrap] = ()
) -> bytes:
    """Seal in memory; the answer is a complete age v1 file."""
    sealing = begin(wrapper, key, context, padded=len(plaintext) >= PAD_FROM_BYTES, others=others)
    return sealing.head + stream.seal(sealing.payload_key, plaintext)


def file_key_of(
    head: Header, wrapper: Wrapper, key: KeyRef, *, context: Context, named: str | None = None
) -> bytes:
    """Unwrap and verify: header MAC, then context, then origin. DecryptFailed for every failure alike.

    ``key`` is the wrapper's own version; ``named`` is the one in the context stanza where that is another
    (a file that several backends wrap). A wrap that authenticates its AAD needs no origin.
    """
    bound = binding.read(head)
    if bound is None or (bound.key_id, bound.key_version) != (key.key_id, named or key.version):
        raise DecryptFailed
    file_key = _unwrap(head, wrapper, key, binding.wrap_aad(key, bound.context))
    head.check_mac(file_key)
    binding.check_context(bound.context, file_key, replace(key, version=bound.key_version), context)
    mac_key = wrapper.origin_key(key)
    if mac_key is not None:
        expected = binding.origin_tag(mac_key, file_key, head.nonce, key=key, context=context)
        if not hmac.compare_digest(bound.origin or b"", expected):
            raise DecryptFailed
    return file_key


def foreign_file_key(head: Header, wrapper: Wrapper, keys: Sequence[KeyRef]) -> tuple[bytes, KeyRef]:
    """Unwrap a file without our stanzas, by trying each key version. Only the header MAC vouches for it."""
    if scrypt.stanza_of(head.stanzas):  # a passphrase file: only the command, where a person is, opens it
        raise DecryptFailed
    for key in keys:
        try:
            file_key = _unwrap(head, wrapper, key, b"")
        except NoMatch:
            continue
        head.check_mac(file_key)
        return file_key, key
    raise DecryptFailed


def open_(ciphertext: bytes, head: Header, file_key: bytes) -> bytes:
    """The plaintext of a file in memory whose file key is known."""
    payload = memoryview(ciphertext)[head.payload_offset :]
    return stream.open_(stream.payload_key(file_key, head.nonce), payload)


def _unwrap(head: Header, wrapper: Wrapper, key: KeyRef, aad: bytes) -> bytes:
    """The first stanza that opens. A malformed one fails the file, one for somebody else is passed over."""
    for stanza in head.stanzas:
        if stanza.type.startswith(binding.OWN_PREFIX) and stanza.type != binding.WRAP:
            continue
        try:
            return wrapper.unwrap(stanza, key, aad)
        except NoMatch:
            continue
    raise NoMatch
