"""The id of a file: the same in answers, audit records and ``kms inspect``, and kept by a rewrap."""

import hashlib
from pathlib import Path

import pytest

from kms_cli.commands.offline import inspect
from kms_core.age import x25519
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding
from kms_core.service import Kms
from kms_protocol.errors import DecryptFailed
from support.age_kms import ADA, NO_CONTEXT, ROW_7, MemoryTrail, age_backend, head_of, kms_over


def expected(file: bytes) -> str:
    """The definition of docs/design.md, by hand: label and nonce, each after its 4-byte length."""
    label, nonce = b"kms-service/file-id/1", file[head_of(file).size :][:16]
    text = len(label).to_bytes(4, "big") + label + len(nonce).to_bytes(4, "big") + nonce
    return hashlib.sha256(text).hexdigest()[:32]


@pytest.fixture
def trail() -> MemoryTrail:
    return MemoryTrail()


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "keys", x25519.X25519Identity.generate())


@pytest.fixture
def kms(backend: AgeBackend, trail: MemoryTrail) -> Kms:
    return kms_over(backend, trail=trail)


def test_it_is_derived_from_the_nonce() -> None:
    assert binding.file_id(bytes(range(16))) == "517a430cf59d409fd281417f343a2c1d"  # of sha256sum


def test_each_operation_tells_and_records_it(kms: Kms, trail: MemoryTrail, tmp_path: Path) -> None:
    sealed = kms.encrypt(ADA, b"x", ROW_7)
    opened = kms.decrypt(ADA, sealed.ciphertext, ROW_7)
    moved = kms.rewrap(ADA, sealed.ciphertext, ROW_7, new_context=NO_CONTEXT)
    data_key = kms.generate_data_key(ADA, 32, ROW_7)

    file_id = expected(sealed.ciphertext)
    assert {sealed.file_id, opened.file_id, moved.file_id, expected(moved.ciphertext)} == {file_id}
    assert data_key.file_id == expected(data_key.ciphertext)
    assert [line["file_id"] for line in trail.lines] == [file_id] * 3 + [data_key.file_id]
    (tmp_path / "file").write_bytes(sealed.ciphertext)
    assert inspect(tmp_path / "file")["file_id"] == file_id


def test_a_reseal_records_both(kms: Kms, trail: MemoryTrail) -> None:
    sealed = kms.encrypt(ADA, b"x", ROW_7)
    again = kms.reseal(ADA, sealed.ciphertext, ROW_7)

    line = trail.lines[-1]
    assert (line["file_id"], line["new_file_id"]) == (sealed.file_id, again.file_id)
    assert again.file_id == expected(again.ciphertext) != sealed.file_id


def test_a_refused_file_is_named(kms: Kms, trail: MemoryTrail) -> None:
    sealed = kms.encrypt(ADA, b"x", ROW_7)
    for act in (kms.decrypt, kms.rewrap, kms.reseal):
        with pytest.raises(DecryptFailed):
            act(ADA, sealed.ciphertext, NO_CONTEXT)

    assert [line["file_id"] for line in trail.lines] == [sealed.file_id] * 4
    assert {line["result"] for line in trail.lines[1:]} == {"decrypt_failed"}


def test_stanzas_without_a_file_have_a_digest(kms: Kms, trail: MemoryTrail) -> None:
    wrapped = kms.wrap(ADA, bytes(16), ROW_7)
    kms.unwrap(ADA, wrapped.stanza, ROW_7)
    kms.wrap(ADA, bytes(16), ROW_7)

    first, again, other = (line["stanzas"] for line in trail.lines)
    assert first == again != other
    assert len(str(first)) == 32
    assert "file_id" not in trail.lines[0]
