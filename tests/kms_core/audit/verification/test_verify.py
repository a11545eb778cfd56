"""What verification notices: lines that were changed, taken, added or cut, and files that are gone."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit import chain
from kms_core.audit.keys import PublicKeys, Signer
from kms_core.audit.verification import scan
from kms_core.audit.verification.verify import verify
from support.audit_logs import (
    PROGRAM_PREAMBLE,
    AuditFolder,
    audit_section,
    chain_name,
    notes,
    problem_codes,
    record,
    rewrite,
)

Change = Callable[[list[bytes]], list[bytes]]
SMALL: Final = audit_section(checkpoint_lines=5)
HOLD: Final = f"""{PROGRAM_PREAMBLE}
place.trail(role="worker").append(record(9))
print(flush=True)
sys.stdin.read()
"""


def resealed(lines: list[bytes], *, begin: int) -> list[bytes]:
    """What somebody without the signing key can do: make all heads fit again, from a line on."""
    head = chain.claimed_head(lines[begin - 1][:-1]) or chain.ZERO
    made = lines[:begin]
    for line in lines[begin:]:
        sealed, head = chain.seal(head, chain.body_of(line[:-1]))
        made.append(sealed)
    return made


def on_line(at: int, change: Callable[[bytes], bytes]) -> Change:
    """Change one line."""

    def changed(lines: list[bytes]) -> list[bytes]:
        made = lines[:]
        made[at] = change(made[at])
        return made

    return changed


def exchanged(at: int, old: bytes, new: bytes) -> Change:
    return on_line(at, lambda line: line.replace(old, new))


def refitted(old: bytes, new: bytes) -> Change:
    """Change all lines with a text, and make the heads fit."""
    return lambda lines: resealed([re.sub(old, new, line) for line in lines], begin=1)


# -- whole trails ------------------------------------------------------------------------------------


def test_a_closed_trail_is_intact_and_signed_to_its_end(audit_folder: AuditFolder) -> None:
    audit_folder.written(12, SMALL)
    report = audit_folder.verified()
    (only,) = report.chains

    assert (report.verdict, problem_codes(report), notes(report)) == ("intact", [], [])
    assert only.state == "closed"
    assert only.signed_seq == only.last_seq
    assert report.lines == only.lines == len(audit_folder.lines())
    assert report.trusted


def test_without_a_key_the_trails_own_is_taken_and_that_is_said(audit_folder: AuditFolder) -> None:
    audit_folder.written(3)
    report = verify(audit_folder.folder)
    other = Signer.at(audit_folder.root / "other.key").public

    assert (report.verdict, report.trusted) == ("intact", False)
    assert problem_codes(verify(audit_folder.folder, PublicKeys([other]))) == ["unknown_key"]


@pytest.mark.parametrize("key", [b"", b"00", b"no hex"])
def test_a_log_without_a_key_that_can_be_taken_is_a_finding(audit_folder: AuditFolder, key: bytes) -> None:
    audit_folder.written(3)
    (path,) = audit_folder.files()
    named = b'"public_key":"%b"' % key
    rewrite(path, lambda lines: [re.sub(rb'"public_key":"\w+"', named, line) for line in lines])

    assert "edited" in problem_codes(verify(audit_folder.folder))


def test_progress_is_told_at_first_and_after_each_file(audit_folder: AuditFolder) -> None:
    audit_folder.written(40, rotate_bytes=4096)
    seen: list[tuple[int, int]] = []
    report = verify(
        audit_folder.folder, audit_folder.keys(), progress=lambda done, total: seen.append((done, total))
    )

    assert report.verdict == "intact"
    assert len(seen) == 1 + len(audit_folder.files()) > 3
    assert seen[0] == (0, report.size_bytes)
    assert seen[-1] == (report.size_bytes, report.size_bytes)


def test_a_change_where_two_blocks_meet_is_found_once(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    for _ in range(200):
        trail.append(record(principal="x" * 100_000))
    trail.close()
    (path,) = audit_folder.files()
    lines = path.read_bytes().splitlines(keepends=True)
    sizes = accumulate(map(len, lines))
    last = next(number for number, end in enumerate(sizes) if end > scan._BLOCK_BYTES)  # noqa: SLF001

    for change, expected in (
        (exchanged(last, b"xxx", b"xyx"), ("edited", last)),
        (exchanged(last + 1, b"xxx", b"xyx"), ("edited", last + 1)),
        (on_line(last + 1, lambda _: b""), ("gap", last + 1)),
        (on_line(last, lambda line: line * 2), ("reordered", last)),
    ):
        path.write_bytes(b"".join(change(lines)))
        assert [(problem.code, problem.seq) for problem in audit_folder.verified().problems] == [expected]


# -- lines -------------------------------------------------------------------------------------------

LINES: Final[dict[str, tuple[Change, str]]] = {
    "edited": (exchanged(3, b'"ada-', b'"eve-'), "edited"),
    "first line edited": (exchanged(0, b"started", b"Started"), "edited"),
    "last line edited": (exchanged(-1, b"closed", b"kloset"), "edited"),
    "head changed": (on_line(3, lambda line: line[:-8] + b"00000" + line[-3:]), "edited"),
    "head in capital letters": (
        on_line(3, lambda line: line[:-67] + line[-67:-3].upper() + line[-3:]),
        "unreadable",
    ),
    "head under another name": (exchanged(3, b',"head":"', b',"heed":"'), "unreadable"),
    "number changed": (exchanged(3, b'{"seq":3,', b'{"seq":30,'), "gap"),
    "one removed": (lambda lines: lines[:3] + lines[4:], "gap"),
    "many removed": (lambda lines: lines[:3] + lines[9:], "gap"),
    "first removed": (lambda lines: lines[1:], "gap"),
    "swapped": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "gap"),
    "repeated": (on_line(3, lambda line: line * 2), "reordered"),
    "one put in": (on_line(3, lambda line: b'{"seq":3}\n' + line), "unreadable"),
    "not JSON": (on_line(3, lambda _: b"nonsense\n"), "unreadable"),
    "empty line": (on_line(3, lambda line: b"\n" + line), "unreadable"),
    "torn in the middle": (on_line(3, lambda line: line[:40] + b"\n"), "unreadable"),
    "two fused": (on_line(3, lambda line: line[:40]), "unreadable"),
    "bytes after the end": (lambda lines: [*lines, b"{"], "unreadable"),
    "heads made to fit": (refitted(b'"ada-3"', b'"eve-3"'), "bad_signature"),
    "heads made to fit after a removal": (lambda lines: resealed(lines[:3] + lines[4:], begin=3), "gap"),
    "checkpoint continues something else": (refitted(b'"previous":"..', b'"previous":"zz'), "bad_signature"),
    "checkpoint names no heads": (refitted(b'"signature":"', b'"signature":"!'), "bad_signature"),
    "checkpoint unsigned": (refitted(b'"kind":"checkpoint"', b'"kind":"checkpaint"'), "bad_signature"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_change_of_lines_is_found(audit_folder: AuditFolder, name: str) -> None:
    change, code = LINES[name]
    path = audit_folder.written(12, SMALL)
    rewrite(path, change)
    report = audit_folder.verified()

    assert code in problem_codes(report)
    assert report.verdict == "damaged"
    assert {problem.file for problem in report.problems} == {path.name}


def test_a_line_of_another_chain_is_out_of_place(audit_folder: AuditFolder) -> None:
    stray = audit_folder.written(3).read_bytes().splitlines(keepends=True)[2]
    rewrite(audit_folder.written(12, SMALL), on_line(3, lambda line: stray + line))

    assert "misplaced" in problem_codes(audit_folder.verified())


def test_words_of_a_caller_are_never_taken_for_a_checkpoint(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(
        record(principal='","kind":"closed","signature":"', context={"kind": "closed", "stage": "intent"})
    )
    trail.append(record(1))
    trail.close()

    assert audit_folder.verified().verdict == "intact"


# -- ends --------------------------------------------------------------------------------------------


def test_a_live_process_is_seen_from_another_one(audit_folder: AuditFolder) -> None:
    here = audit_folder.trail()
    here.append(record(1))
    argv = [sys.executable, "-c", HOLD, str(audit_folder.root)]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        report = audit_folder.verified()

        assert ([each.state for each in report.chains], report.verdict) == (["open", "open"], "intact")
    finally:
        holder.kill()
        holder.communicate()

    assert [each.state for each in audit_folder.verified().chains] == ["open", "cut or crashed"]
    here.close()


def test_a_chain_without_end_is_cut_or_crashed_until_the_next_one_bears_witness(
    audit_folder: AuditFolder,
) -> None:
    rewrite(audit_folder.written(12, SMALL), lambda lines: lines[:-1])
    report = audit_folder.verified()
    assert (report.verdict, report.chains[0].state) == ("open end", "cut or crashed")
    assert (problem_codes(report), notes(report)) == ([], ["cut_or_crashed"])
    audit_folder.written(1)
    report = audit_folder.verified()

    assert (report.verdict, report.chains[0].witness) == ("intact", report.chains[1].chain)


def test_a_chain_written_anew_after_another_saw_it_does_not_pass(audit_folder: AuditFolder) -> None:
    """Even by somebody who has the signing key."""
    path = audit_folder.written(3)
    audit_folder.written(1)
    original = json.loads(path.read_bytes().splitlines()[0])
    path.unlink()
    forged = audit_folder.trail()
    for number in (7, 8, 9):
        forged.append(record(number))
    forged.close()
    new = audit_folder.files()[-1]
    text = new.read_bytes().replace(chain_name(forged).encode(), original["chain"].encode())
    path.write_bytes(b"".join(resealed(text.splitlines(keepends=True), begin=0)))
    new.unlink()

    assert "rewritten" in problem_codes(audit_folder.verified())


# -- files -------------------------------------------------------------------------------------------


def shortened(path: Path, end: int) -> None:
    rewrite(path, lambda lines: lines[:end])


def unlink_all(files: list[Path]) -> None:
    for file in files:
        file.unlink()


FILES: Final[dict[str, tuple[bool, Callable[[list[Path]], object], str]]] = {
    "one in the middle is gone": (False, lambda files: files[2].unlink(), "missing_file"),
    "the first is gone": (False, lambda files: files[0].unlink(), "missing_file"),
    "the first is cut": (False, lambda files: shortened(files[0], -2), "cut"),
    "the last is gone": (True, lambda files: files[-1].unlink(), "cut"),
    "the last is empty": (True, lambda files: files[-1].write_bytes(b""), "cut"),
    "the last lacks a line": (True, lambda files: shortened(files[-1], -1), "cut"),
    "the last lacks all lines but one": (True, lambda files: shortened(files[-1], 1), "cut"),
    "all are gone": (True, unlink_all, "missing_chain"),
    "one is there twice": (False, lambda files: shutil.copy(files[-1], f"{files[-1]}.1"), "duplicate_file"),
}
"""Whether another chain names the end of the damaged one, the damage, and its code."""


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_files_is_found(audit_folder: AuditFolder, name: str) -> None:
    is_named, damage, code = FILES[name]
    audit_folder.written(80, rotate_bytes=4096)
    files = audit_folder.files()
    if is_named:
        audit_folder.written(1)
    damage(files)
    report = audit_folder.verified()

    assert (problem_codes(report), report.verdict) == ([code], "damaged")


def test_a_file_that_is_not_the_one_which_the_next_continues_is_found(audit_folder: AuditFolder) -> None:
    """It has as many lines, heads that fit, and no signature in it."""
    trail = audit_folder.trail()
    for number in range(4):
        trail.append(record(number))
    (file,) = audit_folder.files()
    content = file.read_bytes()
    file.unlink()
    trail.append(record(9))
    trail.close()
    file.write_bytes(content)
    assert problem_codes(audit_folder.verified()) == []
    rewrite(file, refitted(b'"ada-2"', b'"eve-2"'))

    assert problem_codes(audit_folder.verified()) == ["cut"]


def test_other_files_are_left_alone(audit_folder: AuditFolder) -> None:
    audit_folder.written(3)
    (audit_folder.folder / "README").write_text("not ours")
    (audit_folder.folder / "sub.jsonl").mkdir()
    (audit_folder.folder / "other.jsonl").write_text('{"not": "ours"}\n')

    assert audit_folder.verified().verdict == "intact"


# -- effects -----------------------------------------------------------------------------------------


def test_an_effect_without_outcome_is_noted(audit_folder: AuditFolder) -> None:
    """The outcome may stand in another chain."""
    trail, other = audit_folder.trail(), audit_folder.trail(role="worker")
    for job in ("job-1", "job-2", "job-3"):
        trail.append(record(operation="commit", stage="intent", effect=job, result=""))
    trail.append(record(operation="commit", stage="outcome", effect="job-2"))
    trail.close()
    other.append(record(operation="commit", stage="outcome", effect="job-3"))
    other.close()
    report = audit_folder.verified()

    assert [note.text for note in report.notes] == ["commit job-1 has no outcome"]
    assert report.verdict == "intact"
