"""Logs of several hosts read as one: order, pages, copies that arrive later, hostile copies."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit import query
from kms_core.audit.hosts import HostLog, host_logs, local_log
from kms_core.audit.log import AuditLog
from kms_core.audit.query import EventFilter
from support.audit_logs import AuditFolder, record

ALL: Final = EventFilter()
MINUTE_NS: Final = 60 * 1_000_000_000


class Host:
    """A log with a clock, and its copy."""

    def __init__(self, folder: Path, name: str) -> None:
        self.audit_folder, self.copy = AuditFolder(folder / "hosts" / name), folder / "copies" / name
        self.now = time.time_ns() - 120 * MINUTE_NS
        self.copy.parent.mkdir(exist_ok=True)
        self.trails: dict[str, AuditLog] = {}

    def write(self, number: int, role: str = "api") -> None:
        """Append a record in the chain of a role."""
        if role not in self.trails:
            self.trails[role] = self.audit_folder.trail(role=role, clock=lambda: self.now)
        self.trails[role].append(record(number))

    def ship(self, role: str = "") -> None:
        """Copy the chains of a role, or all."""
        for path in self.audit_folder.folder.glob(f"{role}*"):
            (self.copy / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def own(tmp_path: Path) -> Host:
    return Host(tmp_path, "own")


@pytest.fixture
def other(tmp_path: Path) -> Host:
    made = Host(tmp_path, "kms-2")
    made.copy.mkdir()
    return made


def logs(own: Host, other: Host) -> Sequence[HostLog]:
    found, unread = host_logs(own.audit_folder.folder, other.copy.parent)
    assert ([each.host for each in found], unread) == ([local_log(), "kms-2"], {})
    return found


def names(found: query.EventPage) -> list[str]:
    return [event.principal.removeprefix("ada-") for event in found.events]


def test_events_of_hosts_are_merged_by_time(own: Host, other: Host) -> None:
    for number in range(6):
        host = (own, other)[number % 2]
        host.now = own.now + number * MINUTE_NS
        host.write(number)
    other.ship()

    page = query.page(logs(own, other), ALL, None, 10)
    assert [(event.host, event.principal) for event in page.events] == [
        ((local_log(), "kms-2")[number % 2], f"ada-{number}") for number in range(6)
    ]
    newest = query.newest(logs(own, other), ALL, 3)
    assert [event.principal for event in newest] == ["ada-3", "ada-4", "ada-5"]


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_records_that_are_copied_later_are_in_later_pages(own: Host, other: Host, limit: int) -> None:
    """Of a copy whose chains were copied one after the other, too, and once only."""
    found: list[str] = []
    after = None

    def follow() -> None:
        nonlocal after
        more = True
        while more:
            page = query.page(logs(own, other), ALL, after, limit)
            found.extend(names(page))
            after, more = page.following, page.more

    other.write(1, "worker")
    other.now += MINUTE_NS
    other.write(2, "api")
    own.now = time.time_ns()
    own.write(3)
    other.ship("api")
    follow()
    other.ship("worker")
    follow()
    other.now += 60 * MINUTE_NS
    other.write(4, "worker")
    own.now = time.time_ns()
    own.write(5)
    follow()
    other.ship()
    follow()
    follow()

    assert sorted(found) == ["1", "2", "3", "4", "5"]


def test_a_cursor_stays_small_with_many_chains(own: Host, other: Host) -> None:
    for number in range(300):
        other.now += 1_000_000_000
        other.write(number, f"cli_{number}")
    other.ship()
    own.write(1000)

    page = query.page(logs(own, other), ALL, None, 1000)
    assert (len(page.events), len(page.following) < 12_000) == (301, True)
    assert names(query.page(logs(own, other), ALL, page.following, 1000)) == []


def test_a_line_cannot_name_another_host(own: Host, other: Host) -> None:
    line = {"seq": 1, "chain": "x", "time": "2026-01-01T00:00:00.000000Z", "operation": "decrypt"}
    path = other.copy / "api-20260101T000000.000000Z-1.0001.jsonl"
    path.write_text(json.dumps(line | {"host": "kms-1"}) + "\n")

    (event,) = query.page(logs(own, other), ALL, None, 10).events
    assert event.host == "kms-2"


@pytest.mark.parametrize(
    "junk",
    [
        b"x" * 3_000_000,
        b'{"seq":1,"chain":"x","time":"0001-01-01T00:00:00Z"}\n',
        b'{"seq":1,"chain":"x","time":"9999-12-31T23:59:59Z"}\n',
        b'{"seq":1,"chain":"x","time":"~"}\n',
        b'{"seq":1,"chain":"x","time":"0001-01-01T00:00:00Z","operation":"a"}\n' * 3,
        b"[" * 100_000 + b"\n",
    ],
)
def test_junk_in_a_copy_hides_nothing_of_others(own: Host, other: Host, junk: bytes) -> None:
    (other.copy / "api-20260101T000000.000000Z-1.0001.jsonl").write_bytes(junk)
    own.write(1)
    other.write(2)
    other.ship()

    acme = EventFilter(equal=(("tenant", "acme"),))
    page = query.page(logs(own, other), acme, None, 100)
    assert sorted(names(page)) == ["1", "2"]
    own.now = time.time_ns()
    own.write(3)
    assert names(query.page(logs(own, other), acme, page.following, 100)) == ["3"]


def test_a_link_in_a_copy_is_not_followed(own: Host, other: Host) -> None:
    own.write(1)
    target = next(own.audit_folder.folder.iterdir())
    (other.copy / target.name).symlink_to(target)

    found = host_logs(own.audit_folder.folder, other.copy.parent)
    assert "has a link" in found.unread["kms-2"]
    assert "kms-2" not in [each.host for each in found.logs]


def test_names_that_are_no_hosts_are_left_out_and_a_directory_that_is_away_is_told(own: Host) -> None:
    copies = own.copy.parent
    for name in (".hidden", "a b", "x" * 81, local_log(), "-f"):
        (copies / name).mkdir()
    (copies / "kms-2.pub").touch()

    for folder, unread in ((copies, []), (copies / "gone", ["copies"])):
        found = host_logs(own.audit_folder.folder, folder)
        assert ([each.host for each in found.logs], [*found.unread]) == ([local_log()], unread)


def test_a_copy_that_shrinks_repeats_nothing(own: Host, other: Host) -> None:
    for number in range(5):
        other.write(number)
    other.ship()
    own.write(9)
    page = query.page(logs(own, other), ALL, None, 100)
    (path,) = other.copy.iterdir()
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    later = query.page(logs(own, other), ALL, page.following, 100)
    path.write_bytes(whole)

    assert names(later) == names(query.page(logs(own, other), ALL, later.following, 100)) == []
