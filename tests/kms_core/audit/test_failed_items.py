"""Failed items of one batch: how many have a record each, and what the record of the others says."""

from collections import Counter
from collections.abc import Mapping
from typing import Final

import pytest
from prometheus_client import REGISTRY

from kms_core.audit import query
from kms_core.audit.query import EventFilter
from kms_core.auth.policy import AllowAll, Principal
from kms_protocol.context import Context
from kms_protocol.errors import KmsError, UnknownKey
from support.age_kms import kms_over
from support.audit_logs import AuditFolder, Line, problem_codes, record
from support.memory_kms import memory_backend

BOUND: Final = 10
FAILED: Final = ("unauthenticated", "forbidden", "unknown_key", "decrypt_failed", "not_a_ciphertext")


def batch(audit_folder: AuditFolder, *records: Mapping[str, object]) -> list[Line]:
    """The lines of one batch; fails if the trail cannot be verified."""
    trail = audit_folder.trail()
    with trail.together():
        for fields in records:
            trail.append(record(1, **fields))
    trail.close()
    assert not problem_codes(audit_folder.verified())
    return audit_folder.operations()


@pytest.mark.parametrize("result", FAILED)
def test_failures_above_the_bound_are_one_record(audit_folder: AuditFolder, result: str) -> None:
    lines = batch(audit_folder, *[{"result": result, "bytes_in": 3, "duration_us": 2}] * 1000)

    assert [line.get("count") for line in lines] == [None] * BOUND + [1000 - BOUND]
    assert {(line["result"], line["operation"], line["principal"]) for line in lines} == {
        (result, "encrypt", "ada-1")
    }
    assert (lines[-1]["bytes_in"], lines[-1]["duration_us"]) == (3 * 990, 2 * 990)


@pytest.mark.parametrize(
    ("results", "single", "together"),
    [
        (["forbidden"] * BOUND, {"forbidden": BOUND}, {}),
        (["forbidden"] * 20 + ["ok"] * 300, {"forbidden": BOUND, "ok": 300}, {"forbidden": 10}),
        (
            ["forbidden", "unknown_key"] * 50,
            {"forbidden": 5, "unknown_key": 5},
            {"forbidden": 45, "unknown_key": 45},
        ),
    ],
    ids=["at the bound", "successes", "two results"],
)
def test_results_are_counted_apart_and_share_the_bound(
    audit_folder: AuditFolder, results: list[str], single: dict[str, int], together: dict[str, int]
) -> None:
    """Each item that succeeds has its record."""
    lines = batch(audit_folder, *[{"result": result} for result in results])

    assert Counter(line["result"] for line in lines if "count" not in line) == single
    assert {line["result"]: line["count"] for line in lines if "count" in line} == together


def test_only_what_all_have_in_common_is_told_of_them(audit_folder: AuditFolder) -> None:
    same = {"result": "forbidden", "key_id": "payroll", "context": {"env": "1f"}, "backend": "age"}
    lines = batch(audit_folder, *[same] * 15, *[same | {"key_id": "other", "context": {"env": "2f"}}] * 15)

    assert lines[0].items() >= same.items()
    assert lines[-1]["count"] == 20
    assert lines[-1]["backend"] == "age"
    assert {"key_id", "context"}.isdisjoint(lines[-1])


def test_each_batch_has_a_bound_of_its_own_and_single_calls_have_none(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    for _ in range(2):
        with trail.together():
            for _ in range(12):
                trail.append(record(result="forbidden"))
    for _ in range(30):
        trail.append(record(result="forbidden"))

    counts = [line.get("count") for line in audit_folder.operations()]
    assert counts == ([None] * BOUND + [2]) * 2 + [None] * 30


def test_queries_find_it_with_its_count(audit_folder: AuditFolder) -> None:
    batch(audit_folder, *[{"result": "forbidden"}] * 25)
    page = query.page(audit_folder.logs, EventFilter(result="failed"), None, 100)

    assert [event.count for event in page.events] == [0] * BOUND + [15]
    assert query.fields(page.events[-1])["count"] == 15
    assert "count" not in query.fields(page.events[0])


def lines_counted() -> float:
    return REGISTRY.get_sample_value("kms_audit_events_total", {"result": "ok"}) or 0


def test_the_metric_counts_the_records_that_are_written(audit_folder: AuditFolder) -> None:
    kms = kms_over(memory_backend()[0], policy=AllowAll(), trail=audit_folder.trail())
    before = lines_counted()
    with kms.audit_log.together():
        for _ in range(40):
            with pytest.raises(KmsError) as caught:
                kms.encrypt(Principal("ada"), b"", Context(), key_id="absent")
            assert type(caught.value) is UnknownKey

    assert len(audit_folder.operations()) == BOUND + 1
    assert lines_counted() - before == BOUND + 1
