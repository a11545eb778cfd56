"""Scopes: what a line of text allows, and what it does not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_core.scopes import OPERATIONS, Access, parse
from kms_protocol.context import Context


def missing(line: str, wanted: Access) -> str | None:
    return parse(line).missing(wanted)


def on(operation: str, key_id: str | None = None, context: str | None = None) -> Access:
    return Access(operation, key_id, None if context is None else Context.parse(context))


@pytest.mark.parametrize(
    ("line", "wanted", "rule"),
    [
        ("encrypt", on("encrypt", "any", ""), None),
        ("encrypt", on("decrypt", "any", ""), "operation"),
        ("encrypt,decrypt key=pay-*", on("decrypt", "pay-1", ""), None),
        ("encrypt key=pay-*", on("encrypt", "xpay-1", ""), "key"),
        ("encrypt key=pay-*", on("encrypt", None, ""), None),
        ("encrypt key=a,b-*", on("encrypt", "b-7", ""), None),
        ("encrypt key=a,b-*", on("encrypt", "c", ""), "key"),
        ("encrypt key=a.b", on("encrypt", "axb", ""), "key"),
        ("encrypt key=pay", on("encrypt", "pay-1", ""), "key"),
        ("encrypt key=" + "a*" * 9, on("encrypt", "a" * 9, ""), None),
        ("encrypt context=env=prod", on("encrypt", "k", "env=prod-not"), "context"),
        ("encrypt context=env=prod", on("encrypt", "k", "env=prod,service=api"), None),
        ("encrypt context=env=prod", on("encrypt", "k", "env=test"), "context"),
        ("encrypt context=env=prod", on("encrypt", "k", ""), "context"),
        ("encrypt context=env=prod", on("encrypt", "k"), None),
        ("encrypt context=env=*", on("encrypt", "k", "env="), None),
        ("encrypt context=env=*", on("encrypt", "k", "service=env"), "context"),
        ("encrypt context=env=prod,service=a*", on("encrypt", "k", "env=prod,service=b"), "context"),
        (
            "encrypt context=team=R%26D%2C%20all",
            Access("encrypt", "k", Context.parse({"team": "R&D, all"})),
            None,
        ),
        ("*", on("reseal", "k", ""), None),
        ("*", on("audit:read"), None),
        ("*", on("rotate", "k", ""), "operation"),
        ("*", on("wrap", "k", ""), "operation"),
        ("*", on("unwrap", "k", ""), "operation"),
        ("*,rotate key=k", on("rotate", "k", ""), None),
        ("*,rotate key=k", on("wrap", "k", ""), "operation"),
        ("unwrap", on("unwrap", "k", ""), None),
        ("*", on("metrics"), "operation"),
        ("jobs:read", on("jobs:read"), None),
        ("jobs:read", on("jobs:write"), "operation"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_scope_allows_what_all_its_rules_fit(line: str, wanted: Access, rule: str | None) -> None:
    assert missing(line, wanted) == rule


BOTH = "encrypt read=file:///srv/in/ write=file:///srv/out"


@pytest.mark.parametrize(
    ("source", "target", "rule"),
    [
        ("file:///srv/in/a", "file:///srv/out/a", None),
        ("file:///srv/in/deep/er/a", "file:///srv/out/a", None),
        ("file:///srv/in/", "file:///srv/out/", None),
        ("file:///srv/%69n/a", "file:///srv/out/a", None),
        ("file:///srv/in/a", "", None),
        ("file:///srv/out/a", "file:///srv/out/b", "read"),
        ("file:///srv/in/a", "file:///srv/in/b", "write"),
        ("file:///srv/in-other/a", "file:///srv/out/a", "read"),
        ("file:///srv/in/a", "file:///srv/outer/a", "write"),
        ("file:///srv/in/../secret", "file:///srv/out/a", "read"),
        ("file:///srv/in/%2e%2e/secret", "file:///srv/out/a", "read"),
        ("file:///srv/in/..%2Fsecret", "file:///srv/out/a", "read"),
        ("file:///srv/in//a", "file:///srv/out/a", "read"),
        ("file:///srv/in/./a", "file:///srv/out/a", "read"),
        ("file://localhost/srv/in/a", "file:///srv/out/a", "read"),
        ("file:////srv/in/a", "file:///srv/out/a", "read"),
        ("FILE:///srv/in/a", "file:///srv/out/a", "read"),
        ("/srv/in/a", "file:///srv/out/a", "read"),
        ("s3://srv/in/a", "file:///srv/out/a", "read"),
    ],
    ids=str,
)
def test_files_are_read_beneath_one_prefix_and_written_beneath_another(
    source: str, target: str, rule: str | None
) -> None:
    assert missing(BOTH, Access("encrypt", "k", Context(), source, target)) == rule


@pytest.mark.parametrize("line", ["encrypt", "encrypt key=*", "*"])
def test_without_prefixes_no_file_is_named(line: str) -> None:
    assert missing(line, Access("encrypt", "k", Context(), "file:///a", "file:///b")) == "read"


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("s3://bucket/in/a", None),
        ("s3://bucket/in-2/a", "read"),
        ("s3://bucket2/in/a", "read"),
        ("s3://bucket/%69n/a", None),
        ("s3://bucket/in/%2e%2e/a", "read"),
    ],
)
def test_objects_are_named_as_they_are(url: str, rule: str | None) -> None:
    assert missing("decrypt read=s3://bucket/in/", Access("decrypt", "k", Context(), url)) == rule


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "begins with operations"),
        ("encript", 'did you mean "encrypt"'),
        ("encrypt,", "begins with operations"),
        ("encrypt keys=a", "key=…"),
        ("encrypt key", "key=…"),
        ("encrypt key=", "key=…"),
        ("encrypt  key=a", "key=…"),
        ("encrypt key=a key=b", "occurs twice"),
        ("encrypt key=a/b", "key ids"),
        ("encrypt context=prod", "pairs such as"),
        ("encrypt context==x", "pairs such as"),
        ("encrypt context=a=%2A", "a star"),
        ("encrypt context=a=%2a", "a star"),
        ("encrypt read=/srv/in", "file:///directory/"),
        ("encrypt read=file://srv", "file:///directory/"),
        ("encrypt read=file:///srv/../etc/", "file:///directory/"),
        ("encrypt read=s3://", "file:///directory/"),
        ("encrypt read=https://a/b", "file:///directory/"),
    ],
    ids=str,
)
def test_a_line_that_is_no_scope_is_refused_in_words(line: str, word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(word)):
        parse(line)


@given(st.text(max_size=60))
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    try:
        scope = parse(text)
    except ValueError:
        return
    assert scope.operations <= set(OPERATIONS)


def test_a_scope_shows_the_keys_that_it_names() -> None:
    assert parse("decrypt key=pay-*").names_key("pay-1")
    assert not parse("decrypt key=pay-*").names_key("other")
    assert parse("rotate").names_key("other")
    assert not parse("jobs:read,status").names_key("other")
