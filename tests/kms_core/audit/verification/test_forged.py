"""Lines that a program without the signing key writes to the folder never count as signed ones."""

import threading
import time
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit import chain, segments
from kms_core.audit.keys import PublicKeys
from kms_core.audit.maintenance import AuditMaintenance, FolderSink
from kms_core.audit.verification import scan, verify
from kms_core.audit.verification.anchors import ACKNOWLEDGED, acknowledged
from kms_core.audit.verification.verify import AuditMonitor
from support.audit_logs import Place, audit_section, chain_name, codes, notes, record, rewrite

SMALL: Final = audit_section(checkpoint_lines=5)
TIME: Final = "2026-01-01T00:00:00.000000Z"
LATER: Final = "2999-01-01T00:00:00.000000Z"
FORGED: Final = "api-20200101T000000.000000Z-1"
DAY_NS: Final = 24 * 3600 * 1_000_000_000


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def anchors(place: Place) -> FolderSink:
    made = FolderSink(place.at / "anchors")
    made.make()
    return made


def anchored(place: Place, anchors: FolderSink, count: int) -> Path:
    """A closed chain of so many records with an anchor of its end; its file."""
    log = place.trail(SMALL)
    for number in range(count):
        log.append(record(number))
    log.close()
    anchors.put(log.last_signed)
    return place.files()[-1]


def body(name: str, seq: int, rest: str) -> bytes:
    return f'{{"seq":{seq},"chain":"{name}","time":"{TIME}",{rest}'.encode()


def opening(seq: int = 0, segment: int = 1) -> tuple[int, str]:
    return seq, f'"kind":"open","version":1,"segment":{segment},"reason":"started"'


def put_chain(place: Place, *lines: tuple[int, str], name: str = FORGED, segment: int = 1) -> Path:
    """A segment that no process wrote, with heads that fit: the number of each line, and its other fields."""
    head, written = chain.ZERO, b""
    for seq, rest in lines:
        line, head = chain.seal(head, body(name, seq, rest))
        written += line
    path = segments.path_of(place.folder, name, segment)
    path.write_bytes(written)
    return path


def append(path: Path, *bodies: bytes) -> bytes:
    """Append lines with heads that fit; the last head."""
    head = chain.claimed_head(path.read_bytes().splitlines()[-1])
    assert head is not None
    for each in bodies:
        line, head = chain.seal(head, each)
        with path.open("ab") as file:
            file.write(line)
    return head


def last_of(path: Path) -> chain.ChainLine:
    found = chain.read(path.read_bytes().splitlines()[-1])
    assert found is not None
    return found


def anchor_problems(place: Place, anchors: FolderSink) -> list[str]:
    """What the monitor of a process that starts now finds by anchors."""
    watch = AuditMonitor(place.folder, place.signing_key, [anchors])
    watch.round()
    return [problem.code for problem in watch.condition.anchors]


# -- numbers of lines ----------------------------------------------------------------------------------

RETIRED: Final = f'"kind":"retired","before":"{LATER}"'


def test_a_removal_with_a_negative_number_excuses_no_missing_chain(place: Place, anchors: FolderSink) -> None:
    """The last signed line of a chain without signatures is -1, which is more than -3."""
    lost = anchored(place, anchors, 20)
    anchored(place, anchors, 6)
    put_chain(place, opening(-4), (-3, RETIRED), (-2, '"operation":"x"'))
    lost.unlink()
    report = place.verified(*anchors.lines())

    assert "missing_chain" in codes(report)
    assert "unreadable" in codes(report), "no line has such a number"
    assert anchor_problems(place, anchors) == ["missing_chain"]


@pytest.mark.parametrize(
    "second", ['"seq":0', f'"chain":"{FORGED}","seq":-9', '"seq":-1'], ids=["number", "chain", "negative"]
)
def test_a_removal_with_two_numbers_excuses_no_missing_chain(
    place: Place, anchors: FolderSink, second: str
) -> None:
    """It stands after the last signed line, and says that it stands before."""
    lost = anchored(place, anchors, 20)
    path = anchored(place, anchors, 6)
    rewrite(path, lambda lines: lines[:-1])  # as after a crash
    end = last_of(path)
    append(path, body(end.chain, end.seq + 1, f"{RETIRED},{second}"))
    lost.unlink()

    assert {"unreadable", "missing_chain"} <= {*codes(place.verified(*anchors.lines()))}
    assert "missing_chain" in anchor_problems(place, anchors)


@pytest.mark.parametrize("seq", [-3, 0], ids=["negative", "two numbers"])
def test_a_forged_record_of_a_loss_excuses_no_cut(place: Place, anchors: FolderSink, seq: int) -> None:
    path = anchored(place, anchors, 20)
    end = last_of(path)
    rewrite(path, lambda lines: lines[:-3])
    loss = f'"operation":"{ACKNOWLEDGED}","stage":"outcome","effect":"{end.chain}:999999-0"'
    put_chain(place, opening(seq - 1 if seq else 0), (seq or 1, loss if seq else f'{loss},"seq":-9'))

    assert "cut" in codes(place.verified(*anchors.lines()))
    assert anchor_problems(place, anchors) == ["cut"]


def test_the_monitor_takes_no_record_of_a_loss_from_a_file_without_signature(
    place: Place, anchors: FolderSink
) -> None:
    """Another file under the name of a signed chain, read before the signed one."""
    lost = anchored(place, anchors, 20)
    signed = anchored(place, anchors, 6)
    name, gone = last_of(signed).chain, last_of(lost).chain
    loss = f'"operation":"{ACKNOWLEDGED}","stage":"outcome","effect":"{gone}:999999-0"'
    put_chain(place, opening(), (1, loss), name=name, segment=0)
    lost.unlink()

    assert anchor_problems(place, anchors) == ["missing_chain"]


@pytest.mark.parametrize(
    "rest",
    ['"operation":"decrypt","principal":"eve","seq":4', '"operation":"decrypt",'],
    ids=["second number", "no JSON"],
)
@pytest.mark.parametrize("is_known", [True, False], ids=["known before", "new"])
def test_lines_after_a_closed_end_count_by_their_position(place: Place, rest: str, *, is_known: bool) -> None:
    path = place.written(3)
    end = last_of(path)
    watch = AuditMonitor(place.folder, place.signing_key)
    if is_known:
        watch.round()
    append(path, body(end.chain, end.seq + 1, rest))
    watch.round()
    report = place.verified()

    assert (report.verdict, codes(report)) == ("damaged", ["after_closed"])
    assert watch.condition.problems


@pytest.mark.parametrize("digits", [19, 4_300, 5_000])
@pytest.mark.parametrize("where", ["line", "head"])
def test_a_number_of_many_digits_is_unreadable(place: Place, digits: int, where: str) -> None:
    """Python refuses to print numbers of more than 4,300 digits."""
    number = "9" * digits
    if where == "line":
        line, _ = chain.seal(
            chain.ZERO, f'{{"seq":{number},"chain":"{FORGED}","time":"{TIME}",{opening()[1]}'.encode()
        )
        place.folder.mkdir()
        segments.path_of(place.folder, FORGED, 1).write_bytes(line + line)
    else:
        place.folder.mkdir()
        put_chain(place, (0, f'{opening()[1]},"heads":{{"{FORGED}":[{number},"00","{TIME}"]}}'))
    place.trail()

    assert place.verified().problems[0].code == "unreadable"


# -- heads in unsigned lines ---------------------------------------------------------------------------


def test_an_unsigned_head_replaces_no_signed_one(place: Place) -> None:
    """A chain rewritten below a head in a signed line, and a forged line that names the new end."""
    path = place.written(30, SMALL)
    place.written(3, SMALL)
    rewrite(path, lambda lines: lines[:14])
    end = last_of(path)
    head = append(path, *(body(end.chain, end.seq + 1 + n, '"operation":"encrypt"') for n in range(60)))
    assert codes(place.verified()) == ["rewritten"]
    heads = f'"heads":{{"{end.chain}":[{end.seq + 60},"{head.hex()}",""]}}'
    append(path, body(end.chain, end.seq + 61, f'"kind":"x",{heads}'))

    assert codes(place.verified()) == ["rewritten"]


def test_an_unsigned_head_excuses_no_missing_chain(place: Place) -> None:
    """The signed head is younger than the removal on record; the forged one claims to be older."""
    at = time.time_ns() - 30 * DAY_NS
    old = place.trail(clock=lambda: at)
    old.append(record(1))
    old.close()
    lost = place.trail()
    for number in range(3):
        lost.append(record(number))
    lost.close()
    gone = next(file for file in place.files() if chain_name(lost) in file.name)
    log = place.trail(role="worker")
    log.append(record(1))
    AuditMaintenance(log, keep_days=20).round()
    log.close()
    gone.unlink()
    assert codes(place.verified()) == ["missing_chain"]
    heads = f'"heads":{{"{chain_name(lost)}":[99,"{"00" * 32}","2020-01-01T00:00:00.000000Z"]}}'
    put_chain(place, (0, f"{opening()[1]},{heads}"))

    assert codes(place.verified()) == ["missing_chain"]


def test_signed_lines_name_no_forged_line_above_a_signed_head(place: Place) -> None:
    """A chain without signatures begins with line 0. A later line would replace an earlier signed head."""
    place.folder.mkdir()
    put_chain(place, opening(seq=40))

    assert segments.chain_heads(place.folder, PublicKeys([]), but="") == {}


# -- other forms of a line -----------------------------------------------------------------------------


def test_a_forged_end_in_another_form_of_json_is_damage(place: Place) -> None:
    """A space after the brace: number and head are right, and the end has no signature."""
    path = place.written(8, SMALL)
    rewrite(path, lambda lines: lines[:7])
    end = last_of(path)
    append(path, *(body(end.chain, end.seq + 1 + n, '"operation":"encrypt"') for n in range(3)))
    append(path, body(end.chain, end.seq + 4, '"kind":"closed"').replace(b"{", b"{ ", 1))
    watch = AuditMonitor(place.folder, place.signing_key)
    watch.round()

    assert codes(place.verified()) == ["edited"]
    assert [problem.code for problem in watch.condition.problems] == ["edited"]


# -- the monitor goes on -------------------------------------------------------------------------------


def test_a_loss_with_thousands_of_digits_is_none() -> None:
    def line(last: str) -> chain.ChainLine:
        return chain.ChainLine(
            seq=1, chain="c", time=TIME, operation=ACKNOWLEDGED, stage="outcome", effect=f"x:{last}-0-1f"
        )

    assert acknowledged([line("9" * 5_000), line("9" * 20)]) == {}
    assert acknowledged([line("9" * 19)]) == {"x": (0, int("9" * 19))}


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


def test_a_round_that_fails_is_reported_and_does_not_end_the_monitor(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread itself, and an error that no code expects."""
    path = place.written(3)
    failed, good = threading.Event(), threading.Event()
    real = scan.scan

    class Watched(AuditMonitor):
        def round(self) -> None:
            try:
                super().round()
            except ZeroDivisionError:
                failed.set()
                raise
            good.set()

    def broken(*_: object) -> scan.ScannedSpan:
        raise ZeroDivisionError

    watch = Watched(place.folder, place.signing_key)
    monkeypatch.setattr(verify, "scan", broken)
    watch.start()
    try:
        wait_for(failed)
        assert "ZeroDivisionError" in watch.condition.unread
        assert watch.condition.read_at == 0
        monkeypatch.setattr(verify, "scan", real)
        watch.wake()
        wait_for(good)
        assert (watch.condition.unread, watch.condition.lines) == ("", 5)
        path.unlink()
        good.clear()
        watch.wake()
        wait_for(good)
        assert [problem.code for problem in watch.condition.problems] == ["missing_file"]
    finally:
        watch.stop(5)


def test_no_line_ends_the_monitor(place: Place) -> None:
    """A record of a loss with 5,000 digits; then a file is removed."""
    path = place.written(3)
    loss = f'"operation":"{ACKNOWLEDGED}","stage":"outcome","effect":"x:{"9" * 5_000}-0"'
    watch = AuditMonitor(place.folder, place.signing_key)
    watch.round()
    put_chain(place, opening(), (1, loss))
    watch.round()
    assert watch.condition.unread == ""
    path.unlink()
    watch.round()

    assert [problem.code for problem in watch.condition.problems] == ["missing_file"]


# -- long lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 20, 3 << 20, 9 << 20])
def test_a_line_of_more_than_a_mib_is_unreadable(place: Place, size: int) -> None:
    """The service writes none, and its readers stop at one, even if number and head are right."""
    path = place.written(3)
    rewrite(path, lambda lines: lines[:-1])
    end = last_of(path)
    append(path, body(end.chain, end.seq + 1, f'"operation":"x","principal":"{"x" * size}"'))
    report = place.verified()

    assert codes(report) == ["unreadable"]
    assert "1 MiB" in report.problems[0].text
    assert notes(report) == ["cut_or_crashed"]


def test_bytes_without_newline_change_no_number(place: Place) -> None:
    path = place.written(3)
    with path.open("ab") as file:
        file.write(b"x" * 100)
    report = place.verified()

    assert codes(report) == ["unreadable"]
    assert report.chains[0].last_seq == 4
