"""Ten times as much may cost ten times as much: counted in calls, and in processor time for what C does."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final

from kms_core.age import header
from kms_core.age.armor import VERSION_LINE
from kms_core.age.header import HeaderLimits, Stanza
from kms_core.age.x25519 import X25519Identity
from kms_core.envelope import binding, sealing
from kms_core.jobs import bulk_lines
from kms_protocol.context import Context
from kms_protocol.errors import KmsError
from support.speed.counting import Function, Meter
from support.speed.hot_paths import SECRET, Install

GROWTH_FACTOR: Final = 10
_RUNS: Final = 9
_ENOUGH_S: Final = 0.1
_ENDLESS: Final = HeaderLimits(header_bytes=1 << 40, stanzas=1 << 40)
_KEY: Final = SECRET[:16]
_SHARE: Final = b"-> X25519 " + b"A" * 43 + b"\n"
_FOOT: Final = b"\n--- " + b"A" * 43 + b"\n"
_GARBAGE: Final[dict[str, Callable[[int], bytes]]] = {
    "a body without end": lambda count: _SHARE + (b"A" * 64 + b"\n") * count,
    "a bad body after many": lambda count: (_SHARE + b"AAAA\n") * count + _SHARE + b"A" + _FOOT,
    "stanzas of ours twice": lambda count: (b"-> kms-service/context 1\nAAAA\n" * count)[:-1] + _FOOT,
    "spaces": lambda count: b"-> " + b" " * 64 * count + _FOOT,
    "arguments and a space": lambda count: b"-> " + b"a " * 32 * count + _FOOT,
    "newlines": lambda count: b"\n" * 64 * count + _FOOT,
    "footers": lambda count: b"\n--- " * 13 * count,
    "zeros": lambda count: bytes(64 * count),
}


def measure(meter: Meter, install: Install) -> dict[str, dict[str, list[float]]]:
    """For each way its calls and its processor seconds, of few and of ten times as many."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, few, way in _ways(install):
        ready = way(few), way(few * GROWTH_FACTOR)
        seconds = [min(_seconds(each)) for each in ready]
        found[name] = {"calls": [meter.calls_of(each)["calls"] for each in ready], "seconds": seconds}
    return found


def _seconds(function: Function) -> list[float]:
    """Of several runs, if they are short."""
    found: list[float] = []
    while not found or (len(found) < _RUNS and sum(found) < _ENOUGH_S):
        begun = time.process_time()
        function()
        found.append(time.process_time() - begun)
    return found


def _ways(install: Install) -> Iterator[tuple[str, int, Callable[[int], Function]]]:
    """Name, how many are few, and what makes the function for a number of them; settings have limits."""
    yield "items of a batch", 100, lambda count: partial(install.batch, count)
    yield "items of a job that is run", 50, lambda count: partial(install.job, count)
    yield "items of a job that is accepted", 1000, lambda count: partial(install.submit, count)
    yield "lines of items in a stream", 1000, lambda count: partial(_in_lines, b'{"plaintext":""}\n' * count)
    yield "pairs of a context", 6, lambda count: partial(_bound, count, itertools.count())
    yield "recipients of a file, opened by the last", 1000, partial(_recipients, install)
    yield "stanzas of a header, written", 1000, lambda count: partial(header_of, count)
    yield "stanzas of a header, read", 1000, lambda count: partial(header.parse, header_of(count), _ENDLESS)
    for name, garbage in _GARBAGE.items():
        yield (
            f"garbage: {name}",
            400,
            partial(_refused, garbage),
        )  # the many are 256 KiB, the most a header may


def _in_lines(text: bytes) -> int:
    return sum(1 for _ in bulk_lines.lines(text[start : start + 16] for start in range(0, len(text), 16)))


def _bound(count: int, turns: Iterator[int]) -> bytes:
    """Another context each time: those seen lately are remembered."""
    turn = next(turns)
    return Context.parse(",".join(f"key{number}={turn}" for number in range(count))).canonical()


def _recipients(install: Install, count: int) -> Function:
    other, last = X25519Identity.generate().recipient.wrap(_KEY), install.backend.wrap(_KEY, install.ref, b"")
    head = header.parse(header.render([other] * (count - 1) + [last], _KEY) + SECRET, _ENDLESS)
    return lambda: sealing.foreign_file_key(head, install.backend, [install.ref])


def header_of(count: int) -> bytes:
    """With so many stanzas, and something behind it."""
    return header.render([Stanza(("pad", "0"), bytes(48))] * count, _KEY) + SECRET


def _refused(garbage: Callable[[int], bytes], count: int) -> Function:
    text = VERSION_LINE + garbage(count) + SECRET

    def refused() -> None:
        with suppress(KmsError):
            binding.read(header.parse(text, _ENDLESS).stanzas)
            raise AssertionError("garbage was taken for a header")

    return refused
