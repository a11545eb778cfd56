"""The id of an install, the proof of a shared spool, and clocks: two hosts in one process, over one Redis."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import cast

import msgspec
import pytest
import redis

from kms_core.jobs.execution import attendance
from kms_core.jobs.execution.attendance import Attendance
from kms_core.jobs.hosts import notes as notes_module
from kms_core.jobs.hosts.install import Facts, Install, InstallCondition, InstallWatch
from kms_core.jobs.hosts.notes import LIVE_S, Host, HostNote, HostNotes, SpoolMarks
from kms_core.jobs.storage.blob_store import SpoolNote
from kms_core.jobs.storage.spool_folder import DiskSync, SpoolFolder
from kms_protocol.errors import ConfigurationError, JobsUnavailable, SpoolFull, SpoolUnavailable, WrongInstall
from support.embedded_valkey import EmbeddedValkey

AWAY = "unix:///nonexistent/valkey.sock"
JOBS = {"0192f0c1-7a3e-4c55-9d0a-1f2e3d4c5b6a": 1.0}


@dataclass
class Machine:
    """One host: a spool of its own or of another, its clock, and the time since its start."""

    url: str
    spool: Path
    name: str
    ahead_s: float = 0.0
    passed_s: float = 0.0
    key_place: str = ""

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def process(self) -> Install:
        self.spool.mkdir(exist_ok=True)
        marks = SpoolMarks(SpoolFolder(self.spool, DiskSync(self.spool)))
        notes = HostNotes(self.redis, lambda: time.time() + self.ahead_s)
        facts = Facts({"orders": self.key_place} if self.key_place else {}, {"spool key": "1"})
        return Install(
            notes,
            marks,
            Host(self.name, f"host-{self.name}"),
            lambda: facts,
            lambda: self.passed_s,
        )

    def started(self) -> Install:
        found = self.process()
        found.begin()
        found.round()
        return found

    def round_at(self, passed_s: float, install: Install) -> None:
        """A round of a process of this host, so long after its start."""
        self.passed_s = passed_s
        install.round()


def degraded_parts(found: InstallCondition) -> list[str]:
    return [name for name, is_degraded in found.states.items() if is_degraded]


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


@pytest.fixture
def machine(tmp_path: Path, redis_url: str) -> Callable[..., Machine]:
    def make(name: str, spool: str = "spool", **more: float | str) -> Machine:
        return Machine(redis_url, tmp_path / spool, name, **more)  # type: ignore[arg-type]  # by name

    return make


Make = Callable[..., Machine]


def write_id(spool: Path, install_id: bytes) -> None:
    (spool / "hosts").mkdir(parents=True, exist_ok=True)
    (spool / "hosts/install").write_bytes(install_id)


def write_notes(client: redis.Redis, *notes: HostNote) -> None:
    """The notes of other hosts, written now."""
    now = {note.id: msgspec.structs.replace(note, seen=time.time()) for note in notes}
    client.hset("kms:hosts", mapping={each: msgspec.json.encode(note) for each, note in now.items()})


def keep_serving(monkeypatch: pytest.MonkeyPatch, *others: Install) -> None:
    """Other hosts go on with their rounds while one waits for them."""

    def pause(seconds: float) -> None:
        assert seconds < 1
        for other in others:
            other.round()

    monkeypatch.setattr(time, "sleep", pause)


# -- the id ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [{}, JOBS], ids=["empty", "jobs-of-an-earlier-version"])
def test_first_start_makes_one_id_in_both_places(
    machine: Make, client: redis.Redis, tmp_path: Path, jobs: dict[str, float]
) -> None:
    if jobs:
        client.zadd("kms:open", jobs)
    found, mark = machine("a").started().condition, tmp_path / "spool/hosts/install"
    assert len(found.install_id) == 32
    assert client.get("kms:install") == found.install_id.encode() == mark.read_bytes()
    assert mark.stat().st_mode & 0o777 == 0o600
    assert (found.wrong, degraded_parts(found)) == ("", [])


def test_ids_that_differ_refuse_the_start(machine: Make) -> None:
    machine("a").started()
    other = machine("b", "other")
    write_id(other.spool, b"0" * 32)
    with pytest.raises(ConfigurationError, match=r"install_mismatch.*delete the key kms:install"):
        other.started()


def test_emptied_redis_gets_the_id_of_the_spool(machine: Make, client: redis.Redis) -> None:
    before = machine("a").started()
    client.delete("kms:install", "kms:hosts")
    assert machine("a").started().condition.install_id == before.condition.install_id
    client.delete("kms:install")
    before.round()  # and while it runs
    assert client.get("kms:install") == before.condition.install_id.encode()


def test_redis_that_is_new_sweeps_no_files_of_jobs_for_a_day(machine: Make, client: redis.Redis) -> None:
    found = machine("a").started()
    assert found.may_sweep()  # the first start
    client.delete("kms:install")
    found.round()
    assert not found.may_sweep()
    assert 86_000 < int(str(client.ttl("kms:install:new"))) <= 86_400


def test_two_installs_with_one_spool_are_told_and_delete_nothing(
    machine: Make, valkey: EmbeddedValkey, database_numbers: Iterator[int], tmp_path: Path
) -> None:
    """A copy of the settings with another Redis, which was empty and so took the id of the spool."""
    hosts = machine("a"), machine("b")
    hosts[1].url = valkey.files.url_of(next(database_numbers))
    first, second = (each.started() for each in hosts)
    for passed_s in (601, 662):
        for host, install in zip(hosts, (first, second), strict=True):
            host.round_at(passed_s, install)
            assert not install.may_sweep()
    assert degraded_parts(first.condition) == degraded_parts(second.condition) == ["install"]
    assert (first.condition.strangers, second.condition.strangers) == (("host-b",), ("host-a",))
    first.require()  # jobs go on: their blobs have names of their own

    long_ago = time.time() - 1_900
    os.utime(tmp_path / "spool/hosts/host-b", (long_ago, long_ago))
    hosts[0].round_at(723, first)
    assert degraded_parts(first.condition) == []
    assert first.may_sweep()


def test_hosts_of_one_install_are_no_strangers(machine: Make, client: redis.Redis) -> None:
    """Also one that starts, whose mark is there before its note, and one that ended a moment ago."""
    host = machine("a")
    found = host.started()
    machine("ended").started()
    marks = SpoolMarks(SpoolFolder(host.spool, DiskSync(host.spool)))
    marks.create_host("b", "host-b")
    host.round_at(601, found)
    assert not found.may_sweep()
    write_notes(client, HostNote("b", "host-b", 0))
    host.round_at(662, found)
    assert degraded_parts(found.condition) == []
    assert found.may_sweep()


def test_new_spool_without_jobs_takes_the_id_of_redis(
    machine: Make, client: redis.Redis, tmp_path: Path
) -> None:
    client.set("kms:install", "1" * 32)
    assert machine("a").started().condition.install_id == "1" * 32
    assert (tmp_path / "spool/hosts/install").read_bytes() == b"1" * 32


@pytest.mark.parametrize("jobs", ["kms:open", "kms:ended"])
def test_new_spool_is_refused_while_jobs_need_the_old_one(
    machine: Make, client: redis.Redis, jobs: str
) -> None:
    client.set("kms:install", "1" * 32)
    client.zadd(jobs, JOBS)
    with pytest.raises(
        ConfigurationError, match="install_mismatch: the spool has no install id, and Redis has 1 jobs"
    ):
        machine("a").started()
    client.delete("kms:install")  # as the error says
    assert machine("a").started().condition.wrong == ""


def test_processes_that_start_together_agree(machine: Make) -> None:
    first, second = machine("a").process(), machine("a").process()
    first.begin()
    second.begin()
    assert first.condition.install_id == second.condition.install_id


def test_redis_that_is_away_is_compared_later(tmp_path: Path, machine: Make, redis_url: str) -> None:
    found = Machine(AWAY, tmp_path / "spool", "a").process()
    with pytest.raises(JobsUnavailable):
        found.begin()
    with pytest.raises(JobsUnavailable):
        found.require()
    machine("b", "other").started()
    write_id(tmp_path / "spool", b"2" * 32)
    back = Machine(redis_url, tmp_path / "spool", "a").process()
    with pytest.raises(WrongInstall, match="belongs to the install 2222"):
        back.require()
    back.round()
    assert "install" in degraded_parts(back.condition)


def test_require_notices_another_redis_within_seconds(machine: Make, client: redis.Redis) -> None:
    host = machine("a")
    found = host.started()
    found.require()
    client.set("kms:install", "3" * 32)
    host.passed_s = 5
    with pytest.raises(WrongInstall):
        found.require()


@pytest.mark.parametrize("error", [SpoolFull, SpoolUnavailable])
def test_spool_that_takes_no_writes_gets_its_id_later_although_jobs_wait(
    machine: Make, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Jobs that need no spool are accepted meanwhile; they are no sign of another spool."""

    def refused(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(SpoolFolder, "put", refused)
        host = machine("a")
        host.started()
        client.zadd("kms:open", JOBS)
        found = host.started()
        condition = found.condition
        assert (condition.wrong, condition.is_shared, client.get("kms:install")) == ("", True, None)

    found.round()
    assert (found.condition.wrong, len(found.condition.install_id)) == ("", 32)


def test_an_empty_spool_is_not_adopted_because_other_hosts_live(machine: Make, client: redis.Redis) -> None:
    """Of a process that began while Redis did not answer."""
    machine("a").started()
    client.zadd("kms:open", JOBS)
    found = machine("b", "elsewhere").process()

    for _ in range(3):
        found.round()
        assert found.condition.wrong


def test_jobs_are_taken_unlooked_once_redis_has_answered_and_not_before(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "_shared", [Attendance()])
    away = machine("a")
    away.url = AWAY
    for host, is_sure in ((away, False), (machine("a"), True)):
        InstallWatch(host.process(), attendance.set_misplaced).round()
        assert attendance.is_misplaced() is not is_sure


# -- the proof of a shared spool -----------------------------------------------------------------------------


def test_hosts_with_one_spool_start(machine: Make) -> None:
    first, second, third = (machine(name).started() for name in "abc")
    for each in (first, second, third):
        each.round()
        assert degraded_parts(each.condition) == []
        assert len(each.condition.others) == 2


@pytest.mark.parametrize("is_copy", [False, True], ids=["another", "copy"])
def test_host_with_another_spool_refuses_to_start(
    machine: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_copy: bool
) -> None:
    """A copy has the id, and the marks of hosts that started before it was made."""
    first, other = machine("a").started(), machine("b", "other")
    if is_copy:
        write_id(other.spool, (tmp_path / "spool/hosts/install").read_bytes())
    keep_serving(monkeypatch, first)
    with pytest.raises(ConfigurationError, match=r"spool_not_shared: .* the one that host host-a uses"):
        other.started()
    assert (degraded_parts(first.condition), first.condition.others) == ([], {})


def test_starts_once_the_other_host_is_gone(
    machine: Make, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("a").started()
    slept: list[float] = []

    def pause(seconds: float) -> None:
        slept.append(seconds)
        for name in ("a", "a starting"):
            raw = cast("bytes", client.hget("kms:hosts", name))
            note = msgspec.json.decode(raw, type=HostNote)
            old = msgspec.structs.replace(note, seen=note.seen - LIVE_S)  # as if so much time had passed
            client.hset("kms:hosts", name, msgspec.json.encode(old))

    monkeypatch.setattr(time, "sleep", pause)
    machine("b", "other").started()
    assert len(slept) == 1


def test_spools_that_part_while_hosts_run_degrade_both(machine: Make, tmp_path: Path) -> None:
    a, b = machine("a"), machine("b")
    first, second = a.started(), b.started()
    (tmp_path / "spool/hosts/host-b").unlink()
    a.round_at(61, first)
    assert degraded_parts(first.condition) == []  # a file system of a network may show it late
    a.round_at(72, first)
    b.round_at(72, second)
    assert degraded_parts(first.condition) == degraded_parts(second.condition) == ["spool_not_shared"]
    (tmp_path / "spool/hosts/host-b").write_text("host-b")
    a.round_at(83, first)
    b.round_at(83, second)
    assert degraded_parts(first.condition) == degraded_parts(second.condition) == []


def test_host_is_told_by_others_that_its_spool_is_another(machine: Make, client: redis.Redis) -> None:
    found = machine("a").started()
    write_notes(client, HostNote("b", "host-b", 0, missing=("a",)))
    found.round()
    assert degraded_parts(found.condition) == ["spool_not_shared"]


def test_directory_that_is_not_mounted_any_more_is_noticed(machine: Make, tmp_path: Path) -> None:
    host = machine("a")
    found = host.started()
    (tmp_path / "spool").rename(tmp_path / "gone")
    (tmp_path / "spool").mkdir()
    for passed_s in (11, 72, 700):
        host.round_at(passed_s, found)
        assert degraded_parts(found.condition) == ["spool_not_shared"]
    assert list((tmp_path / "spool").iterdir()) == []


NESTED = b'{"id":"x","name":"x","seen":1,"more":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
TEXTS = [b"", b"{}", b"\xff", b'{"id": 1}', b'{"id":"x","name":"x","seen":1e300}', NESTED]
NOTES = [HostNote("x", "x" * 81, 0), *(HostNote(host_id, "x", 0) for host_id in ("a\0b", "../b", ""))]


@pytest.mark.parametrize("junk", [*TEXTS, *NOTES], ids=range(len(TEXTS + NOTES)))
def test_junk_in_redis_is_left_out(machine: Make, client: redis.Redis, junk: bytes | HostNote) -> None:
    if isinstance(junk, HostNote):
        write_notes(client, junk)
    else:
        client.hset("kms:hosts", "x", junk)
    found = machine("a").started().condition
    assert (degraded_parts(found), found.others) == ([], {})
    assert set(client.hkeys("kms:hosts")) <= {b"a", b"a starting"}


def test_any_number_of_notes_costs_a_round_few_looks(
    machine: Make, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine("a").started()
    write_notes(client, *(HostNote(f"b{number}", "x", 0) for number in range(1000)))
    looks: list[str] = []

    def look(_: SpoolMarks, host_id: str) -> bool:
        looks.append(host_id)
        return False

    monkeypatch.setattr(SpoolMarks, "lacks_host", look)
    found.round()
    assert 100 <= len(looks) < 110


def test_marks_are_read_of_some_unknown_hosts_only(
    machine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = machine("a")
    found = host.started()
    machine("b").started()
    for number in range(1000):
        (tmp_path / f"spool/hosts/host-x{number}").write_text("x")
    get, reads = SpoolFolder.get, []

    def read(self: SpoolFolder, folder: str, name: str, most_bytes: int) -> SpoolNote:
        reads.append(name)
        return get(self, folder, name, most_bytes)

    monkeypatch.setattr(SpoolFolder, "get", read)
    host.round_at(601, found)
    assert not found.may_sweep()
    assert 100 <= len(reads) < 110
    reads.clear()
    for number in range(1000):
        (tmp_path / f"spool/hosts/host-x{number}").unlink()
    host.round_at(662, found)
    assert found.may_sweep()
    assert reads.count("host-b") == 1  # as a mark that may be missing, not as that of a stranger


@pytest.mark.parametrize(("look", "passed_s", "later_s"), [("users", 601, 700), ("install_id", 61, 200)])
def test_no_call_waits_for_a_look_into_the_spool(
    machine: Make, monkeypatch: pytest.MonkeyPatch, look: str, passed_s: float, later_s: float
) -> None:
    """Others may put any number of marks into it, and a bucket takes time for each, or does not answer."""
    host, required, in_time = machine("a"), Event(), []
    found = host.started()
    found.is_watched = look == "install_id"
    seen = {"users": {}, "install_id": found.condition.install_id}

    def require() -> None:
        found.require()
        required.set()

    def slow(*_: object) -> object:
        host.passed_s = later_s  # long after the last comparison
        Thread(target=require, daemon=True).start()
        in_time.append(required.wait(20))
        return seen[look]

    monkeypatch.setattr(SpoolMarks, look, slow)
    host.round_at(passed_s, found)
    assert in_time == [True]


def test_link_in_the_place_of_a_mark_is_not_followed(machine: Make, tmp_path: Path) -> None:
    (tmp_path / "spool/hosts").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"4" * 32)
    (tmp_path / "spool/hosts/install").symlink_to(tmp_path / "secret")
    assert machine("a").started().condition.install_id == ""
    assert (tmp_path / "secret").read_bytes() == b"4" * 32


def test_spool_that_does_not_answer_is_not_taken_for_another(
    machine: Make, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = machine("a"), machine("b")
    first, second = a.started(), b.started()
    before = first.condition.install_id
    get = SpoolFolder.get

    def away(*_: object) -> None:
        raise SpoolUnavailable

    monkeypatch.setattr(SpoolFolder, "get", away)
    client.delete("kms:install")
    for passed_s in (61, 72, 83):
        a.round_at(passed_s, first)
        b.round_at(passed_s, second)
        assert degraded_parts(first.condition) == degraded_parts(second.condition) == []
    third = machine("c").process()
    third.begin()
    assert client.get("kms:install") is None
    monkeypatch.setattr(SpoolFolder, "get", get)
    first.round()
    assert client.get("kms:install") == before.encode()


# -- clocks and keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_s", "degraded"), [(0.0, []), (1.0, []), (3.0, ["clock"]), (-3600.0, ["clock"])]
)
def test_clock_is_compared_with_that_of_redis(machine: Make, ahead_s: float, degraded: list[str]) -> None:
    far, near = machine("a", ahead_s=ahead_s).started(), machine("b").started()
    assert degraded_parts(far.condition) == degraded_parts(near.condition) == degraded
    assert abs(far.condition.ahead_s - ahead_s) < 0.5
    assert abs(near.condition.ahead_s) < 0.5


def test_other_hosts_with_files_of_their_own(machine: Make) -> None:
    first = machine("a", key_place="one").started()
    same, other = machine("b", key_place="one").started(), machine("c", key_place="two").started()
    assert first.elsewhere("orders", asks=True) == ["host-c"]
    assert same.elsewhere("orders", asks=True) == ["host-c"]
    assert other.elsewhere("orders", asks=True) == ["host-a", "host-b"]
    assert first.elsewhere("bills", asks=True) == []


def test_any_number_of_other_hosts_is_named_by_a_few(machine: Make, client: redis.Redis) -> None:
    first, names = machine("a", key_place="one").started(), [f"b{number}" for number in range(100)]
    write_notes(client, *(HostNote(name, name, 0, key_places={"orders": "x"}) for name in names))
    assert 1 <= len(first.elsewhere("orders", asks=True)) <= 10


def test_watched_process_does_not_ask_redis_for_each_call(machine: Make) -> None:
    first = machine("a", key_place="one").started()
    first.is_watched = True
    machine("b", key_place="two").started()
    assert first.elsewhere("orders", asks=False) == []
    first.round()
    assert first.elsewhere("orders", asks=False) == ["host-b"]


def test_host_is_its_machine_its_state_and_its_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.mkdir()
    other.mkdir()
    first = Host.here(one, one)
    assert Host.here(one, one) == first
    assert Host.here(other, one).id != first.id
    assert Host.here(one, other).id != first.id
    monkeypatch.setattr(notes_module, "_BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text("another")
    assert Host.here(one, one).id != first.id
