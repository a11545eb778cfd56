"""What verification notices: lines that were changed, taken, added or cut, and files that are gone."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path

import pytest

from kms_core.audit import chain, maintenance
from kms_core.audit.keys import PublicKeys, Signer
from kms_core.audit.maintenance import FolderSink
from kms_core.audit.verification import scan
from kms_core.audit.verification.verify import verify
from kms_core.settings.model import AuditSection
from support.audit_logs import Place, audit_section, chain_name, codes, notes, record, rewrite

Change = Callable[[list[bytes]], list[bytes]]
SMALL = audit_section(checkpoint_lines=5)
TESTS = str(Path(__file__).parents[3])
HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.audit_logs import Place, record

Place(Path(sys.argv[1])).trail(role="worker").append(record(9))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def resealed(lines: list[bytes], *, begin: int) -> list[bytes]:
    """What somebody without the signing key can do: make all heads fit again, from a line on."""
    head = chain.claimed_head(lines[begin - 1][:-1]) or chain.ZERO
    made = lines[:begin]
    for line in lines[begin:]:
        sealed, head = chain.seal(head, chain.body_of(line[:-1]))
        made.append(sealed)
    return made


def edited(lines: list[bytes], at: int = 3) -> list[bytes]:
    return [*lines[:at], lines[at].replace(b'"ada-', b'"eve-'), *lines[at + 1 :]]


def with_other_number(line: bytes) -> bytes:
    return line.replace(b'{"seq":3,', b'{"seq":30,')


# -- whole trails ------------------------------------------------------------------------------------


def test_a_closed_trail_is_intact_and_signed_to_its_end(place: Place) -> None:
    place.written(12, SMALL)
    report = place.verified()
    (only,) = report.chains

    assert (report.verdict, codes(report), notes(report)) == ("intact", [], [])
    assert only.state == "closed"
    assert only.signed_seq == only.last_seq
    assert report.lines == only.lines == len(place.lines())
    assert report.trusted


def test_without_a_key_the_trails_own_is_taken_and_that_is_said(place: Place) -> None:
    place.written(3)
    report = verify(place.folder)

    assert report.verdict == "intact"
    assert not report.trusted


def test_another_key_does_not_fit(place: Place, tmp_path: Path) -> None:
    place.written(3)
    other = Signer.at(tmp_path / "other.key").public

    assert codes(verify(place.folder, PublicKeys([other]))) == ["unknown_key"]


def test_progress_is_told_at_first_and_after_each_file(place: Place) -> None:
    place.written(40, rotate_bytes=4096)
    seen: list[tuple[int, int]] = []
    report = verify(place.folder, place.keys(), progress=lambda done, total: seen.append((done, total)))

    assert report.verdict == "intact"
    assert len(seen) == 1 + len(place.files()) > 3
    assert seen[0] == (0, report.size_bytes)
    assert seen[-1] == (report.size_bytes, report.size_bytes)


def test_a_change_where_two_blocks_meet_is_found_once(place: Place) -> None:
    trail = place.trail()
    for _ in range(200):
        trail.append(record(principal="x" * 100_000))
    trail.close()
    (path,) = place.files()
    lines = path.read_bytes().splitlines(keepends=True)
    sizes = list(accumulate(map(len, lines)))
    last = next(number for number, end in enumerate(sizes) if end > scan._BLOCK_BYTES)  # noqa: SLF001
    for at in (last, last + 1):
        path.write_bytes(b"".join([*lines[:at], lines[at].replace(b"xxx", b"xyx", 1), *lines[at + 1 :]]))
        assert [(problem.code, problem.seq) for problem in place.verified().problems] == [("edited", at)]
    path.write_bytes(b"".join([*lines[: last + 1], *lines[last + 2 :]]))
    assert [(problem.code, problem.seq) for problem in place.verified().problems] == [("gap", last + 1)]
    path.write_bytes(b"".join([*lines[: last + 1], *lines[last:]]))
    assert [(problem.code, problem.seq) for problem in place.verified().problems] == [("reordered", last)]


# -- lines -------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Change, str]] = {
    "edited": (edited, "edited"),
    "first line edited": (lambda lines: [lines[0].replace(b"started", b"Started"), *lines[1:]], "edited"),
    "last line edited": (lambda lines: [*lines[:-1], lines[-1].replace(b"closed", b"kloset")], "edited"),
    "head changed": (
        lambda lines: [*lines[:3], lines[3][:-8] + b"00000" + lines[3][-3:], *lines[4:]],
        "edited",
    ),
    "head in capital letters": (
        lambda lines: [*lines[:3], lines[3][:-67] + lines[3][-67:-3].upper() + lines[3][-3:], *lines[4:]],
        "unreadable",
    ),
    "head under another name": (
        lambda lines: [*lines[:3], lines[3].replace(b',"head":"', b',"heed":"'), *lines[4:]],
        "unreadable",
    ),
    "number changed": (lambda lines: [*lines[:3], with_other_number(lines[3]), *lines[4:]], "gap"),
    "one removed": (lambda lines: lines[:3] + lines[4:], "gap"),
    "many removed": (lambda lines: lines[:3] + lines[9:], "gap"),
    "first removed": (lambda lines: lines[1:], "gap"),
    "swapped": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "gap"),
    "repeated": (lambda lines: [*lines[:4], lines[3], *lines[4:]], "reordered"),
    "one put in": (lambda lines: [*lines[:3], b'{"seq":3}\n', *lines[3:]], "unreadable"),
    "not JSON": (lambda lines: [*lines[:3], b"nonsense\n", *lines[4:]], "unreadable"),
    "empty line": (lambda lines: [*lines[:3], b"\n", *lines[3:]], "unreadable"),
    "torn in the middle": (lambda lines: [*lines[:3], lines[3][:40] + b"\n", *lines[4:]], "unreadable"),
    "two fused": (lambda lines: [*lines[:3], lines[3][:40], *lines[4:]], "unreadable"),
    "bytes after the end": (lambda lines: [*lines, b"{"], "unreadable"),
    "heads made to fit": (lambda lines: resealed(edited(lines), begin=3), "bad_signature"),
    "heads made to fit after a removal": (lambda lines: resealed(lines[:3] + lines[4:], begin=3), "gap"),
    "checkpoint continues something else": (
        lambda lines: resealed(
            [re.sub(rb'"previous":"..', b'"previous":"zz', line) for line in lines], begin=1
        ),
        "bad_signature",
    ),
    "checkpoint names no heads": (
        lambda lines: resealed(
            [line.replace(b'"signature":"', b'"signature":"!') for line in lines], begin=1
        ),
        "bad_signature",
    ),
    "checkpoint unsigned": (
        lambda lines: resealed(
            [line.replace(b'"kind":"checkpoint"', b'"kind":"checkpaint"') for line in lines], begin=1
        ),
        "bad_signature",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_lines_is_found(place: Place, name: str) -> None:
    change, code = CHANGES[name]
    path = place.written(12, SMALL)
    rewrite(path, change)
    report = place.verified()

    assert code in codes(report)
    assert report.verdict == "damaged"


def test_a_problem_says_where(place: Place) -> None:
    path = place.written(12, SMALL)
    rewrite(path, edited)
    (problem,) = place.verified().problems

    assert (problem.code, problem.file, problem.seq) == ("edited", path.name, 3)


def test_a_line_of_another_chain_is_out_of_place(place: Place) -> None:
    place.written(3)
    path = place.written(12, SMALL)
    stray = place.files()[0].read_bytes().splitlines(keepends=True)[2]
    rewrite(path, lambda lines: [*lines[:3], stray, *lines[3:]])

    assert "misplaced" in codes(place.verified())


def test_words_of_a_caller_are_never_taken_for_a_checkpoint(place: Place) -> None:
    trail = place.trail()
    trail.append(
        record(principal='","kind":"closed","signature":"', context={"kind": "closed", "stage": "intent"})
    )
    trail.append(record(1))
    trail.close()

    assert place.verified().verdict == "intact"


# -- ends --------------------------------------------------------------------------------------------


def test_a_trail_that_is_written_to_is_open(place: Place) -> None:
    trail = place.trail()
    trail.append(record(1))
    report = place.verified()

    assert [each.state for each in report.chains] == ["open"]
    assert report.verdict == "intact"
    trail.close()


def test_a_live_process_is_seen_from_another_one(place: Place) -> None:
    place.trail()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place.at), TESTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout
        holder.stdout.readline()

        assert [each.state for each in place.verified().chains] == ["open"]
    finally:
        holder.kill()
        holder.communicate()

    assert [each.state for each in place.verified().chains] == ["cut or crashed"]


def crashed(place: Place, cut: int = 0) -> Path:
    """A trail whose end is not there: as a crash leaves it, or with so many lines cut."""
    path = place.written(12, SMALL)
    rewrite(path, lambda lines: lines[: len(lines) - 1 - cut])
    return path


def test_a_chain_without_end_is_cut_or_crashed(place: Place) -> None:
    crashed(place)
    report = place.verified()

    assert report.chains[0].state == "cut or crashed"
    assert (codes(report), notes(report)) == ([], ["cut_or_crashed"])
    assert report.verdict == "open end"


def test_the_next_chain_bears_witness_of_a_crash(place: Place) -> None:
    crashed(place)
    place.written(1)
    report = place.verified()

    assert report.verdict == "intact"
    assert report.chains[0].witness == report.chains[1].chain


@pytest.mark.parametrize("cut", [1, 4, 11])
def test_what_is_cut_after_another_chain_saw_it_is_missing(place: Place, cut: int) -> None:
    path = place.written(12, SMALL)
    place.written(1)
    rewrite(path, lambda lines: lines[:-cut])
    report = place.verified()

    assert codes(report) == ["cut"]
    assert report.problems[0].file == path.name


def test_a_chain_written_anew_after_another_saw_it_does_not_pass(place: Place) -> None:
    """Even by somebody who has the signing key."""
    path = place.written(3)
    place.written(1)
    original = json.loads(path.read_bytes().splitlines()[0])
    path.unlink()
    forged = Place(place.at).trail()
    for number in (7, 8, 9):
        forged.append(record(number))
    forged.close()
    new = place.files()[-1]
    text = new.read_bytes().replace(chain_name(forged).encode(), original["chain"].encode())
    path.write_bytes(b"".join(resealed(text.splitlines(keepends=True), begin=0)))
    new.unlink()

    assert "rewritten" in codes(place.verified())


def anchored(place: Place, count: int) -> tuple[Path, FolderSink]:
    trail = place.trail(SMALL)
    for number in range(count):
        trail.append(record(number))
    anchors = FolderSink(place.at / "anchors")
    anchors.put(trail.last_signed)
    trail.close()
    return place.files()[-1], anchors


def test_an_anchor_tells_of_a_cut_that_nobody_else_saw(place: Place) -> None:
    path, _ = anchored(place, 30)
    rewrite(path, lambda lines: lines[:12])
    lines = FolderSink(place.at / "anchors").lines()

    assert codes(place.verified()) == []
    assert codes(place.verified(*lines)) == ["cut"]


def test_an_anchor_tells_of_a_trail_that_is_gone(place: Place) -> None:
    path, _ = anchored(place, 30)
    path.unlink()
    place.written(1)
    lines = FolderSink(place.at / "anchors").lines()

    assert place.verified().verdict == "intact"
    assert codes(place.verified(*lines)) == ["missing_chain"]


def test_a_forged_anchor_counts_for_nothing(place: Place) -> None:
    _, _ = anchored(place, 6)
    (line,) = FolderSink(place.at / "anchors").lines()
    forged = line.replace(b'"seq":5,', b'"seq":500,')

    assert forged != line
    assert codes(place.verified(forged, b"nonsense", b"")) == []


def test_an_anchor_with_another_head_accuses_no_log(place: Place) -> None:
    """The signature does not stand over the head of its own line."""
    _, _ = anchored(place, 6)
    (line,) = FolderSink(place.at / "anchors").lines()

    assert codes(place.verified(line[:-66] + b"0" * 64 + line[-2:])) == []


# -- files -------------------------------------------------------------------------------------------


def test_a_missing_file_in_the_middle_of_a_chain_is_found(place: Place) -> None:
    place.written(80, rotate_bytes=4096)
    place.files()[2].unlink()

    assert codes(place.verified()) == ["missing_file"]


def test_a_missing_first_file_is_found(place: Place) -> None:
    place.written(80, rotate_bytes=4096)
    place.files()[0].unlink()

    assert codes(place.verified()) == ["missing_file"]


def test_a_missing_last_file_is_found_if_another_chain_saw_it(place: Place) -> None:
    path = place.written(80, rotate_bytes=4096)
    place.written(1)
    path.unlink()

    assert codes(place.verified()) == ["cut"]


def test_a_missing_chain_is_found(place: Place) -> None:
    path = place.written(3)
    place.written(1)
    path.unlink()

    assert codes(place.verified()) == ["missing_chain"]


def test_a_file_cut_before_the_next_one_is_found(place: Place) -> None:
    place.written(80, rotate_bytes=4096)
    rewrite(place.files()[1], lambda lines: lines[:-2])

    assert codes(place.verified()) == ["cut"]


def test_a_file_that_is_not_the_one_which_the_next_continues_is_found(place: Place) -> None:
    """It has as many lines, heads that fit, and no signature in it."""
    trail = place.trail()
    for number in range(4):
        trail.append(record(number))
    (file,) = place.files()
    content = file.read_bytes()
    file.unlink()
    trail.append(record(9))
    trail.close()
    file.write_bytes(content)
    assert codes(place.verified()) == []
    rewrite(file, lambda lines: resealed(edited(lines), begin=3))

    assert codes(place.verified()) == ["cut"]


def test_a_second_copy_of_a_file_is_found(place: Place) -> None:
    path = place.written(3)
    shutil.copy(path, place.folder / "copy.jsonl")

    assert "duplicate_file" in codes(place.verified())


def test_an_empty_file_in_the_place_of_one_is_found(place: Place) -> None:
    path = place.written(3)
    place.written(1)
    path.write_bytes(b"")

    assert codes(place.verified()) == ["cut"]


def test_other_files_are_left_alone(place: Place) -> None:
    place.written(3)
    (place.folder / "README").write_text("not ours")
    (place.folder / "sub.jsonl").mkdir()
    (place.folder / "other.jsonl").write_text('{"not": "ours"}\n')

    assert place.verified().verdict == "intact"


# -- retention ---------------------------------------------------------------------------------------

DAY_NS = 24 * 3600 * 1_000_000_000


def aged(place: Place, days: list[int], rules: AuditSection | None = None) -> None:
    """A chain of so many days ago each."""
    for ago in days:
        at = time.time_ns() - ago * DAY_NS
        trail = place.trail(rules, clock=lambda at=at: at)  # type: ignore[misc]  # bound early
        for number in range(3):
            trail.append(record(number))
        trail.close()


def retire(place: Place, keep_days: int) -> int:
    trail = place.trail()
    gone, horizon = maintenance.due_segments(place.folder, keep_days, datetime.now(UTC))
    if gone:
        trail.record_removal(horizon, len(gone))
    for segment in gone:
        segment.path.unlink()
    trail.close()
    return len(gone)


def test_old_files_go_and_verification_knows(place: Place) -> None:
    aged(place, [50, 40, 30, 10, 5])

    assert retire(place, 20) == 3
    assert place.verified().verdict == "intact"


def test_a_removal_on_top_of_removals_is_known_too(place: Place) -> None:
    aged(place, [50, 40, 10])
    retire(place, 20)
    aged(place, [9, 1])
    retire(place, 5)
    retire(place, 5)

    assert place.verified().verdict == "intact"


def test_a_young_file_that_is_gone_is_missing_all_the_same(place: Place) -> None:
    aged(place, [50, 10])
    young = place.files()[-1]
    place.written(1)
    retire(place, 20)
    young.unlink()

    assert codes(place.verified()) == ["missing_chain"]


def test_a_file_goes_only_after_all_that_were_opened_before_it(place: Place) -> None:
    """Or one time could not say which files are gone."""
    at = [time.time_ns() - 60 * DAY_NS]
    old = place.trail(clock=lambda: at[0])
    old.append(record(1))
    aged(place, [50])
    at[0] = time.time_ns()
    old.append(record(2))
    old.close()

    assert retire(place, 20) == 0


def test_files_of_live_processes_stay(place: Place) -> None:
    trail = place.trail(clock=lambda: time.time_ns() - 60 * DAY_NS)
    trail.append(record(1))

    assert retire(place, 20) == 0
    trail.close()


def test_days_are_kept_from_the_last_record_on(place: Place) -> None:
    aged(place, [21, 19])
    (first, _) = maintenance.due_segments(place.folder, 20, datetime.now(UTC))

    assert len(first) == 1
    assert maintenance.due_segments(place.folder, 20, datetime.now(UTC) + timedelta(days=3))[1]


# -- effects -----------------------------------------------------------------------------------------


def test_an_effect_without_outcome_is_noted(place: Place) -> None:
    trail = place.trail()
    trail.append(record(operation="commit", stage="intent", effect="job-1", result=""))
    trail.append(record(operation="commit", stage="intent", effect="job-2", result=""))
    trail.append(record(operation="commit", stage="outcome", effect="job-2"))
    trail.close()
    report = place.verified()

    assert [note.text for note in report.notes] == ["commit job-1 has no outcome"]
    assert report.verdict == "intact"


def test_the_outcome_may_be_another_chains(place: Place) -> None:
    trail = place.trail()
    trail.append(record(operation="commit", stage="intent", effect="job-1", result=""))
    trail.close()
    other = place.trail(role="worker")
    other.append(record(operation="commit", stage="outcome", effect="job-1"))
    other.close()

    assert notes(place.verified()) == []
