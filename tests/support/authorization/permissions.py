"""The tables of docs/authorization.md: which call needs which operations."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

PAGE: Final = Path(__file__).parents[3] / "docs/authorization.md"
KEY_OPERATIONS: Final = (
    "encrypt",
    "decrypt",
    "generate_data_key",
    "rewrap",
    "reseal",
    "rotate",
    "wrap",
    "unwrap",
)
OPERATIONS: Final = (*KEY_OPERATIONS, "jobs:read", "jobs:write", "audit:read", "status", "metrics")
ANY_KEY_OPERATION: Final = "any key operation"
ForeignAnswer = Literal["own", "absent", "sealed", ""]
_ROW: Final = re.compile(r"\| ([A-Z, ]+) \| `(/[^`]*)` \| ([^|]*?) ?\| ([^|]+) \| (own|absent|sealed|) ?\|")
_TERM: Final = re.compile(r"([a-z_:]+|any key operation)(?:@(key|old|new))?( with read= and write=)?")


@dataclass(frozen=True)
class Term:
    """One operation. ``key`` is ``key``, ``old`` or ``new``, and empty where any key will do."""

    operation: str
    key: str
    on_files: bool

    @property
    def operations(self) -> tuple[str, ...]:
        """Those of which one is enough."""
        return KEY_OPERATIONS if self.operation == ANY_KEY_OPERATION else (self.operation,)


@dataclass(frozen=True)
class Row:
    """One method of one path. ``ways`` are alternatives; an empty one is held by any valid credential."""

    method: str
    path: str
    case: str
    is_public: bool
    ways: Sequence[Sequence[Term]]
    stranger: ForeignAnswer

    def __str__(self) -> str:
        return " ".join(filter(None, (self.method, self.path, self.case)))

    @property
    def is_page(self) -> bool:
        """Whether it is one of the pages, which sessions open."""
        return self.path == "/ui" or self.path.startswith("/ui/")

    @property
    def is_vault(self) -> bool:
        return self.path.startswith("/v1/")

    def is_met(self, operations: Collection[str]) -> bool:
        """Whether these operations, with any key and any file, are enough."""
        return any(all(set(term.operations) & set(operations) for term in way) for way in self.ways)


def rows(text: str) -> Iterator[Row]:
    """Every row of the tables, once for each of its methods. Raises ValueError for one that is unclear."""
    for line in text.splitlines():
        if not re.match(r"\| [A-Z]{3}", line):
            continue
        found = _ROW.fullmatch(line)
        if found is None:
            raise ValueError(f"not a row: {line}")
        methods, path, case, needs, stranger = found.groups()
        is_public = needs == "public"
        ways = () if is_public else tuple(_ways(needs.replace("`", "")))
        for method in methods.split(", "):
            yield Row(method, path, case, is_public, ways, stranger)  # type: ignore[arg-type]  # by the pattern


def not_in_star(text: str) -> frozenset[str]:
    """The operations that ``*`` does not hold."""
    (line,) = re.findall(r"`\*` is every operation except (.+?)\.\n", text)
    return frozenset(re.findall(r"`([a-z_:]+)`", line))


def _ways(needs: str) -> Iterator[Sequence[Term]]:
    for way in needs.split(" or "):
        yield () if way == "any credential" else tuple(map(_term, way.split(" + ")))


def _term(text: str) -> Term:
    found = _TERM.fullmatch(text)
    if found is None or found[1] not in {*OPERATIONS, ANY_KEY_OPERATION}:
        raise ValueError(f"no operation: {text}")
    return Term(found[1], found[2] or "", found[3] is not None)
