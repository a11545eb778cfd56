"""Scopes: the permissions of a credential, as one line of text each.

A scope names operations, and rules that all must hold for a request:

    encrypt,decrypt key=payroll-* context=env=prod,service=*
    encrypt key=backup read=file:///srv/data/ write=file:///srv/sealed/
    jobs:read,jobs:write

A missing rule allows everything, but file jobs need ``read`` and ``write``. ``*`` matches any text
(``patterns.py``); space, comma and ``%`` are percent-encoded. Grammar: docs/auth.md.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal
from urllib.parse import unquote

from msgspec import Struct

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
"""Operations with a key. The scopes ``rewrap`` and ``reseal`` allow no change of key or context."""
OTHER_OPERATIONS: Final = ("jobs:read", "jobs:write", "audit:read", "status", "metrics")
OPERATIONS: Final = (*KEY_OPERATIONS, *OTHER_OPERATIONS)
NOT_IN_STAR: Final = frozenset({"rotate", "wrap", "unwrap", "metrics"})
"""Operations that ``*`` does not include: rotation administers keys, a file key in clear allows forgeries for
good, and metrics show all tenants. Tokens are administered on the machine, by no operation of a scope."""

Rule = Literal["operation", "key", "context", "read", "write"]
_KEY: Final = re.compile(r"[A-Za-z0-9_.*-]{1,80}")
_PREFIX: Final = re.compile(r"(file://|s3://[a-z0-9.-]+)(/.*)", re.DOTALL)


class Access(Struct, frozen=True):
    """A requested access. ``key_id`` and ``context`` are None if not known yet; no rule refuses None.

    ``source`` and ``target`` are the URLs of a job from file to file, empty for other requests.
    """

    operation: str
    key_id: str | None = None
    context: Context | None = None
    source: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Scope:
    """A parsed scope."""

    operations: frozenset[str]
    keys: tuple[Pattern, ...] = ()
    context: tuple[tuple[str, Pattern], ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()

    @property
    def left_out(self) -> frozenset[str]:
        """Operations that a scope with ``*`` does not include; none for a scope without ``*``."""
        everything = set(OPERATIONS) - NOT_IN_STAR
        return NOT_IN_STAR - self.operations if everything <= self.operations else frozenset()

    def names_key(self, key_id: str) -> bool:
        """Return whether it allows any operation with this key."""
        return bool(self.operations.intersection(KEY_OPERATIONS)) and _is_among(self.keys, key_id)

    def missing(self, wanted: Access) -> Rule | None:
        """The first rule that refuses the access, in the order of ``Rule``; None if it is allowed."""
        for rule, holds in _CHECKS.items():
            if not holds(self, wanted):
                return rule
        return None


# -- parsing -----------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def parse(text: str) -> Scope:
    """Parse one line, cached: each request needs the same few lines.

    Raises ValueError, with a text for its author, if it violates the grammar.
    """
    names, *rules = text.split(" ")
    given: dict[str, list[str]] = {}
    for rule in rules:
        name, equals, value = rule.partition("=")
        if not equals or not value or name not in _RULES:
            raise ValueError(f"after the operations come rules: {', '.join(f'{r}=…' for r in _RULES)}")
        given.setdefault(name, []).append(value)
    for name in ("key", "context"):
        if len(given.get(name, ())) > 1:
            raise ValueError(f"{name}= occurs twice: separate by commas, or write two scopes")
    return Scope(
        _operations(names),
        tuple(_key_pattern(key) for value in given.get("key", ()) for key in value.split(",")),
        tuple(_pair(pair) for value in given.get("context", ()) for pair in value.split(",")),
        tuple(map(_prefix, given.get("read", ()))),
        tuple(map(_prefix, given.get("write", ()))),
    )


def parse_or_none(text: str) -> Scope | None:
    """As ``parse``, but None for a line that violates the grammar, such as one of a later version."""
    try:
        return parse(text)
    except ValueError:
        return None


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
    # A percent-encoded star would become a wildcard.
    if "%2a" in value.lower():
        raise ValueError("a star in a context value is always a wildcard: it cannot be encoded")
    return unquote(key, errors="strict"), Pattern.parse(unquote(value, errors="strict"))


def _prefix(text: str) -> str:
    """The decoded URL of a directory. Complete path segments are compared, so it ends with a slash."""
    found = _PREFIX.fullmatch(unquote(text, errors="strict"))
    if not found or _has_dots(found[2]):
        raise ValueError("read= and write= take file:///directory/ or s3://bucket/prefix/")
    return f"{found[1]}{found[2].rstrip('/')}/"


# -- checking ------------------------------------------------------------------------------------------


def _is_among(keys: Sequence[Pattern], key_id: str) -> bool:
    """Return whether a ``key=`` rule allows a key; without the rule all keys are allowed."""
    return not keys or any_matches(keys, key_id)


def _context_fits(scope: Scope, wanted: Access) -> bool:
    if wanted.context is None or not scope.context:
        return True
    given = dict(wanted.context.pairs)
    return all(key in given and pattern.matches(given[key]) for key, pattern in scope.context)


def _beneath(prefixes: tuple[str, ...], url: str) -> bool:
    """True if a URL of a request is beneath a prefix. An ambiguous URL, with ``.`` or ``..``, never is."""
    found = _PREFIX.fullmatch(unquote(url))
    return found is not None and not _has_dots(found[2]) and any(map(found[0].startswith, prefixes))


def _has_dots(path: str) -> bool:
    """Return whether a segment of the path is empty, ``.`` or ``..``."""
    return path != "/" and not {"", ".", ".."}.isdisjoint(path[1:].removesuffix("/").split("/"))


_RULES: Final = ("key", "context", "read", "write")
_CHECKS: Final[Mapping[Rule, Callable[[Scope, Access], bool]]] = {
    "operation": lambda scope, wanted: wanted.operation in scope.operations,
    "key": lambda scope, wanted: wanted.key_id is None or _is_among(scope.keys, wanted.key_id),
    "context": _context_fits,
    "read": lambda scope, wanted: not wanted.source or _beneath(scope.read, wanted.source),
    "write": lambda scope, wanted: not wanted.target or _beneath(scope.write, wanted.target),
}
