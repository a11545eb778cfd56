"""What the service writes into the audit trail: one line per operation, before the result, and no secrets."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import pytest
from prometheus_client import REGISTRY

from kms_core import audit
from kms_core.age import stream, x25519
from kms_core.age.header import Stanza, render
from kms_core.auth.policy import Principal
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef, version_of
from kms_core.key_selection import SelectionRules
from kms_core.payload.files import FileRange, FileWriter
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, KmsError, TargetExists
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    FailingTrail,
    MemoryTrail,
    age_backend,
    file_key_of,
    file_to_file,
    head_of,
    kms_over,
    operation_counts,
    resigned,
    stanzas_of,
)
from support.audit_logs import AuditFolder

IDENTITY: Final = x25519.X25519Identity.generate()
SECRET: Final = Context.parse("patient=hunter2,row=7")
PLAIN: Final = b"hunter2 plain"
STRICT: Final = SelectionRules(require_context=True)
Call = Callable[[Kms, bytes], object]


def encrypting(context: Context = SECRET, *, who: Principal = ADA, key_id: str | None = None) -> Call:
    return lambda kms, _: kms.encrypt(who, PLAIN, context, key_id=key_id)


def decrypting(change: Callable[[bytes], bytes] = bytes, context: Context = SECRET) -> Call:
    return lambda kms, sealed: kms.decrypt(ADA, change(sealed), context)


def rewrapping(change: Callable[[bytes], bytes] = bytes, context: Context = SECRET) -> Call:
    return lambda kms, sealed: kms.rewrap(ADA, change(sealed), context)


def decrypting_a_file(change: Callable[[bytes], bytes] = bytes) -> Call:
    def call(kms: Kms, sealed: bytes) -> None:
        with TemporaryFile(buffering=0) as source, TemporaryFile() as target:
            source.write(content := change(sealed))
            files = file_to_file(FileRange(source.fileno(), len(content)), FileWriter(target.fileno()))
            kms.decrypt(ADA, files, SECRET)

    return call


def encrypt_a_file(kms: Kms, sealed: bytes) -> None:
    del sealed
    with TemporaryFile(buffering=0) as source, TemporaryFile() as target:
        source.write(PLAIN)
        files = file_to_file(FileRange(source.fileno(), len(PLAIN)), FileWriter(target.fileno()))
        kms.encrypt(ADA, files, SECRET)


def encrypt_header_only(kms: Kms, sealed: bytes) -> None:
    kms.encrypt_header(ADA, (os.urandom(16), head_of(sealed).nonce), SECRET, size_bytes=13)


def rewrap_a_file(kms: Kms, sealed: bytes) -> None:
    with TemporaryFile(buffering=0) as source:
        source.write(sealed)
        kms.rewrap_header(ADA, FileRange(source.fileno(), len(sealed)), SECRET, new_context=None, key_id=None)


def cut(sealed: bytes) -> bytes:
    return sealed[:-1]


def no_age_file(_: bytes) -> bytes:
    return b"hunter2"


def large_header(_: bytes) -> bytes:
    return render([Stanza(("x",), b"")] * 65, bytes(16)) + bytes(16)


CALLS: Final[dict[str, tuple[Call, str, str]]] = {
    "encrypt": (encrypting(), "encrypt", "ok"),
    "decrypt": (decrypting(), "decrypt", "ok"),
    "data key": (lambda kms, _: kms.generate_data_key(ADA, 32, SECRET), "generate_data_key", "ok"),
    "rewrap": (rewrapping(), "rewrap", "ok"),
    "encrypt a file": (encrypt_a_file, "encrypt", "ok"),
    "decrypt a file": (decrypting_a_file(), "decrypt", "ok"),
    "adopt a file": (encrypt_header_only, "encrypt", "ok"),
    "rewrap a file": (rewrap_a_file, "rewrap", "ok"),
    "unknown key": (encrypting(key_id="gone"), "encrypt", "unknown_key"),
    "wrong time": (encrypting(Context.parse("not_after=hunter2")), "encrypt", "invalid_context"),
    "no context": (encrypting(NO_CONTEXT), "encrypt", "context_required"),
    "nobody": (encrypting(who=Principal("")), "encrypt", "forbidden"),
    "wrong context": (decrypting(context=ROW_7), "decrypt", "decrypt_failed"),
    "cut": (decrypting(cut), "decrypt", "decrypt_failed"),
    "no age file": (decrypting(no_age_file), "decrypt", "not_a_ciphertext"),
    "large header": (decrypting(large_header), "decrypt", "too_large"),
    "rewrap, no age file": (rewrapping(no_age_file), "rewrap", "not_a_ciphertext"),
    "rewrap, context": (rewrapping(context=ROW_7), "rewrap", "decrypt_failed"),
    "file, cut": (decrypting_a_file(cut), "decrypt", "decrypt_failed"),
    "file, no age file": (decrypting_a_file(no_age_file), "decrypt", "not_a_ciphertext"),
    "no size": (lambda kms, _: kms.generate_data_key(ADA, -1, SECRET), "generate_data_key", "internal"),
}


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "age", IDENTITY)


@pytest.fixture
def sealed(backend: AgeBackend) -> bytes:
    return kms_over(backend).encrypt(ADA, PLAIN, SECRET).ciphertext


# -- one line per operation --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_each_operation_is_one_line_without_secrets(
    backend: AgeBackend, sealed: bytes, audit_folder: AuditFolder, name: str
) -> None:
    call, operation, result = CALLS[name]
    with nullcontext() if result == "ok" else pytest.raises((KmsError, ValueError)):
        call(kms_over(backend, trail=audit_folder.trail(), rules=STRICT), sealed)
    (line,) = audit_folder.operations()
    (path,) = audit_folder.files()

    assert (line["operation"], line["result"]) == (operation, result)
    if result == "ok":
        assert (line["key_id"], line["backend"]) == ("default", "age")
    assert "hunter2" not in path.read_text()
    assert IDENTITY.export() not in path.read_text()


@pytest.mark.parametrize("name", CALLS)
def test_without_its_line_no_result_leaves(backend: AgeBackend, sealed: bytes, name: str) -> None:
    """Not even a refusal."""
    with pytest.raises(AuditUnavailable):
        CALLS[name][0](kms_over(backend, trail=FailingTrail(), rules=STRICT), sealed)


def test_a_refusal_names_the_key_that_the_file_names(backend: AgeBackend, sealed: bytes) -> None:
    trail = MemoryTrail()
    kms = kms_over(backend, trail=trail)
    with pytest.raises(KmsError):
        kms.decrypt(ADA, sealed, NO_CONTEXT)
    with pytest.raises(KmsError):
        kms.unwrap(ADA, stanzas_of(sealed), NO_CONTEXT)

    for line in trail.lines:
        assert (line["key_id"], line["key_version"]) == ("default", version_of(IDENTITY.recipient))
        assert "origin" not in line  # which was not proven


# -- what is in a line -------------------------------------------------------------------------------


def test_a_line_says_who_what_which_and_how_much(backend: AgeBackend) -> None:
    trail = MemoryTrail()
    request, job = audit.request_id.set("req-1"), audit.job_id.set("job-1")
    try:
        made = kms_over(backend, trail=trail).encrypt(ADA, b"hunter2 plain", SECRET)
    finally:
        audit.request_id.reset(request)
        audit.job_id.reset(job)
    line = trail.lines[0]

    assert line.pop("duration_us")
    assert line == {
        "operation": "encrypt",
        "principal": "ada",
        "tenant": "acme",
        "credential": "test",
        "request_id": "req-1",
        "job_id": "job-1",
        "key_id": "default",
        "key_version": version_of(IDENTITY.recipient),
        "backend": "age",
        "context": {"patient": "hidden", "row": "hidden"},
        "bytes_in": 13,
        "bytes_out": len(made.ciphertext),
        "file_id": made.file_id,
        "result": "ok",
    }


def foreign_file() -> bytes:
    file_key = os.urandom(16)
    head = render([IDENTITY.recipient.wrap(file_key)], file_key) + bytes(16)
    return head + stream.seal(stream.payload_key(file_key, bytes(16)), b"theirs")


def test_a_foreign_file_is_recorded_as_such(backend: AgeBackend) -> None:
    trail, foreign = MemoryTrail(), foreign_file()
    kms_over(backend, trail=trail).decrypt(ADA, foreign, NO_CONTEXT)
    with pytest.raises(KmsError):
        kms_over(backend, trail=trail, accept_foreign=False).decrypt(ADA, foreign, NO_CONTEXT)

    assert [(line["origin"], line["result"]) for line in trail.lines] == [
        ("foreign", "ok"),
        ("foreign", "foreign_refused"),
    ]


def test_the_origin_of_the_file_that_was_read_is_recorded(backend: AgeBackend, sealed: bytes) -> None:
    trail = MemoryTrail()
    kms = kms_over(backend, trail=trail)
    kms.decrypt(ADA, sealed, SECRET)
    kms.rewrap(ADA, sealed, SECRET)
    kms.reseal(ADA, sealed, SECRET)
    kms.reseal(ADA, foreign_file(), NO_CONTEXT)

    assert [line["origin"] for line in trail.lines] == ["service", "service", "service", "foreign"]


def test_only_the_wrap_that_was_opened_is_recorded(backend: AgeBackend) -> None:
    """Who holds a file key can put other stanzas beside the one that opens the file."""
    trail = MemoryTrail()
    kms = kms_over(backend, trail=trail)
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    wraps = [binding.wrap_stanza(KeyRef("acme", key_id, "1", "age"), b"!", b"job") for key_id in ("x", "y")]
    file = resigned(sealed, [*head_of(sealed).stanzas, *wraps], file_key_of(sealed, IDENTITY))

    assert kms.decrypt(ADA, file, ROW_7).plaintext == b"salary"
    assert kms.unwrap(ADA, stanzas_of(file), ROW_7, nonce=head_of(file).nonce).file_key
    assert not any("wrap_key" in line for line in trail.lines)


def test_a_rewrap_records_both_contexts_and_sizes(
    backend: AgeBackend, sealed: bytes, audit_folder: AuditFolder
) -> None:
    trail = audit_folder.trail()
    moved = kms_over(backend, trail=trail).rewrap(ADA, sealed, SECRET, new_context=ROW_7).ciphertext
    (line,) = audit_folder.operations()

    assert line["context"] == trail.conceal("acme", SECRET)
    assert line["new_context"] == trail.conceal("acme", ROW_7)
    assert (line["bytes_in"], line["bytes_out"]) == (len(sealed), len(moved))


def test_a_data_key_is_not_in_its_line(backend: AgeBackend, audit_folder: AuditFolder) -> None:
    made = kms_over(backend, trail=audit_folder.trail()).generate_data_key(ADA, 32, SECRET)
    (path,) = audit_folder.files()

    assert made.plaintext.hex() not in path.read_text()
    assert "plaintext" not in audit_folder.operations()[0]


# -- effects and denials -----------------------------------------------------------------------------


def stages(trail: MemoryTrail) -> list[tuple[object, object]]:
    return [(line.get("stage"), line.get("result")) for line in trail.lines]


@pytest.mark.parametrize(
    ("raised", "outcome", "of_command"),
    [
        (None, [("outcome", "ok")], "ok"),
        (TargetExists, [("outcome", "target_exists")], "target_exists"),
        (KeyboardInterrupt, [], "internal"),
        (SystemExit, [], "internal"),
        (OSError, [], "internal"),
    ],
)
@pytest.mark.parametrize("is_command", [False, True])
def test_an_effect_has_its_intent_before_and_its_outcome_after_it(
    raised: type[BaseException] | None, outcome: list[tuple[str, str]], of_command: str, *, is_command: bool
) -> None:
    """After anything but a refusal the outcome is unknown. A command failed: no other process finishes it."""
    trail, seen = MemoryTrail(), []
    failures: type[BaseException] = BaseException if is_command else KmsError
    outcome = [("outcome", of_command)] if is_command else outcome
    effect = audit.effect(trail, ADA, "commit", "job-1", failures)
    with pytest.raises(raised) if raised else nullcontext(), effect:
        seen = stages(trail)
        if raised:
            raise raised

    assert seen == [("intent", None)]
    assert stages(trail) == [("intent", None), *outcome]
    assert {line["effect"] for line in trail.lines} == {"job-1"}


def test_without_its_intent_on_record_an_effect_does_not_begin() -> None:
    begun = False
    with pytest.raises(AuditUnavailable), audit.effect(FailingTrail(), ADA, "commit", "job-1"):
        begun = True

    assert not begun


def test_a_denial_is_a_line() -> None:
    trail = MemoryTrail()
    audit.denied(trail, None, "POST /encrypt", "unauthenticated")
    audit.denied(trail, ADA, "GET /audit", "forbidden")

    assert [(line["principal"], line["tenant"], line["route"], line["result"]) for line in trail.lines] == [
        ("", "", "POST /encrypt", "unauthenticated"),
        ("ada", "acme", "GET /audit", "forbidden"),
    ]
    assert {line["operation"] for line in trail.lines} == {"denied"}


def audit_lines(result: str) -> float:
    return REGISTRY.get_sample_value("kms_audit_events_total", {"result": result}) or 0


def test_lost_lines_are_counted(backend: AgeBackend) -> None:
    before = [audit_lines(result) for result in ("ok", "failed")]
    outcomes = operation_counts()
    kms_over(backend).encrypt(ADA, b"", NO_CONTEXT)
    with pytest.raises(AuditUnavailable):
        kms_over(backend, trail=FailingTrail()).encrypt(ADA, b"", NO_CONTEXT)
    after = [audit_lines(result) for result in ("ok", "failed")]
    at = ("encrypt", "audit_unavailable")

    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]
    assert operation_counts()[at] == outcomes.get(at, 0) + 1
