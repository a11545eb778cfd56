"""The list of live processes, by which a writer knows what all of them can read."""

from typing import Any, cast

import pytest

from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store import processes
from kms_core.jobs.store.heartbeats import worker_seen
from kms_core.jobs.store.processes import LISTED_S, Presence, listed, new_name, understood
from kms_core.jobs.store.store import JobStore
from kms_protocol import __version__

KEY = "kms:processes"


@pytest.fixture(autouse=True)
def features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FEATURES", frozenset({"folders", "streams"}))


def present(store: JobStore, role: processes.Role, name: str) -> Presence:
    presence = Presence(store, role, name)
    presence.round()
    return presence


def test_a_process_is_listed_until_it_is_stopped(store: JobStore) -> None:
    presence = Presence(store, "api", "one")
    presence.start()
    presence.stop(5)
    presence.join()
    assert listed(store) == []

    presence.round()
    present(store, "worker", "two")
    assert {(each.role, each.name, each.version) for each in listed(store)} == {
        ("api", "one", __version__),
        ("worker", "two", __version__),
    }
    assert {each.features for each in listed(store)} == {frozenset({"folders", "streams"})}

    presence.finish()
    assert [each.name for each in listed(store)] == ["two"]


def test_a_killed_process_leaves_the_list(store: JobStore) -> None:
    present(store, "api", "killed")
    (entry,) = cast("list[bytes]", store.redis.zrange(KEY, 0, -1))
    store.redis.zadd(KEY, {entry: store.now() - LISTED_S - 1})
    assert listed(store) == []

    present(store, "api", "lives")
    assert store.redis.zcard(KEY) == 1


def test_a_writer_uses_what_every_live_process_knows(store: JobStore) -> None:
    present(store, "api", "new")
    assert understood(store) == {"folders", "streams"}

    store.redis.zadd(KEY, {"api next 0.9.0 chords folders streams": store.now()})
    assert understood(store) == {"folders", "streams"}

    store.redis.zadd(KEY, {"api before 0.3.0 streams": store.now()})
    assert understood(store) == {"streams"}


def test_a_worker_that_is_not_listed_knows_no_feature(store: JobStore) -> None:
    """One of 0.2, which sends heartbeats only."""
    present(store, "worker", "new")
    worker_seen(store, "new", 1, QUEUES)
    assert understood(store) == {"folders", "streams"}

    worker_seen(store, "old", 1, QUEUES)
    assert understood(store) == frozenset()


def test_an_entry_that_is_none_of_ours_is_passed_over(store: JobStore) -> None:
    junk: dict[Any, float] = {"": store.now(), b"\xff\xfe": store.now(), "api short": store.now()}
    store.redis.zadd(KEY, junk)
    present(store, "api", "one")
    assert [each.name for each in listed(store)] == ["one"]


def test_names_of_processes_differ() -> None:
    names = {new_name() for _ in range(10)}
    assert len(names) == 10
    assert not any(" " in name for name in names)
