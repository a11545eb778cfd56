"""Counts the work that a call makes, the same on every machine however busy it is. Knows no service.

Calls are those of Python functions and, from Python, of C functions; what C calls (``map``) is not seen.
Lines, and not bytecodes: those differ by a quarter between versions of Python, lines by 2 %. Redis commands
are counted by the server, those within scripts too.
"""

import gc
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import reduce
from operator import and_
from types import FrameType
from typing import Any, Final

import redis

RUNS: Final = 3
SUMS: Final = frozenset({"calls", "lines", "modules"})
"""These differ a little between versions of Python; the other figures are exact."""
_RUST: Final = "cryptography.hazmat.bindings._rust.openssl."
_DEAR: Final = re.compile(
    r"redis .*|kms_core\.age\.header\.hkdf|_(hashlib|hmac)\.(hmac|openssl)_.*|(aead|x25519|nacl)\..*"
    r"|_socket\.socket\.(connect|send|sendall|sendmsg)|posix\.(open|p?(read|write)v?|fsync|fdatasync|ftruncate"
    r"|posix_fallocate|copy_file_range|sendfile|rename|replace|link|unlink|urandom)"
)
_INLINED: Final = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # calls in Python 3.11 alone
Function = Callable[[], object]


def figures(seen: Counter[str]) -> dict[str, int]:
    """What budgets are made of: the sums, and the calls that are dear, by name."""
    return {name: count for name, count in seen.items() if name in SUMS or _DEAR.fullmatch(name)}


class Meter:
    """Counts in this thread and in those that begin meanwhile. ``server`` is the Redis of the calls.

    Leaves Python without its garbage collector, which calls things at any time: for a process of its own.
    """

    def __init__(self, server: redis.Redis) -> None:
        self._server = server
        self._seen: Counter[str] = Counter()
        gc.disable()

    def count(self, function: Function) -> Counter[str]:
        """Everything seen, by name; the least of several runs, since now and then a call tidies up."""
        function()  # fills caches
        ways = self._commands_of, self.calls_of, self._lines_of  # apart: what is slow has its lease renewed
        return sum((reduce(and_, (way(function) for _ in range(RUNS))) for way in ways), Counter())

    def calls_of(self, function: Function) -> Counter[str]:
        return self._watched(function, self._called, (threading.setprofile, sys.setprofile))

    def _lines_of(self, function: Function) -> Counter[str]:
        return self._watched(function, self._traced, (threading.settrace, sys.settrace))

    def _watched(
        self, function: Function, watch: object, places: tuple[Callable[[Any], None], ...]
    ) -> Counter[str]:
        self._seen = Counter()
        for place in places:
            place(watch)
        try:
            function()
        finally:
            for place in reversed(places):
                place(None)
        return self._seen

    def _called(self, frame: FrameType, event: str, what: object) -> None:
        if event == "call" and frame.f_code.co_name not in _INLINED:
            self._seen["calls"] += 1
            self._seen[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            called: Any = what
            owner: str = (
                getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
            )
            self._seen["calls"] += 1
            self._seen[f"{owner.removeprefix(_RUST)}.{called.__qualname__}"] += 1

    def _traced(self, frame: FrameType, event: str, _: object) -> Callable[..., object]:
        self._seen["lines"] += event == "line"
        if event == "call" and frame.f_code.co_name in _INLINED:
            self._seen["lines"] -= 1  # whose first line comes once more
        return self._traced

    def _commands_of(self, function: Function) -> Counter[str]:
        before = self._commands()
        function()
        return self._commands() - before

    def _commands(self) -> Counter[str]:
        found: Any = self._server.info("commandstats")
        seen = {name.replace("cmdstat_", "redis "): of["calls"] for name, of in found.items()}
        persistence: Any = self._server.info("persistence")
        changes = persistence["rdb_changes_since_last_save"]
        return Counter({**seen, "redis info": 0, "redis changes": changes})
