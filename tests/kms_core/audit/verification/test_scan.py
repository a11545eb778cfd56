"""Lines without a signature have no witness, excuse nothing, and behind a closed end they are damage."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit import chain, segments
from kms_core.audit.keys import PublicKeys, Signer
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.sinks import FolderSink
from kms_core.audit.verification.anchors import ACKNOWLEDGED
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import AuditMonitor
from support.audit_logs import AuditFolder, audit_section, chain_name, notes, problem_codes, record, rewrite

SMALL: Final = audit_section(checkpoint_lines=5)
TIME: Final = "2026-01-01T00:00:00.000000Z"
LATER: Final = "2999-01-01T00:00:00.000000Z"
FORGED: Final = "worker-29990101T000000.000000Z-1"
OPENING: Final = '"kind":"open","version":1,"segment":1,"reason":"started"'
ORDINARY: Final = '"operation":"decrypt","principal":"eve","tenant":"acme","result":"ok"'


# -- a hand that has no key ----------------------------------------------------------------------------


def body(name: str, seq: int, rest: str) -> bytes:
    return f'{{"seq":{seq},"chain":"{name}","time":"{TIME}",{rest}'.encode()


def put_chain(
    audit_folder: AuditFolder, *lines: tuple[int, str], name: str = FORGED, segment: int = 1
) -> Path:
    """A segment that no process wrote, with heads that fit: the number of each line, and its other fields."""
    audit_folder.folder.mkdir(exist_ok=True)
    head, written = chain.ZERO, b""
    for seq, rest in lines:
        line, head = chain.seal(head, body(name, seq, rest))
        written += line
    path = segments.path_of(audit_folder.folder, name, segment)
    path.write_bytes(written)
    return path


def last_of(path: Path) -> chain.ChainLine:
    found = chain.read(path.read_bytes().splitlines()[-1])
    assert found is not None
    return found


def append(path: Path, *bodies: bytes) -> str:
    """Append lines with heads that fit; the last head."""
    head, written = bytes.fromhex(last_of(path).head), b""
    for each in bodies:
        line, head = chain.seal(head, each)
        written += line
    with path.open("ab") as file:
        file.write(written)
    return head.hex()


def append_forged(path: Path, count: int = 1, rest: str = ORDINARY) -> str:
    """Append lines with the numbers that follow."""
    end = last_of(path)
    return append(path, *(body(end.chain, end.seq + 1 + number, rest) for number in range(count)))


def crashed(audit_folder: AuditFolder, records: int = 5) -> Path:
    """A chain that was killed: lines 0 to 4 are signed by line 5, and line 6 is not."""
    path = audit_folder.written(records, SMALL)
    rewrite(path, lambda lines: lines[:-1])
    return path


def tips(audit_folder: AuditFolder) -> dict[str, int]:
    return {
        name: tip.seq
        for name, tip in segments.chain_heads(audit_folder.folder, audit_folder.keys(), but="").items()
    }


def said(report: VerificationReport, code: str) -> str:
    (text,) = [note.text for note in report.notes if note.code == code]
    return text


def watched(watch: AuditMonitor) -> list[tuple[str, int]]:
    watch.round()
    return [(problem.code, problem.seq) for problem in watch.condition.problems]


# -- behind a closed end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest",
    [ORDINARY, f'{ORDINARY},"seq":4', '"operation":"decrypt",'],
    ids=["plain", "second number", "no JSON"],
)
@pytest.mark.parametrize("is_known", [True, False], ids=["read before", "read at first"])
def test_lines_behind_a_closed_end_are_damage(
    audit_folder: AuditFolder, rest: str, *, is_known: bool
) -> None:
    """They count by their position, no other chain names them, and without them the log is intact again."""
    path = audit_folder.written(3)
    whole = path.read_bytes()
    watch = audit_folder.monitor()
    if is_known:
        assert watched(watch) == []
    append_forged(path, 2, rest)
    assert watched(watch) == watched(watch) == [("after_closed", 5)]
    audit_folder.written(2)
    report = audit_folder.verified()

    assert (report.verdict, problem_codes(report)) == ("damaged", ["after_closed"])
    assert (report.problems[0].file, report.problems[0].seq) == (path.name, 5)
    assert "2 lines after line 4" in report.problems[0].text
    path.write_bytes(whole)
    assert audit_folder.verified().verdict == "intact"


def test_lines_behind_an_end_far_above_the_last_mib_are_found(audit_folder: AuditFolder) -> None:
    """Only the end that was known before tells that its process wrote no more."""
    path, watch = audit_folder.written(3), audit_folder.monitor()
    assert watched(watch) == []
    append_forged(path, 8_000)

    assert watched(watch) == [("after_closed", 5)]
    assert watch.condition.lines < 8_000


def test_lines_behind_the_end_of_a_full_file_are_damage(audit_folder: AuditFolder) -> None:
    """The process was killed before it began the next one."""
    trail = audit_folder.trail(rotate_bytes=1)
    trail.append(record(1))
    (path,) = audit_folder.files()
    append_forged(path)

    assert problem_codes(audit_folder.verified()) == ["after_closed"]


def test_unsigned_lines_in_a_further_file_behind_a_closed_end_are_no_intact_log(
    audit_folder: AuditFolder,
) -> None:
    """A process may go on after it closed its chain; so may anybody else."""
    trail = audit_folder.trail()
    trail.append(record(1))
    trail.close()
    trail.append(record(2))
    path = audit_folder.files()[-1]
    content = path.read_bytes()
    trail.close()
    audit_folder.written(1)
    assert audit_folder.verified().verdict == "intact"
    path.write_bytes(content)
    for file in audit_folder.files():
        if not file.name.startswith(f"{chain_name(trail)}."):
            file.unlink()
    audit_folder.written(1)

    report = audit_folder.verified()
    assert (report.verdict, problem_codes(report)) == ("open end", [])
    assert "its last 2 lines are not signed" in said(report, "cut_or_crashed")


# -- ends without a closing line ---------------------------------------------------------------------


def test_a_tail_without_signature_is_counted_and_said(audit_folder: AuditFolder) -> None:
    append_forged(crashed(audit_folder), 2)
    audit_folder.written(1)
    report = audit_folder.verified()

    assert (report.verdict, report.chains[0].witness) == ("intact", report.chains[1].chain)
    text = said(report, "cut_or_crashed")
    assert "its last 3 lines are not signed" in text
    assert "any program that can write to the folder" in text


def test_an_end_that_is_signed_is_said_to_have_no_such_tail(audit_folder: AuditFolder) -> None:
    rewrite(audit_folder.written(5, SMALL), lambda lines: lines[:6])

    assert "not signed" not in said(audit_folder.verified(), "cut_or_crashed")


@pytest.mark.parametrize(("count", "verdict"), [(1_099, "intact"), (1_100, "open end")])
def test_a_witness_counts_for_one_checkpoint_interval(
    audit_folder: AuditFolder, count: int, verdict: str
) -> None:
    """Behind line 5, which is signed, stands line 6 already."""
    append_forged(crashed(audit_folder), count)
    audit_folder.written(1)
    report = audit_folder.verified()

    assert (report.verdict, problem_codes(report)) == (verdict, [])


@pytest.mark.parametrize(
    ("every", "records", "verdict"),
    [(3_000, 3_100, "open end"), (3_000, 6_100, "intact"), (500, 1_250, "open end")],
)
def test_the_interval_is_that_of_the_chain_where_it_signed_less_often(
    audit_folder: AuditFolder, every: int, records: int, verdict: str
) -> None:
    """One signed line, number 3,000, tells of no interval; behind the second as many lines may follow."""
    path = audit_folder.written(records, audit_section(checkpoint_lines=every, checkpoint_s=1e9))
    rewrite(path, lambda lines: lines[:-1])
    append_forged(path, 1_200)
    audit_folder.written(1)

    assert audit_folder.verified().verdict == verdict


def test_who_saw_the_beginning_of_a_chain_is_no_witness_of_its_end(audit_folder: AuditFolder) -> None:
    trail, other = audit_folder.trail(SMALL), audit_folder.trail(role="worker")
    trail.append(record(1))
    other.append(record(1))
    other.close()
    for number in range(6):
        trail.append(record(number))
    trail.close()
    assert notes(audit_folder.verified(other.last_signed)) == ["not_anchored"], "its end is named by nothing"
    rewrite(audit_folder.files()[0], lambda lines: lines[:-1])
    report = audit_folder.verified()

    assert (report.verdict, report.chains[0].witness) == ("open end", "")


def test_an_anchor_is_a_witness_of_its_own_line_alone(audit_folder: AuditFolder) -> None:
    path = crashed(audit_folder)
    anchor = path.read_bytes().splitlines()[5]
    assert (audit_folder.verified(anchor).verdict, audit_folder.verified(anchor).chains[0].witness) == (
        "open end",
        "",
    )
    rewrite(path, lambda lines: lines[:6])

    report = audit_folder.verified(anchor)
    assert (report.verdict, report.chains[0].witness) == ("intact", "the anchor in here")


def test_a_chain_that_no_key_signed_bears_no_witness(audit_folder: AuditFolder) -> None:
    last = last_of(crashed(audit_folder))
    put_chain(
        audit_folder, (0, f'{OPENING},"heads":{{"{last.chain}":[{last.seq},"{last.head}","{last.time}"]}}')
    )
    report = audit_folder.verified()

    assert (report.verdict, report.chains[0].witness) == ("open end", "")


# -- what chains name of each other ------------------------------------------------------------------


@pytest.mark.parametrize(
    "forge",
    [
        append_forged,
        lambda path: rewrite(path, lambda lines: [*lines, lines[5].replace(b'"seq":5,', b'"seq":8,')]),
    ],
    ids=["no signature", "that of another line"],
)
def test_only_signed_ends_are_named(audit_folder: AuditFolder, forge: Callable[[Path], object]) -> None:
    path = crashed(audit_folder)
    name = last_of(path).chain
    forge(path)

    assert tips(audit_folder) == {name: 5}
    assert segments.chain_heads(audit_folder.folder, audit_folder.keys(), but=name) == {}, "none names itself"


@pytest.mark.parametrize("torn", [b"", b'{"seq":7,"chain"', b"x" * 5_000])
def test_a_search_that_finds_no_line_ends_behind_the_last_whole_one(
    audit_folder: AuditFolder, torn: bytes
) -> None:
    path = audit_folder.written(20)
    whole = path.stat().st_size
    with path.open("ab") as out:
        out.write(torn)

    assert segments.offset_of(path, lambda _: False) == whole


def test_a_signed_line_of_another_chain_is_no_end(audit_folder: AuditFolder) -> None:
    path = crashed(audit_folder)
    name = last_of(path).chain
    path.write_bytes(path.read_bytes() + audit_folder.written(1).read_bytes().splitlines(keepends=True)[-1])

    assert tips(audit_folder).get(name) in {None, 0}


def test_a_chain_without_signed_lines_is_named_by_its_first(audit_folder: AuditFolder) -> None:
    """That it is there, and no more: a process that is killed at once leaves one."""
    trail = audit_folder.trail()
    for number in range(3):
        trail.append(record(number))

    assert tips(audit_folder) == {chain_name(trail): 0}


def test_the_signed_end_may_be_in_the_file_before(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(rotate_bytes=1)
    trail.append(record(1))
    trail.rotate_bytes = 1 << 20  # the next file does not fill up
    trail.append(record(2))

    assert len(audit_folder.files()) == 2
    assert tips(audit_folder) == {chain_name(trail): 2}


def test_an_end_signed_by_a_former_key_is_named(audit_folder: AuditFolder) -> None:
    name = last_of(crashed(audit_folder)).chain
    audit_folder.signing_key.rename(audit_folder.root / "former.key")
    audit_folder.written(1)
    opening = audit_folder.lines()[-3]

    assert (opening["kind"], {each: tip[0] for each, tip in opening["heads"].items()}) == ("open", {name: 5})


def test_a_forged_chain_keeps_no_end_from_being_named(audit_folder: AuditFolder) -> None:
    """Its first line names the end, as if that were on record already."""
    signed = chain.read(crashed(audit_folder).read_bytes().splitlines()[5])
    assert signed is not None
    put_chain(
        audit_folder, (0, f'{OPENING},"heads":{{"{signed.chain}":[5,"{signed.head}","{signed.time}"]}}')
    )

    assert tips(audit_folder)[signed.chain] == 5


def signed_chain(audit_folder: AuditFolder, signer: Signer, number: int) -> str:
    """A chain of an opening line and a checkpoint; written so many seconds after chain 0."""
    name = f"api-20260101T000000.000000Z-{number}"
    path = put_chain(audit_folder, (0, OPENING), name=name)
    rest = f'"kind":"checkpoint","previous":"{last_of(path).head}","opened":"{TIME}","heads":{{}}'
    unsigned = body(name, 1, f'{rest},"key":"{signer.key_id}"')
    append(path, b'%b%b%b"' % (unsigned, chain.SIGNATURE, signer.sign(chain.LABEL + unsigned)))
    os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))
    return name


class Counting(PublicKeys):
    """Counts the lines whose signatures are checked."""

    asked = 0

    def signed(self, line: bytes) -> chain.ChainLine | None:
        self.asked += 1
        return super().signed(line)


def test_at_most_256_ends_are_named_those_written_last(audit_folder: AuditFolder) -> None:
    signer = Signer.at(audit_folder.signing_key)
    names = [signed_chain(audit_folder, signer, number) for number in range(300)]

    assert [*tips(audit_folder)] == names[: 300 - 257 : -1]
    assert len(tips(audit_folder)) == 256
    keys = Counting(audit_folder.keys().keys.values())
    segments.chain_heads(audit_folder.folder, keys, but="")
    assert keys.asked == 256, "older chains are not even read"


def test_chains_that_were_not_written_to_of_late_can_be_left_out(audit_folder: AuditFolder) -> None:
    signer = Signer.at(audit_folder.signing_key)
    names = [signed_chain(audit_folder, signer, number) for number in range(4)]

    found = segments.chain_heads(audit_folder.folder, audit_folder.keys(), but="", since=1_700_000_002)
    assert {*found} == {*names[2:]}


def test_forged_chains_crowd_out_no_signed_one(audit_folder: AuditFolder) -> None:
    name = signed_chain(audit_folder, Signer.at(audit_folder.signing_key), 1)
    for number in range(300):
        put_chain(audit_folder, (0, OPENING), name=f"worker-29990101T000000.000000Z-{number}")

    found = tips(audit_folder)
    assert (len(found), next(iter(found))) == (256, name)


def test_signed_lines_name_no_forged_line_above_a_signed_head(audit_folder: AuditFolder) -> None:
    """A chain without signatures begins with line 0. A later line would replace an earlier signed head."""
    put_chain(audit_folder, (40, OPENING))

    assert segments.chain_heads(audit_folder.folder, PublicKeys([]), but="") == {}


# -- what excuses nothing ------------------------------------------------------------------------------

RETIRED: Final = f'"kind":"retired","before":"{LATER}"'
"""The record of a removal that would excuse any chain."""
LOSS: Final = f'"operation":"{ACKNOWLEDGED}","stage":"outcome","effect":"LOST:999999-0-1f"'
"""The record of a loss that would excuse any line of the chain whose name takes the place of LOST."""


@pytest.fixture
def lost(audit_folder: AuditFolder) -> tuple[str, Path]:
    """The name of a chain that is gone, and the file of another one; both ends have anchors."""
    files = [audit_folder.written(count, SMALL) for count in (20, 6)]
    for file in files:
        FolderSink(audit_folder.root / "anchors").put(file.read_bytes().splitlines(keepends=True)[-1])
    name = last_of(files[0]).chain
    files[0].unlink()
    return name, files[1]


def check_missed(audit_folder: AuditFolder, damage: str) -> None:
    """That chain is missed by verify, which finds other damage too, and by a monitor that starts now."""
    anchors = FolderSink(audit_folder.root / "anchors")
    watch = audit_folder.monitor(anchors)
    watch.round()

    assert {"missing_chain", damage} <= {*problem_codes(audit_folder.verified(*anchors.lines()))}
    assert "missing_chain" in [problem.code for problem in watch.condition.anchors]


@pytest.mark.parametrize(
    "lines",
    [
        # the last signed line of a chain without signatures is -1, which is more than -3
        [(-4, OPENING), (-3, RETIRED), (-2, '"operation":"x"')],
        [(-4, OPENING), (-3, LOSS)],
        [(0, OPENING), (1, f'{LOSS},"seq":-9')],
    ],
    ids=["removal with a negative number", "loss with a negative number", "loss with two numbers"],
)
def test_a_chain_without_signatures_excuses_no_missing_one(
    audit_folder: AuditFolder, lost: tuple[str, Path], lines: list[tuple[int, str]]
) -> None:
    put_chain(audit_folder, *((seq, rest.replace("LOST", lost[0])) for seq, rest in lines))

    check_missed(audit_folder, "unreadable")


@pytest.mark.parametrize(
    "second", ['"seq":0', f'"chain":"{FORGED}","seq":-9', '"seq":-1'], ids=["number", "chain", "negative"]
)
def test_a_removal_with_two_numbers_excuses_no_missing_chain(
    audit_folder: AuditFolder, lost: tuple[str, Path], second: str
) -> None:
    """It stands after the last signed line, and says that it stands before."""
    path = lost[1]
    rewrite(path, lambda lines: lines[:-1])  # as after a crash
    append_forged(path, 1, f"{RETIRED},{second}")

    check_missed(audit_folder, "unreadable")


def test_another_file_under_the_name_of_a_signed_chain_excuses_no_missing_one(
    audit_folder: AuditFolder, lost: tuple[str, Path]
) -> None:
    """It has no signature, and is read before the signed one."""
    name, path = lost
    put_chain(
        audit_folder, (0, OPENING), (1, LOSS.replace("LOST", name)), name=last_of(path).chain, segment=0
    )

    check_missed(audit_folder, "duplicate_file")


def test_an_unsigned_head_replaces_no_signed_one(audit_folder: AuditFolder) -> None:
    """A chain rewritten below a head in a signed line, and a forged line that names the new end."""
    path = audit_folder.written(30, SMALL)
    audit_folder.written(3, SMALL)
    rewrite(path, lambda lines: lines[:14])
    head = append_forged(path, 60)
    assert problem_codes(audit_folder.verified()) == ["rewritten"]
    end = last_of(path)
    append_forged(path, 1, f'"kind":"x","heads":{{"{end.chain}":[{end.seq},"{head}",""]}}')

    assert problem_codes(audit_folder.verified()) == ["rewritten"]


def test_an_unsigned_head_excuses_no_missing_chain(audit_folder: AuditFolder) -> None:
    """The signed head is younger than the removal on record; the forged one claims to be older."""
    audit_folder.aged(30)
    lost = audit_folder.written(3)
    name = last_of(lost).chain
    log = audit_folder.trail(role="worker")
    log.append(record(1))
    AuditMaintenance(log, keep_days=20).round()
    log.close()
    lost.unlink()
    assert problem_codes(audit_folder.verified()) == ["missing_chain"]
    heads = f'"heads":{{"{name}":[99,"{"00" * 32}","2020-01-01T00:00:00.000000Z"]}}'
    put_chain(audit_folder, (0, f"{OPENING},{heads}"))

    assert problem_codes(audit_folder.verified()) == ["missing_chain"]


# -- other forms of a line -----------------------------------------------------------------------------


def test_a_forged_end_in_another_form_of_json_is_damage(audit_folder: AuditFolder) -> None:
    """A space after the brace: number and head are right, and the end has no signature."""
    path = audit_folder.written(8, SMALL)
    rewrite(path, lambda lines: lines[:7])
    append_forged(path, 3)
    end = last_of(path)
    append(path, body(end.chain, end.seq + 1, '"kind":"closed"').replace(b"{", b"{ ", 1))

    assert problem_codes(audit_folder.verified()) == ["edited"]
    assert [code for code, _ in watched(audit_folder.monitor())] == ["edited"]


@pytest.mark.parametrize("digits", [19, 4_300, 5_000])
@pytest.mark.parametrize("where", ["line", "head"])
def test_a_number_of_many_digits_is_unreadable(audit_folder: AuditFolder, digits: int, where: str) -> None:
    """Python refuses to print numbers of more than 4,300 digits."""
    number = "9" * digits
    if where == "line":
        path = put_chain(audit_folder, (0, OPENING))
        line, _ = chain.seal(chain.ZERO, body(FORGED, 0, OPENING).replace(b":0,", f":{number},".encode(), 1))
        path.write_bytes(line * 2)
    else:
        put_chain(audit_folder, (0, f'{OPENING},"heads":{{"{FORGED}":[{number},"00","{TIME}"]}}'))
    audit_folder.trail()

    assert audit_folder.verified().problems[0].code == "unreadable"


@pytest.mark.parametrize("size", [1 << 20, 3 << 20, 9 << 20])
def test_a_line_of_more_than_a_mib_is_unreadable(audit_folder: AuditFolder, size: int) -> None:
    """The service writes none, and its readers stop at one, even if number and head are right."""
    path = audit_folder.written(3)
    rewrite(path, lambda lines: lines[:-1])
    append_forged(path, 1, f'"operation":"x","principal":"{"x" * size}"')
    report = audit_folder.verified()

    assert problem_codes(report) == ["unreadable"]
    assert "1 MiB" in report.problems[0].text
    assert notes(report) == ["cut_or_crashed"]


def test_bytes_without_newline_change_no_number(audit_folder: AuditFolder) -> None:
    path = audit_folder.written(3)
    path.write_bytes(path.read_bytes() + b"x" * 100)
    report = audit_folder.verified()

    assert problem_codes(report) == ["unreadable"]
    assert report.chains[0].last_seq == 4


@pytest.mark.parametrize("suffix", [".old", ".bak"])
def test_a_renamed_file_is_read_and_said(audit_folder: AuditFolder, suffix: str) -> None:
    """The service, its pages and commands pass over it."""
    path = audit_folder.written(3)
    path.rename(path.with_name(path.name + suffix))
    report = audit_folder.verified()

    assert (report.verdict, problem_codes(report), notes(report)) == ("intact", [], ["misplaced"])
    assert path.name + suffix in said(report, "misplaced")
    assert report.chains[0].lines == 5
