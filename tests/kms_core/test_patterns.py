"""Patterns with stars: they mean what a plain reference says, and no value takes long to match."""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_core.auth.policy import Principal, allows
from kms_core.jobs.file_patterns import Tree
from kms_core.patterns import Pattern
from kms_protocol.context import Context
from support.age_kms import allowing
from support.waiting import RealTime

SIZES: Final = (80, 800, 8_000)
"""Characters; the most that a caller's value has is 8 KiB."""
TIMES: Final = 10
LINEAR: Final = 3.0  # of noise and caches; a square would be 10 times as much, and a cube 100
_RUNS: Final = 5
_CALLS: Final = 20


def reference(pattern: str, value: str) -> bool:
    """What a pattern means, one character after the other: obviously right, and slow."""
    if not pattern:
        return not value
    if pattern[0] == "*":
        return reference(pattern[1:], value) or (bool(value) and reference(pattern, value[1:]))
    return bool(value) and value[0] == pattern[0] and reference(pattern[1:], value[1:])


few_letters: Final = st.text("ab/.\n", max_size=12)


@given(st.text("ab/.\n*", max_size=8), few_letters)
def test_a_pattern_means_what_the_reference_says(pattern: str, value: str) -> None:
    assert Pattern.parse(pattern).matches(value) == reference(pattern, value)


@given(st.lists(few_letters, min_size=1, max_size=5), st.lists(few_letters, min_size=4, max_size=4))
def test_stars_stand_for_any_text(pieces: list[str], between: list[str]) -> None:
    value = "".join(
        piece + text for piece, text in zip(pieces, [*between[: len(pieces) - 1], ""], strict=True)
    )

    assert Pattern.parse("*".join(pieces)).matches(value)


@given(st.text(st.characters(exclude_characters="*"), max_size=20), st.text(min_size=1, max_size=3))
def test_a_pattern_without_stars_fits_itself_alone(text: str, more: str) -> None:
    pattern = Pattern.parse(text)

    assert pattern.matches(text)
    assert not pattern.matches(text + more)
    assert not pattern.matches(more + text)


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("", "", True),
        ("", "a", False),
        ("*", "", True),
        ("**", "a\nb", True),
        ("ab*ba", "aba", False),
        ("ab*ba", "abba", True),
        ("*ab*", "xaab", True),
        ("a.c", "abc", False),
        ("a[b-d]?\\*", "a[b-d]?\\", True),
        ("*a*a", "a", False),
        ("refs/heads/*", "refs/heads/main\n", True),
        ("refs/heads/main", "refs/heads/main\n", False),
    ],
)
def test_edges(pattern: str, value: str, *, matches: bool) -> None:
    assert Pattern.parse(pattern).matches(value) == matches == reference(pattern, value)


# -- growth ----------------------------------------------------------------------------------------------

WHO: Final = Principal("ada", "acme", "token:x")


def _scope(pattern: str, value: str) -> Callable[[], bool]:
    policy = allowing(f"encrypt context=path={pattern}")
    context = Context.parse({"path": value})
    return lambda: allows(policy, WHO, "encrypt", "k", context)


def _pattern(pattern: str, value: str) -> Callable[[], bool]:
    made = Pattern.parse(pattern)
    return lambda: made.matches(value)


def _tree(pattern: str, value: str) -> Callable[[], bool]:
    tree = Tree.parse(f"s3://b/{pattern}")
    return lambda: tree.names(value)


def _slashes(size: int) -> str:
    return "a/" * (size // 2)


def _same(size: int) -> str:
    return "a" * size


def _nearly(size: int) -> str:
    return ("a" * 63 + "c") * (size // 64 + 1)


HARD: Final[Mapping[str, tuple[str, Callable[[int], str]]]] = {
    "of the attack": ("*/*/*.json", _slashes),
    "four stars": ("team-*-*-*-prod", lambda size: "team" + "-" * size + "x"),
    "four stars, one letter": ("*a*a*a*a*b", _same),
    "forty stars": ("*a" * 40 + "*b", _same),
    "stars alone": ("*" * 40 + "b", _same),
    "a long piece": ("*" + "a" * 64 + "*b", _nearly),
    "a piece of another length": ("*" + "a" * 50 + "b" + "a" * 50 + "*", _same),
}


@pytest.mark.parametrize("make", [_scope, _pattern], ids=["policy", "pattern"])
@pytest.mark.parametrize("name", HARD)
def test_ten_times_the_value_takes_ten_times_as_long(
    name: str, make: Callable[[str, str], Callable[[], bool]]
) -> None:
    pattern, value = HARD[name]

    _check_growth(make(pattern, value(size)) for size in SIZES)


@pytest.mark.parametrize("pieces", [("a", _same), ("aa", _same)], ids=["one", "two"])
def test_more_stars_take_no_longer_than_they_are_many(pieces: tuple[str, Callable[[int], str]]) -> None:
    piece, value = pieces

    _check_growth(_pattern(f"*{piece}" * stars + "*b", value(8_000)) for stars in (4, 40, 400))


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("**/" * 4 + "*a*a*a*b", _same),
        ("**/" * 4 + "z", _slashes),
        ("**/*a*b/" * 8 + "z", _slashes),
    ],
)
def test_a_pattern_of_files_takes_no_longer_than_a_path_is_long(
    pattern: str, value: Callable[[int], str]
) -> None:
    _check_growth(_tree(pattern, value(size).rstrip("/")) for size in SIZES)


def test_directories_of_any_depth_cost_their_number() -> None:
    """Parts of a pattern have a limit, so the work is counted and not timed: states for each name."""
    tree = Tree.parse("s3://b/" + "**/" * 62 + "z")

    assert len(tree.start()) == 63
    assert tree.step(tree.start(), "a") == tree.start()


def _check_growth(works: Iterable[Callable[[], bool]]) -> None:
    """Each of these is ten times the one before. Fails before the last is run, which could take for ever."""
    seconds: list[float] = []
    for work in works:
        seconds.append(min(_seconds(work) for _ in range(_RUNS)))
        for few, many in pairwise(seconds):
            assert many <= max(few, 2e-6) * TIMES * LINEAR, seconds


def _seconds(work: Callable[[], bool]) -> float:
    begun = RealTime.processor_s()
    for _ in range(_CALLS):
        work()
    return (RealTime.processor_s() - begun) / _CALLS
