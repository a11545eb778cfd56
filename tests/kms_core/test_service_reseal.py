"""Resealing: a new file key around the same plaintext; who may, and what is recorded."""

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import pytest

from kms_core.age import stream, x25519
from kms_core.age.header import render
from kms_core.age.stream import CHUNK
from kms_core.envelope import sealing
from kms_core.payload.files import FileRange, FileWriter
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, Forbidden, ForeignRefused, KmsError
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    MemoryTrail,
    age_backend,
    allowing,
    file_key_of,
    file_to_file,
    head_of,
    kms_over,
)

MiB: Final = 1024 * 1024
IDENTITY: Final = x25519.X25519Identity.generate()
PAYROLL: Final = x25519.X25519Identity.generate()
OTHER: Final = Context.parse("row=8")


@pytest.fixture
def trail() -> MemoryTrail:
    return MemoryTrail()


@pytest.fixture
def kms(tmp_path: Path, trail: MemoryTrail) -> Kms:
    payroll = age_backend(tmp_path / "payroll", PAYROLL)
    return kms_over(age_backend(tmp_path / "default", IDENTITY), {"payroll": payroll}, trail=trail)


def resealed(
    kms: Kms,
    sealed: bytes,
    context: Context = ROW_7,
    *,
    new: Context | None = None,
    key_id: str | None = None,
) -> bytes:
    with TemporaryFile(buffering=0) as source, TemporaryFile(buffering=0) as target:
        source.write(sealed)
        extent = FileRange(source.fileno(), len(sealed))
        onto = FileWriter(target.fileno())
        kms.reseal(ADA, file_to_file(extent, onto), context, new_context=new, key_id=key_id)
        return os.pread(target.fileno(), 2 * len(sealed) + 8192, 0)


@pytest.mark.parametrize("size", [0, 1, CHUNK, MiB - 1, MiB, 3 * MiB + 1])
def test_the_plaintext_stays_and_nothing_else(kms: Kms, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = kms.encrypt(ADA, plaintext, ROW_7).ciphertext
    moved = resealed(kms, sealed)

    assert kms.decrypt(ADA, moved, ROW_7).plaintext == plaintext
    assert file_key_of(moved, IDENTITY) != file_key_of(sealed, IDENTITY)
    assert head_of(moved).nonce != head_of(sealed).nonce
    assert (head_of(moved).size == sealing.PADDED_HEADER_BYTES) == (size >= MiB)


def test_it_may_go_to_another_key_and_context(kms: Kms) -> None:
    moved = resealed(kms, kms.encrypt(ADA, b"salary", ROW_7).ciphertext, new=OTHER, key_id="payroll")

    opened = kms.decrypt(ADA, moved, OTHER)
    assert (opened.plaintext, opened.key.key_id) == (b"salary", "payroll")
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, moved, ROW_7)


def test_one_record_names_the_operation_and_where_it_went(kms: Kms, trail: MemoryTrail) -> None:
    sealed = kms.encrypt(ADA, bytes(100), ROW_7).ciphertext
    moved = resealed(kms, sealed, key_id="payroll")

    assert [result for result in trail.results if result[0] != "encrypt"] == [("reseal", "ok")]
    line = trail.lines[-1]
    assert (line["key_id"], line["bytes_in"], line["bytes_out"]) == ("payroll", len(sealed), len(moved))


@pytest.mark.parametrize("at", [0, 40, -1], ids=["first line", "header", "payload"])
def test_a_damaged_file_is_refused_and_recorded(kms: Kms, trail: MemoryTrail, at: int) -> None:
    sealed = bytearray(kms.encrypt(ADA, b"salary", ROW_7).ciphertext)
    sealed[at] ^= 1

    with pytest.raises(KmsError) as refusal:
        resealed(kms, bytes(sealed))
    assert trail.results[-1] == ("reseal", refusal.value.code)


def test_a_wrong_context_is_refused(kms: Kms) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext

    for wrong in (OTHER, NO_CONTEXT):
        with pytest.raises(DecryptFailed):
            resealed(kms, sealed, wrong)


def foreign_file(identity: x25519.X25519Identity) -> bytes:
    file_key = os.urandom(16)
    head = render([identity.recipient.wrap(file_key)], file_key) + bytes(16)
    return head + stream.seal(stream.payload_key(file_key, bytes(16)), b"theirs")


def test_a_foreign_file_becomes_one_of_ours(kms: Kms) -> None:
    for identity, key_id in ((IDENTITY, None), (PAYROLL, "payroll")):
        moved = resealed(kms, foreign_file(identity), NO_CONTEXT, new=ROW_7, key_id=key_id)

        opened = kms.decrypt(ADA, moved, ROW_7)
        assert (opened.plaintext, opened.origin) == (b"theirs", "service")


def test_a_foreign_file_is_refused_where_its_key_takes_none(tmp_path: Path) -> None:
    kms = kms_over(age_backend(tmp_path, IDENTITY), accept_foreign=False)

    with pytest.raises(ForeignRefused):
        resealed(kms, foreign_file(IDENTITY), NO_CONTEXT)


@pytest.mark.parametrize(
    ("scopes", "key_id", "fine"),
    [
        (["decrypt,encrypt key=default"], None, True),
        (["reseal key=default"], None, True),
        (["rewrap key=default"], None, False),
        (["decrypt key=default"], None, False),
        (["encrypt key=default"], None, False),
        (["reseal key=default,payroll"], "payroll", False),
        (["decrypt key=default", "encrypt key=payroll"], "payroll", True),
    ],
)
def test_it_takes_both_rights_or_its_own_where_the_key_stays(
    tmp_path: Path, scopes: list[str], key_id: str | None, *, fine: bool
) -> None:
    backends = age_backend(tmp_path / "a", IDENTITY), {"payroll": age_backend(tmp_path / "b", PAYROLL)}
    sealed = kms_over(*backends).encrypt(ADA, b"salary", ROW_7).ciphertext
    kms = kms_over(*backends, policy=allowing(*scopes))
    if fine:
        assert resealed(kms, sealed, key_id=key_id)
        return

    with pytest.raises(Forbidden):
        resealed(kms, sealed, key_id=key_id)
