"""Scopes: what a credential may do, as one line of text each; knows no caller and no credential.

A scope is operations, and rules that a call must keep all of:

    encrypt,decrypt key=payroll-* context=env=prod,service=*
    encrypt key=backup read=file:///srv/data/ write=file:///srv/sealed/
    jobs:read,jobs:write

A rule that is left out asks for nothing, except that file jobs need ``read`` and ``write``. ``*`` stands for
any text (``patterns.py``); space, comma and ``%`` are percent-encoded. ``docs/auth.md`` has all of it.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Self
from urllib.parse import unquote

from kms_core.patterns import Pattern, any_matches
from kms_protocol.context import Context

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
"""What is done with a key. ``rewrap`` and ``reseal`` alone keep the key and the context as they are."""
OTHER_OPERATIONS: Final = ("jobs:read", "jobs:write", "audit:read", "status", "metrics")
OPERATIONS: Final = (*KEY_OPERATIONS, *OTHER_OPERATIONS)
NOT_IN_STAR: Final = frozenset({"rotate", "wrap", "unwrap", "metrics"})
"""To be written out: rotation administers keys, a file key in the clear can be forged under for good, and
metrics tell of every tenant. Tokens are administered on the machine, by no operation of a scope."""

Rule = Literal["operation", "key", "context", "read", "write"]
_KEY: Final = re.compile(r"[A-Za-z0-9_.*-]{1,80}")
_PREFIX: Final = re.compile(r"(file://|s3://[a-z0-9.-]+)(/.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller wants. None is not known yet, and then no rule stands against it.

    ``source`` and ``target`` are URLs of a job from file to file; empty means that it is none.
    """

    operation: str
    key_id: str | None = None
    context: Context | None = None
    source: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Scope:
    """One line of what is allowed, read."""

    operations: frozenset[str]
    keys: tuple[Pattern, ...] = ()
    context: tuple[tuple[str, Pattern], ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """ValueError, in words for whoever wrote the line, if it does not follow the grammar."""
        names, *rules = text.split(" ")
        given: dict[str, list[str]] = {}
        for rule in rules:
            name, equals, value = rule.partition("=")
            if not equals or not value or name not in _RULES:
                raise ValueError(f"after the operations come rules: {', '.join(f'{r}=…' for r in _RULES)}")
            given.setdefault(name, []).append(value)
        for name in ("key", "context"):
            if len(given.get(name, ())) > 1:
                raise ValueError(f"{name}= stands twice: separate by commas, or write two scopes")
        return cls(
            _operations(names),
            tuple(_key_pattern(key) for value in given.get("key", ()) for key in value.split(",")),
            tuple(_pair(pair) for value in given.get("context", ()) for pair in value.split(",")),
            tuple(map(_prefix, given.get("read", ()))),
            tuple(map(_prefix, given.get("write", ()))),
        )

    @property
    def left_out(self) -> frozenset[str]:
        """Operations that the scope does not hold although it says ``*``; none without a star."""
        everything = set(OPERATIONS) - NOT_IN_STAR
        return NOT_IN_STAR - self.operations if everything <= self.operations else frozenset()

    def names_key(self, key_id: str) -> bool:
        """Whether it allows anything at all with this key."""
        return bool(self.operations.intersection(KEY_OPERATIONS)) and _is_among(self.keys, key_id)

    def missing(self, wanted: Access) -> Rule | None:
        """The first rule that stands against it, in the order of ``Rule``; None if it is allowed."""
        for rule, holds in _CHECKS.items():
            if not holds(self, wanted):
                return rule
        return None


@lru_cache(maxsize=4096)
def parse(text: str) -> Scope:
    """As ``Scope.parse``, remembered: the same few lines are asked for with every call."""
    return Scope.parse(text)


# -- reading -----------------------------------------------------------------------------------------


def _operations(text: str) -> frozenset[str]:
    found: set[str] = set()
    for name in text.split(","):
        if name == "*":
            found |= set(OPERATIONS) - NOT_IN_STAR
        elif name in OPERATIONS:
            found.add(name)
        else:
            near = difflib.get_close_matches(name, OPERATIONS, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f": there are {', '.join(OPERATIONS)} and *"
            raise ValueError(f"a scope begins with operations, and one of these is unknown{hint}")
    return frozenset(found)


def _key_pattern(text: str) -> Pattern:
    if not _KEY.fullmatch(text):
        raise ValueError("key= takes key ids, with * for any text, separated by commas")
    return Pattern.parse(text)


def _pair(text: str) -> tuple[str, Pattern]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError("context= takes pairs such as env=prod,service=*")
    # A star that was percent-encoded would become one that matches: there is no need for it.
    if "%2a" in value.lower():
        raise ValueError("a star in a context value cannot be asked for by itself")
    return unquote(key, errors="strict"), Pattern.parse(unquote(value, errors="strict"))


def _prefix(text: str) -> str:
    """A URL of a directory, decoded; whole parts of a path are compared, so it ends with a slash."""
    found = _PREFIX.fullmatch(unquote(text, errors="strict"))
    if not found or _has_dots(found[2]):
        raise ValueError("read= and write= take file:///directory/ or s3://bucket/prefix/")
    return f"{found[1]}{found[2].rstrip('/')}/"


# -- asking ------------------------------------------------------------------------------------------


def _is_among(keys: Sequence[Pattern], key_id: str) -> bool:
    """Whether a rule ``key=`` allows a key; without the rule every key is allowed."""
    return not keys or any_matches(keys, key_id)


def _context_fits(scope: Scope, wanted: Access) -> bool:
    if wanted.context is None or not scope.context:
        return True
    given = dict(wanted.context.pairs)
    return all(key in given and pattern.matches(given[key]) for key, pattern in scope.context)


def _beneath(prefixes: tuple[str, ...], url: str) -> bool:
    """``url`` as a caller wrote it. What whoever opens it could read in two ways is beneath nothing."""
    found = _PREFIX.fullmatch(unquote(url))
    return found is not None and not _has_dots(found[2]) and any(map(found[0].startswith, prefixes))


def _has_dots(path: str) -> bool:
    """Whether a part of the path is empty, ``.`` or ``..``."""
    return path != "/" and not {"", ".", ".."}.isdisjoint(path[1:].removesuffix("/").split("/"))


_RULES: Final = ("key", "context", "read", "write")
_CHECKS: Final[Mapping[Rule, Callable[[Scope, Access], bool]]] = {
    "operation": lambda scope, wanted: wanted.operation in scope.operations,
    "key": lambda scope, wanted: wanted.key_id is None or _is_among(scope.keys, wanted.key_id),
    "context": _context_fits,
    "read": lambda scope, wanted: not wanted.source or _beneath(scope.read, wanted.source),
    "write": lambda scope, wanted: not wanted.target or _beneath(scope.write, wanted.target),
}
