"""ASCII armor: an age file as text, read strictly; knows nothing of what is inside.

Source: C2SP age specification, "ASCII armor": strict PEM (RFC 7468) in lines of 64 columns, padded
canonical base64, LF or CRLF. Only whitespace may stand around it, at most 1 KiB on either side.
"""

import binascii
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from kms_protocol.errors import DecryptFailed, NotACiphertext

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

BEGIN: Final = b"-----BEGIN AGE ENCRYPTED FILE-----"
_END: Final = b"-----END AGE ENCRYPTED FILE-----"
_COLUMNS: Final = 64
_LINE: Final = _COLUMNS + 1
_LINE_BYTES: Final = 48
_AROUND: Final = 1024
_PIECE: Final = 64 * 1024


class ByteSource(Protocol):
    """A blocking binary stream."""

    def read(self, size: int, /) -> bytes | None:
        """Some bytes; none at the end."""


class ByteTarget(Protocol):
    """A binary stream that takes all it is given."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``."""


def armor(data: bytes) -> bytes:
    """An age file as text, with LF line ends."""
    text = io.BytesIO()
    writer = ArmorWriter(text)
    for start in range(0, len(data), _PIECE):
        writer.write(data[start : start + _PIECE])
    writer.finish()
    return text.getvalue()


def dearmor(text: bytes) -> bytes:
    """The age file in an armored text; errors as ``ArmorReader``."""
    return b"".join(_decoded(io.BytesIO(text)))


class ArmorReader(io.RawIOBase):
    """The age file behind an armored stream, as a raw binary stream.

    Reading raises NotACiphertext if no armor begins there, and DecryptFailed on any departure from the
    format, be it cut short or followed by more than whitespace.
    """

    def __init__(self, source: ByteSource) -> None:
        super().__init__()
        self._pieces = _decoded(source)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        size = min(len(target), len(self._rest))
        target[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


class ArmorWriter:
    """Armors what is written to it. Without ``finish`` the text has no end, and no reader takes it."""

    def __init__(self, target: ByteTarget) -> None:
        self._target = target
        self._held = b""
        self._begun = False

    def write(self, data: "ReadableBuffer", /) -> int:
        """Take all of ``data``; whole lines go out."""
        self._begin()
        text = self._held + bytes(data)
        whole = len(text) - len(text) % _LINE_BYTES
        self._target.write(_lines(text[:whole]))
        self._held = text[whole:]
        return memoryview(data).nbytes

    def finish(self) -> None:
        """Write the last line and the end; the target stays open."""
        self._begin()
        self._target.write(b"%b%b\n" % (_lines(self._held), _END))

    def _begin(self) -> None:
        if not self._begun:
            self._target.write(BEGIN + b"\n")
            self._begun = True


def _lines(data: bytes) -> bytes:
    text = binascii.b2a_base64(data, newline=False)
    rows = [text[start : start + _COLUMNS] for start in range(0, len(text), _COLUMNS)]
    return b"\n".join([*rows, b""])


def _decoded(source: ByteSource) -> Iterator[bytes]:
    pieces = _pieces(source)
    text = _after_begin(pieces)
    while (dash := text.find(b"-")) == -1:
        whole = max(0, len(text) - 1) // _LINE * _LINE  # a line that ends the text may be the last
        yield _decode_full_lines(text[:whole])
        piece = next(pieces, None)
        if piece is None:
            raise DecryptFailed
        text = text[whole:] + piece
    yield _decode_last_lines(text[:dash])
    _check_end(text[dash:], pieces)


def _pieces(source: ByteSource) -> Iterator[bytes]:
    """The text with LF line ends."""
    held = b""
    while piece := source.read(_PIECE):
        text = held + piece
        held = text[-1:] if text.endswith(b"\r") else b""
        yield text.removesuffix(held).replace(b"\r\n", b"\n") if b"\r" in text else text
    if piece is None:
        raise BlockingIOError("the stream is not in blocking mode")
    yield held


def _after_begin(pieces: Iterator[bytes]) -> bytes:
    text = b""
    for piece in pieces:
        text += piece
        if len(text) > _AROUND + len(BEGIN):
            break
    begin = text.lstrip()
    if not begin.startswith(BEGIN) or len(text) - len(begin) > _AROUND:
        raise NotACiphertext("Neither an age file nor an armored one")
    if not begin.startswith(b"\n", len(BEGIN)):
        raise DecryptFailed
    return begin[len(BEGIN) + 1 :]


def _decode_full_lines(lines: bytes) -> bytes:
    text = lines.replace(b"\n", b"")
    count = len(lines) // _LINE
    if lines[_COLUMNS::_LINE] != b"\n" * count or len(text) != count * _COLUMNS or b"=" in text:
        raise DecryptFailed
    return _decode(text)


def _decode_last_lines(lines: bytes) -> bytes:
    text = lines.replace(b"\n", b"")
    full, short = divmod(len(text), _COLUMNS)
    rows = full + bool(short)
    placed = lines[_COLUMNS::_LINE] == b"\n" * full and lines.endswith(b"\n" * bool(rows))
    if not placed or len(lines) != len(text) + rows:
        raise DecryptFailed
    data = _decode(text)
    if binascii.b2a_base64(data[len(data) // 3 * 3 :], newline=False) not in {b"", text[-4:]}:
        raise DecryptFailed  # spare bits are set
    return data


def _decode(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as exc:
        raise DecryptFailed from exc


def _check_end(text: bytes, pieces: Iterator[bytes]) -> None:
    for piece in pieces:
        text += piece
        if len(text) > _AROUND + len(_END):
            break
    around = text.removeprefix(_END)
    if len(around) == len(text) or len(around) > _AROUND or around.strip() or around[:1] not in {b"", b"\n"}:
        raise DecryptFailed
