"""All C2SP CCTV vectors: what decrypts, how the rest fails, and that encoding again gives the same bytes.

Passphrases are left to stock age: the 26 vectors with one test header, payload and armor only.
"""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable

import pytest

from kms_core.age import armor, header, mlkem768x25519, stream, x25519
from kms_core.age.header import FILE_LIMITS, Header
from kms_core.age.x25519 import NoMatch
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.streaming import RangeReader
from kms_protocol.errors import DecryptFailed, NotACiphertext
from support import age_kms, cctv
from support.cctv import Vector

WITH_PASSPHRASE = 26
UNREADABLE = {"armor failure", "header failure"}
SELECTIONS: dict[str, Callable[[Vector], bool]] = {
    "vector": lambda vector: not vector.all("passphrase"),
    "readable": lambda vector: vector.expect not in UNREADABLE,
    "released": lambda vector: vector.payload_sha256 is not None and not vector.all("passphrase"),
    "opened": lambda vector: vector.payload_sha256 is not None,
    "good": lambda vector: vector.expect == "success",
    "armored": lambda vector: vector.armored and vector.expect == "success",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test takes the vectors of the selection that it names; none at all means skipped."""
    for name in SELECTIONS.keys() & set(metafunc.fixturenames):
        chosen = [vector for vector in cctv.load() if SELECTIONS[name](vector)]
        metafunc.parametrize(name, chosen, ids=[vector.name for vector in chosen])


def test_every_vector_is_there() -> None:
    assert len(cctv.load()) == cctv.COUNT
    assert sum(bool(vector.all("passphrase")) for vector in cctv.load()) == WITH_PASSPHRASE


def test_decryption_ends_as_expected(vector: Vector) -> None:
    assert decrypt(vector, io.BytesIO()) == vector.expect


@pytest.mark.parametrize("slab_chunks", [1, 2, 8, 300])
def test_exactly_the_genuine_bytes_are_released(released: Vector, slab_chunks: int) -> None:
    output = io.BytesIO()
    outcome = decrypt(released, output, ParallelOptions(slab_chunks=slab_chunks))

    assert outcome == released.expect
    assert hashlib.sha256(output.getvalue()).hexdigest() == released.payload_sha256


@pytest.mark.parametrize("slab_chunks", [1, 2, 8, 300])
def test_threads_open_what_is_whole_and_nothing_else(opened: Vector, slab_chunks: int) -> None:
    key, sealed = payload(opened)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(sealed)
        source.flush()
        extent = FileRange(source.fileno(), len(sealed))
        outcome = "success"
        try:
            parallel.open_file(
                key, extent, FileWriter(target.fileno()), options=ParallelOptions(slab_chunks=slab_chunks)
            )
        except DecryptFailed:
            outcome = "payload failure"
        target.seek(0)

        assert outcome == opened.expect
        assert outcome != "success" or hashlib.sha256(target.read()).hexdigest() == opened.payload_sha256


def test_memory_and_ranges_agree_with_files(opened: Vector) -> None:
    key, sealed = payload(opened)

    def whole() -> bytes:
        return stream.open_(key, sealed)

    def in_ranges() -> bytes:
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(sealed)
            return b"".join(RangeReader(key, FileRange(file.fileno(), len(sealed))).slabs())

    for read in (whole, in_ranges):
        if opened.expect == "success":
            assert hashlib.sha256(read()).hexdigest() == opened.payload_sha256
        else:
            with pytest.raises(DecryptFailed):
                read()


def test_the_header_encodes_to_the_same_bytes(readable: Vector) -> None:
    file = dearmored(readable)
    head = header.parse(file, FILE_LIMITS)
    rendered = header.render(head.stanzas, readable.file_key)

    assert rendered.startswith(head.signed)
    assert (rendered == file[: head.size]) == (readable.expect != "HMAC failure")


@pytest.mark.parametrize("slab_chunks", [1, 2, 8, 300])
def test_the_payload_seals_to_the_same_bytes(good: Vector, slab_chunks: int) -> None:
    key, sealed = payload(good)
    plaintext = stream.open_(key, sealed)
    piped = io.BytesIO()
    streaming.seal_pipe(key, io.BytesIO(plaintext), piped, ParallelOptions(slab_chunks=slab_chunks))

    assert stream.seal(key, plaintext) == sealed
    assert piped.getvalue() == sealed


def test_armor_encodes_to_the_same_text(armored: Vector) -> None:
    text = armored.file.strip().replace(b"\r\n", b"\n") + b"\n"

    assert age_kms.armored(armor.dearmor(armored.file)) == text


def decrypt(vector: Vector, released: io.BytesIO, options: ParallelOptions = parallel.DEFAULTS) -> str:
    """What a reader finds, in the words of the vectors."""
    try:
        file = dearmored(vector)
    except (DecryptFailed, NotACiphertext):
        return "armor failure"
    try:
        head = header.parse(file, FILE_LIMITS)
        file_key = unwrapped(vector, head)
    except NoMatch:
        return "no match"
    except (DecryptFailed, NotACiphertext):
        return "header failure"
    try:
        head.check_mac(file_key)
    except DecryptFailed:
        return "HMAC failure"
    try:
        key = stream.payload_key(file_key, head.nonce)
        streaming.open_pipe(key, io.BytesIO(file[head.payload_offset :]), released, options)
    except DecryptFailed:
        return "payload failure"
    return "success"


def unwrapped(vector: Vector, head: Header) -> bytes:
    """The file key, by the identities of the vector."""
    identities = [identity(text) for text in vector.all("identity")]
    for stanza in head.stanzas:
        for one in identities:
            with contextlib.suppress(NoMatch):
                return one.unwrap(stanza)
    raise NoMatch


def identity(text: str) -> x25519.X25519Identity | mlkem768x25519.HybridIdentity:
    kind = (
        mlkem768x25519.HybridIdentity
        if text.startswith(mlkem768x25519.IDENTITY_PREFIX)
        else x25519.X25519Identity
    )
    return kind.parse(text)


def dearmored(vector: Vector) -> bytes:
    return armor.dearmor(vector.file) if vector.armored else vector.file


def payload(vector: Vector) -> tuple[bytes, bytes]:
    """The payload key and the chunks."""
    file = dearmored(vector)
    head = header.parse(file, FILE_LIMITS)
    return stream.payload_key(vector.file_key, head.nonce), file[head.payload_offset :]
