"""ASCII armor: age files as text, parsed strictly.

Source: C2SP age specification, "ASCII armor": strict PEM (RFC 7468) in lines of 64 columns, padded
canonical base64, LF or CRLF. Before and after it only whitespace is allowed, at most 1 KiB each.
"""

import binascii
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from kms_protocol.errors import DecryptFailed, NotACiphertext

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, SupportsRead, SupportsWrite, WriteableBuffer

    ByteSource = SupportsRead[bytes | None]  # blocking; b"" is the end

VERSION_LINE: Final = b"age-encryption.org/v1\n"
BEGIN: Final = b"-----BEGIN AGE ENCRYPTED FILE-----"
_END: Final = b"-----END AGE ENCRYPTED FILE-----"
_COLUMNS: Final = 64
_LINE: Final = _COLUMNS + 1
_LINE_BYTES: Final = 48
_AROUND: Final = 1024
_BLOCK_BYTES: Final = 64 * 1024


def dearmor(text: bytes) -> bytes:
    """The age file in an armored text. Raises as ``ArmorReader``."""
    return b"".join(_decoded(io.BytesIO(text)))


class ArmorReader(io.RawIOBase):
    """The age file in an armored stream, as a raw binary stream.

    Reading raises NotACiphertext without a begin line, and DecryptFailed for any other violation of the
    format, such as a missing end or trailing data.
    """

    def __init__(self, source: "ByteSource") -> None:
        super().__init__()
        self._blocks = _decoded(source)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        size = min(len(target), len(self._rest))
        target[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


class ArmorWriter:
    """Armors the bytes written to it, with LF line ends.

    Without ``finish`` the text has no end line, and readers refuse it.
    """

    def __init__(self, target: "SupportsWrite[bytes]") -> None:
        """``target`` accepts all bytes of a write."""
        self._target = target
        self._begin = BEGIN + b"\n"  # empty once it is written
        self._held = b""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Accept all of ``data``, and write complete lines."""
        text = self._held + bytes(data)
        whole = len(text) - len(text) % _LINE_BYTES
        self._target.write(self._begin + _lines(text[:whole]))
        self._begin, self._held = b"", text[whole:]
        return memoryview(data).nbytes

    def finish(self) -> None:
        """Write the last line and the end line; the target stays open."""
        self._target.write(self._begin + _lines(self._held) + _END + b"\n")


def _lines(data: bytes) -> bytes:
    text = binascii.b2a_base64(data, newline=False)
    rows = [text[start : start + _COLUMNS] for start in range(0, len(text), _COLUMNS)]
    return b"\n".join([*rows, b""])


def _decoded(source: "ByteSource") -> Iterator[bytes]:
    blocks = _blocks(source)
    text = _after_begin(blocks)
    while (dash := text.find(b"-")) == -1:
        whole = max(0, len(text) - 1) // _LINE * _LINE  # the last line of the text may be the last of all
        yield _decode_full_lines(text[:whole])
        block = next(blocks, None)
        if block is None:
            raise DecryptFailed
        text = text[whole:] + block
    yield _decode_last_lines(text[:dash])
    _check_end(text[dash:], blocks)


def _blocks(source: "ByteSource") -> Iterator[bytes]:
    """The blocks of the text, with LF line ends."""
    held = b""
    while block := source.read(_BLOCK_BYTES):
        text = held + block
        held = text[-1:] if text.endswith(b"\r") else b""
        yield text.removesuffix(held).replace(b"\r\n", b"\n") if b"\r" in text else text
    if block is None:
        raise BlockingIOError("the stream is not in blocking mode")
    yield held


def _after_begin(blocks: Iterator[bytes]) -> bytes:
    text = b""
    for block in blocks:
        text += block
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


def _check_end(text: bytes, blocks: Iterator[bytes]) -> None:
    for block in blocks:
        text += block
        if len(text) > _AROUND + len(_END):
            break
    around = text.removeprefix(_END)
    if len(around) == len(text) or len(around) > _AROUND or around.strip() or around[:1] not in {b"", b"\n"}:
        raise DecryptFailed
