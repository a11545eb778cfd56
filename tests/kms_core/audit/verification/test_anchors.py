"""A log that is older than its anchors is found: while it is written, at the next start, and by verify."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import pytest
import redis
from structlog.testing import capture_logs

from kms_core import audit
from kms_core.audit import chain, segments
from kms_core.audit.keys import Signer
from kms_core.audit.log import AuditLog
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.removals import removal_horizon
from kms_core.audit.sinks import ANCHORS, FolderSink, RedisSink
from kms_core.audit.verification import anchors
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import AuditMonitor, verify
from kms_core.auth.policy import Principal
from kms_core.settings.model import AuditSection
from support.audit_logs import (
    AuditFolder,
    audit_ok,
    audit_section,
    chain_name,
    hours_ago,
    notes,
    problem_codes,
    record,
    rewrite,
)

EAGER: Final = audit_section(checkpoint_s=0)
AnchorPlace = RedisSink | FolderSink


@pytest.fixture(params=["directory", "redis"])
def kept(request: pytest.FixtureRequest, audit_folder: AuditFolder) -> AnchorPlace:
    """Where anchors are."""
    if request.param == "directory":
        return FolderSink(audit_folder.root / "anchors")
    return RedisSink(redis.Redis.from_url(request.getfixturevalue("redis_url")))


class Writer:
    """A process that writes a log and anchors it at once."""

    def __init__(
        self, audit_folder: AuditFolder, kept: AnchorPlace, rules: AuditSection = EAGER, role: str = "api"
    ) -> None:
        self.trail: AuditLog = audit_folder.trail(rules, role=role)
        self._keeper = AuditMaintenance(self.trail, [kept])

    def write(self, count: int = 3) -> None:
        for number in range(1, count + 1):
            self.trail.append(record(number))
        self._keeper.round()

    def close(self) -> None:
        self.trail.close()
        self._keeper.round()


@pytest.fixture
def writer(audit_folder: AuditFolder, kept: AnchorPlace) -> Writer:
    """One whose line 4 is anchored."""
    made = Writer(audit_folder, kept)
    made.write()
    return made


def found(watch: AuditMonitor) -> list[str]:
    watch.round()
    return [problem.code for problem in watch.condition.anchors]


def verified(audit_folder: AuditFolder, kept: AnchorPlace) -> VerificationReport:
    return verify(audit_folder.folder, audit_folder.keys(), {"there": kept.lines()})


def by_anchors(audit_folder: AuditFolder, kept: AnchorPlace) -> list[str]:
    """What verification finds by anchors; a later chain saw the ends of earlier ones, too."""
    return [problem.code for problem in verified(audit_folder, kept).problems if problem.anchor]


class Copy:
    """A copy of the log, to be put back later."""

    def __init__(self, audit_folder: AuditFolder, name: str = "copy") -> None:
        self._place, self._copy = audit_folder, audit_folder.root / name
        shutil.copytree(audit_folder.folder, self._copy)

    def put_back(self) -> None:
        shutil.rmtree(self._place.folder, ignore_errors=True)
        shutil.copytree(self._copy, self._place.folder)


def older_put_back(audit_folder: AuditFolder, writer: Writer) -> None:
    """The chain goes on to line 9 and is closed; then the log ends at line 4 again."""
    older = Copy(audit_folder, "older")
    writer.write()
    writer.close()
    older.put_back()


# -- the same log ------------------------------------------------------------------------------------


def test_a_log_that_goes_on_through_many_files_agrees_with_its_anchors(
    audit_folder: AuditFolder, kept: AnchorPlace
) -> None:
    writer, watch = Writer(audit_folder, kept, audit_section(checkpoint_lines=4)), audit_folder.monitor(kept)
    writer.trail.rotate_bytes = 4096
    for _ in range(20):
        writer.write(5)
        assert found(watch) == []
    other = Writer(audit_folder, kept, role="worker")
    other.write()
    other.close()
    writer.close()

    assert len(audit_folder.files()) > 4
    assert (found(watch), watch.condition.not_compared, audit_ok(kept.name)) == ([], {}, 1)
    assert verified(audit_folder, kept).verdict == "intact"


# -- another log ---------------------------------------------------------------------------------------


def written_anew(file: Path, signing_key: Path) -> None:
    """The same number of lines, with all heads and signatures: by a hand that has a signing key."""
    head, lines, signer = chain.ZERO, [], Signer.at(signing_key)
    for line in file.read_bytes().splitlines():
        before, body = head, chain.body_of(line).replace(b"ada-2", b"eve-2")
        parts = chain.parts_of_signed(line)
        if parts is not None:
            claimed = chain.read(line)
            assert claimed is not None
            unsigned = parts[0].replace(claimed.previous.encode(), before.hex().encode())
            body = b'%b%b%b"' % (unsigned, chain.SIGNATURE, signer.sign(chain.LABEL + unsigned))
        sealed, head = chain.seal(before, body)
        lines.append(sealed)
    file.write_bytes(b"".join(lines))


def put_stub(file: Path, previous_opened: str) -> None:
    """In place of a chain a single line behind all of its lines, which takes no key to write.

    It says that all files before it were removed as they should be.
    """
    name = file.name.removesuffix(".jsonl").rpartition(".")[0]
    body = (
        f'{{"seq":1000000,"chain":"{name}","time":"2026-01-01T00:00:00.000000Z","kind":"open","version":1,'
        f'"segment":5,"reason":"continued","service":"x","public_key":"{"00" * 32}","previous":"{"00" * 32}",'
        f'"previous_opened":"{previous_opened}"'
    )
    file.unlink()
    file.with_name(f"{name}.0005.jsonl").write_bytes(chain.seal(chain.ZERO, body.encode())[0])


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else under the name of the file."""

    def put(file: Path) -> None:
        file.unlink()
        make(file)

    return put


TAMPERINGS: Final[dict[str, tuple[Callable[[Path], object], str, set[str]]]] = {
    "no file": (Path.unlink, "missing_chain", set()),
    "no folder": (lambda file: shutil.rmtree(file.parent), "missing_chain", set()),
    "fewer lines": (lambda file: rewrite(file, lambda lines: lines[:3]), "cut", set()),
    "other lines": (lambda file: written_anew(file, file.parent.parent / "signing.key"), "rewritten", set()),
    "other lines of another key": (  # heads fit, and signed lines name the trusted key
        lambda file: written_anew(file, file.parent.parent / "other.key"),
        "rewritten",
        {"bad_signature"},
    ),
    "a line of the end": (lambda file: put_stub(file, ""), "missing_chain", {"missing_file"}),
    "a line of the end that names a start": (
        lambda file: put_stub(file, "2020-01-01T00:00:00.000000Z"),
        "missing_chain",
        {"missing_file"},
    ),
    "a pipe": (instead(os.mkfifo), "missing_chain", set()),
    "a folder": (instead(Path.mkdir), "missing_chain", set()),
    "a loop": (instead(lambda file: file.symlink_to(file)), "missing_chain", set()),
    "no end": (instead(lambda file: file.symlink_to("/dev/zero")), "missing_chain", set()),
}
"""What is done to the file of a log, what anchors tell of it, and what is found without them."""


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_not_the_anchored_log_is_found(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer, name: str
) -> None:
    """While the service runs, by one that starts, and by verify; until the genuine log is back."""
    hand, code, others = TAMPERINGS[name]
    writer.close()
    (file,) = audit_folder.files()
    genuine, watch = Copy(audit_folder), audit_folder.monitor(kept)
    assert found(watch) == []
    hand(file)

    assert found(watch) == found(audit_folder.monitor(kept)) == by_anchors(audit_folder, kept) == [code]
    assert {*problem_codes(audit_folder.verified())} == others
    assert audit_ok(kept.name) == 0
    genuine.put_back()
    assert (found(watch), audit_ok(kept.name)) == ([], 1)
    hand(file)
    later = Writer(audit_folder, kept, role="worker")
    later.write()
    later.close()
    assert found(audit_folder.monitor(kept)) == by_anchors(audit_folder, kept) == [code]


def test_an_older_copy_is_told_with_the_lines_that_it_lacks(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer
) -> None:
    watch = audit_folder.monitor(kept)
    older_put_back(audit_folder, writer)

    assert found(watch) == ["cut"]
    (problem,) = watch.condition.anchors
    assert (problem.chain, problem.seq, problem.anchor_seq) == (chain_name(writer.trail), 5, 9)
    assert "the log ends at line 4" in problem.text
    report = verified(audit_folder, kept)
    assert (report.verdict, problem_codes(report)) == ("damaged", ["cut"])
    assert "the anchor in there names line 9" in report.problems[0].text


def test_a_line_in_place_of_a_chain_is_found_by_a_chain_that_saw_its_end(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer
) -> None:
    writer.close()
    other = Writer(audit_folder, kept, role="worker")
    other.write()
    put_stub(next(file for file in audit_folder.files() if file.name.startswith("api-")), "")

    assert "missing_chain" in problem_codes(audit_folder.verified())


# -- what is no other log -----------------------------------------------------------------------------


def retired(audit_folder: AuditFolder, kept: AnchorPlace) -> Writer:
    """An old chain that retention has removed, whose anchors stay; the process that did it still writes."""
    AuditMaintenance(audit_folder.aged(30), [kept]).round()
    writer = Writer(audit_folder, kept)
    writer.write()
    AuditMaintenance(writer.trail, keep_days=20).round()
    assert len(audit_folder.files()) == 1
    return writer


def test_chains_that_retention_removed_are_not_missed(audit_folder: AuditFolder, kept: AnchorPlace) -> None:
    """The first look reads a MiB of each file; a removal far above its end is known, too."""
    writer = retired(audit_folder, kept)
    assert found(audit_folder.monitor(kept)) == []
    assert verified(audit_folder, kept).verdict == "intact"
    writer.write(5_000)
    watch = audit_folder.monitor(kept)

    assert found(watch) == []
    assert watch.condition.lines < 5_000


def test_a_removal_that_nobody_signed_excuses_nothing(audit_folder: AuditFolder, kept: AnchorPlace) -> None:
    """Whoever has no signing key can append a line to the end of a chain, and no checkpoint after it."""
    victim = Writer(audit_folder, kept, role="worker")
    victim.write()
    victim.close()
    audit_folder.files()[0].unlink()
    log = audit_folder.trail()
    log.append(record(1))
    (file,) = audit_folder.files()
    end = file.read_bytes().splitlines()[-1]
    head = chain.claimed_head(end)
    assert head is not None
    begin = chain.body_of(end).partition(b'"operation"')[0].replace(b'"seq":1', b'"seq":2')
    line, _ = chain.seal(head, begin + b'"kind":"retired","before":"2999-01-01T00:00:00.000000Z","files":1')
    file.write_bytes(file.read_bytes() + line)

    assert found(audit_folder.monitor(kept)) == ["missing_chain"]
    assert "missing_chain" in problem_codes(verified(audit_folder, kept))


def test_a_removal_before_a_copied_checkpoint_is_not_signed_by_it(audit_folder: AuditFolder) -> None:
    """A signature stands for the lines before it, not for whatever was put there."""
    log = audit_folder.trail()
    log.append(record(1))
    log.record_removal("2026-01-01T00:00:00.000000Z", 1)
    log.close()
    (file,) = audit_folder.files()
    lines = file.read_bytes().splitlines(keepends=True)
    assert removal_horizon(audit_folder.folder, audit_folder.keys()) == "2026-01-01T00:00:00.000000Z"
    before = chain.claimed_head(lines[1].rstrip())
    assert before is not None
    forged, _ = chain.seal(before, chain.body_of(lines[2]).replace(b'"before":"2026', b'"before":"2999'))
    file.write_bytes(b"".join([*lines[:2], forged, *lines[3:]]))

    assert removal_horizon(audit_folder.folder, audit_folder.keys()) == ""


def test_anchors_of_another_install_are_not_held_against_this_log(
    audit_folder: AuditFolder, kept: AnchorPlace
) -> None:
    (audit_folder.root / "other").mkdir()
    Writer(AuditFolder(audit_folder.root / "other"), kept).write()
    Writer(audit_folder, kept).write()

    assert found(audit_folder.monitor(kept)) == []
    assert verified(audit_folder, kept).verdict == "intact"


@pytest.mark.parametrize(
    "forge",
    [
        lambda line: line.replace(b'"seq":4,', b'"seq":400,'),
        lambda line: line[:-67] + b"0" * 64 + line[-3:],
    ],
    ids=["number", "head"],
)
def test_forged_anchors_count_for_nothing_and_hide_none(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer, forge: Callable[[bytes], bytes]
) -> None:
    """The head of a line stands behind its signature, not under it."""
    genuine = writer.trail.last_signed
    forged = forge(genuine)
    assert (forged != genuine, forged.startswith(b'{"seq":4'), forged[-3:]) == (True, True, b'"}\n')
    watch = audit_folder.monitor(kept)
    kept.put(forged)
    assert found(watch) == problem_codes(verified(audit_folder, kept)) == []
    older_put_back(audit_folder, writer)

    assert found(watch) == problem_codes(verified(audit_folder, kept)) == ["cut"]


# -- a loss on record --------------------------------------------------------------------------------


@contextmanager
def acknowledging(audit_folder: AuditFolder, writer: Writer, first: int, last: int) -> Iterator[None]:
    """The loss of lines of a chain is on record, and signed afterwards."""
    log = audit_folder.trail(role="cli")
    effect = f"{anchors.effect_of(chain_name(writer.trail), first, last)}-1f"
    with audit.effect(log, Principal("root"), anchors.ACKNOWLEDGED, effect):
        pass
    yield
    log.close()


def acknowledge(audit_folder: AuditFolder, writer: Writer, first: int, last: int) -> None:
    with acknowledging(audit_folder, writer, first, last):
        pass


def test_a_loss_on_record_is_a_note(audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer) -> None:
    older_put_back(audit_folder, writer)
    watch = audit_folder.monitor(kept)
    acknowledge(audit_folder, writer, 0, 8)
    assert found(watch) == ["cut"], "line 9 is not among those"
    with acknowledging(audit_folder, writer, 0, 9):
        assert found(watch) == problem_codes(verified(audit_folder, kept)) == ["cut"], (
            "nobody has signed the record"
        )

    assert found(watch) == found(audit_folder.monitor(kept)) == []
    report = verified(audit_folder, kept)
    assert (report.verdict, problem_codes(report)) == ("intact", [])
    assert "acknowledged" in notes(report)


def test_a_larger_loss_than_the_one_on_record_is_told_again(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer
) -> None:
    """The record names lines 5 to 9; then line 3 and 4 are lost as well."""
    older_put_back(audit_folder, writer)
    acknowledge(audit_folder, writer, 5, 9)
    watch = audit_folder.monitor(kept)
    assert found(watch) == []
    assert verified(audit_folder, kept).verdict == "intact"
    file = next(file for file in audit_folder.files() if file.name.startswith("api-"))
    rewrite(file, lambda lines: lines[:3])

    assert found(watch) == found(audit_folder.monitor(kept)) == by_anchors(audit_folder, kept) == ["cut"]
    acknowledge(audit_folder, writer, 3, 9)
    assert found(watch) == found(audit_folder.monitor(kept)) == by_anchors(audit_folder, kept) == []
    file.unlink()
    assert found(watch) == by_anchors(audit_folder, kept) == ["missing_chain"]


def test_losses_on_record_add_up() -> None:
    """A number has at most 19 digits."""

    def lost(*effects: str, stage: str = "outcome") -> anchors.Losses:
        operation = anchors.ACKNOWLEDGED
        return anchors.acknowledged(
            chain.ChainLine(seq=0, chain="cli", time="", operation=operation, stage=stage, effect=each)
            for each in effects
        )

    junk = ("a:x-1-1f", "a:9-y-1f", "a:9-1", "a", f"a:{'9' * 5_000}-0-1f", f"a:{'9' * 20}-0-1f")
    assert lost("a:9-6-1f", "b:4-0-1f", *junk, "a:9-3-1f", "a:7-5-1f") == {"a": (3, 9), "b": (0, 4)}
    assert lost("a:9-6-1f", stage="intent") == {}
    assert lost(f"a:{'9' * 19}-0-1f") == {"a": (0, int("9" * 19))}


def test_lines_written_anew_are_no_loss_that_can_be_acknowledged(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer
) -> None:
    writer.close()
    written_anew(audit_folder.files()[0], audit_folder.signing_key)
    acknowledge(audit_folder, writer, 0, 100)

    assert found(audit_folder.monitor(kept)) == problem_codes(verified(audit_folder, kept)) == ["rewritten"]


# -- anchors that are away, or older ------------------------------------------------------------------


def test_a_place_that_cannot_be_read_is_said_and_compared_when_it_is_back(audit_folder: AuditFolder) -> None:
    kept = FolderSink(audit_folder.root / "anchors")
    writer = Writer(audit_folder, kept)
    writer.write()
    older_put_back(audit_folder, writer)
    (audit_folder.root / "anchors").rename(audit_folder.root / "elsewhere")
    watch = audit_folder.monitor(kept)

    assert found(watch) == []
    assert "mount or create it" in watch.condition.not_compared["directory"]
    assert math.isnan(audit_ok(kept.name))
    (audit_folder.root / "elsewhere").rename(audit_folder.root / "anchors")
    assert found(watch) == ["cut"]
    assert watch.condition.not_compared == {}
    assert audit_ok(kept.name) == 0


def test_redis_that_does_not_answer_is_said(audit_folder: AuditFolder) -> None:
    kept = RedisSink(redis.Redis.from_url("unix:///nonexistent/valkey.sock"))
    audit_folder.written(3)
    watch = audit_folder.monitor(kept)

    assert found(watch) == []
    assert watch.condition.not_compared == {"redis": "Redis does not answer"}
    assert math.isnan(audit_ok(kept.name))


def emptied(audit_folder: AuditFolder, url: str) -> None:
    redis.Redis.from_url(url).delete(ANCHORS)
    shutil.rmtree(audit_folder.root / "anchors", ignore_errors=True)
    (audit_folder.root / "anchors").mkdir()


def test_anchors_that_were_removed_while_the_service_runs_are_missed(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer, redis_url: str
) -> None:
    watch = audit_folder.monitor(kept)
    assert found(watch) == []
    emptied(audit_folder, redis_url)
    assert found(watch) == ["anchors_lost"]
    writer.write()

    assert found(watch) == ["anchors_lost"], "new ones do not bring back the old ones"


def test_the_last_seconds_that_a_failover_loses_are_no_alarm_and_more_is(
    audit_folder: AuditFolder, redis_url: str
) -> None:
    client = redis.Redis.from_url(redis_url)
    kept = RedisSink(client)
    writer, watch = Writer(audit_folder, kept), audit_folder.monitor(kept)
    for _ in range(3):
        writer.write()
        assert found(watch) == []
    entries = cast("list[tuple[bytes, object]]", client.xrange(ANCHORS))
    ids = [name for name, _ in entries]
    client.xdel(ANCHORS, ids[-1])
    writer.write()
    assert found(watch) == []

    client.xdel(ANCHORS, *ids)
    assert found(watch) == ["anchors_lost"]


def test_without_anchors_only_a_young_log_counts_as_compared(
    audit_folder: AuditFolder, kept: AnchorPlace, redis_url: str
) -> None:
    """The first anchor follows the first checkpoint."""
    emptied(audit_folder, redis_url)
    audit_folder.written(3)
    watch = audit_folder.monitor(kept)
    assert (found(watch), watch.condition.not_compared, audit_ok(kept.name)) == ([], {}, 1)
    audit_folder.aged(1)

    assert (found(watch), list(watch.condition.not_compared)) == ([], [kept.name])
    report = verified(audit_folder, kept)
    assert (report.verdict, list(report.not_compared)) == ("not compared", ["there"])


def test_a_log_without_calls_has_an_anchor_once_a_service_begins_its_chain(
    audit_folder: AuditFolder, kept: AnchorPlace, redis_url: str
) -> None:
    """A command recorded a change while no place was there; an hour passed since the service began."""
    emptied(audit_folder, redis_url)
    audit_folder.aged(1)
    watch = audit_folder.monitor(kept)
    with capture_logs() as said:
        assert (found(watch), list(watch.condition.not_compared)) == ([], [kept.name])
        keeper = AuditMaintenance(audit_folder.trail(clock=hours_ago(1)), [kept])
        keeper.begun = watch.wake
        keeper.round()
        assert (found(watch), watch.condition.not_compared, audit_ok(kept.name)) == ([], {}, 1)

    events = [(each["event"], each["place"]) for each in said if "place" in each]
    assert events == [("audit.anchors_away", kept.name), ("audit.anchors_back", kept.name)]
    assert "no anchor of this log" in next(each["reason"] for each in said if "reason" in each)
    (begun,) = kept.lines()
    keeper.round()
    assert kept.lines() == [begun], "once"


# -- at what cost ------------------------------------------------------------------------------------


def test_an_anchor_is_compared_with_its_line_once(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is looked for in a file unless it is the last signed one, which the look has read."""
    searched: list[int] = []
    genuine = segments.line_of

    def counted(path: Path, seq: int) -> bytes | None:
        searched.append(seq)
        return genuine(path, seq)

    monkeypatch.setattr(segments, "line_of", counted)
    writer.trail.append(record(4))
    writer.trail.checkpoint_if_due()  # not anchored yet
    watch = audit_folder.monitor(kept)
    for _ in range(5):
        assert found(watch) == []
    writer.write()
    assert found(watch) == []

    assert searched == [4]


def test_a_line_that_only_looks_like_that_of_an_anchor_is_none(
    audit_folder: AuditFolder, kept: AnchorPlace, writer: Writer
) -> None:
    """The log was written anew, and its last signed line is later than the anchor."""
    writer.trail.append(record(4))
    writer.trail.close()
    written_anew(audit_folder.files()[0], audit_folder.signing_key)

    assert found(audit_folder.monitor(kept)) == ["rewritten"]


def test_only_the_newest_anchors_of_a_stream_are_read_at_first(
    audit_folder: AuditFolder, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors, "_FIRST_READ", 2)
    kept = RedisSink(redis.Redis.from_url(redis_url))
    writer = Writer(audit_folder, kept)
    for _ in range(4):
        writer.write()
    older_put_back(audit_folder, writer)

    assert found(audit_folder.monitor(kept)) == ["cut"]


def test_an_older_anchor_behind_a_newer_one_in_a_stream_does_not_hide_it(
    audit_folder: AuditFolder, redis_url: str
) -> None:
    kept = RedisSink(redis.Redis.from_url(redis_url))
    writer = Writer(audit_folder, kept)
    writer.write()
    older_put_back(audit_folder, writer)
    kept.put(kept.lines()[0] + b"\n")

    assert found(audit_folder.monitor(kept)) == ["cut"]
