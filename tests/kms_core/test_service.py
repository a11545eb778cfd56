import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import pytest

from kms_core.age import stream, x25519
from kms_core.age.header import HeaderLimits, Stanza, render
from kms_core.auth.policy import Principal
from kms_core.backends import Health
from kms_core.backends.age import AgeBackend
from kms_core.envelope import sealing
from kms_core.key_selection import SelectionRules
from kms_core.operation import Unwrapped
from kms_core.payload.files import FileRange, FileWriter
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import (
    ContextRequired,
    DataKeysUnsupported,
    DecryptFailed,
    InvalidContext,
    InvalidRequest,
    TooLarge,
    UnknownKey,
)
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    age_backend,
    file_key_of,
    file_to_file,
    head_of,
    kms_over,
    types_of,
)

MiB: Final = 1024 * 1024
BOB: Final = Principal("bob", "other", "test")
IDENTITY: Final = x25519.X25519Identity.generate()
PAYROLL: Final = x25519.X25519Identity.generate()


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "default", IDENTITY)


@pytest.fixture
def payroll(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "payroll", PAYROLL)


@pytest.fixture
def kms(backend: AgeBackend, payroll: AgeBackend) -> Kms:
    return kms_over(backend, {"payroll": payroll})


# -- bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [NO_CONTEXT, ROW_7], ids=["no context", "context"])
@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, MiB])
def test_what_is_encrypted_decrypts(kms: Kms, size: int, context: Context) -> None:
    plaintext = os.urandom(size)
    sealed = kms.encrypt(ADA, plaintext, context)
    opened = kms.decrypt(ADA, sealed.ciphertext, context)

    assert opened.plaintext == plaintext
    assert opened.origin == "service"
    assert opened.key == sealed.key
    assert (sealed.key.tenant, sealed.key.key_id, sealed.key.backend) == ("acme", "default", "age")


def test_a_key_is_chosen_by_id_and_found_by_the_name_in_the_file(kms: Kms) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7, key_id="payroll")

    assert kms.decrypt(ADA, sealed.ciphertext, ROW_7).key.key_id == "payroll"
    assert kms.decrypt(ADA, sealed.ciphertext, ROW_7, key_id="payroll").plaintext == b"salary"
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, sealed.ciphertext, ROW_7, key_id="default")


def test_one_key_under_two_ids_is_two_keys(backend: AgeBackend) -> None:
    kms = kms_over(backend, {"alias": backend})
    sealed = kms.encrypt(ADA, b"salary", ROW_7, key_id="alias")

    assert kms.decrypt(ADA, sealed.ciphertext, ROW_7).key.key_id == "alias"
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, sealed.ciphertext.replace(b" alias ", b" default "), ROW_7)


def test_an_unknown_key_opens_and_seals_nothing(kms: Kms, backend: AgeBackend) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7, key_id="payroll")

    with pytest.raises(UnknownKey):
        kms_over(backend).decrypt(ADA, sealed.ciphertext, ROW_7)
    with pytest.raises(UnknownKey):
        kms.encrypt(ADA, b"salary", ROW_7, key_id="gone")
    with pytest.raises(UnknownKey):
        kms.generate_data_key(ADA, 32, ROW_7, key_id="gone")


def test_the_tenant_of_the_sealing_is_bound(kms: Kms) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7)

    with pytest.raises(DecryptFailed):
        kms.decrypt(BOB, sealed.ciphertext, ROW_7)


def test_headers_above_the_limits_of_a_call_are_too_large(kms: Kms, backend: AgeBackend) -> None:
    file_key = bytes(16)
    stanzas = [Stanza(("x",), b"")] * 65
    for head in (render(stanzas, file_key), render([Stanza(("x" * 40_000,), b"")], file_key)):
        with pytest.raises(TooLarge):
            kms.decrypt(ADA, head + bytes(32), NO_CONTEXT)
    own = kms_over(backend, rules=SelectionRules(limits=HeaderLimits(1024, 2)))
    with pytest.raises(TooLarge):
        own.decrypt(ADA, own.encrypt(ADA, b"salary", ROW_7).ciphertext, ROW_7)


# -- contexts ----------------------------------------------------------------------------------------


def test_a_required_context_is_required_where_something_is_sealed(backend: AgeBackend) -> None:
    strict = kms_over(backend, rules=SelectionRules(require_context=True))
    without = kms_over(backend).encrypt(ADA, b"salary", NO_CONTEXT).ciphertext
    within = strict.encrypt(ADA, b"salary", ROW_7).ciphertext

    for refused in (
        lambda: strict.encrypt(ADA, b"salary", NO_CONTEXT),
        lambda: strict.generate_data_key(ADA, 32, NO_CONTEXT),
        lambda: strict.rewrap(ADA, without, NO_CONTEXT),
        lambda: strict.rewrap(ADA, within, ROW_7, new_context=NO_CONTEXT),
    ):
        with pytest.raises(ContextRequired):
            refused()
    assert strict.decrypt(ADA, without, NO_CONTEXT).plaintext == b"salary"


@pytest.mark.parametrize(
    "text",
    [
        *(f"2999-01-31T12:00:00{offset}" for offset in ("Z", "+00:00", "+14:00", "-12:00")),
        (datetime.now(UTC) + timedelta(days=1)).astimezone(None).isoformat(),
    ],
    ids=["Z", "UTC", "east", "west", "tomorrow, here"],
)
def test_before_its_time_is_over_a_file_opens(kms: Kms, text: str) -> None:
    context = Context.parse({"not_after": text})

    assert kms.decrypt(ADA, kms.encrypt(ADA, b"x", context).ciphertext, context).plaintext == b"x"


@pytest.mark.parametrize(
    "text",
    ["2020-01-31T12:00:00Z", "2020-01-31T12:00:00+14:00", "0001-01-01T00:00:00+23:59"],
    ids=["past", "past elsewhere", "the first"],
)
def test_after_its_time_a_file_is_refused(kms: Kms, text: str) -> None:
    context = Context.parse({"not_after": text})
    sealed = kms.encrypt(ADA, b"salary", context).ciphertext

    for call in (kms.decrypt, kms.rewrap):
        with pytest.raises(DecryptFailed):
            call(ADA, sealed, context)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be an RFC 3339 time"),
        ("tomorrow", "must be an RFC 3339 time"),
        ("2027-13-31T12:00:00Z", "must be an RFC 3339 time"),
        ("1800000000", "must be an RFC 3339 time"),
        ("2027-01-31T12:00:00", "needs an offset"),
        ("2027-01-31", "needs an offset"),
    ],
)
def test_a_malformed_time_is_refused_where_it_would_be_sealed(kms: Kms, text: str, said: str) -> None:
    context, sealed = Context.parse({"not_after": text}), kms.encrypt(ADA, b"x", ROW_7).ciphertext
    for call in (
        lambda: kms.encrypt(ADA, b"x", context),
        lambda: kms.generate_data_key(ADA, 32, context),
        lambda: kms.rewrap(ADA, sealed, ROW_7, new_context=context),
    ):
        with pytest.raises(InvalidContext, match=said):
            call()


# -- data keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 16, 32, 1024])
def test_a_data_key_comes_in_clear_and_sealed(kms: Kms, size: int) -> None:
    made = kms.generate_data_key(ADA, size, ROW_7)

    assert len(made.plaintext) == size
    assert kms.decrypt(ADA, made.ciphertext, ROW_7).plaintext == made.plaintext
    assert kms.generate_data_key(ADA, 32, ROW_7).plaintext != kms.generate_data_key(ADA, 32, ROW_7).plaintext


def test_data_keys_are_handed_out_where_settings_say_so(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, IDENTITY)
    backend.data_keys = False

    with pytest.raises(DataKeysUnsupported):
        kms_over(backend).generate_data_key(ADA, 32, ROW_7)


# -- rewrap ------------------------------------------------------------------------------------------


def test_a_rewrap_leaves_the_payload_as_it_is(kms: Kms) -> None:
    before = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    after = kms.rewrap(ADA, before, ROW_7, key_id="payroll")

    assert after.key.key_id == "payroll"
    assert after.ciphertext[head_of(after.ciphertext).size :] == before[head_of(before).size :]
    assert kms.rewrap(ADA, after.ciphertext, ROW_7).key.key_id == "payroll", "it stays with its key"
    assert kms.decrypt(ADA, after.ciphertext, ROW_7).plaintext == b"salary"
    with pytest.raises(DecryptFailed):
        IDENTITY.unwrap(head_of(after.ciphertext).stanzas[0])


@pytest.mark.parametrize(
    "target", [NO_CONTEXT, Context.parse("row=8"), ROW_7, None], ids=["none", "other", "same", "kept"]
)
def test_a_rewrap_keeps_or_changes_the_context(kms: Kms, target: Context | None) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    moved = kms.rewrap(ADA, sealed, ROW_7, new_context=target).ciphertext

    assert kms.decrypt(ADA, moved, ROW_7 if target is None else target).plaintext == b"salary"
    with pytest.raises(DecryptFailed):
        kms.rewrap(ADA, sealed, NO_CONTEXT, new_context=target)
    if target not in {None, ROW_7}:
        with pytest.raises(DecryptFailed):
            kms.decrypt(ADA, moved, ROW_7)


def test_a_rewrap_moves_to_the_current_version(tmp_path: Path) -> None:
    old = kms_over(age_backend(tmp_path, IDENTITY))
    sealed = old.encrypt(ADA, b"salary", ROW_7)
    rotated = kms_over(age_backend(tmp_path, IDENTITY, PAYROLL))
    moved = rotated.rewrap(ADA, sealed.ciphertext, ROW_7)

    assert moved.key.version != sealed.key.version
    assert file_key_of(moved.ciphertext, PAYROLL) == file_key_of(sealed.ciphertext, IDENTITY)


@pytest.mark.parametrize("size", [MiB - 1, MiB])
def test_a_rewrap_keeps_the_size_of_a_rounded_header(kms: Kms, size: int) -> None:
    before = kms.encrypt(ADA, bytes(size), ROW_7).ciphertext
    after = kms.rewrap(ADA, before, ROW_7, key_id="payroll").ciphertext

    assert types_of(after) == types_of(before)
    assert (head_of(after).size == 4096) == (size >= MiB)


def test_a_foreign_file_gets_no_origin_by_rewrap(kms: Kms) -> None:
    foreign = render([IDENTITY.recipient.wrap(bytes(16))], bytes(16)) + bytes(32)

    with pytest.raises(InvalidRequest, match="decrypt it and encrypt it again"):
        kms.rewrap(ADA, foreign, NO_CONTEXT)


# -- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, MiB + 1])
def test_files_go_through_descriptors(kms: Kms, size: int) -> None:
    plaintext = os.urandom(size)
    with TemporaryFile(buffering=0) as source, TemporaryFile() as sealed, TemporaryFile() as opened:
        source.write(plaintext)
        made = kms.encrypt(
            ADA, file_to_file(FileRange(source.fileno(), size), FileWriter(sealed.fileno())), ROW_7
        )
        file = FileRange(sealed.fileno(), os.fstat(sealed.fileno()).st_size)
        found = kms.decrypt(ADA, file_to_file(file, FileWriter(opened.fileno())), ROW_7)

        assert kms.decrypt_header(ADA, file, ROW_7).key == found.key == made.key
        assert made.ciphertext == found.plaintext == b""
        assert opened.read() == plaintext
        assert kms.decrypt(ADA, sealed.read(), ROW_7).plaintext == plaintext


def test_a_damaged_file_is_a_failed_decrypt(kms: Kms) -> None:
    sealed = kms.encrypt(ADA, bytes(100_000), ROW_7).ciphertext[:-1]
    with TemporaryFile(buffering=0) as source, TemporaryFile() as opened:
        source.write(sealed)
        file = FileRange(source.fileno(), len(sealed))
        with pytest.raises(DecryptFailed):
            kms.decrypt(ADA, file_to_file(file, FileWriter(opened.fileno())), ROW_7)
        with pytest.raises(DecryptFailed):
            kms.decrypt_header(ADA, file, ROW_7)


def test_a_header_is_made_for_a_payload_that_is_there(kms: Kms) -> None:
    found = Unwrapped(os.urandom(16), os.urandom(16), kms.encrypt(ADA, b"", ROW_7).key, "service")
    payload = found.file_key, found.nonce
    head = kms.encrypt_header(ADA, payload, ROW_7, size_bytes=6)
    file = head + found.nonce + stream.seal(found.payload_key, b"salary")

    assert kms.decrypt(ADA, file, ROW_7).plaintext == b"salary"
    assert len(kms.encrypt_header(ADA, payload, ROW_7, size_bytes=MiB)) == 4096


def test_rewrapping_a_file_makes_a_header_alone(kms: Kms) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    head = head_of(sealed)
    with TemporaryFile(buffering=0) as source:
        source.write(sealed)
        file = FileRange(source.fileno(), len(sealed))
        moved, nonce = kms.rewrap_header(ADA, file, ROW_7, new_context=None, key_id="payroll")

    assert nonce == head.nonce
    assert kms.decrypt(ADA, moved.ciphertext + sealed[head.size :], ROW_7).plaintext == b"salary"


# -- the rest of the interface -----------------------------------------------------------------------


def test_health_is_the_health_of_the_default_key(kms: Kms, tmp_path: Path) -> None:
    before: Health = kms.health_check()
    assert before.healthy
    (tmp_path / "default" / "private_key.txt").unlink()

    assert not kms.health_check().healthy


def test_nothing_secret_is_shown(kms: Kms) -> None:
    sealed = kms.encrypt(ADA, b"hunter2", ROW_7)
    opened = kms.decrypt(ADA, sealed.ciphertext, ROW_7)
    made = kms.generate_data_key(ADA, 32, ROW_7)
    unwrapped = Unwrapped(b"hunter2", b"hunter2", opened.key, "service")
    shown = repr([sealed, opened, made, unwrapped])

    assert "hunter2" not in shown
    assert "age-encryption" not in shown
    assert repr(made.plaintext) not in shown


def test_padding_begins_where_the_contract_says() -> None:
    assert (MiB, 4096) == (sealing.PAD_FROM_BYTES, sealing.PADDED_HEADER_BYTES)
