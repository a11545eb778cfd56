"""The encryption context: key-value pairs that are bound to a ciphertext, and their canonical bytes.

Accepted forms (docs/design.md, Contexts): ``env=prod,service=api``, or a mapping where a value holds a comma.
The order of pairs does not matter. ``None``, ``""`` and ``{}`` all mean no context.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, Self

from kms_protocol.errors import InvalidContext
from kms_protocol.units import parse_time

MAX_PAIRS: Final = 64
MAX_BYTES: Final = 8 * 1024
RESERVED_PREFIX: Final = "kms:"
NOT_AFTER: Final = "not_after"
NUMBER: Final = "kms:transit"
"""The pair that the Vault API adds: its mark, and the number of the key version, as ``v3``."""
_LENGTH_BYTES: Final = 4
_CACHED_LENGTH: Final = 256  # the cache stays below 1 MiB


def length_prefixed(*parts: bytes) -> bytes:
    """Join parts, each after its 4-byte length, so that different lists give different bytes."""
    return b"".join([len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in parts])


@dataclass(frozen=True, slots=True)
class Context:
    """Sorted pairs. Equal contexts have equal canonical bytes. ``repr`` hides values, which may be secret."""

    pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    prefixed: bytes = field(init=False, repr=False, compare=False)
    """The canonical bytes after their length, as part of an authenticated text."""

    def __post_init__(self) -> None:
        parts = [part.encode() for pair in self.pairs for part in pair]
        object.__setattr__(self, "prefixed", length_prefixed(length_prefixed(*parts)))

    @classmethod
    def parse(cls, given: str | Mapping[str, str] | None) -> Self:
        """Parse either form.

        Raises InvalidContext for a missing ``=``, an empty or repeated key, a control character, a
        reserved key (``kms:…``), more than 64 pairs or more than 8 KiB in total.
        """
        if not given:
            return cls()
        if isinstance(given, str):
            return cls._cached(given) if len(given) <= _CACHED_LENGTH else cls._checked(_split(given))
        pairs = tuple(given.items())
        is_short = sum(len(key) + len(value) for key, value in pairs) <= _CACHED_LENGTH
        return cls._cached(pairs) if is_short else cls._checked(pairs)

    @classmethod
    @lru_cache(maxsize=1024)
    def _cached(cls, given: str | tuple[tuple[str, str], ...]) -> Self:
        """Parse a context once for repeated calls: parsing takes a tenth of an encryption."""
        return cls._checked(_split(given) if isinstance(given, str) else given)

    @classmethod
    def reserved(cls, pairs: Mapping[str, str]) -> Self:
        """Return a context with reserved keys, which ``parse`` refuses. Raises InvalidContext above 8 KiB."""
        if sum(len(key) + len(value) for key, value in pairs.items()) > MAX_BYTES:
            raise InvalidContext(f"context and associated_data have at most {MAX_BYTES} bytes in base64")
        return cls(tuple(sorted(pairs.items())))

    @classmethod
    def _checked(cls, items: Iterable[tuple[str, str]]) -> Self:
        pairs: dict[str, str] = {}
        size = 0
        for key, value in items:
            size += len(key.encode("utf-8", "surrogatepass")) + len(value.encode("utf-8", "surrogatepass"))
            if len(pairs) >= MAX_PAIRS or size > MAX_BYTES:
                raise InvalidContext(f"A context has at most {MAX_PAIRS} pairs and {MAX_BYTES} bytes")
            _check_pair(key, value, len(pairs))
            if key in pairs:
                raise InvalidContext(f"Pair {len(pairs) + 1} of the context repeats an earlier key")
            pairs[key] = value
        return cls(tuple(sorted(pairs.items(), key=lambda pair: pair[0].encode())))

    def canonical(self) -> bytes:
        """Return the authenticated bytes: pairs sorted by key, each key and value length-prefixed."""
        return self.prefixed[_LENGTH_BYTES:]

    def not_after(self) -> datetime | None:
        """Return the time of the pair ``not_after``, after which decryption is refused; None without it.

        Raises InvalidContext if the value is not an RFC 3339 time with an offset.
        """
        text = dict(self.pairs).get(NOT_AFTER)
        if text is None:
            return None
        try:
            return parse_time(text)
        except ValueError as exc:
            raise InvalidContext(f"{NOT_AFTER} {exc}") from exc

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, which may be logged; values may not."""
        return tuple(key for key, _ in self.pairs)

    def is_kept_by(self, new: Self) -> bool:
        """Return whether ``new`` has the same pairs, except for the number of a key version."""
        both = zip(self.pairs, new.pairs, strict=False)
        return self.keys == new.keys and all(old == now or old[0] == NUMBER for old, now in both)

    def __bool__(self) -> bool:
        return bool(self.pairs)


def _split(text: str) -> Iterable[tuple[str, str]]:
    for number, pair in enumerate(text.split(","), start=1):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidContext(f"Pair {number} of the context has no '=': write key=value,key=value")
        yield key.strip(" "), value.strip(" ")


def _check_pair(key: str, value: str, index: int) -> None:
    where = f"Pair {index + 1} of the context"
    if not key:
        raise InvalidContext(f"{where} has an empty key")
    if key.startswith(RESERVED_PREFIX):
        raise InvalidContext(
            f"{where} uses a reserved key: keys that begin with 'kms:' belong to the service"
        )
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in key + value):
        raise InvalidContext(f"{where} contains a control character")
