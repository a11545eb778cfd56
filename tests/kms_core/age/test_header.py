import hmac
import os
import tracemalloc
from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.age import header
from kms_core.age.armor import VERSION_LINE
from kms_core.age.header import FILE_LIMITS, SYNC_LIMITS, Header, HeaderLimits, Stanza
from kms_protocol.errors import DecryptFailed, KmsError, NotACiphertext, TooLarge

FILE_KEY: Final = bytes(range(16))
NONCE: Final = b"n" * 16
SHORT: Final = Stanza(("X25519", "share"), bytes(32))
MAC: Final = b"--- " + b"A" * 43 + b"\n"
PROPERTY: Final = settings(max_examples=150, deadline=None)
ARGUMENTS: Final = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=12)
STANZAS: Final = st.builds(
    Stanza,
    st.lists(ARGUMENTS, min_size=1, max_size=4).map(tuple),
    st.binary(max_size=100) | st.sampled_from([bytes(48), bytes(96)]),
)


def file_of(*stanzas: Stanza, payload: bytes = b"") -> bytes:
    return header.render(stanzas, FILE_KEY) + NONCE + payload


def parse(file: bytes, limits: HeaderLimits = FILE_LIMITS) -> Header:
    return header.parse(file, limits)


def padded_to(size_bytes: int) -> bytes:
    """A header of exactly so many bytes."""
    spare = size_bytes - len(header.render([Stanza(("x",), b"")], FILE_KEY))
    return header.render([Stanza(("x" * (1 + spare),), b"")], FILE_KEY)


# -- what is read ------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(STANZAS, min_size=1, max_size=5), st.binary(max_size=50))
def test_what_is_rendered_parses(stanzas: list[Stanza], payload: bytes) -> None:
    file = file_of(*stanzas, payload=payload)
    head = parse(file)

    assert head.stanzas == tuple(stanzas)
    assert head.nonce == NONCE
    assert file[head.payload_offset :] == payload
    assert header.render(head.stanzas, FILE_KEY) == file[: head.size]
    head.check_mac(FILE_KEY)


@pytest.mark.parametrize("kind", [bytes, memoryview], ids=["bytes", "memoryview"])
def test_views_are_read_like_bytes(kind: Callable[[bytes], bytes | memoryview]) -> None:
    assert header.parse(kind(file_of(SHORT)), FILE_LIMITS).stanzas == (SHORT,)


def test_the_mac_covers_everything_up_to_the_dashes() -> None:
    file = file_of(SHORT)

    assert parse(file).signed == file[: file.index(b" ", file.index(b"\n---"))]


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"age-encryption.org/v1",
        b"age-encryption.org/v2\n",
        b"age-encryption.org/v1\r\n-> X25519 a\n\n",
        b"\xef\xbb\xbfage-encryption.org/v1\n",
        b" age-encryption.org/v1\n",
        b"AGE-encryption.org/v1\n",
        b"-----BEGIN AGE ENCRYPTED FILE-----\n",
        b"PK\x03\x04",
        b"salary\n",
    ],
    ids=["empty", "cut", "v2", "CRLF", "BOM", "space", "case", "armor", "zip", "text"],
)
def test_without_the_version_line_it_is_no_ciphertext(file: bytes) -> None:
    with pytest.raises(NotACiphertext):
        parse(file)
    with pytest.raises(NotACiphertext):
        header.check_start(memoryview(file))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        MAC,
        b"-> X25519 a\n",
        b"-> X25519 a\n" + MAC,
        b"->\n\n" + MAC,
        b"-> \n\n" + MAC,
        b"->  a\n\n" + MAC,
        b"-> a  b\n\n" + MAC,
        b"-> a \n\n" + MAC,
        b"-> a\tb\n\n" + MAC,
        b"-> \xc3\xbc\n\n" + MAC,
        b"-> a\x7f\n\n" + MAC,
        b"-> a\r\n\r\n" + MAC,
        b"-- a\n\n" + MAC,
        b"a\n\n" + MAC,
        b"-> a\n\n\n" + MAC,
        b"-> a\nAAA=\n" + MAC,
        b"-> a\nAAAA\n\n" + MAC,
        b"-> a\nAAB\n" + MAC,
        b"-> a\nA\n" + MAC,
        b"-> a\nAA-_\n" + MAC,
        b"-> a\nAA AA\n" + MAC,
        b"-> a\n" + b"A" * 64 + b"\n" + MAC,
        b"-> a\n" + b"A" * 68 + b"\n" + MAC,
        b"-> a\n" + b"A" * 60 + b"\nAAAA\n" + MAC,
        b"-> a\n" + b"A" * 64 + b"\n-> b\n\n" + MAC,
        b"-> a\n\n" + MAC[:-1],
        b"-> a\n\n" + MAC.replace(b"\n", b"="),
        b"-> a\n\n--- " + b"A" * 42 + b"\n",
        b"-> a\n\n--- " + b"A" * 44 + b"\n",
        b"-> a\n\n--- " + b"A" * 42 + b"B\n",
        b"-> a\n\n---" + b"A" * 43 + b"\n",
        b"-> a\n\n---  " + b"A" * 42 + b"\n",
        b"-> a\n\n--- " + b"A" * 43 + b"\r\n",
    ],
    ids=ascii,
)
def test_every_departure_from_the_grammar_is_refused(body: bytes) -> None:
    with pytest.raises(DecryptFailed):
        parse(VERSION_LINE + body + NONCE)


@PROPERTY
@given(st.integers(min_value=0))
def test_every_cut_is_refused(size: int) -> None:
    file = file_of(SHORT, Stanza(("kms-service/context", "1"), bytes(48)))

    with pytest.raises((NotACiphertext, DecryptFailed)):
        parse(file[: size % len(file)])


@PROPERTY
@given(st.binary(max_size=300) | st.text("-> aA=\n", max_size=200).map(str.encode), st.booleans())
def test_nothing_but_our_errors_is_raised(data: bytes, headed: bool) -> None:
    try:
        head = parse(VERSION_LINE * headed + data + MAC + NONCE, SYNC_LIMITS)
    except KmsError:
        return

    assert head.stanzas


@PROPERTY
@given(st.binary(max_size=70))
def test_base64_decodes_to_what_was_encoded(data: bytes) -> None:
    assert header.b64decode(header.b64encode(data)) == data


@PROPERTY
@given(st.binary(max_size=10) | st.text("AB/+=- \n", max_size=10).map(str.encode))
def test_base64_has_one_spelling(text: bytes) -> None:
    try:
        data = header.b64decode(text)
    except DecryptFailed:
        return

    assert header.b64encode(data) == text


# -- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [SYNC_LIMITS, FILE_LIMITS], ids=["sync", "file"])
def test_a_header_of_the_greatest_size_is_read_and_none_above(limits: HeaderLimits) -> None:
    parse(padded_to(limits.header_bytes) + NONCE, limits)

    for more in (1, 2, 47, 48, 49, 100_000):
        with pytest.raises(TooLarge, match=f"above {limits.header_bytes} bytes"):
            parse(padded_to(limits.header_bytes + more) + NONCE, limits)


@pytest.mark.parametrize("limits", [SYNC_LIMITS, FILE_LIMITS], ids=["sync", "file"])
def test_the_greatest_number_of_stanzas_is_read_and_none_above(limits: HeaderLimits) -> None:
    most = [Stanza(("x",), b"")] * limits.stanzas
    parse(file_of(*most), limits)

    with pytest.raises(TooLarge, match=f"more than {limits.stanzas} stanzas"):
        parse(file_of(*most, Stanza(("y",), b"")), limits)


@pytest.mark.parametrize("limits", [SYNC_LIMITS, FILE_LIMITS], ids=["sync", "file"])
def test_as_many_stanzas_may_stand_alone_or_in_a_bundle(limits: HeaderLimits) -> None:
    most, more = ([Stanza(("x",), b"")] * number for number in (limits.stanzas, limits.stanzas + 1))

    assert len(header.parse_stanzas(b"".join(map(header.render_stanza, most)), limits)) == limits.stanzas
    assert len(header.unbundled([header.bundle(most)], limits)) == limits.stanzas
    with pytest.raises(TooLarge, match=f"{limits.stanzas} in number"):
        header.parse_stanzas(b"".join(map(header.render_stanza, more)), limits)
    with pytest.raises(TooLarge, match=f"more than {limits.stanzas} stanzas"):
        header.unbundled([header.bundle(more)], limits)


@pytest.mark.parametrize("limits", [SYNC_LIMITS, FILE_LIMITS], ids=["sync", "file"])
def test_stanzas_alone_may_be_as_large_as_a_header(limits: HeaderLimits) -> None:
    spare = limits.header_bytes - len(header.render_stanza(Stanza(("",), b"")))
    header.parse_stanzas(header.render_stanza(Stanza(("x" * spare,), b"")), limits)

    with pytest.raises(TooLarge, match=f"above {limits.header_bytes} bytes"):
        header.parse_stanzas(header.render_stanza(Stanza(("x" * (spare + 1),), b"")), limits)


def test_the_limits_are_those_of_the_contract() -> None:
    assert HeaderLimits(header_bytes=32 * 1024, stanzas=64) == SYNC_LIMITS
    assert HeaderLimits(header_bytes=256 * 1024, stanzas=4096) == FILE_LIMITS


@pytest.mark.parametrize("limits", [SYNC_LIMITS, FILE_LIMITS], ids=["sync", "file"])
def test_a_header_without_an_end_is_too_large_not_damaged(limits: HeaderLimits) -> None:
    endless = VERSION_LINE + b"-> x\n" + (b"A" * 64 + b"\n") * (limits.header_bytes // 64)

    with pytest.raises(TooLarge):
        parse(endless, limits)


def test_no_more_than_the_limit_is_copied() -> None:
    file = memoryview(file_of(SHORT, payload=bytes(10_000_000)))
    tracemalloc.start()
    header.parse(file, SYNC_LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4 * SYNC_LIMITS.header_bytes


# -- open files --------------------------------------------------------------------------------------


@pytest.fixture
def fd() -> Iterator[int]:
    """An empty file."""
    with TemporaryFile(buffering=0) as stored:
        yield stored.fileno()


def read(fd: int, offset: int = 0) -> Header:
    return header.read_by(lambda position, length: os.pread(fd, length, offset + position), FILE_LIMITS)


@pytest.mark.parametrize("offset", [0, 5], ids=["at the start", "behind something"])
@pytest.mark.parametrize(
    "size",
    [200, 4095, 4096, 4097, 4096 + 15, 4096 + 16, 4096 + 17, 4096 + 48, 5000, 200_000, 256 * 1024],
)
def test_a_header_of_any_size_is_read_from_a_file(fd: int, size: int, offset: int) -> None:
    file = padded_to(size) + NONCE + bytes(70_000)
    os.pwrite(fd, file, offset)
    head = read(fd, offset)

    assert (head.size, head.nonce) == (size, NONCE)


@pytest.mark.parametrize("payload", [b"", b"\n--- ", bytes(3900) + b"\n--- ", b"\n--- " * 2000], ids=len)
def test_a_payload_that_looks_like_an_end_is_no_end(fd: int, payload: bytes) -> None:
    os.write(fd, file_of(SHORT, payload=payload))

    assert read(fd).stanzas == (SHORT,)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", NotACiphertext),
        (b"PK" + bytes(100_000), NotACiphertext),
        (VERSION_LINE + b"-> x\n", DecryptFailed),
        (VERSION_LINE + b"A" * 300_000, TooLarge),
    ],
    ids=["empty", "zip", "cut", "endless"],
)
def test_files_without_a_header_are_refused_as_in_memory(fd: int, data: bytes, error: type[KmsError]) -> None:
    os.write(fd, data)

    with pytest.raises(error):
        read(fd)


# -- key derivation ----------------------------------------------------------------------------------

SALTS: Final = (
    st.binary(max_size=70) | st.binary(min_size=63, max_size=65) | st.binary(min_size=128, max_size=130)
)


@given(st.binary(max_size=40), SALTS, st.binary(max_size=40))
def test_derived_keys_are_hkdf_sha256_of_rfc_5869(secret: bytes, salt: bytes, info: bytes) -> None:
    """By the HMAC of the standard library."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    expanded = hmac.digest(extracted, info + b"\x01", "sha256")

    assert header.hkdf(secret, salt=salt, info=info) == expanded
