"""Bech32 (BIP 173) without its limit of 90 characters, the text form of age keys."""

import re
from collections.abc import Iterable, Iterator
from typing import Final

_CHARSET: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_VALUES: Final = {char: value for value, char in enumerate(_CHARSET)}
_GENERATOR: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM_CHARS: Final = 6
_PREFIX: Final = re.compile("[!-~]+")


def encode(prefix: str, data: bytes) -> str:
    """Encode ``data`` behind ``prefix``; an upper-case prefix gives an upper-case string."""
    lower = prefix.lower()
    values = list(_regroup(data, 8, 5, pad=True))
    checksum = _polymod([*_expand(lower), *values, *[0] * _CHECKSUM_CHARS]) ^ 1
    values += [(checksum >> 5 * (5 - position)) & 31 for position in range(_CHECKSUM_CHARS)]
    text = lower + "1" + "".join(_CHARSET[value] for value in values)
    return text.upper() if prefix.isupper() else text


def decode(text: str) -> tuple[str, bytes]:
    """The prefix, in the case of the input, and the data.

    Raises ValueError for mixed case, a wrong character, checksum or padding. The error's text never contains
    the input, which may be a private key.
    """
    if text not in (text.lower(), text.upper()):
        raise ValueError("a key has mixed case")
    lower = text.lower()
    prefix, one, rest = lower.rpartition("1")
    if not one or not _PREFIX.fullmatch(prefix) or len(rest) < _CHECKSUM_CHARS:
        raise ValueError("not a Bech32 key")
    try:
        values = [_VALUES[char] for char in rest]
    except KeyError:
        raise ValueError("a key contains a character that Bech32 does not use") from None
    if _polymod([*_expand(prefix), *values]) != 1:
        raise ValueError("a key's checksum is wrong: it was mistyped or cut")
    data = bytes(_regroup(values[:-_CHECKSUM_CHARS], 5, 8, pad=False))
    return text[: len(prefix)], data


def decode_key(text: str, prefix: str, size: int, kind: str) -> bytes:
    """The ``size`` bytes of a key with this prefix, which may be in lower case.

    Raises ValueError as ``decode``, and for another key; it says that the text is not ``kind``.
    """
    found, data = decode(text)
    if found not in {prefix, prefix.lower()} or len(data) != size:
        raise ValueError(f"not {kind}: it should look like {prefix}1…")
    return data


def _polymod(values: Iterable[int]) -> int:
    checksum = 1
    for value in values:
        top = checksum >> 25
        checksum = (checksum & 0x1FFFFFF) << 5 ^ value
        for position, generator in enumerate(_GENERATOR):
            checksum ^= generator if (top >> position) & 1 else 0
    return checksum


def _expand(prefix: str) -> list[int]:
    return [ord(char) >> 5 for char in prefix] + [0] + [ord(char) & 31 for char in prefix]


def _regroup(values: Iterable[int], width: int, new_width: int, *, pad: bool) -> Iterator[int]:
    accumulator = bits = 0
    for value in values:
        accumulator = (accumulator << width | value) & 0xFFFF
        bits += width
        while bits >= new_width:
            bits -= new_width
            yield (accumulator >> bits) & ((1 << new_width) - 1)
    if pad and bits:
        yield (accumulator << (new_width - bits)) & ((1 << new_width) - 1)
    elif not pad and (bits >= width or accumulator & ((1 << bits) - 1)):
        raise ValueError("a key has bad padding")
