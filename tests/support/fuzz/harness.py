"""What all harnesses share: where their corpora are, and how an input says several things at once.

A harness is a module ``fuzz_<name>`` with ``check(data)``, which raises on whatever should not happen,
``seeds()``, ``MOST_BYTES`` and ``WORDS``, tokens of the grammar that mutations may put in. It imports nothing
of atheris, so that seeds and past findings are checked on any Python.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

HERE: Final = Path(__file__).parents[2] / "fuzz"
CORPUS: Final = HERE / "corpus"
SEPARATOR: Final = b"\x00\x00"
"""What separates the parts of an input that holds several, such as a file and its surroundings."""

NAMES: Final = tuple(sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py")))


class Harness(Protocol):
    """A module of ours, as the runner sees it."""

    MOST_BYTES: int
    WORDS: Iterable[bytes]
    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def parts(data: bytes, count: int) -> list[bytes]:
    """Exactly so many parts, missing ones empty; the last holds what is left."""
    found = data.split(SEPARATOR, count - 1)
    return found + [b""] * (count - len(found))


def kept(name: str) -> list[Path]:
    """The files of a corpus: inputs that reach something, and all that ever failed."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def inputs(name: str, harness: Harness) -> list[bytes]:
    """Every input that a run begins with."""
    return [*harness.seeds(), *(path.read_bytes() for path in kept(name))]


def assert_not_echoed(said: str, ours: Iterable[bytes]) -> None:
    """Fail if an error's text repeats one of the values that a caller sent."""
    for each in ours:
        assert each.decode("latin-1") not in said, "an error repeats what was sent"
