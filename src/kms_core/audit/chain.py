"""What binds one line to all before it. Pure functions over bytes; docs/audit.md has the same in words.

A line is ``body + ,"head":"<64 hex digits>"}``. Its head is SHA-256(head of the line before ||
SHA-256(body)), and 32 zero bytes stand before the first line. So the head of a line stands for every byte
before it, and a proof for one line needs the digests of the lines after it, not the lines.
"""

from collections.abc import Iterable
from hashlib import sha256
from typing import Final

import msgspec

from kms_protocol.wire import NOT_JSON

ZERO: Final = bytes(32)
HEAD: Final = b',"head":"'
END: Final = b'"}'
TAIL_BYTES: Final = len(HEAD) + 64 + len(END)
SIGNATURE: Final = b',"signature":"'
_SIGNATURE_CHARS: Final = 88  # base64 of 64 bytes
_SIGNED_TAIL: Final = len(SIGNATURE) + _SIGNATURE_CHARS + 1
LABEL: Final = b"kms-service/audit-checkpoint/1\n"

OPEN: Final = "open"
CHECKPOINT: Final = "checkpoint"
ROTATED: Final = "rotated"
CLOSED: Final = "closed"
RESUMED: Final = "resumed"
RETIRED: Final = "retired"
SIGNED: Final = frozenset({CHECKPOINT, ROTATED, CLOSED})
ENDS: Final = frozenset({ROTATED, CLOSED})
"""Kinds of the last line of a file: its process writes nothing behind it."""


class ChainHead(msgspec.Struct, frozen=True, array_like=True):
    """The last line of a chain, as somebody saw it: number, head (hex), and when its file was opened."""

    seq: int
    head: str
    opened: str


class ChainLine(msgspec.Struct, frozen=True, kw_only=True):
    """Any line, as far as readers of chains need it. Operations have no ``kind``."""

    seq: int
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
    """A line without its newline, decoded; None if it is not one."""
    try:
        return _decode(line)
    except NOT_JSON:
        return None


def digest(body: bytes) -> bytes:
    return sha256(body).digest()


def head_after(before: bytes, body: bytes) -> bytes:
    """32 bytes."""
    return sha256(before + sha256(body).digest()).digest()


def follow(head: bytes, digests: Iterable[bytes]) -> bytes:
    """The head after further lines, of which only the digests are known."""
    for each in digests:
        head = sha256(head + each).digest()
    return head


def seal(before: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The finished line, with its newline, and its head."""
    head = head_after(before, body)
    return b"%b%b%b%b\n" % (body, HEAD, head.hex().encode(), END), head


def body_of(line: bytes) -> bytes:
    """What the head of a line (without newline) is made over."""
    return line[:-TAIL_BYTES]


def claimed_head(line: bytes) -> bytes | None:
    """The head that a line says it has; None if it does not end as a line does."""
    tail = line[-TAIL_BYTES:]
    if not (tail.startswith(HEAD) and tail.endswith(END) and len(tail) == TAIL_BYTES):
        return None
    return octets(tail[len(HEAD) : -len(END)].decode("latin-1"))


def octets(text: str) -> bytes | None:
    """The bytes that hex digits stand for, in lower case as a trail writes them; None for any other text."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        return None
    return found if found.hex() == text else None


def is_sound(before: bytes, line: bytes) -> bool:
    """Whether the line says the head that follows from what stands before it."""
    return claimed_head(line) == head_after(before, body_of(line))


def text_to_sign(unsigned: bytes) -> bytes:
    """``unsigned`` is the body up to its signature; the head of the line before is in it, as ``previous``."""
    return LABEL + unsigned


def parts_of_signed(line: bytes) -> tuple[bytes, str] | None:
    """The unsigned body and the signature (base64) of a signed line; None if it has none at its end."""
    body = body_of(line)
    unsigned, rest = body[:-_SIGNED_TAIL], body[-_SIGNED_TAIL:]
    if not rest.startswith(SIGNATURE) or not rest.endswith(b'"'):
        return None
    return unsigned, rest[len(SIGNATURE) : -1].decode("ascii", "replace")
