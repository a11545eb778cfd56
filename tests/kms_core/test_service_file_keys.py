"""File keys that the service wraps and unwraps for age tools, which make the rest of the file themselves."""

import os
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import header, stream, x25519
from kms_core.age.header import FILE_LIMITS
from kms_core.auth.policy import Principal
from kms_core.key_selection import SelectionRules
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import (
    ContextRequired,
    DecryptFailed,
    ForeignRefused,
    InvalidRequest,
    KmsError,
    TooLarge,
    UnknownKey,
)
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    MemoryTrail,
    age_backend,
    head_of,
    kms_over,
    stanzas_of,
)

FILE_KEY: Final = bytes(range(16))
IDENTITIES: Final = {name: x25519.X25519Identity.generate() for name in ("default", "payroll")}
BOB: Final = Principal("bob", "other", "test")


@pytest.fixture
def trail() -> MemoryTrail:
    return MemoryTrail()


@pytest.fixture
def kms(tmp_path: Path, trail: MemoryTrail) -> Kms:
    mine, payroll = (age_backend(tmp_path / name, IDENTITIES[name]) for name in IDENTITIES)
    return kms_over(mine, {"payroll": payroll}, trail=trail, accept_foreign=False)


def test_a_tool_that_wraps_by_the_service_makes_a_file_of_the_service(kms: Kms, trail: MemoryTrail) -> None:
    nonce = os.urandom(16)
    made = kms.wrap(ADA, FILE_KEY, ROW_7, key_id="payroll")
    stanza = header.parse_stanzas(made.stanza, FILE_LIMITS)
    file = (
        header.render(stanza, FILE_KEY) + nonce + stream.seal(stream.payload_key(FILE_KEY, nonce), b"salary")
    )

    opened = kms.decrypt(ADA, file, ROW_7)
    found = kms.unwrap(ADA, made.stanza, ROW_7)

    assert (opened.plaintext, opened.origin, opened.key) == (b"salary", "service", made.key)
    assert (found.file_key, found.origin, found.key) == (FILE_KEY, "service", made.key)
    assert trail.results == [("wrap", "ok"), ("decrypt", "ok"), ("unwrap", "ok")]
    assert [line["key_id"] for line in trail.lines] == ["payroll"] * 3


@pytest.mark.parametrize(
    ("who", "context", "key_id"),
    [
        (BOB, ROW_7, None),
        (ADA, NO_CONTEXT, None),
        (ADA, Context.parse("row=8"), None),
        (ADA, ROW_7, "payroll"),
    ],
    ids=["tenant", "no context", "other context", "other key"],
)
def test_an_unwrap_has_to_be_as_the_wrap(
    kms: Kms, who: Principal, context: Context, key_id: str | None
) -> None:
    made = kms.wrap(ADA, FILE_KEY, ROW_7)

    with pytest.raises(DecryptFailed):
        kms.unwrap(who, made.stanza, context, key_id=key_id)


def test_a_wrap_ends_with_its_time(kms: Kms) -> None:
    over = Context.parse("not_after=2020-01-01T00:00:00Z")

    with pytest.raises(DecryptFailed):
        kms.unwrap(ADA, kms.wrap(ADA, FILE_KEY, over).stanza, over)


def test_stanzas_of_a_file_that_the_service_made_prove_no_origin(kms: Kms, trail: MemoryTrail) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7)

    with pytest.raises(ForeignRefused):
        kms.unwrap(ADA, stanzas_of(sealed.ciphertext), ROW_7)

    assert trail.lines[-1]["origin"] == "foreign"


def test_the_payload_nonce_proves_the_origin_of_a_file_that_the_service_made(
    kms: Kms, trail: MemoryTrail
) -> None:
    sealed = kms.encrypt(ADA, b"salary", ROW_7)
    head, stanzas = head_of(sealed.ciphertext), stanzas_of(sealed.ciphertext)

    found = kms.unwrap(ADA, stanzas, ROW_7, nonce=head.nonce)

    assert (found.origin, found.nonce) == ("service", head.nonce)
    assert trail.lines[-1]["file_id"] == sealed.file_id
    head.check_mac(found.file_key)
    with pytest.raises(DecryptFailed):
        kms.unwrap(ADA, stanzas, ROW_7, nonce=bytes(16))
    with pytest.raises(InvalidRequest):
        kms.unwrap(ADA, stanzas, ROW_7, nonce=head.nonce[:15])


def test_where_foreign_files_are_taken_they_open(tmp_path: Path) -> None:
    kms = kms_over(age_backend(tmp_path, x25519.X25519Identity.generate()))
    sealed = kms.encrypt(ADA, b"salary", ROW_7)

    found = kms.unwrap(ADA, stanzas_of(sealed.ciphertext), ROW_7)

    assert found.origin == "foreign"
    head_of(sealed.ciphertext).check_mac(found.file_key)


def test_a_native_stanza_alone_is_not_lifted_out_of_its_context(tmp_path: Path) -> None:
    """It would fit any context, even where foreign files are taken."""
    kms = kms_over(age_backend(tmp_path, x25519.X25519Identity.generate()))
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    native = header.render_stanza(head_of(sealed).stanzas[0])

    assert native.startswith(b"-> X25519 ")
    for stanzas, context in ((stanzas_of(sealed), NO_CONTEXT), (native, ROW_7), (native, NO_CONTEXT)):
        with pytest.raises(DecryptFailed):
            kms.unwrap(ADA, stanzas, context)


@pytest.mark.parametrize(
    ("stanzas", "error"),
    [
        (b"", DecryptFailed),
        (b"-> a\n", DecryptFailed),
        (b"-> X25519 a\n\n", DecryptFailed),
        (b"-> a\n\n" * 65, TooLarge),
        (b"-> a " + b"x" * 40_000, TooLarge),
    ],
    ids=["none", "no body", "of others", "too many", "too long"],
)
def test_what_are_no_stanzas_of_ours_is_refused(kms: Kms, stanzas: bytes, error: type[KmsError]) -> None:
    with pytest.raises(error):
        kms.unwrap(ADA, stanzas, NO_CONTEXT)


def test_a_wrap_is_held_to_the_rules_of_encrypt(kms: Kms) -> None:
    strict = Kms(kms.keyring, kms.policy, kms.audit_log, SelectionRules(require_context=True))

    with pytest.raises(ContextRequired):
        strict.wrap(ADA, FILE_KEY, NO_CONTEXT)
    with pytest.raises(UnknownKey):
        kms.wrap(ADA, FILE_KEY, ROW_7, key_id="missing")
    for size in (0, 15, 17, 32):
        with pytest.raises(InvalidRequest):
            kms.wrap(ADA, bytes(size), ROW_7)
