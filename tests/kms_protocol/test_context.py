from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_protocol.context import MAX_BYTES, MAX_PAIRS, Context, length_prefixed
from kms_protocol.errors import InvalidContext

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)
KEYS = TEXT.filter(lambda key: key and not key.startswith("kms:"))
PAIRS = st.dictionaries(KEYS, TEXT, max_size=8)
PROPERTY = settings(max_examples=60, deadline=None)


def refusal(given: str | dict[str, str]) -> str:
    with pytest.raises(InvalidContext) as caught:
        Context.parse(given)
    return caught.value.detail


# -- what is accepted --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "", {}], ids=["None", "empty text", "empty object"])
def test_absent_and_empty_mean_none(given: str | dict[str, str] | None) -> None:
    context = Context.parse(given)

    assert not context
    assert context == Context()
    assert context.canonical() == b""


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("env=prod", {"env": "prod"}),
        ("env=prod,service=api", {"env": "prod", "service": "api"}),
        ("service=api,env=prod", {"env": "prod", "service": "api"}),
        (" env = prod , service = api ", {"env": "prod", "service": "api"}),
        ("env=", {"env": ""}),
        ("query=a=b", {"query": "a=b"}),
        ("path=/a b/c", {"path": "/a b/c"}),
        ("größe=übergroß,鍵=値,🔑=🔒", {"größe": "übergroß", "鍵": "値", "🔑": "🔒"}),
        ("KMS:x=1", {"KMS:x": "1"}),
        ("kms=1", {"kms": "1"}),
    ],
)
def test_text_and_object_are_two_forms_of_one_context(text: str, pairs: dict[str, str]) -> None:
    assert Context.parse(text) == Context.parse(pairs)


def test_an_object_may_hold_commas_and_outer_spaces() -> None:
    context = Context.parse({" a ": "x, y", "b": " "})

    assert context.pairs == ((" a ", "x, y"), ("b", " "))


def test_keys_are_in_order_and_values_are_not_shown() -> None:
    context = Context.parse("service=api,env=prod")

    assert context
    assert context.keys == ("env", "service")
    assert "prod" not in f"{context!r} {context}"


def test_canonical_bytes_are_what_the_format_says() -> None:
    canonical = Context.parse("b=ü,a=").canonical()

    assert canonical == b"\0\0\0\1a" + b"\0\0\0\0" + b"\0\0\0\1b" + b"\0\0\0\2\xc3\xbc"


def test_pairs_are_sorted_by_their_bytes() -> None:
    pairs = {"\uff5a": "", "\U00010000": "", "Z": "", "a": ""}

    assert Context.parse(pairs).keys == ("Z", "a", "\uff5a", "\U00010000")


def test_composed_and_decomposed_letters_are_different_contexts() -> None:
    assert Context.parse("name=\u00e9").canonical() != Context.parse("name=e\u0301").canonical()


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("env", "Pair 1 of the context has no '='"),
        ("env=prod,", "Pair 2 of the context has no '='"),
        (",", "Pair 1 of the context has no '='"),
        (" ", "Pair 1 of the context has no '='"),
        ("=x", "Pair 1 of the context has an empty key"),
        ("a=1, =2", "Pair 2 of the context has an empty key"),
        ({"": "x"}, "Pair 1 of the context has an empty key"),
        ("a=1,b=2,a=3", "Pair 3 of the context repeats an earlier key"),
        ("a=1, a =1", "Pair 2 of the context repeats an earlier key"),
        ("kms:purpose=x", "Pair 1 of the context uses a reserved key"),
        ({"a": "", "kms:": ""}, "Pair 2 of the context uses a reserved key"),
    ],
    ids=str,
)
def test_a_wrong_pair_is_named_by_its_number(given: str | dict[str, str], said: str) -> None:
    assert refusal(given).startswith(said)


@pytest.mark.parametrize(
    "char",
    ["\0", "\t", "\n", "\r", "\x1b", "\x1f", "\x7f", "\x85", "\ud800"],
    ids=lambda char: f"U+{ord(char):04X}",
)
@pytest.mark.parametrize("place", ["{}a=b", "a{}=b", "a={}b", "a=b{}"])
def test_control_characters_and_surrogates_are_refused(char: str, place: str) -> None:
    key, _, value = place.format(char).partition("=")

    assert refusal(place.format(char)) == "Pair 1 of the context contains a control character"
    assert refusal({key: value}) == "Pair 1 of the context contains a control character"


def test_no_value_is_quoted_in_a_refusal() -> None:
    for secret in ["hunter2", "=hunter2", "kms:x=hunter2", "a=hunter2\0", "a=hunter2,a=hunter2"]:
        assert "hunter2" not in refusal(secret)


def test_64_pairs_are_enough() -> None:
    most = {f"k{number}": "v" for number in range(MAX_PAIRS)}

    assert len(Context.parse(most).pairs) == MAX_PAIRS
    assert refusal(most | {"more": ""}) == "A context has at most 64 pairs and 8192 bytes"
    assert refusal(",".join(f"{key}=" for key in (*most, "more"))).startswith("A context has at most 64")


@pytest.mark.parametrize("char", ["v", "ü", "鍵"], ids=["1 byte", "2 bytes", "3 bytes"])
def test_8_kib_are_counted_in_bytes(char: str) -> None:
    width = len(char.encode())
    most = char * ((MAX_BYTES - 1) // width) + "v" * ((MAX_BYTES - 1) % width)

    assert Context.parse({"k": most}).pairs == (("k", most),)
    assert refusal({"k": most + "v"}).startswith("A context has at most")
    assert refusal({"k": most[:4], "l": most}).startswith("A context has at most")


# -- properties --------------------------------------------------------------------------------------


@PROPERTY
@given(PAIRS, st.randoms())
def test_order_does_not_matter(pairs: dict[str, str], shuffler: Random) -> None:
    items = list(pairs.items())
    shuffler.shuffle(items)

    assert Context.parse(dict(items)).canonical() == Context.parse(pairs).canonical()


@PROPERTY
@given(PAIRS, PAIRS)
def test_different_contexts_have_different_bytes(one: dict[str, str], other: dict[str, str]) -> None:
    same = Context.parse(one).canonical() == Context.parse(other).canonical()

    assert same == (one == other)


@PROPERTY
@given(st.lists(st.binary(max_size=6), max_size=5), st.lists(st.binary(max_size=6), max_size=5))
def test_lists_of_parts_never_run_together(one: list[bytes], other: list[bytes]) -> None:
    assert (length_prefixed(*one) == length_prefixed(*other)) == (one == other)


@PROPERTY
@given(st.text() | st.dictionaries(st.text(), st.text()))
def test_nothing_but_invalid_context_is_raised(given: str | dict[str, str]) -> None:
    try:
        context = Context.parse(given)
    except InvalidContext:
        return

    assert Context.parse(dict(context.pairs)) == context
