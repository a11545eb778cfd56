"""Items of bulk jobs as lines of NDJSON: read, checked, and cut out of a stream."""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, TooLarge
from kms_protocol.units import KiB, MiB

PLAINTEXT_BYTES: Final = 1 * MiB
"""The largest plaintext of an item, and of a call without a job: what is larger is streamed."""
CIPHERTEXT_BYTES: Final = PLAINTEXT_BYTES + 64 * KiB
RUN_ITEMS: Final = 500
"""Items between two places of the input at which a job can be cut; a part has one run, or several."""
MOST_PARTS: Final = 100
_MAX_LINE_BYTES: Final = 4 * 1024 * 1024
decode: Final = msgspec.json.Decoder(wire.JobItem).decode


def check_item(kind: wire.JobKind, index: int, item: wire.JobItem) -> None:
    """Refuse an item that lacks what its kind needs, or whose plaintext is above the limit."""
    given, other, wanted, most = item.ciphertext, item.plaintext, "ciphertext", CIPHERTEXT_BYTES
    if kind == "encrypt":
        given, other, wanted, most = item.plaintext, item.ciphertext, "plaintext", PLAINTEXT_BYTES
    if given is None or other is not None:
        raise InvalidRequest(f"Item {index} needs {wanted}, and nothing else, for {kind}")
    if len(given) > most:
        raise TooLarge(f"Item {index} is above {most} bytes: upload it as a file")


def parse_line(index: int, line: bytes) -> wire.JobItem:
    """One line of an NDJSON submission; InvalidRequest names the line, never its content."""
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"Line {index + 1} is not an item ({type(exc).__name__})") from None


def lines(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The lines of a stream of pieces, without their newline; empty ones are skipped."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + bytes(piece)).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise TooLarge(f"A line is above {_MAX_LINE_BYTES} bytes")
        yield from filter(None, whole)
    if rest:
        yield rest
