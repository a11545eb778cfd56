"""The encryption context: pairs of text bound to a ciphertext; parsing and canonical bytes.

Accepted forms (DESIGN §4): ``env=prod,service=api``, or a mapping where a value holds a comma.
The order of pairs does not matter. ``None``, ``""`` and ``{}`` all mean no context.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, Self

from kms_protocol.errors import InvalidContext

MAX_PAIRS: Final = 64
MAX_BYTES: Final = 8 * 1024
RESERVED_PREFIX: Final = "kms:"
NOT_AFTER: Final = "not_after"
NUMBER: Final = "kms:transit"
"""The pair of the Vault façade: the door that it came by, and the number of the key version, as ``v3``."""
_REPEATED_LENGTH: Final = 256  # what is kept of them stays below a megabyte


def length_prefixed(*parts: bytes) -> bytes:
    """Join parts so that no two lists of parts give the same bytes: each behind its 4-byte length."""
    return b"".join([len(part).to_bytes(4, "big") + part for part in parts])


@dataclass(frozen=True, slots=True)
class Context:
    """Sorted pairs; equal contexts have equal canonical bytes. Values are secret-ish: not in ``repr``."""

    pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    _canonical: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = [part.encode() for pair in self.pairs for part in pair]
        object.__setattr__(self, "_canonical", length_prefixed(*parts))

    @classmethod
    def parse(cls, given: str | Mapping[str, str] | None) -> Self:
        """Read either form.

        Raises InvalidContext on a missing ``=``, an empty or repeated key, a control character, a
        reserved key (``kms:…``), more than 64 pairs or more than 8 KiB in all.
        """
        if not given:
            return cls()
        if not isinstance(given, str):
            return cls._checked(given.items())
        return cls._repeated(given) if len(given) <= _REPEATED_LENGTH else cls._checked(_split(given))

    @classmethod
    @lru_cache(maxsize=1024)
    def _repeated(cls, text: str) -> Self:
        """Callers say the same context again and again; reading it is a tenth of a seal."""
        return cls._checked(_split(text))

    @classmethod
    def reserved(cls, pairs: Mapping[str, str]) -> Self:
        """Pairs of the service's own, which no caller can give by another door.

        Raises InvalidContext above 8 KiB.
        """
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
        """The bytes that are authenticated: pairs sorted by key, every key and value length-prefixed."""
        return self._canonical

    def get(self, key: str) -> str | None:
        return dict(self.pairs).get(key)

    def not_after(self) -> datetime | None:
        """The reserved pair ``not_after``: decrypt refuses after it. InvalidContext if it is no such time.

        RFC 3339, with an offset.
        """
        text = self.get(NOT_AFTER)
        if text is None:
            return None
        try:
            limit = datetime.fromisoformat(text)
        except ValueError as exc:
            raise InvalidContext("not_after must be an RFC 3339 time, as 2027-01-31T12:00:00Z") from exc
        if limit.tzinfo is None:
            raise InvalidContext("not_after needs an offset, as 2027-01-31T12:00:00Z")
        return limit

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys alone, which may be logged; values may not."""
        return tuple(key for key, _ in self.pairs)

    def is_kept_by(self, new: Self) -> bool:
        """Whether ``new`` opens nowhere else: it has the same pairs, but for the number of a version."""
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
        raise InvalidContext(f"{where} uses a reserved key: keys beginning with 'kms:' are the service's own")
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in key + value):
        raise InvalidContext(f"{where} holds a control character")
