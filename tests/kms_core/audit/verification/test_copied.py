"""Verification of a copy of a log that is written: what is late, what is cut, what confirms its end."""

import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit import chain
from kms_core.audit.log import AuditLog
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import verify
from support.audit_logs import AuditFolder, audit_section, notes, problem_codes, record, rewrite

RULES: Final = audit_section(checkpoint_s=0)
HOUR: Final = timedelta(hours=1)
MINUTE_NS: Final = 60 * 1_000_000_000


class Host:
    """A log whose clock is 40 minutes late at first, its anchors, and a copy."""

    def __init__(self, folder: Path) -> None:
        self.audit_folder, self.copy = AuditFolder(folder), folder / "copy"
        self.now = time.time_ns() - 40 * MINUTE_NS
        self.anchors: list[bytes] = []

    def chain(self, role: str = "api") -> AuditLog:
        return self.audit_folder.trail(RULES, role=role, clock=lambda: self.now)

    def write(self, log: AuditLog, count: int = 1, *, minutes: int = 0) -> None:
        """Write and sign records, so many minutes later."""
        self.now += minutes * MINUTE_NS
        for number in range(count):
            log.append(record(number))
        log.checkpoint_if_due()
        self.anchors.append(log.last_signed.rstrip(b"\n"))

    def ship(self, pattern: str = "*") -> None:
        self.copy.mkdir(exist_ok=True)
        for path in self.audit_folder.folder.glob(pattern):
            shutil.copy2(path, self.copy / path.name)

    def verified(self, max_late: timedelta | None = HOUR) -> VerificationReport:
        return verify(self.copy, self.audit_folder.keys(), {"Redis": self.anchors}, max_late=max_late)

    def told(self, max_late: timedelta | None = HOUR) -> tuple[str, list[str]]:
        report = self.verified(max_late)
        return report.verdict, problem_codes(report)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_copy_of_a_chain_that_goes_on_is_intact(host: Host) -> None:
    log = host.chain()
    host.write(log, 5)
    log.append(record(9))  # not signed yet
    host.ship()

    found = host.verified()
    assert (found.verdict, found.late_since, problem_codes(found)) == ("intact", "", [])
    assert host.verified(None).verdict == "open end", "in its place, a log that nothing writes has no end"


def test_a_chain_that_is_too_young_for_an_anchor_is_intact(host: Host) -> None:
    log = host.chain()
    log.append(record(1))
    host.ship()
    host.write(host.chain("worker"))
    host.ship("worker*")

    assert host.verified().verdict == "intact"


def test_lines_that_are_not_copied_yet_are_late(host: Host) -> None:
    log = host.chain()
    host.write(log, 2)
    host.ship()
    host.write(log, 2, minutes=15)
    first_missing = host.anchors[-1]
    host.write(log, 2, minutes=15)

    found = host.verified()
    assert (found.verdict, problem_codes(found), notes(found)[0]) == ("intact", [], "late")
    assert found.late_since.encode() in first_missing
    assert host.told(timedelta(minutes=20)) == ("late", [])
    assert problem_codes(host.verified(None)) == ["cut"], "a log in its place is never late"


def ship_apart(host: Host, minutes: int) -> None:
    """The copy of the worker's chain is so much younger, and names lines that the other copy lacks."""
    one, two = host.chain(), host.chain("worker")
    host.write(one, 2)
    host.ship("api*")
    host.write(one, 2, minutes=1)
    host.write(two, 2, minutes=minutes)
    host.ship("worker*")


def test_lines_that_are_cut_may_be_late_if_they_are_little_older_than_the_rest(host: Host) -> None:
    ship_apart(host, 9)
    assert problem_codes(host.verified(None)) == ["cut", "cut"], "an anchor and the other chain name the line"

    assert host.told() == ("intact", [])


@pytest.mark.parametrize("at", ["~", "9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00.000000Z"])
def test_no_unsigned_line_makes_cut_lines_late(host: Host, at: str) -> None:
    """The end of a copy is not signed, so its writer may add a line with any time."""
    ship_apart(host, 15)
    assert host.told() == ("damaged", ["cut"])
    path = next(host.copy.glob("worker*"))
    found = chain.read(path.read_bytes().splitlines()[-1])
    assert found
    body = f'{{"seq":{found.seq + 1},"chain":"{found.chain}","time":"{at}","operation":"x"'
    with path.open("ab") as file:
        file.write(chain.seal(bytes.fromhex(found.head), body.encode())[0])

    report = host.verified(timedelta(minutes=1))
    assert (report.verdict, set(problem_codes(report))) == ("damaged", {"cut"})


def test_a_chain_that_is_not_copied_yet_is_late(host: Host) -> None:
    host.write(host.chain(), 2)
    host.ship()
    host.write(host.chain("worker"), 2, minutes=1)

    found = host.verified()
    assert (found.verdict, problem_codes(found), notes(found)[0]) == ("intact", [], "late")
    assert host.verified(timedelta(minutes=1)).verdict == "late"


def test_a_chain_that_was_there_before_is_missing(host: Host) -> None:
    host.write(host.chain(), 2)
    host.write(host.chain("worker"), 2, minutes=15)
    host.ship("worker*")

    assert problem_codes(host.verified()) == ["missing_chain"], (
        "its anchor is older than the rest of the copy"
    )


def test_a_copy_that_was_never_made_is_late(host: Host) -> None:
    host.write(host.chain(), 2)
    host.copy.mkdir()

    found = host.verified(timedelta(minutes=20))
    assert (found.verdict, found.chains) == ("late", [])


def drop(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], *lines[3:]]


def change(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b'"ada-1"', b'"eve-1"') for line in lines]


@pytest.mark.parametrize(("hurt", "code"), [(drop, "gap"), (change, "edited")])
def test_changes_of_a_copy_are_damage(
    host: Host, hurt: Callable[[list[bytes]], list[bytes]], code: str
) -> None:
    host.write(host.chain(), 5)
    host.ship()
    rewrite(next(host.copy.iterdir()), hurt)

    assert problem_codes(host.verified()) == [code]


def test_anchors_of_other_hosts_do_not_count(host: Host, tmp_path: Path) -> None:
    host.write(host.chain(), 2)
    host.ship()
    (tmp_path / "other").mkdir()
    other = Host(tmp_path / "other")
    other.write(other.chain("worker"), 2)
    host.anchors += other.anchors

    found = host.verified()
    assert (found.verdict, found.late_since, problem_codes(found)) == ("intact", "", [])


def test_a_file_that_rsync_receives_is_no_second_copy(host: Host) -> None:
    host.write(host.chain(), 2)
    host.ship()
    (path,) = host.copy.iterdir()
    shutil.copy2(path, host.copy / f".{path.name}.aB3xYz")

    assert host.verified().verdict == "intact"
    shutil.copy2(path, host.copy / f"{path.name}.aB3xYz")
    assert problem_codes(host.verified()) == ["duplicate_file"]
