"""How often something may happen: buckets that empty, fill again, and do not grow without end."""

import pytest

from kms_core.auth.throttle import Failures, Pace, Requests, source_of
from kms_core.errors import RateLimited


class Clock:
    """A time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_source_that_failed_often_has_to_wait(clock: Clock) -> None:
    failures = Failures(3, clock=clock)
    for _ in range(3):
        assert failures.wait_s("10.0.0.1") == 0
        failures.failed("10.0.0.1")

    assert failures.wait_s("10.0.0.1") == pytest.approx(20)
    assert failures.wait_s("10.0.0.2") == 0
    clock.now += 20
    assert failures.wait_s("10.0.0.1") == 0
    failures.failed("10.0.0.1")
    assert failures.wait_s("10.0.0.1") == pytest.approx(20)


def test_a_source_that_rested_is_as_good_as_new(clock: Clock) -> None:
    failures = Failures(2, clock=clock)
    for _ in range(50):
        failures.failed("10.0.0.1")
    clock.now += 3600
    failures.failed("10.0.0.1")

    assert failures.wait_s("10.0.0.1") == 0


def test_the_sources_that_failed_last_are_remembered(clock: Clock) -> None:
    failures = Failures(1, clock=clock, most=10)
    for number in range(1000):
        failures.failed(f"10.0.{number // 250}.{number % 250}")

    assert len(failures._buckets) == 10  # noqa: SLF001 -- that memory is bounded is the point
    assert failures.wait_s("10.0.3.249") > 0
    assert failures.wait_s("10.0.0.0") == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("local", "local", True),
    ],
)
def test_what_one_caller_can_change_at_will_is_one_source(one: str, other: str, *, same: bool) -> None:
    assert (source_of(one) == source_of(other)) == same


def test_a_tenant_may_ask_so_often_and_others_as_they_like(clock: Clock) -> None:
    requests = Requests({"acme": Pace(10, 5)}, clock=clock)
    for _ in range(5):
        requests.take("acme")
    with pytest.raises(RateLimited) as caught:
        requests.take("acme")
    assert caught.value.retry_after_s == pytest.approx(0.1)
    for _ in range(100):
        requests.take("other")
    clock.now += 0.2
    requests.take("acme")
    requests.take("acme")

    with pytest.raises(RateLimited):
        requests.take("acme")
