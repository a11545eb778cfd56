"""The header of an age file: what parses is what would be written, and nothing else costs anything."""

from collections.abc import Iterable
from typing import Final

from kms_core.age import header
from kms_core.age.armor import VERSION_LINE
from kms_core.age.header import SYNC_LIMITS, Header, HeaderLimits
from kms_core.envelope import binding
from kms_protocol.errors import DecryptFailed, NotACiphertext, TooLarge
from support import cctv

MOST_BYTES: Final = 8 * 1024
WORDS: Final = (
    VERSION_LINE,
    b"\n-> ",
    b"\n--- ",
    b"-> X25519 ",
    b"kms-service/context 1 ",
    b"kms-service/origin 1\n",
    b"kms-service/wrap ",
    b"kms-service/pad 0",
    b"-> scrypt ",
    b"A" * 43,
    b"A" * 64 + b"\n",
)
_SMALL: Final = HeaderLimits(header_bytes=1024, stanzas=4)


def seeds() -> Iterable[bytes]:
    return [vector.file[:MOST_BYTES] for vector in cctv.load() if not vector.armored]


def check(data: bytes) -> None:
    for limits in (SYNC_LIMITS, _SMALL):
        try:
            head = header.parse(data, limits)
        except (NotACiphertext, TooLarge, DecryptFailed):
            continue
        assert head.size <= limits.header_bytes
        assert len(head.stanzas) <= limits.stanzas
        assert head.nonce == data[head.size : head.payload_offset]
        assert written(head) == data[: head.size]
        assert header.read_by(lambda at, size: data[at : at + size], limits) == head
        _bound(head)


def written(head: Header) -> bytes:
    """The header as a writer with this MAC would put it."""
    rendered = b"".join(map(header.render_stanza, head.stanzas))
    return VERSION_LINE + rendered + b"--- " + header.b64encode(head.mac) + b"\n"


def _bound(head: Header) -> None:
    """Our own stanzas, if there are any."""
    try:
        bound = binding.read(head.stanzas)
    except DecryptFailed:
        return
    ours = [stanza for stanza in head.stanzas if stanza.type.startswith(binding.OWN_PREFIX)]
    assert (bound is None) == (not ours)
    for wrap in bound.wraps if bound else ():
        assert 0 < len(wrap.body) <= binding.MAX_WRAP_BYTES
