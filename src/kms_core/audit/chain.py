"""Lines of an audit chain: their heads, signatures and times. Pure functions over bytes (docs/audit.md).

A line is ``body + ,"head":"<64 hex digits>"}``. Its head is SHA-256(head of the previous line ||
SHA-256(body)); the head before the first line is 32 zero bytes. The head of a line therefore commits to
every byte before it, and a proof for one line needs the digests of later lines only.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Final

import msgspec

from kms_protocol.units import time_text
from kms_protocol.wire import NOT_JSON

_SECOND_NS: Final = 1_000_000_000
ZERO: Final = bytes(32)
HEAD: Final = b',"head":"'
END: Final = b'"}'
TAIL_BYTES: Final = len(HEAD) + 64 + len(END)
SIGNATURE: Final = b',"signature":"'
_SIGNATURE_CHARS: Final = 88  # base64 of 64 bytes
_SIGNED_TAIL: Final = len(SIGNATURE) + _SIGNATURE_CHARS + 1
LABEL: Final = b"kms-service/audit-checkpoint/1\n"
"""Begins the text to sign; the body up to its signature follows, in which ``previous`` is the head before."""
OPEN: Final = "open"
CHECKPOINT: Final = "checkpoint"
ROTATED: Final = "rotated"
CLOSED: Final = "closed"
RESUMED: Final = "resumed"
RETIRED: Final = "retired"
SIGNED: Final = frozenset({CHECKPOINT, ROTATED, CLOSED})
ENDS: Final = frozenset({ROTATED, CLOSED})
"""Kinds of the last line of a segment: its process writes nothing after it."""
LineNumber = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class LineClock:
    """Times of lines, UTC to the microsecond. They never go back, even if the clock does."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._last = 0
        self._second, self._text = -1, b""

    def __call__(self) -> tuple[bytes, bytes]:
        """The time, and a field with the time of the clock if that is a second or more behind."""
        now = self._clock()
        at = self._last = max(now, self._last)
        second, rest = divmod(at, _SECOND_NS)
        if second != self._second:
            self._second, self._text = second, time_text(second)[:-1].encode()
        clock = b'"clock":"%b",' % text_of(_moment(now)).encode() if at - now >= _SECOND_NS else b""
        return b"%b.%06dZ" % (self._text, rest // 1000), clock


def _moment(at_ns: int) -> datetime:
    second, rest = divmod(at_ns, _SECOND_NS)
    return datetime.fromtimestamp(second, UTC).replace(microsecond=rest // 1000)


class ChainHead(msgspec.Struct, frozen=True, array_like=True):
    """The last line of a chain as another saw it: number, head (hex), opening time of its segment."""

    seq: LineNumber
    head: str
    opened: str


class ChainLine(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a line that belong to the chain. Lines of operations have no ``kind``."""

    seq: LineNumber
    chain: str
    time: str
    head: str = ""
    kind: str = ""
    stage: str = ""
    effect: str = ""
    operation: str = ""
    clock: str = ""
    reason: str = ""
    segment: int = 0
    previous: str = ""
    previous_opened: str = ""
    public_key: str = ""
    key: str = ""
    opened: str = ""
    before: str = ""
    refused: int = 0
    heads: dict[str, ChainHead] = {}


_decode: Final = msgspec.json.Decoder(ChainLine).decode


def read(line: bytes) -> ChainLine | None:
    """Decode a line without its newline; None if it is not a line of a chain."""
    try:
        return _decode(line)
    except NOT_JSON:
        return None


def digest(body: bytes) -> bytes:
    """Return the SHA-256 of a line's body (32 bytes)."""
    return sha256(body).digest()


def head_after(before: bytes, body: bytes) -> bytes:
    """The head (32 bytes) of a line with this body, after a line with the head ``before``."""
    return sha256(before + sha256(body).digest()).digest()


def follow(head: bytes, digests: Iterable[bytes]) -> bytes:
    """The head after further lines, given by the digests of their bodies."""
    for each in digests:
        head = sha256(head + each).digest()
    return head


def seal(before: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The finished line, with its newline, and its head."""
    head = head_after(before, body)
    return b"%b%b%b%b\n" % (body, HEAD, head.hex().encode(), END), head


def body_of(line: bytes) -> bytes:
    """The part of a line (without newline) that its head is computed over."""
    return line[:-TAIL_BYTES]


def claimed_head(line: bytes) -> bytes | None:
    """The head in a line (32 bytes), unchecked; None if the line does not end with one."""
    tail = line[-TAIL_BYTES:]
    if not (tail.startswith(HEAD) and tail.endswith(END) and len(tail) == TAIL_BYTES):
        return None
    return from_hex(tail[len(HEAD) : -len(END)].decode("latin-1"))


def from_hex(text: str) -> bytes | None:
    """The bytes of lower-case hex digits; None for any other text."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        return None
    return found if found.hex() == text else None


def is_sound(before: bytes, line: bytes) -> bool:
    """Return whether the head in the line is the right one after the head ``before``."""
    return claimed_head(line) == head_after(before, body_of(line))


def parts_of_signed(line: bytes) -> tuple[bytes, str] | None:
    """The unsigned body and the signature (base64) of a signed line; None for a line without a signature."""
    body = body_of(line)
    unsigned, rest = body[:-_SIGNED_TAIL], body[-_SIGNED_TAIL:]
    if not rest.startswith(SIGNATURE) or not rest.endswith(b'"'):
        return None
    return unsigned, rest[len(SIGNATURE) : -1].decode("ascii", "replace")


def text_of(at: datetime) -> str:
    """A time in the format of lines (RFC 3339, microseconds, Z)."""
    return time_text(at, "microseconds")
