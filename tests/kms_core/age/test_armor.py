"""Armor: one way to write it, and nothing else is read."""

import io
import os

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.age.armor import ArmorReader, ArmorWriter, dearmor
from kms_protocol.errors import DecryptFailed, NotACiphertext
from support.age_kms import armored

DATA = bytes(range(256)) * 2
TEXT = armored(DATA)
BODY = TEXT.split(b"\n", 1)[1].rsplit(b"-----END", 1)[0]
END = b"-----END AGE ENCRYPTED FILE-----\n"


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_what_is_armored_comes_back_with_either_line_end(data: bytes) -> None:
    text = armored(data)

    assert dearmor(text) == data
    assert dearmor(text.replace(b"\n", b"\r\n")) == data
    assert max(map(len, text.split(b"\n"))) <= 64


def test_pyrage_reads_our_armor_and_we_read_its() -> None:
    identity = pyrage.x25519.Identity.generate()
    file = pyrage.encrypt(b"salary", [identity.to_public()])
    text = pyrage.encrypt(b"salary", [identity.to_public()], armored=True)

    assert pyrage.decrypt(armored(file), [identity]) == b"salary"
    assert pyrage.decrypt(dearmor(text), [identity]) == b"salary"


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 65535, 200_000])
def test_streams_do_what_memory_does(size: int) -> None:
    data = os.urandom(size)
    text = io.BytesIO()
    writer = ArmorWriter(text)
    for start in range(0, size, 1000):
        assert writer.write(data[start : start + 1000]) == min(1000, size - start)
    writer.finish()

    assert text.getvalue() == armored(data)
    assert io.BufferedReader(ArmorReader(io.BytesIO(text.getvalue()))).read() == data


class ByteByByte(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(1, size or 0))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_pieces_may_end_anywhere(end: bytes) -> None:
    text = b" \r\n\t" + TEXT.replace(b"\n", end) + b"\r\n "

    assert ArmorReader(ByteByByte(text)).readall() == DATA


FORGED = {  # beside those of the vectors
    "cut-in-end": TEXT[:-4],
    "cut-in-body": TEXT[:100],
    "begin": TEXT[:20] + b"X" + TEXT[21:],
    "two-cr": TEXT.replace(BODY, BODY.replace(b"\n", b"\r\r\n")),
    "early-padding": TEXT.replace(BODY, BODY[:10] + b"=" + BODY[11:]),
    "space-after-begin": TEXT.replace(b"FILE-----\n", b"FILE----- \n", 1),
    "twice": TEXT + TEXT,
    "much-space-behind": TEXT + b"\n" * 1025,
    "cr-behind": TEXT[:-1] + b"\r",
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED.keys())
def test_other_texts_are_refused(text: bytes) -> None:
    assert text != TEXT
    with pytest.raises((DecryptFailed, NotACiphertext)):
        dearmor(text)


def test_padding_before_the_last_line_is_refused_in_long_texts() -> None:
    data = os.urandom(47)
    line = armored(data).split(b"\n")[1] + b"\n"
    text = b"-----BEGIN AGE ENCRYPTED FILE-----\n" + line * 3000 + END

    with pytest.raises(DecryptFailed):
        dearmor(text)


@pytest.mark.parametrize("text", [b"", b"hello", b" " * 1025 + TEXT, b"\xef\xbb\xbf" + TEXT, TEXT.lower()])
def test_what_is_no_armor_is_called_so(text: bytes) -> None:
    with pytest.raises(NotACiphertext):
        dearmor(text)


def test_a_stream_without_data_yet_does_not_pass_for_an_ended_one() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with (
        os.fdopen(reading, "rb", buffering=0) as source,
        os.fdopen(writing, "wb"),
        pytest.raises(BlockingIOError),
    ):
        ArmorReader(source).readall()
