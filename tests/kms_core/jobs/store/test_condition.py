"""What probes say of Redis: asked beside them, seldom, and not waited for while it is silent."""

import threading

import pytest

from kms_core.jobs.store.condition import EVERY_S, StoreCondition, StoreProbe
from support.waiting import WAIT_S, monotonic_ahead, until


class Looks:
    """What is asked about a Redis, which answers while it is not silent."""

    def __init__(self) -> None:
        self.count = 0
        self.found: StoreCondition = "available"
        self.answers = threading.Event()
        self.answers.set()

    def __call__(self) -> StoreCondition:
        self.count += 1
        assert self.answers.wait(WAIT_S)
        return self.found


@pytest.fixture
def looks() -> Looks:
    return Looks()


def test_redis_is_asked_for_probes_once_a_second(looks: Looks) -> None:
    probe = StoreProbe(looks, WAIT_S)
    assert looks.count == 0

    assert [probe.condition() for _ in range(3)] == ["available"] * 3
    assert looks.count == 1
    looks.found = "full"
    with monotonic_ahead(EVERY_S):
        assert [probe.condition() for _ in range(3)] == ["full"] * 3
    assert looks.count == 2


def test_no_probe_waits_longer_than_its_patience_for_a_silent_redis(looks: Looks) -> None:
    probe = StoreProbe(looks, 0.0)
    looks.answers.clear()

    assert [probe.condition() for _ in range(50)] == ["unavailable"] * 50
    with monotonic_ahead(2 * EVERY_S):
        assert probe.condition() == "unavailable"
    assert looks.count == 1, "one look for all of them"
    looks.answers.set()
    until(lambda: probe.condition() == "available", "its answer counts, however late")


def test_the_probe_that_finds_redis_back_says_so(looks: Looks) -> None:
    probe = StoreProbe(looks, WAIT_S)
    looks.found = "unavailable"
    assert probe.condition() == "unavailable"

    looks.found = "available"
    with monotonic_ahead(EVERY_S):
        until(lambda: probe.condition() == "available", "it answers")
    assert looks.count == 2


def test_a_redis_that_has_failed_is_waited_for_shortly(looks: Looks) -> None:
    probe = StoreProbe(looks, WAIT_S)
    looks.found = "unavailable"
    assert probe.condition() == "unavailable"

    looks.answers.clear()
    with monotonic_ahead(EVERY_S):
        assert probe.condition() == "unavailable", "it would wait for 90 s else"
    looks.answers.set()


def test_a_failure_of_another_probe_counts_until_the_next_look(looks: Looks) -> None:
    probe = StoreProbe(looks, WAIT_S)
    assert probe.condition() == "available"

    probe.failed()
    assert probe.condition() == "unavailable"
    with monotonic_ahead(EVERY_S):
        until(lambda: probe.condition() == "available", "it answers")
    assert looks.count == 2
