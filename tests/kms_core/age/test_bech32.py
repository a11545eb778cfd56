import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.age import bech32

PROPERTY = settings(max_examples=80, deadline=None)
CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
IDENTITY = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"


def refusal(text: str) -> str:
    with pytest.raises(ValueError, match=r"^(a key|not a Bech32 key)") as caught:
        bech32.decode(text)
    return str(caught.value)


@pytest.mark.parametrize(  # BIP 173, "Test vectors"
    "text",
    [
        "A12UEL5L",
        "a12uel5l",
        "an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1tt5tgs",
        "abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw",
        "split1checkupstagehandshakeupstreamerranterredcaperred2y9e3w",
        "?1ezyfcl",
    ],
)
def test_the_vectors_of_bip_173_are_valid(text: str) -> None:
    assert bech32.encode(*bech32.decode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1nwldj5",
        "pzry9x0s0muk",
        "1pzry9x0s0muk",
        "x1b4n0q5v",
        "li1dgmt3",
        "A1G7SGD8",
        "10a06t8",
        "1qzzfhee",
        "a12UEL5L",
        "\x201nwldj5",
        "\x7f1axkwrx",
        "\x801eym55h",
        "\u00fcge12uel5l",
        "a1\u00fc2uel5l",
        IDENTITY[:-1],
        IDENTITY + "Q",
        IDENTITY[:-1] + "Q",
        IDENTITY[:20] + IDENTITY[21:],
        IDENTITY.replace("G", "g", 1),
        IDENTITY + "\n",
        " " + IDENTITY,
    ],
    ids=ascii,
)
def test_what_is_not_bech32_is_refused_and_not_quoted(text: str) -> None:
    said = refusal(text)

    assert len(text) < 8 or text[4:] not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (IDENTITY[:9] + IDENTITY[9:].lower(), "a key has mixed case"),
        (IDENTITY.replace("Y", "B"), "a key contains a character that Bech32 does not use"),
        (IDENTITY.replace("YYSJ", "YYSS", 1), "a key's checksum is wrong: it was mistyped or cut"),
        ("age", "not a Bech32 key"),
    ],
    ids=["case", "character", "checksum", "no separator"],
)
def test_the_reason_is_named(text: str, said: str) -> None:
    assert refusal(text) == said


@pytest.mark.parametrize("values", [[1], [31], [0], [0, 1], [0, 0, 0]], ids=str)
def test_wrong_padding_is_refused(values: list[int]) -> None:
    text = "age1" + "".join(CHARSET[value] for value in values)

    assert refusal(text + checksum("age", values)) == "a key has bad padding"


def checksum(prefix: str, values: list[int]) -> str:
    """As BIP 173 writes it down, so that a wrong padding can carry a right checksum."""
    expanded = [ord(char) >> 5 for char in prefix] + [0] + [ord(char) & 31 for char in prefix]
    check = 1
    for value in [*expanded, *values, 0, 0, 0, 0, 0, 0]:
        top, check = check >> 25, (check & 0x1FFFFFF) << 5 ^ value
        for place, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> place & 1 else 0
    return "".join(CHARSET[(check ^ 1) >> 5 * (5 - place) & 31] for place in range(6))


@PROPERTY
@given(st.sampled_from(["age", "age1pq", "AGE-SECRET-KEY-", "AGE-SECRET-KEY-PQ-"]), st.binary(max_size=80))
def test_what_is_encoded_decodes(prefix: str, data: bytes) -> None:
    assert bech32.decode(bech32.encode(prefix, data)) == (prefix, data)


@PROPERTY
@given(st.integers(0, len(IDENTITY) - 1), st.sampled_from(CHARSET.upper() + "1-B"))
def test_every_mistyped_character_is_found(place: int, char: str) -> None:
    mistyped = IDENTITY[:place] + char + IDENTITY[place + 1 :]

    if mistyped != IDENTITY:
        assert refusal(mistyped)


@PROPERTY
@given(st.text(max_size=60) | st.text("1aAqQ-\u00fc", max_size=30))
def test_nothing_but_value_error_is_raised(text: str) -> None:
    try:
        prefix, data = bech32.decode(text)
    except ValueError:
        return

    assert bech32.encode(prefix, data) == text
