"""Pages of a trail: nothing twice, nothing left out, whoever writes meanwhile."""

import json
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from kms_core.audit import query
from kms_core.audit.query import EventFilter
from kms_protocol.errors import InvalidRequest
from support.audit_logs import AuditFolder, record

ALL = EventFilter()


def principals(events: Iterable[query.RecordedOperation]) -> list[str]:
    return [event.principal for event in events]


def names(audit_folder: AuditFolder, wanted: EventFilter = ALL, limit: int = 7) -> list[str]:
    """All that there is, page by page."""
    found: list[str] = []
    after = None
    while True:
        page = query.page(audit_folder.logs, wanted, after, limit)
        assert len(page.events) <= limit
        found += principals(page.events)
        after = page.following
        if not page.more:
            return found


def test_pages_hold_everything_once_and_in_order(audit_folder: AuditFolder) -> None:
    one, two = audit_folder.trail(rotate_bytes=4096), audit_folder.trail(role="worker")
    for number in range(60):
        (one, two)[number % 3 == 0].append(record(number))
    one.close()

    assert names(audit_folder) == [f"ada-{number}" for number in range(60)]
    assert names(audit_folder, limit=1) == names(audit_folder, limit=1000)


def test_a_cursor_goes_on_with_what_comes_later(audit_folder: AuditFolder) -> None:
    one, two = audit_folder.trail(), audit_folder.trail(role="worker")
    one.append(record(1))
    two.append(record(2))
    page = query.page(audit_folder.logs, ALL, None, 10)
    two.append(record(3))
    one.append(record(4))
    later = query.page(audit_folder.logs, ALL, page.following, 10)
    third = audit_folder.trail(role="late")
    third.append(record(5))

    assert principals(page.events) == ["ada-1", "ada-2"]
    assert principals(later.events) == ["ada-3", "ada-4"]
    assert not later.more
    assert principals(query.page(audit_folder.logs, ALL, later.following, 10).events) == ["ada-5"]


def test_more_chains_than_files_may_be_open_are_read(audit_folder: AuditFolder) -> None:
    """Each start of a process makes one, and others may make any number."""
    audit_folder.folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 100
    for number in range(limit):
        name, time_text = f"api-20260101T000000.{number:06d}Z-1", f"2026-01-01T00:00:00.{number:06d}Z"
        line = {"seq": 0, "chain": name, "time": time_text, "operation": "encrypt", "principal": str(number)}
        (audit_folder.folder / f"{name}.0001.jsonl").write_text(json.dumps(line) + "\n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        found = names(audit_folder, limit=30)
        newest = query.newest(audit_folder.logs, ALL, 30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert found == [str(number) for number in range(limit)]
    assert principals(newest) == found[-30:]


def test_a_cursor_is_small_once_everything_is_settled(audit_folder: AuditFolder) -> None:
    for number in range(30):
        at = time.time_ns() - (3600 - number) * 1_000_000_000
        trail = audit_folder.trail(clock=lambda at=at: at)  # type: ignore[misc]  # bound early
        trail.append(record(number))
        trail.close()

    assert len(query.page(audit_folder.logs, ALL, None, 100).following) < 60
    assert len(names(audit_folder, limit=3)) == 30


def test_equal_times_are_told_apart(audit_folder: AuditFolder) -> None:
    at = time.time_ns() - 60 * 1_000_000_000
    trails = {role: audit_folder.trail(role=role, clock=lambda: at) for role in ("api", "worker", "zeta")}
    for number in range(10):
        for role, trail in trails.items():
            trail.append(record(number, principal=f"{role[0]}{number}"))

    for limit in (1, 2, 3, 7, 30):
        assert sorted(names(audit_folder, limit=limit)) == sorted(
            f"{who}{n}" for who in "awz" for n in range(10)
        )


def test_a_clock_that_went_back_hides_nothing(audit_folder: AuditFolder) -> None:
    at = [time.time_ns()]
    trail = audit_folder.trail(clock=lambda: at[0])
    trail.append(record(1))
    page = query.page(audit_folder.logs, ALL, None, 10)
    at[0] -= 7200 * 1_000_000_000
    trail.append(record(2))

    assert principals(query.page(audit_folder.logs, ALL, page.following, 10).events) == ["ada-2"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (EventFilter(equal=(("tenant", "acme"),)), ["ada-1", "ada-2", "ada-4"]),
        (EventFilter(equal=(("tenant", "umbrella"),)), ["ada-3"]),
        (EventFilter(equal=(("operation", "decrypt"),)), ["ada-2", "ada-4"]),
        (EventFilter(equal=(("operation", "decrypt"), ("principal", "ada-4"))), ["ada-4"]),
        (EventFilter(result="ok"), ["ada-1", "ada-3"]),
        (EventFilter(result="failed"), ["ada-2", "ada-4"]),
        (EventFilter(result="decrypt_failed"), ["ada-2"]),
        (EventFilter(context=(("row", "7"),)), ["ada-1"]),
        (EventFilter(equal=(("request_id", "nobody's"),)), []),
    ],
    ids=str,
)
def test_filters(audit_folder: AuditFolder, wanted: EventFilter, expected: list[str]) -> None:
    trail = audit_folder.trail()
    trail.append(record(1, context={"row": "7"}))
    trail.append(record(2, operation="decrypt", result="decrypt_failed"))
    trail.append(record(3, tenant="umbrella", context={"row": "8"}))
    trail.append(record(4, operation="decrypt", result="forbidden"))
    trail.append(
        record(5, tenant="intent", result="")
    )  # what is about to happen has neither come off nor failed

    assert names(audit_folder, wanted) == expected
    assert principals(query.newest(audit_folder.logs, wanted, 10)) == expected


def test_since_and_until(audit_folder: AuditFolder) -> None:
    at = [1_800_000_000_000_000_000]
    trail = audit_folder.trail(rotate_bytes=4096, clock=lambda: at[0])
    for number in range(100):
        trail.append(record(number))
        at[0] += 60 * 1_000_000_000
    times = [str(line["time"]) for line in audit_folder.operations()]
    wanted = EventFilter(since=times[40], until=times[60])

    assert names(audit_folder, wanted) == [f"ada-{number}" for number in range(40, 60)]


def test_a_call_reads_a_bounded_part(audit_folder: AuditFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it finds nothing it reads on, for a bounded time."""
    monkeypatch.setattr(query, "MOST_SCANNED", 100)
    trail = audit_folder.trail()
    for number in range(250):
        trail.append(record(number))
    rare = EventFilter(equal=(("principal", "ada-205"),))
    monkeypatch.setattr(query, "SEARCH_S", -1.0)
    bounded = query.page(audit_folder.logs, rare, None, 10)

    assert (bounded.events, bounded.more) == ([], True)
    assert names(audit_folder, rare) == ["ada-205"]

    monkeypatch.setattr(query, "SEARCH_S", 3600.0)
    first, both = query.page(audit_folder.logs, rare, None, 10), EventFilter(equal=(("result", "ok"),))

    assert (principals(first.events), first.more) == (["ada-205"], True)
    assert len(query.page(audit_folder.logs, both, None, 1000).events) == 100, "one that has found some ends"


def test_the_newest_come_oldest_first(audit_folder: AuditFolder) -> None:
    one, two = audit_folder.trail(rotate_bytes=4096), audit_folder.trail(role="worker")
    for number in range(60):
        (one, two)[number % 2].append(record(number))

    assert principals(query.newest(audit_folder.logs, ALL, 3)) == ["ada-57", "ada-58", "ada-59"]
    assert len(query.newest(audit_folder.logs, ALL, 1000)) == 60
    assert query.newest(audit_folder.logs, ALL, 0) == []


def test_a_torn_tail_and_strange_lines_are_passed_over(audit_folder: AuditFolder) -> None:
    path = audit_folder.written(3)
    with path.open("ab") as file:
        file.write(b'nonsense\n{"seq":9,"cha')

    assert names(audit_folder) == ["ada-1", "ada-2", "ada-3"]
    assert len(query.newest(audit_folder.logs, ALL, 9)) == 3


def test_a_folder_that_is_not_there_is_empty(audit_folder: AuditFolder) -> None:
    assert names(audit_folder) == []


@pytest.mark.parametrize("after", ["x", "!", "bnVsbA", "WyJ4Iix7ImEiOjF9XQ", "é", "W" * 20_000])
def test_a_cursor_that_no_page_gave_is_refused(audit_folder: AuditFolder, after: str) -> None:
    audit_folder.written(1)

    with pytest.raises(InvalidRequest, match="the page before"):
        query.page(audit_folder.logs, ALL, after, 10)
