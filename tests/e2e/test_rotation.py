"""Keys as operators see them: versions and what they sealed, rotation by hand, by age and by budget."""

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
import redis

from kms_core import key_rotation
from kms_core.age import x25519
from kms_core.auth.policy import Principal
from kms_core.backends.age import AgeBackend
from kms_core.container import Core
from kms_core.jobs.store import usage
from kms_core.jobs.store.scripts import SCRIPTS
from kms_core.jobs.store.usage import UsageFlush
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.operation import UsageCounters
from kms_core.service import Kms
from kms_core.settings.model import RotationSection
from kms_protocol.errors import AuditUnavailable, BackendUnavailable, JobsUnavailable, UnknownKey
from kms_protocol.wire import PREFIX
from kms_worker.rotation import look_after
from support.age_kms import NO_CONTEXT, age_backend
from support.audit_logs import AuditFolder, InterceptedLog, Line, fail, unresolved
from support.failing_store import Killed
from support.job_stores import connect
from support.memory_kms import memory_backend
from support.service import Service
from support.waiting import until

WHO = Principal("local")


def made_days_ago(private: Path, days: float) -> None:
    """As if the only identity of the file had been made then."""
    made = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    lines = [line for line in private.read_text().splitlines() if not line.startswith("# created")]
    private.write_text("\n".join([f"# created: {made}", *lines]) + "\n")


def seal(kms: Kms, times: int = 1) -> None:
    for _ in range(times):
        kms.encrypt(WHO, b"salary", NO_CONTEXT)


# -- by hand, from outside ---------------------------------------------------------------------------


def test_a_rotated_key_seals_with_the_new_version_and_opens_the_old(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, redis=redis_url) as service:
        service.start("api")
        old = service.http.post(f"{PREFIX}/encrypt", json={"plaintext": "aGVsbG8="}).json()
        made = service.http.post(f"{PREFIX}/keys/default/rotate").json()
        new = service.http.post(f"{PREFIX}/encrypt", json={"plaintext": "aGVsbG8="}).json()
        opened = service.http.post(f"{PREFIX}/decrypt", json={"ciphertext": old["ciphertext"]}).json()
        key = service.http.get(f"{PREFIX}/keys/default").json()

    assert made["key_version"] == new["key_version"] == key["current_version"] != old["key_version"]
    assert (opened["plaintext"], opened["key_version"]) == ("aGVsbG8=", old["key_version"])
    assert [version["operations"] for version in key["versions"]] == [1, 1]


def test_counts_outlive_the_process(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, redis=redis_url) as first:
        first.start("api")
        first.http.post(f"{PREFIX}/encrypt", json={"plaintext": "aGVsbG8="})
        first.stop("api")
        first.start("api")
        status = first.http.get(f"{PREFIX}/status").json()
        key = first.http.get(f"{PREFIX}/keys/default").json()

    assert status["operations"]["by"]["encrypt"]["ok"] == 1
    assert (key["versions"][0]["operations"], key["versions"][0]["bytes"]) == (1, 5)


def test_a_worker_rotates_a_key_that_is_due(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, "[kms.rotation]\nevery_days = 30\n", redis_url) as service:
        made_days_ago(tmp_path / "state/age/private_key.txt", 31)
        service.start()
        until(
            lambda: len(service.http.get(f"{PREFIX}/keys/default").json()["versions"]) == 2,
            "the key has a new version",
        )
        assert "key.rotated" in service.output("worker")


# -- when it is due ----------------------------------------------------------------------------------


def over(core: Core, key: Key) -> Core:
    """The core with another keyring."""
    return with_keyring(core, Keyring({key.key_id: key}, key))


def with_keyring(core: Core, keyring: Keyring) -> Core:
    return replace(core, kms=Kms(keyring, core.kms.policy, core.kms.audit_log, SelectionRules()))


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "keys", x25519.X25519Identity.generate())


@pytest.mark.parametrize(("days", "every", "versions"), [(89, 90, 1), (91, 90, 2), (5000, 0, 1)])
def test_age_decides(core: Core, tmp_path: Path, days: int, every: int, versions: int) -> None:
    backend = age_backend(tmp_path / "keys", x25519.X25519Identity.generate())
    made_days_ago(tmp_path / "keys/private_key.txt", days)
    look_after(over(core, Key("payroll", backend)), RotationSection(every_days=every), "w1")

    assert len(backend.versions()) == versions


def test_a_key_of_unknown_age_is_left_alone(core: Core, backend: AgeBackend) -> None:
    look_after(over(core, Key("payroll", backend)), RotationSection(every_days=1), "w1")

    assert len(backend.versions()) == 1


@pytest.mark.parametrize(("every_days", "versions"), [(90, 2), (0, 1)])
def test_a_spent_budget_rotates_where_there_is_a_schedule(
    core: Core, backend: AgeBackend, monkeypatch: pytest.MonkeyPatch, *, every_days: int, versions: int
) -> None:
    monkeypatch.setattr(key_rotation, "BUDGET_MESSAGES", 10)
    mine = over(core, Key("payroll", backend))
    seal(mine.kms, 10)
    look_after(mine, RotationSection(every_days=every_days), "w1")

    assert len(backend.versions()) == versions


def test_two_workers_rotate_once(core: Core, backend: AgeBackend, tmp_path: Path) -> None:
    made_days_ago(tmp_path / "keys/private_key.txt", 91)
    mine = over(core, Key("payroll", backend))
    for worker in ("w1", "w2"):
        look_after(mine, RotationSection(), worker)

    assert len(backend.versions()) == 2


def test_a_backend_that_is_away_spoils_no_other_key(core: Core, backend: AgeBackend, tmp_path: Path) -> None:
    made_days_ago(tmp_path / "keys/private_key.txt", 91)
    remote, peer = memory_backend()
    peer.cut()
    ring = Keyring({"gone": Key("gone", remote), "payroll": Key("payroll", backend)}, Key("gone", remote))
    look_after(with_keyring(core, ring), RotationSection(), "w1")

    assert len(backend.versions()) == 2


def test_every_backend_that_seals_gets_a_version(core: Core, backend: AgeBackend) -> None:
    remote, peer = memory_backend()
    retired, untouched = memory_backend("old")
    kms = over(core, Key("payroll", remote, others=(backend,), retired=(retired,))).kms
    made = kms.rotate(WHO, "payroll")

    assert (made.version, len(peer.keys), len(backend.versions()), len(untouched.keys)) == ("2", 2, 2, 1)


# -- on record ---------------------------------------------------------------------------------------


def cut(core: Core, backend: AgeBackend, stage: str, error: BaseException) -> Core:
    """The core with one key, over a trail that is cut at a stage."""
    ring = Keyring({"payroll": (key := Key("payroll", backend))}, key)
    trail = InterceptedLog(core.kms.audit_log, stage, lambda: fail(error))
    return replace(core, kms=Kms(ring, core.kms.policy, trail, SelectionRules()))


def rotations(state: Path) -> list[Line]:
    return [line for line in AuditFolder(state).operations() if line["operation"] == "rotate"]


def test_a_rotation_is_on_record_before_and_after_it(core: Core, backend: AgeBackend, tmp_path: Path) -> None:
    key = Key("payroll", backend)
    kms = over(core, key).kms
    made = [kms.rotate(WHO, "payroll").version]
    key_rotation.rotate_due(kms, [key_rotation.state_of(key, backend, {}, RotationSection())])
    made.append(backend.versions()[-1].version)
    lines = rotations(tmp_path / "state")

    assert [line["stage"] for line in lines] == ["intent", "outcome"] * 2
    assert [line["principal"] for line in lines] == [WHO.name] * 2 + [key_rotation.SCHEDULE.name] * 2
    assert {(line["key_id"], line["backend"]) for line in lines} == {("payroll", "age")}
    assert len({line["effect"] for line in lines}) == 2
    assert [line.get("result") for line in lines] == [None, "ok"] * 2
    assert [line["key_version"] for line in lines[1::2]] == made
    assert unresolved(tmp_path / "state") == []


@pytest.mark.parametrize(
    "rotate",
    [
        lambda core: core.kms.rotate(WHO, "payroll"),
        lambda core: look_after(core, RotationSection(every_days=30), "w1"),
        lambda core: look_after(core, RotationSection(every_days=30_000), "w1"),
    ],
    ids=["by hand", "by age", "by budget"],
)
def test_a_process_that_dies_between_a_rotation_and_its_record_is_seen(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotate: Callable[[Core], object]
) -> None:
    monkeypatch.setattr(key_rotation, "BUDGET_MESSAGES", 10)
    backend = age_backend(tmp_path / "keys", x25519.X25519Identity.generate())
    made_days_ago(tmp_path / "keys/private_key.txt", 31)
    dying = cut(core, backend, "outcome", Killed())
    seal(dying.kms, 10)

    with pytest.raises(Killed):
        rotate(dying)
    assert len(backend.versions()) == 2
    (intent,) = rotations(tmp_path / "state")
    assert unresolved(tmp_path / "state") == [f"rotate {intent['effect']} has no outcome"]


def test_no_key_is_rotated_without_its_intent_on_record(
    core: Core, backend: AgeBackend, tmp_path: Path
) -> None:
    with pytest.raises(AuditUnavailable):
        cut(core, backend, "intent", AuditUnavailable()).kms.rotate(WHO, "payroll")

    assert len(backend.versions()) == 1
    assert unresolved(tmp_path / "state") == []


def test_a_refused_rotation_sets_out_for_nothing(core: Core, backend: AgeBackend, tmp_path: Path) -> None:
    with pytest.raises(UnknownKey):
        over(core, Key("payroll", backend)).kms.rotate(WHO, "nix")
    remote, peer = memory_backend()
    peer.trouble = BackendUnavailable("token refused")
    with pytest.raises(BackendUnavailable):
        over(core, Key("payroll", remote)).kms.rotate(WHO, "payroll")

    found = [(line.get("stage"), line.get("result")) for line in rotations(tmp_path / "state")]
    assert found == [(None, "unknown_key"), ("intent", None), ("outcome", "backend_unavailable")]
    assert unresolved(tmp_path / "state") == []


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else may change the keys of a folder meanwhile."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def test_an_api_that_is_killed_while_it_rotates_leaves_its_intent(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, redis=redis_url) as service, ThreadPoolExecutor(1) as caller:
        service.start("api")
        with held(tmp_path / "state/age"):
            asked = caller.submit(service.http.post, f"{PREFIX}/keys/default/rotate")
            until(
                lambda: AuditFolder(service.state).folder.exists() and rotations(service.state),
                "it has set out",
            )
            service.kill("api")
        with suppress(httpx.HTTPError):
            asked.result()
        service.start("api")
        answer = service.get("/audit", params={"operation": "rotate"}).json()

        assert [event["stage"] for event in answer["events"]] == ["intent"]
        assert unresolved(service.state) == [f"rotate {answer['events'][0]['effect']} has no outcome"]


# -- counts ------------------------------------------------------------------------------------------


def test_counts_of_several_processes_add_up(redis_url: str) -> None:
    client = connect(redis_url)
    for tally in (UsageCounters(), UsageCounters()):
        tally.put_back({"operations encrypt ok": 2, "messages default 1 age": 2})
        UsageFlush(tally, client).round()

    assert usage.shared_usage(client) == {"operations encrypt ok": 4, "messages default 1 age": 4}


def test_counts_wait_while_redis_is_away(redis_url: str) -> None:
    tally = UsageCounters()
    tally.put_back({"operations encrypt ok": 2})
    UsageFlush(tally, connect("unix:///nonexistent/valkey.sock")).round()
    assert tally.peek() == {"operations encrypt ok": 2}
    with pytest.raises(JobsUnavailable):
        usage.shared_usage(connect("unix:///nonexistent/valkey.sock"))
    UsageFlush(tally, connect(redis_url)).round()

    assert usage.shared_usage(connect(redis_url)) == {"operations encrypt ok": 2}
    assert not tally.peek()


def test_counts_that_were_added_before_redis_went_away_are_not_added_again(redis_url: str) -> None:
    added, script = list[object](), connect(redis_url).register_script(SCRIPTS["add_counts"])

    def add(keys: list[str], words: list[str | int]) -> None:
        if added:
            raise redis.ConnectionError
        added.append(script(keys, words))

    client: Any = SimpleNamespace(register_script=lambda _: add)
    tally = UsageCounters()
    tally.put_back({f"messages key {number} age": 1 for number in range(1_500)})
    UsageFlush(tally, client).round()
    assert len(tally.peek()) == 500
    UsageFlush(tally, connect(redis_url)).round()

    assert list(usage.shared_usage(connect(redis_url)).values()) == [1] * 1_500
