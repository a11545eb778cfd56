"""Patterns of many files: which paths they name, where results go, and that no pattern takes long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_core.jobs.file_patterns import Tree, decoded, encoded, target_of
from kms_core.patterns import Pattern
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import JobKind

BASE = "file:///srv/in/"


@pytest.mark.parametrize(
    ("pattern", "named", "others"),
    [
        ("**", ["a", ".a", "a/b", "a/b/.c.d"], []),
        ("*", ["a", ".env"], ["a/b"]),
        ("*.csv", ["a.csv", ".csv"], ["a.csvx", "x/a.csv", "acsv"]),
        ("**/*.age", ["a.age", "x/a.age", "x/y/z.age"], ["a.age/b", "x/a"]),
        ("a/*/c", ["a/b/c"], ["a/c", "a/b/b/c"]),
        ("a/**/c", ["a/c", "a/b/c", "a/b/b/c"], ["b/c", "a/c/d"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a"]),
        ("**/x/**/*.y", ["x/a.y", "q/x/a.y", "x/q/a.y", "p/x/q/r/a.y"], ["a.y", "p/a.y"]),
        ("**/**/a", ["a", "b/a", "b/c/a"], ["a/b"]),
        ("*a*b*", ["ab", "xaxbx", "aab"], ["ba", "a"]),
        ("aa*aa", ["aaaa", "aabaa"], ["aa", "aaa"]),
        ("%2A*", ["%2A", "%2Ax"], ["x", "ax"]),
        ("*%20*", ["a%20b"], ["ab"]),
    ],
)
def test_pattern_names_paths(pattern: str, named: list[str], others: list[str]) -> None:
    tree = Tree.parse(BASE + pattern)

    urls = [BASE + path for path in (*named, *others)]
    assert [url for url in urls if url.startswith(tree.base) and tree.names(url.removeprefix(tree.base))] == [
        BASE + path for path in named
    ]


@pytest.mark.parametrize("pattern", ["**.csv", "a**/b", "*/", "*//b", "/".join(["*"] * 65), "***"])
def test_pattern_that_is_not_clear_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest):
        Tree.parse(BASE + pattern)


def test_base_is_the_longest_directory_without_a_star() -> None:
    assert Tree.parse("file:///a/b/c*/d") == Tree("file:///a/b/", (Pattern.parse("c*"), Pattern.parse("d")))
    assert Tree.parse("s3://bucket/p/**").base == "s3://bucket/p/"
    assert Tree.parse("*").base == ""


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=8),
        min_size=1,
        max_size=6,
    )
)
def test_every_name_can_be_written(names: list[str]) -> None:
    path = "/".join(encoded(name) for name in names)

    assert [decoded(part) for part in path.split("/")] == names
    assert Tree.parse(f"{BASE}**").names(path)
    assert "*" not in path


def test_name_that_is_no_text_can_be_written() -> None:
    name = b"caf\xe9 *".decode(errors="surrogateescape")

    assert encoded(name) == "caf%E9%20%2A"
    assert decoded(encoded(name)) == name


@pytest.mark.parametrize(
    ("kind", "path", "result"),
    [
        ("encrypt", "a/b.csv", "a/b.csv.age"),
        ("encrypt", "a.age", "a.age.age"),
        ("decrypt", "a/b.csv.age", "a/b.csv"),
        ("decrypt", "a/b.enc", "a/b.enc"),
        ("decrypt", "a/.age", "a/.age"),
        ("decrypt", ".age", ".age"),
        ("rewrap", "a/b.age", "a/b.age"),
    ],
)
def test_result_is_named_after_its_source(kind: JobKind, path: str, result: str) -> None:
    source = f"{BASE}**"

    assert target_of(kind, source, "file:///srv/out/", path) == f"file:///srv/out/{result}"
    assert target_of(kind, source, source, path) == f"{BASE}{path}"
