"""What the service writes into the audit trail: one line per operation, before the result, and no secrets."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import pytest
from prometheus_client import REGISTRY

from kms_core import audit
from kms_core.age import stream, x25519
from kms_core.age.header import Stanza, render
from kms_core.age.mlkem768x25519 import version_of
from kms_core.auth.policy import Principal
from kms_core.backends.age import AgeBackend
from kms_core.key_selection import SelectionRules
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.streaming import FileToFile
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, KmsError, TargetExists
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW,
    FullDisk,
    Kept,
    age_backend,
    head_of,
    kms_over,
    operation_counts,
)
from support.audit_logs import Place, room_for

IDENTITY: Final = x25519.X25519Identity.generate()
SECRET: Final = Context.parse("patient=hunter2,row=7")
Call = Callable[[Kms, bytes], object]


def with_files(kms: Kms, sealed: bytes, *, context: Context) -> None:
    with TemporaryFile(buffering=0) as source, TemporaryFile() as target:
        source.write(sealed)
        files = FileToFile(FileRange(source.fileno(), len(sealed)), FileWriter(target.fileno()))
        kms.decrypt(ADA, files, context)


def into_a_file(kms: Kms) -> None:
    with TemporaryFile(buffering=0) as source, TemporaryFile() as target:
        source.write(b"hunter2 plain")
        files = FileToFile(FileRange(source.fileno(), 13), FileWriter(target.fileno()))
        kms.encrypt(ADA, files, SECRET)


def adopted(kms: Kms, sealed: bytes) -> None:
    kms.encrypt_header(ADA, (os.urandom(16), head_of(sealed).nonce), SECRET, size_bytes=13)


def header_of_a_file(kms: Kms, sealed: bytes) -> None:
    with TemporaryFile(buffering=0) as source:
        source.write(sealed)
        kms.rewrap_header(ADA, FileRange(source.fileno(), len(sealed)), SECRET, new_context=None, key_id=None)


GOOD: Final[dict[str, tuple[str, Call]]] = {
    "encrypt": ("encrypt", lambda kms, _: kms.encrypt(ADA, b"hunter2 plain", SECRET)),
    "decrypt": ("decrypt", lambda kms, sealed: kms.decrypt(ADA, sealed, SECRET)),
    "data key": ("generate_data_key", lambda kms, _: kms.generate_data_key(ADA, 32, SECRET)),
    "rewrap": ("rewrap", lambda kms, sealed: kms.rewrap(ADA, sealed, SECRET)),
    "encrypt a file": ("encrypt", lambda kms, _: into_a_file(kms)),
    "decrypt a file": ("decrypt", lambda kms, sealed: with_files(kms, sealed, context=SECRET)),
    "adopt a file": ("encrypt", adopted),
    "rewrap a file": ("rewrap", header_of_a_file),
}
BAD: Final[dict[str, tuple[str, str, Call]]] = {
    "unknown key": ("encrypt", "unknown_key", lambda kms, _: kms.encrypt(ADA, b"x", SECRET, key_id="gone")),
    "wrong time": (
        "encrypt",
        "invalid_context",
        lambda kms, _: kms.encrypt(ADA, b"x", Context.parse("not_after=hunter2")),
    ),
    "no context": ("encrypt", "context_required", lambda kms, _: kms.encrypt(ADA, b"x", NO_CONTEXT)),
    "wrong context": ("decrypt", "decrypt_failed", lambda kms, sealed: kms.decrypt(ADA, sealed, ROW)),
    "cut": ("decrypt", "decrypt_failed", lambda kms, sealed: kms.decrypt(ADA, sealed[:-1], SECRET)),
    "no age file": ("decrypt", "not_a_ciphertext", lambda kms, _: kms.decrypt(ADA, b"hunter2", SECRET)),
    "large header": (
        "decrypt",
        "too_large",
        lambda kms, _: kms.decrypt(ADA, render([Stanza(("x",), b"")] * 65, bytes(16)) + bytes(16), SECRET),
    ),
    "nobody": ("encrypt", "forbidden", lambda kms, _: kms.encrypt(Principal(""), b"x", SECRET)),
    "rewrap, no age file": ("rewrap", "not_a_ciphertext", lambda kms, _: kms.rewrap(ADA, b"", SECRET)),
    "rewrap, context": ("rewrap", "decrypt_failed", lambda kms, sealed: kms.rewrap(ADA, sealed, ROW)),
    "file, cut": (
        "decrypt",
        "decrypt_failed",
        lambda kms, sealed: with_files(kms, sealed[:-1], context=SECRET),
    ),
    "file, no age file": (
        "decrypt",
        "not_a_ciphertext",
        lambda kms, _: with_files(kms, b"hunter2", context=SECRET),
    ),
    "no size": ("generate_data_key", "internal", lambda kms, _: kms.generate_data_key(ADA, -1, SECRET)),
}


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "age", IDENTITY)


@pytest.fixture
def sealed(backend: AgeBackend) -> bytes:
    return kms_over(backend).encrypt(ADA, b"hunter2 plain", SECRET).ciphertext


# -- one line per operation --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_success_is_one_line(backend: AgeBackend, sealed: bytes, name: str) -> None:
    operation, call = GOOD[name]
    trail = Kept()
    call(kms_over(backend, trail=trail), sealed)

    assert trail.results == [(operation, "ok")]
    assert (trail.lines[0]["key_id"], trail.lines[0]["backend"]) == ("default", "age")


@pytest.mark.parametrize("name", BAD)
def test_failure_is_one_line(backend: AgeBackend, sealed: bytes, name: str) -> None:
    operation, code, call = BAD[name]
    trail = Kept()
    with pytest.raises((KmsError, ValueError)):
        call(kms_over(backend, trail=trail, rules=SelectionRules(require_context=True)), sealed)

    assert trail.results == [(operation, code)]


def test_a_refusal_names_the_key_that_the_file_names(backend: AgeBackend, sealed: bytes) -> None:
    trail = Kept()
    with pytest.raises(KmsError):
        kms_over(backend, trail=trail).decrypt(ADA, sealed, NO_CONTEXT)
    line = trail.lines[0]

    assert (line["key_id"], line["key_version"]) == ("default", version_of(IDENTITY.recipient))
    assert line["origin"] == "service"


# -- what is in a line -------------------------------------------------------------------------------


def test_a_line_says_who_what_which_and_how_much(backend: AgeBackend) -> None:
    trail = Kept()
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


def test_a_foreign_file_is_recorded_as_such(backend: AgeBackend) -> None:
    trail, file_key = Kept(), os.urandom(16)
    foreign = render([IDENTITY.recipient.wrap(file_key)], file_key) + bytes(16)
    foreign += stream.seal(stream.payload_key(file_key, bytes(16)), b"theirs")
    kms_over(backend, trail=trail).decrypt(ADA, foreign, NO_CONTEXT)
    with pytest.raises(KmsError):
        kms_over(backend, trail=trail, accept_foreign=False).decrypt(ADA, foreign, NO_CONTEXT)

    assert [(line["origin"], line["result"]) for line in trail.lines] == [
        ("foreign", "ok"),
        ("foreign", "foreign_refused"),
    ]


def test_a_rewrap_records_both_contexts(backend: AgeBackend, sealed: bytes, tmp_path: Path) -> None:
    place = Place(tmp_path)
    trail = place.trail()
    kms_over(backend, trail=trail).rewrap(ADA, sealed, SECRET, new_context=ROW)
    line = place.operations()[0]

    assert line["context"] == trail.conceal("acme", SECRET)
    assert line["new_context"] == trail.conceal("acme", ROW)


# -- effects and denials -----------------------------------------------------------------------------


def stages(trail: Kept) -> list[tuple[object, object]]:
    return [(line.get("stage"), line.get("result")) for line in trail.lines]


def test_an_effect_has_its_intent_before_and_its_outcome_after_it() -> None:
    trail, seen = Kept(), []
    with audit.effect(trail, ADA, "commit", "job-1"):
        seen = stages(trail)

    assert seen == [("intent", None)]
    assert stages(trail) == [("intent", None), ("outcome", "ok")]
    assert {line["effect"] for line in trail.lines} == {"job-1"}


def test_a_refused_effect_says_why() -> None:
    trail = Kept()
    with pytest.raises(TargetExists), audit.effect(trail, ADA, "commit", "job-1"):
        raise TargetExists

    assert stages(trail) == [("intent", None), ("outcome", "target_exists")]


@pytest.mark.parametrize("cut", [KeyboardInterrupt, SystemExit, OSError])
def test_after_anything_else_nobody_knows_the_outcome(cut: type[BaseException]) -> None:
    trail = Kept()
    with pytest.raises(cut), audit.effect(trail, ADA, "commit", "job-1"):
        raise cut

    assert stages(trail) == [("intent", None)]


def test_without_its_intent_on_record_an_effect_does_not_begin() -> None:
    begun = False
    with pytest.raises(AuditUnavailable), audit.effect(FullDisk(), ADA, "commit", "job-1"):
        begun = True

    assert not begun


def test_a_denial_is_a_line() -> None:
    trail = Kept()
    audit.denied(trail, None, "POST /encrypt", "unauthenticated")
    audit.denied(trail, ADA, "GET /audit", "forbidden")

    assert [(line["principal"], line["tenant"], line["route"], line["result"]) for line in trail.lines] == [
        ("", "", "POST /encrypt", "unauthenticated"),
        ("ada", "acme", "GET /audit", "forbidden"),
    ]
    assert {line["operation"] for line in trail.lines} == {"denied"}


def test_a_rewrap_records_what_went_in_and_what_came_out(backend: AgeBackend, sealed: bytes) -> None:
    trail = Kept()
    moved = kms_over(backend, trail=trail).rewrap(ADA, sealed, SECRET).ciphertext

    assert (trail.lines[0]["bytes_in"], trail.lines[0]["bytes_out"]) == (len(sealed), len(moved))


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_no_line_holds_plaintext_keys_or_context_values(
    backend: AgeBackend, sealed: bytes, tmp_path: Path, name: str
) -> None:
    call = (GOOD | BAD)[name][-1]
    place = Place(tmp_path)
    with suppress(KmsError, ValueError):
        call(kms_over(backend, trail=place.trail()), sealed)
    (path,) = place.files()
    text = path.read_text()

    assert "hunter2" not in text
    assert IDENTITY.export() not in text
    assert len(place.operations()) == 1


def test_a_data_key_is_not_in_its_line(backend: AgeBackend, tmp_path: Path) -> None:
    place = Place(tmp_path)
    made = kms_over(backend, trail=place.trail()).generate_data_key(ADA, 32, SECRET)
    (path,) = place.files()

    assert made.plaintext.hex() not in path.read_text()
    assert "plaintext" not in place.operations()[0]


# -- before the result -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_without_its_line_no_result_leaves(backend: AgeBackend, sealed: bytes, name: str) -> None:
    with pytest.raises(AuditUnavailable):
        GOOD[name][1](kms_over(backend, trail=FullDisk()), sealed)


@pytest.mark.parametrize("name", BAD)
def test_without_its_line_not_even_a_refusal_leaves(backend: AgeBackend, sealed: bytes, name: str) -> None:
    kms = kms_over(backend, trail=FullDisk(), rules=SelectionRules(require_context=True))

    with pytest.raises(AuditUnavailable):
        BAD[name][2](kms, sealed)


def test_a_full_disk_withholds_the_plaintext(backend: AgeBackend, sealed: bytes, tmp_path: Path) -> None:
    kms = kms_over(backend, trail=Place(tmp_path / "full").trail())

    with room_for(10), pytest.raises(AuditUnavailable, match="cannot be written"):
        kms.decrypt(ADA, sealed, SECRET)


def audit_lines(result: str) -> float:
    return REGISTRY.get_sample_value("kms_audit_events_total", {"result": result}) or 0


def test_lost_lines_are_counted(backend: AgeBackend) -> None:
    before = [audit_lines(result) for result in ("ok", "failed")]
    outcomes = operation_counts()
    kms_over(backend).encrypt(ADA, b"", NO_CONTEXT)
    with pytest.raises(AuditUnavailable):
        kms_over(backend, trail=FullDisk()).encrypt(ADA, b"", NO_CONTEXT)
    after = [audit_lines(result) for result in ("ok", "failed")]
    at = ("encrypt", "audit_unavailable")

    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]
    assert operation_counts()[at] == outcomes.get(at, 0) + 1
