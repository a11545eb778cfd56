"""The textual header of an age v1 file: its strict grammar, parsed in linear time, and its MAC.

Source: C2SP age specification, "Header". A header is the version line, one or more stanzas, and the MAC line.
The MAC covers the received bytes up to and including ``---``.
"""

import binascii
import hmac
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Struct

from kms_core.age.armor import BEGIN, VERSION_LINE
from kms_protocol.errors import DecryptFailed, NotACiphertext, TooLarge

KEY_BYTES: Final = 32
_SHA256: Final = SHA256()
BUNDLE: Final = "kms-service/bundle"
BUNDLE_VERSION: Final = "1"
FILE_KEY_BYTES: Final = 16
NONCE_BYTES: Final = 16
_FOOTER: Final = b"\n--- "
_MAC_LINE_BYTES: Final = len("--- ") + 43 + 1
_COLUMNS: Final = 64
_BASE64: Final = string.ascii_uppercase.encode() + string.ascii_lowercase.encode() + b"0123456789+/"
_ENDS: Final = ((b"", _BASE64), (b"", b""), (b"==", _BASE64[::16]), (b"=", _BASE64[::4]))
"""By length modulo 4: the omitted padding, and the last characters that leave no spare bits."""
_ARGUMENTS: Final = re.compile(rb"-> [!-~]+(?: [!-~]+)*")
_FIRST_READ_BYTES: Final = 4096 + NONCE_BYTES
_FOOT_BYTES: Final = _MAC_LINE_BYTES + NONCE_BYTES


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """Derive 32 bytes. An empty salt means 32 zero bytes."""
    return HKDF(_SHA256, KEY_BYTES, salt, info).derive(secret)


def check_start(content: memoryview) -> None:
    """Raise NotACiphertext unless content begins as an age file without armor."""
    if not bytes(content[: len(VERSION_LINE)]).startswith(VERSION_LINE):
        raise NotACiphertext


def is_age_file(content: bytes) -> bool:
    """Return whether content begins as an age file does, armored or not."""
    return content.startswith((VERSION_LINE, BEGIN))


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """The largest header that is parsed, in bytes and in stanzas."""

    header_bytes: int
    stanzas: int


SYNC_LIMITS: Final = HeaderLimits(header_bytes=32 * 1024, stanzas=64)
FILE_LIMITS: Final = HeaderLimits(header_bytes=256 * 1024, stanzas=4096)


class Stanza(Struct, frozen=True):
    """``-> type argument…`` and a body; ``args[0]`` is the type."""

    args: tuple[str, ...]
    body: bytes

    @property
    def type(self) -> str:
        return self.args[0]


class Header(Struct, frozen=True):
    """A parsed header and the 16-byte payload nonce after it. ``signed`` are the bytes that the MAC covers.

    ``stanzas`` contains the stanzas of a bundle in place of the bundle.
    """

    stanzas: tuple[Stanza, ...]
    signed: bytes
    mac: bytes
    size: int
    nonce: bytes

    @property
    def payload_offset(self) -> int:
        """The offset of the first chunk."""
        return self.size + NONCE_BYTES

    def check_mac(self, file_key: bytes) -> None:
        """Raise DecryptFailed unless the MAC is that of the file key."""
        if not hmac.compare_digest(self.mac, _mac(file_key, self.signed)):
            raise DecryptFailed


def parse(data: bytes | memoryview, limits: HeaderLimits) -> Header:
    """Parse the header and the nonce at the start of ``data``; the payload is not read.

    Raises NotACiphertext without the version line, TooLarge above ``limits``, and DecryptFailed for any
    other violation of the grammar, such as a missing end or nonce.
    """
    text = bytes(data[: limits.header_bytes + NONCE_BYTES])
    if not text.startswith(VERSION_LINE):
        raise NotACiphertext
    end = text.find(_FOOTER)
    size = end + 1 + _MAC_LINE_BYTES
    if (end == -1 and len(text) > limits.header_bytes) or size > limits.header_bytes:
        raise TooLarge(f"The header is above {limits.header_bytes} bytes")
    nonce = text[size : size + NONCE_BYTES]
    if end < len(VERSION_LINE) or len(nonce) != NONCE_BYTES or text[size - 1 : size] != b"\n":
        raise DecryptFailed
    if text.count(b"\n-> ", 0, end) > limits.stanzas:
        raise TooLarge(f"The header has more than {limits.stanzas} stanzas")
    mac = b64decode(text[end + len(_FOOTER) : size - 1])  # 43 characters: 32 bytes
    stanzas = unbundled(_stanzas(text[len(VERSION_LINE) : end].split(b"\n")), limits)
    return Header(stanzas, text[: end + len(_FOOTER) - 1], mac, size, nonce)


def parse_stanzas(text: bytes, limits: HeaderLimits) -> tuple[Stanza, ...]:
    """Parse stanzas without the other lines of a header; each line ends with LF.

    Raises TooLarge above ``limits``, DecryptFailed for any violation of the grammar, and without a stanza.
    """
    if len(text) > limits.header_bytes or text.count(b"\n-> ") >= limits.stanzas:
        raise TooLarge(f"Stanzas are above {limits.header_bytes} bytes or {limits.stanzas} in number")
    if not text.endswith(b"\n"):
        raise DecryptFailed
    return _stanzas(text[:-1].split(b"\n"))


def bundle(stanzas: Iterable[Stanza]) -> Stanza:
    """Make ``-> kms-service/bundle 1`` of stanzas: an age plugin returns one stanza for each recipient."""
    return Stanza((BUNDLE, BUNDLE_VERSION), b"".join(map(render_stanza, stanzas)))


def unbundled(stanzas: Iterable[Stanza], limits: HeaderLimits) -> tuple[Stanza, ...]:
    """Replace each bundle by its stanzas. A bundle within a bundle stays, and no reader knows its type.

    Raises DecryptFailed, TooLarge.
    """
    found: list[Stanza] = []
    for stanza in stanzas:
        if stanza.type != BUNDLE:
            found.append(stanza)
        elif stanza.args != (BUNDLE, BUNDLE_VERSION) or not stanza.body.endswith(b"\n"):
            raise DecryptFailed
        else:
            found += _stanzas(stanza.body[:-1].split(b"\n"))
        if len(found) > limits.stanzas:
            raise TooLarge(f"The header has more than {limits.stanzas} stanzas")
    return tuple(found)


def read_by(read_at: Callable[[int, int], bytes], limits: HeaderLimits) -> Header:
    """Parse the header of a source, where ``read_at(position, length)`` returns up to ``length`` bytes.

    At most ``limits`` are read. Raises as ``parse``.
    """
    start = read_at(0, _FIRST_READ_BYTES)
    if len(start) == _FIRST_READ_BYTES and start.rfind(_FOOTER) not in range(len(start) - _FOOT_BYTES):
        start = read_at(0, limits.header_bytes + NONCE_BYTES)
    return parse(start, limits)


def render(stanzas: Iterable[Stanza], file_key: bytes) -> bytes:
    """The bytes of a header with these stanzas, MAC line included."""
    signed = VERSION_LINE + b"".join(map(render_stanza, stanzas)) + b"---"
    return signed + b" " + b64encode(_mac(file_key, signed)) + b"\n"


def render_stanza(stanza: Stanza) -> bytes:
    """Return the text of a stanza, its body in base64 of 64 columns (C2SP age, "Recipient stanza")."""
    body = b64encode(stanza.body)
    if len(body) < _COLUMNS:
        return f"-> {' '.join(stanza.args)}\n".encode("ascii") + body + b"\n"
    rows = [body[start : start + _COLUMNS] for start in range(0, len(body) + 1, _COLUMNS)]
    return f"-> {' '.join(stanza.args)}\n".encode("ascii") + b"\n".join(rows) + b"\n"


def b64encode(data: bytes) -> bytes:
    """Standard base64 without padding, as everywhere in an age header."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=")


def b64decode(text: bytes) -> bytes:
    """Decode canonical unpadded base64; DecryptFailed on anything else, spare bits included."""
    padding, last = _ENDS[len(text) % 4]
    if text[-1:] not in last:
        raise DecryptFailed
    try:
        return binascii.a2b_base64(text + padding, strict_mode=True)
    except binascii.Error as exc:
        raise DecryptFailed from exc


def _mac(file_key: bytes, signed: bytes) -> bytes:
    return hmac.digest(hkdf(file_key, salt=b"", info=b"header"), signed, "sha256")


def _stanzas(lines: list[bytes]) -> tuple[Stanza, ...]:
    stanzas: list[Stanza] = []
    position = 0
    while position < len(lines):
        if not _ARGUMENTS.fullmatch(lines[position]):
            raise DecryptFailed
        start = position + 1
        end = start
        while end < len(lines) and len(lines[end]) == _COLUMNS:
            end += 1
        if end == len(lines) or len(lines[end]) > _COLUMNS:  # a body ends with a line below 64 columns
            raise DecryptFailed
        arguments = tuple(lines[position][3:].decode("ascii").split(" "))
        stanzas.append(Stanza(arguments, b64decode(b"".join(lines[start : end + 1]))))
        position = end + 1
    return tuple(stanzas)
