"""Receipts: one line proven by a signed checkpoint, without the trail."""

import json
from collections.abc import Callable

import msgspec
import pytest

from kms_core.audit.keys import PublicKeys, Signer
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import BadReceipt, Receipt, UnknownRecord
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import AuditFolder, audit_section, record


@pytest.fixture
def ids(audit_folder: AuditFolder) -> list[str]:
    trail = audit_folder.trail(audit_section(checkpoint_lines=10), rotate_bytes=8192)
    made = [trail.append(record(number)) for number in range(60)]
    trail.close()
    return made


def test_every_record_has_a_receipt_that_holds_and_shows_no_other(
    audit_folder: AuditFolder, ids: list[str]
) -> None:
    """Without the trail, too."""
    made = [msgspec.json.encode(receipt.make(audit_folder.folder, name)) for name in ids]
    for path in audit_folder.files():
        path.unlink()

    for number, (name, text) in enumerate(zip(ids, made, strict=True)):
        found = msgspec.json.decode(text, type=Receipt)
        proven = receipt.check(found, audit_folder.keys())
        assert f"{proven.chain}:{proven.seq}" == name
        assert json.loads(found.line)["principal"] == f"ada-{number}"
        assert text.count(b"ada-") == 1


def test_a_line_without_a_later_checkpoint_has_to_wait(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    name = trail.append(record())
    with pytest.raises(AuditUnavailable, match="ask again"):
        receipt.make(audit_folder.folder, name)
    trail.close()

    assert receipt.check(receipt.make(audit_folder.folder, name), audit_folder.keys()).seq == 1


def test_the_checkpoint_may_stand_in_the_next_file(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    name = trail.append(record(1))
    path = audit_folder.files()[0]
    path.rename(path.with_name("moved"))  # no checkpoint ends this file
    trail.append(record(2))
    trail.close()
    path.with_name("moved").rename(path)

    assert receipt.check(receipt.make(audit_folder.folder, name), audit_folder.keys()).seq == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "An audit id is a chain, a colon") for name in ("", "x", "{chain}:-1", "{chain}:1x")),
        ("../../etc/passwd:1", "An audit id is a chain, a colon"),
        *((name, "No record") for name in ("api-20260101T000000.000000Z-1:5", "{chain}:999")),
    ],
)
def test_an_unknown_id_has_none(audit_folder: AuditFolder, ids: list[str], name: str, reason: str) -> None:
    with pytest.raises(UnknownRecord, match=f"^{reason}"):
        receipt.make(audit_folder.folder, name.replace("{chain}", ids[0].partition(":")[0]))


CHANGES: dict[str, Callable[[Receipt], dict[str, object]]] = {
    "line": lambda made: {"line": made.line.replace("ada-", "eve-")},
    "no line": lambda _: {"line": "nonsense"},
    "id": lambda made: {"id": made.id.replace(":5", ":6")},
    "before": lambda _: {"before": "00" * 32},
    "digest": lambda made: {"path": ["00" * 32, *made.path[1:]]},
    "shorter path": lambda made: {"path": made.path[1:]},
    "no hex": lambda made: {"path": ["zz", *made.path[1:]]},
    "checkpoint": lambda made: {"checkpoint": made.checkpoint.replace('"seq":10', '"seq":11')},
    "line as checkpoint": lambda made: {"checkpoint": made.line},
    "version": lambda _: {"version": 2},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_receipt_does_not_hold(audit_folder: AuditFolder, ids: list[str], field: str) -> None:
    made = receipt.make(audit_folder.folder, ids[4])
    changed = msgspec.structs.replace(made, **CHANGES[field](made))
    assert receipt.check(made, audit_folder.keys()).seq == 5
    assert changed != made

    with pytest.raises(BadReceipt):
        receipt.check(changed, audit_folder.keys())


def test_a_receipt_needs_a_key_that_is_trusted(audit_folder: AuditFolder, ids: list[str]) -> None:
    other = PublicKeys([Signer.at(audit_folder.root / "other.key").public])

    with pytest.raises(BadReceipt, match="not signed by a key"):
        receipt.check(receipt.make(audit_folder.folder, ids[0]), other)
