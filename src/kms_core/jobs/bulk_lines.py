"""Items of bulk jobs as lines of NDJSON: read, checked, and cut out of a stream. Knows no key."""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, TooLarge

ENVELOPE_BYTES: Final = 64 * 1024  # what a ciphertext may be longer than its plaintext
PART_ITEMS: Final = 500
_MAX_LINE_BYTES: Final = 4 * 1024 * 1024
decode: Final = msgspec.json.Decoder(wire.JobItem).decode


def check_item(kind: wire.JobKind, index: int, item: wire.JobItem, limit_bytes: int) -> None:
    """Refuse an item that lacks what its kind needs, or whose plaintext is above the limit."""
    given, other, wanted = item.ciphertext, item.plaintext, "ciphertext"
    if kind == "encrypt":
        given, other, wanted = item.plaintext, item.ciphertext, "plaintext"
    else:
        limit_bytes += ENVELOPE_BYTES
    if given is None or other is not None:
        raise InvalidRequest(f"Item {index} needs {wanted}, and nothing else, for {kind}")
    if len(given) > limit_bytes:
        raise TooLarge(f"Item {index} is above {limit_bytes} bytes: upload it as a file")


def parse_line(index: int, line: bytes) -> wire.JobItem:
    """One line of an NDJSON submission; InvalidRequest names the line, never its content."""
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"Line {index + 1} is not an item ({type(exc).__name__})") from None


def lines(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The lines of a stream of pieces, without their newline; empty ones are passed over."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + bytes(piece)).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise TooLarge(f"A line is above {_MAX_LINE_BYTES} bytes")
        yield from filter(None, whole)
    if rest:
        yield rest
