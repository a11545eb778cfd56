"""A log that is older than its anchors is found: while it is written, at the next start, and by verify."""

import math
import os
import shutil
import time
from pathlib import Path
from typing import Final, cast

import pytest
import redis
from prometheus_client import REGISTRY

from kms_core import audit
from kms_core.audit import AuditLog, chain, maintenance, segments
from kms_core.audit.keys import Signer
from kms_core.audit.maintenance import ANCHORS, AuditMaintenance, FolderSink, RedisSink
from kms_core.audit.verification import anchors
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import AuditMonitor, verify
from kms_core.auth.policy import Principal
from kms_core.settings.model import AuditSection
from support.audit_logs import Place, audit_section, chain_name, codes, notes, record

EAGER: Final = audit_section(checkpoint_s=0)
DAY_NS: Final = 24 * 3600 * 1_000_000_000
AnchorPlace = RedisSink | FolderSink
KINDS: Final = ("directory", "redis")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, place: Place) -> AnchorPlace:
    """Where anchors are."""
    if request.param == "directory":
        return FolderSink(place.at / "anchors")
    return RedisSink(redis.Redis.from_url(request.getfixturevalue("redis_url")))


class Writer:
    """A process that writes a log and anchors it at once."""

    def __init__(
        self, place: Place, kept: AnchorPlace, rules: AuditSection = EAGER, role: str = "api"
    ) -> None:
        self.trail: AuditLog = place.trail(rules, role=role)
        self._keeper = AuditMaintenance(self.trail, [kept])

    def write(self, count: int = 3) -> None:
        for number in range(1, count + 1):
            self.trail.append(record(number))
        self._keeper.round()

    def close(self) -> None:
        self.trail.close()
        self._keeper.round()


@pytest.fixture
def writer(place: Place, kept: AnchorPlace) -> Writer:
    made = Writer(place, kept)
    made.write()
    return made


def watching(place: Place, *kept: AnchorPlace) -> AuditMonitor:
    return AuditMonitor(place.folder, place.signing_key, kept)


def found(watch: AuditMonitor) -> list[str]:
    watch.round()
    return [problem.code for problem in watch.condition.anchors]


def verified(place: Place, kept: AnchorPlace) -> VerificationReport:
    return verify(place.folder, place.keys(), {"there": kept.lines()})


def ok(kept: AnchorPlace) -> float:
    value = REGISTRY.get_sample_value("kms_audit_ok", {"what": kept.name})
    assert value is not None
    return value


class Older:
    """A copy of the log, to be put back later."""

    def __init__(self, place: Place) -> None:
        self._place, self._copy = place, place.at / "copy"
        shutil.copytree(place.folder, self._copy)

    def put_back(self) -> None:
        shutil.rmtree(self._place.folder)
        shutil.copytree(self._copy, self._place.folder)


# -- the same log ------------------------------------------------------------------------------------


def test_a_log_that_goes_on_agrees_with_its_anchors(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    watch = watching(place, kept)
    for _ in range(3):
        assert found(watch) == []
        writer.write()
    other = Writer(place, kept, role="worker")
    other.write()
    other.close()

    assert found(watch) == []
    assert watch.condition.not_compared == {}
    assert ok(kept) == 1
    assert verified(place, kept).verdict == "intact"


def test_one_checkpoint_after_another_through_many_files(place: Place, kept: AnchorPlace) -> None:
    writer = Writer(place, kept, audit_section(checkpoint_lines=4))
    writer.trail.rotate_bytes = 4096
    watch = watching(place, kept)
    for _ in range(20):
        writer.write(5)
        assert found(watch) == []
    writer.close()

    assert len(place.files()) > 3
    assert (found(watch), verified(place, kept).verdict) == ([], "intact")


# -- older copies ------------------------------------------------------------------------------------


def test_an_older_copy_is_found_while_the_service_runs(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    watch = watching(place, kept)
    older = Older(place)
    writer.write()
    writer.close()
    assert found(watch) == []

    older.put_back()
    assert found(watch) == ["cut"]
    (problem,) = watch.condition.anchors
    assert (problem.chain, problem.seq, problem.anchor_seq) == (chain_name(writer.trail), 5, 9)
    assert "the log ends at line 4" in problem.text
    assert ok(kept) == 0


def test_an_older_copy_is_found_at_the_next_start(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    older = Older(place)
    writer.write()
    writer.close()
    older.put_back()
    Writer(place, kept, role="worker").write()

    assert found(watching(place, kept)) == ["cut"]
    report = verified(place, kept)
    assert (report.verdict, codes(report)) == ("damaged", ["cut"])
    assert "the anchor in there names line 9" in report.problems[0].text
    assert place.verified().problems == [], "without anchors nothing contradicts"


def test_a_chain_that_is_gone_is_found(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    older = Older(place)
    later = Writer(place, kept, role="worker")
    later.write()
    later.close()
    writer.close()
    watch = watching(place, kept)
    assert found(watch) == []
    older.put_back()

    assert sorted(found(watch)) == sorted(found(watching(place, kept))) == ["cut", "missing_chain"]
    assert sorted(codes(verified(place, kept))) == ["cut", "missing_chain"]


def test_a_log_that_is_gone_altogether_is_found(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    writer.close()
    shutil.rmtree(place.folder)

    assert found(watching(place, kept)) == ["missing_chain"]
    assert codes(verified(place, kept)) == ["missing_chain"]


def test_the_newer_copy_put_back_ends_it(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    writer.close()
    newer = Older(place)
    watch = watching(place, kept)
    place.files()[0].unlink()
    assert found(watch) == ["missing_chain"]
    newer.put_back()

    assert found(watch) == []
    assert ok(kept) == 1


def written_anew(file: Path, signer: Signer) -> None:
    """The same number of lines, with all heads and signatures: by a hand that has the signing key."""
    head, lines = chain.ZERO, []
    for line in file.read_bytes().splitlines():
        before, body = head, chain.body_of(line).replace(b"ada-2", b"eve-2")
        parts = chain.parts_of_signed(line)
        if parts is not None:
            claimed = chain.read(line)
            assert claimed is not None
            unsigned = parts[0].replace(claimed.previous.encode(), before.hex().encode())
            body = b'%b%b%b"' % (unsigned, chain.SIGNATURE, signer.sign(chain.text_to_sign(unsigned)))
        sealed, head = chain.seal(before, body)
        lines.append(sealed)
    file.write_bytes(b"".join(lines))


def test_a_chain_written_anew_with_the_same_length_is_found(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    writer.close()
    written_anew(place.files()[0], Signer.at(place.signing_key))

    assert place.verified().verdict == "intact", "without anchors it is"
    assert found(watching(place, kept)) == ["rewritten"]
    assert codes(verified(place, kept)) == ["rewritten"]


def test_a_chain_written_anew_with_another_key_is_found_without_anchors(place: Place, writer: Writer) -> None:
    """Heads fit, and signed lines name the trusted key."""
    writer.close()
    written_anew(place.files()[0], Signer.at(place.at / "other.key"))

    assert set(codes(place.verified())) == {"bad_signature"}


def put_stub(file: Path, previous_opened: str) -> None:
    """In place of a chain a single line behind all of its lines, which takes no key to write."""
    name = file.name.removesuffix(".jsonl").rpartition(".")[0]
    body = (
        f'{{"seq":1000000,"chain":"{name}","time":"2026-01-01T00:00:00.000000Z","kind":"open","version":1,'
        f'"segment":5,"reason":"continued","service":"x","public_key":"{"00" * 32}","previous":"{"00" * 32}",'
        f'"previous_opened":"{previous_opened}"'
    )
    file.unlink()
    file.with_name(f"{name}.0005.jsonl").write_bytes(chain.seal(chain.ZERO, body.encode())[0])


@pytest.mark.parametrize("previous_opened", ["", "2020-01-01T00:00:00.000000Z"])
def test_a_line_in_place_of_a_whole_chain_is_found(
    place: Place, kept: AnchorPlace, writer: Writer, previous_opened: str
) -> None:
    """It says that all files before it were removed as they should be."""
    writer.close()
    put_stub(place.files()[0], previous_opened)
    other = Writer(place, kept, role="worker")
    other.write()
    other.close()

    assert found(watching(place, kept)) == ["missing_chain"]
    assert set(codes(verified(place, kept))) >= {"missing_file", "missing_chain"}


def test_a_line_in_place_of_a_chain_is_found_by_a_chain_that_saw_its_end(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    writer.close()
    other = Writer(place, kept, role="worker")
    other.write()
    put_stub(next(file for file in place.files() if file.name.startswith("api-")), "")

    assert "missing_chain" in codes(verify(place.folder, place.keys(), {}))


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "endless"])
def test_what_is_no_file_keeps_nobody_from_looking(
    place: Place, kept: AnchorPlace, writer: Writer, kind: str
) -> None:
    """A pipe in place of a file hung the service; a folder there hid that others were missing."""
    writer.close()
    watch = watching(place, kept)
    assert found(watch) == []
    file = place.files()[0]
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file if kind == "loop" else "/dev/zero")

    assert found(watch) == ["missing_chain"]
    assert codes(verified(place, kept)) == ["missing_chain"]
    assert segments.chain_heads(place.folder, place.keys(), but="") == {}


# -- what is no older copy ----------------------------------------------------------------------------


def retired(place: Place, kept: AnchorPlace) -> Writer:
    """An old chain that retention has removed, whose anchors stay; the process that did it still writes."""
    at = time.time_ns() - 30 * DAY_NS
    old = place.trail(clock=lambda: at)
    old.append(record(1))
    old.close()
    AuditMaintenance(old, [kept]).round()
    writer = Writer(place, kept)
    writer.write()
    AuditMaintenance(writer.trail, keep_days=20).round()
    assert len(place.files()) == 1
    return writer


def test_chains_that_retention_removed_are_not_missed(place: Place, kept: AnchorPlace) -> None:
    retired(place, kept)

    assert found(watching(place, kept)) == []
    assert verified(place, kept).verdict == "intact"


def test_a_removal_far_above_the_end_of_a_file_is_known(place: Place, kept: AnchorPlace) -> None:
    """The first look reads a MiB of each file."""
    writer = retired(place, kept)
    writer.write(5_000)
    watch = watching(place, kept)

    assert found(watch) == []
    assert watch.condition.lines < 5_000


def test_a_removal_that_nobody_signed_excuses_nothing(place: Place, kept: AnchorPlace) -> None:
    """Whoever has no signing key can append a line to the end of a chain, and no checkpoint after it."""
    victim = Writer(place, kept, role="worker")
    victim.write()
    victim.close()
    taken = place.files()[0]
    last = place.trail()
    last.append(record(1))
    file = place.files()[0]
    lines = file.read_bytes().splitlines()
    body = chain.body_of(lines[-1])
    found_ = chain.read(lines[-1])
    assert found_ is not None
    begin = body.partition(b'"operation"')[0].replace(b'"seq":1', b'"seq":2')
    forged = begin + b'"kind":"retired","before":"2999-01-01T00:00:00.000000Z","files":1'
    line, _ = chain.seal(bytes.fromhex(found_.head), forged)
    file.write_bytes(file.read_bytes() + line)
    taken.unlink()

    assert found(watching(place, kept)) == ["missing_chain"]
    assert "missing_chain" in codes(verified(place, kept))


def test_a_removal_before_a_copied_checkpoint_is_not_signed_by_it(place: Place) -> None:
    """A signature stands for the lines before it, not for whatever was put there."""
    log = place.trail()
    log.append(record(1))
    log.record_removal("2026-01-01T00:00:00.000000Z", 1)
    log.close()
    file = place.files()[0]
    lines = file.read_bytes().splitlines()
    assert maintenance.removal_horizon(place.folder, place.keys()) == "2026-01-01T00:00:00.000000Z"
    before = chain.claimed_head(lines[1])
    assert before is not None
    forged, _ = chain.seal(before, chain.body_of(lines[2]).replace(b'"before":"2026', b'"before":"2999'))
    file.write_bytes(b"\n".join([*lines[:2], forged.rstrip(b"\n"), *lines[3:], b""]))

    assert maintenance.removal_horizon(place.folder, place.keys()) == ""


def test_anchors_of_another_install_are_not_held_against_this_log(
    place: Place, kept: AnchorPlace, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    Writer(Place(tmp_path / "other"), kept).write()
    Writer(place, kept).write()

    assert found(watching(place, kept)) == []
    assert verified(place, kept).verdict == "intact"


def test_forged_anchors_count_for_nothing_and_hide_none(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    genuine = writer.trail.last_signed
    forged = genuine.replace(b'"seq":4,', b'"seq":400,')
    assert forged != genuine
    watch = watching(place, kept)
    kept.put(forged)
    assert found(watch) == []
    older = Older(place)
    writer.write()
    writer.close()
    older.put_back()

    assert found(watch) == ["cut"]
    assert codes(verified(place, kept)) == ["cut"]


# -- a loss on record --------------------------------------------------------------------------------


def acknowledge(place: Place, name: str, seq: int, first: int = 0) -> None:
    log = place.trail(role="cli")
    with audit.effect(
        log, Principal("root"), anchors.ACKNOWLEDGED, f"{anchors.effect_of(name, first, seq)}-1f"
    ):
        pass
    log.close()


def test_a_loss_on_record_is_a_note(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    older = Older(place)
    writer.write()
    writer.close()
    older.put_back()
    watch = watching(place, kept)
    assert found(watch) == ["cut"]

    acknowledge(place, chain_name(writer.trail), 8)
    assert found(watch) == ["cut"], "line 9 is not among those"
    acknowledge(place, chain_name(writer.trail), 9)
    assert found(watch) == found(watching(place, kept)) == []
    report = verified(place, kept)
    assert (report.verdict, codes(report)) == ("intact", [])
    assert "acknowledged" in notes(report)


def test_a_larger_loss_than_the_one_on_record_is_told_again(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    """The record names lines 5 to 9; then line 3 and 4 are lost as well."""
    older = Older(place)
    writer.write()
    writer.close()
    older.put_back()
    acknowledge(place, chain_name(writer.trail), 9, first=5)
    watch = watching(place, kept)
    assert found(watch) == []
    assert verified(place, kept).verdict == "intact"
    file = next(file for file in place.files() if file.name.startswith("api-"))
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))

    assert found(watch) == found(watching(place, kept)) == by_anchors(place, kept) == ["cut"]
    acknowledge(place, chain_name(writer.trail), 9, first=3)
    assert found(watch) == found(watching(place, kept)) == by_anchors(place, kept) == []
    file.unlink()
    assert found(watch) == by_anchors(place, kept) == ["missing_chain"]


def by_anchors(place: Place, kept: AnchorPlace) -> list[str]:
    """What verification finds by anchors; the chain of the record saw line 4, too."""
    return [problem.code for problem in verified(place, kept).problems if problem.anchor]


def test_losses_on_record_add_up() -> None:
    def lines(*effects: str, stage: str = "outcome") -> list[chain.ChainLine]:
        return [
            chain.ChainLine(
                seq=0, chain="cli", time="", operation=anchors.ACKNOWLEDGED, stage=stage, effect=each
            )
            for each in effects
        ]

    effects = ("a:9-6-1f", "b:4-0-1f", "a:x-1-1f", "a:9-y-1f", "a:9-1", "a", "a:9-3-1f", "a:7-5-1f")
    assert anchors.acknowledged(lines(*effects)) == {"a": (3, 9), "b": (0, 4)}
    assert anchors.acknowledged(lines("a:9-6-1f", stage="intent")) == {}


def test_lines_written_anew_are_no_loss_that_can_be_acknowledged(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    writer.close()
    written_anew(place.files()[0], Signer.at(place.signing_key))
    acknowledge(place, chain_name(writer.trail), 100)

    assert found(watching(place, kept)) == ["rewritten"]
    assert codes(verified(place, kept)) == ["rewritten"]


def test_a_loss_counts_once_its_record_is_signed(place: Place, kept: AnchorPlace, writer: Writer) -> None:
    older = Older(place)
    writer.write()
    writer.close()
    older.put_back()
    watch = watching(place, kept)
    log = place.trail(role="cli")
    name = f"{anchors.effect_of(chain_name(writer.trail), 5, 9)}-1f"
    with audit.effect(log, Principal("root"), anchors.ACKNOWLEDGED, name):
        pass
    assert found(watch) == ["cut"]
    assert codes(verified(place, kept)) == ["cut"]
    log.close()

    assert found(watch) == []


# -- anchors that are away, or older ------------------------------------------------------------------


def test_a_place_that_cannot_be_read_is_said_and_compared_when_it_is_back(place: Place) -> None:
    kept = FolderSink(place.at / "anchors")
    writer = Writer(place, kept)
    writer.write()
    older = Older(place)
    writer.write()
    writer.close()
    older.put_back()
    (place.at / "anchors").rename(place.at / "elsewhere")
    watch = watching(place, kept)

    assert found(watch) == []
    assert "mount or create it" in watch.condition.not_compared["directory"]
    assert math.isnan(ok(kept))
    (place.at / "elsewhere").rename(place.at / "anchors")
    assert found(watch) == ["cut"]
    assert watch.condition.not_compared == {}
    assert ok(kept) == 0


def test_redis_that_does_not_answer_is_said(place: Place) -> None:
    kept = RedisSink(redis.Redis.from_url("unix:///nonexistent/valkey.sock"))
    place.written(3)
    watch = watching(place, kept)

    assert found(watch) == []
    assert watch.condition.not_compared == {"redis": "Redis does not answer"}
    assert math.isnan(ok(kept))


def emptied(place: Place, url: str) -> None:
    redis.Redis.from_url(url).delete(ANCHORS)
    shutil.rmtree(place.at / "anchors", ignore_errors=True)
    (place.at / "anchors").mkdir()


def test_anchors_that_were_removed_while_the_service_runs_are_missed(
    place: Place, kept: AnchorPlace, writer: Writer, redis_url: str
) -> None:
    watch = watching(place, kept)
    assert found(watch) == []
    emptied(place, redis_url)
    assert found(watch) == ["anchors_lost"]
    writer.write()

    assert found(watch) == ["anchors_lost"], "new ones do not bring back the old ones"


def test_the_last_seconds_that_a_failover_loses_are_no_alarm_and_more_is(
    place: Place, redis_url: str
) -> None:
    client = redis.Redis.from_url(redis_url)
    kept = RedisSink(client)
    writer, watch = Writer(place, kept), watching(place, kept)
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


def test_a_place_without_anchors_of_a_signed_log_is_not_compared(
    place: Place, kept: AnchorPlace, redis_url: str
) -> None:
    at = time.time_ns() - DAY_NS
    log = place.trail(clock=lambda: at)
    log.append(record(1))
    log.close()
    emptied(place, redis_url)
    watch = watching(place, kept)

    assert found(watch) == []
    assert list(watch.condition.not_compared) == [kept.name]
    report = verified(place, kept)
    assert (report.verdict, list(report.not_compared)) == ("not compared", ["there"])


def test_a_young_log_without_anchors_is_compared(place: Place, kept: AnchorPlace, redis_url: str) -> None:
    """The first anchor follows the first checkpoint."""
    emptied(place, redis_url)
    place.written(3)
    watch = watching(place, kept)

    assert found(watch) == []
    assert (watch.condition.not_compared, ok(kept)) == ({}, 1)


def test_an_end_that_has_no_anchor_is_noted(place: Place, kept: AnchorPlace) -> None:
    Writer(place, kept).write()
    place.written(3)

    assert "not_anchored" in notes(verified(place, kept))


def test_anchors_older_than_the_log_are_no_contradiction(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    """They are written after it; what came since is not proven by them."""
    for number in range(5):
        writer.trail.append(record(number))

    assert found(watching(place, kept)) == []
    assert verified(place, kept).problems == []


# -- at what cost ------------------------------------------------------------------------------------


def test_an_anchor_is_compared_with_its_line_once(
    place: Place, kept: AnchorPlace, writer: Writer, monkeypatch: pytest.MonkeyPatch
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
    watch = watching(place, kept)
    for _ in range(5):
        assert found(watch) == []
    writer.write()
    assert found(watch) == []

    assert searched == [4]


def test_a_line_that_only_looks_like_that_of_an_anchor_is_none(
    place: Place, kept: AnchorPlace, writer: Writer
) -> None:
    """The log was written anew, and its last signed line is later than the anchor."""
    writer.trail.append(record(4))
    writer.close()
    kept_lines = kept.lines()
    written_anew(place.files()[0], Signer.at(place.signing_key))
    other = FolderSink(place.at / "first only")
    other.put(kept_lines[0] + b"\n")

    assert found(watching(place, other)) == ["rewritten"]


def test_only_the_newest_anchors_of_a_stream_are_read_at_first(
    place: Place, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors, "_FIRST_READ", 2)
    kept = RedisSink(redis.Redis.from_url(redis_url))
    writer = Writer(place, kept)
    for _ in range(4):
        writer.write()
    older = Older(place)
    for _ in range(4):
        writer.write()
    writer.close()
    older.put_back()

    assert found(watching(place, kept)) == ["cut"]
