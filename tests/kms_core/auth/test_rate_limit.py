"""How often something may happen: buckets that empty, fill again, and do not grow without end."""

import pytest

from kms_core.auth import rate_limit
from kms_core.auth.rate_limit import Failures, Rate, Requests, source_of
from kms_protocol.errors import RateLimited
from support.clock import Clock


def refused_s(requests: Requests, items: int = 0) -> float:
    """The seconds to wait that a request that is refused is told, or a batch of items."""
    with pytest.raises(RateLimited) as caught:
        requests.take_items("acme", items) if items else requests.take("acme")
    return caught.value.retry_after_s


@pytest.mark.parametrize("per_minute", [1, 3, 7, 9, 60])
def test_a_source_that_failed_often_may_fail_again_at_the_very_time_that_was_told(
    clock: Clock, per_minute: int
) -> None:
    failures = Failures(per_minute, clock=clock)
    for _ in range(per_minute):
        assert failures.wait_s("10.0.0.1") == 0
        failures.failed("10.0.0.1")
    assert failures.wait_s("10.0.0.2") == 0
    for _ in range(20):
        wait_s = failures.wait_s("10.0.0.1")
        assert wait_s == pytest.approx(60 / per_minute)
        clock.now += wait_s * 0.99
        assert failures.wait_s("10.0.0.1") > 0
        clock.now += wait_s * 0.01
        assert failures.wait_s("10.0.0.1") == 0
        failures.failed("10.0.0.1")


def test_a_source_that_rested_is_as_good_as_new(clock: Clock) -> None:
    """However often it failed."""
    failures = Failures(2, clock=clock)
    for _ in range(50):
        failures.failed("10.0.0.1")
    assert failures.wait_s("10.0.0.1") == pytest.approx(30)
    clock.now += 3600
    failures.failed("10.0.0.1")

    assert failures.wait_s("10.0.0.1") == 0


def test_the_sources_that_failed_last_are_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MOST_SOURCES", 10)
    failures = Failures(1, clock=clock)
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


@pytest.mark.parametrize("per_s", [0.1, 1 / 3, 7, 1e-3, 333.3])
def test_a_request_passes_at_the_very_time_that_was_told_and_not_before(clock: Clock, per_s: float) -> None:
    """Others ask as they like."""
    requests = Requests({"acme": Rate(per_s, 2)}, clock=clock)
    for _ in range(2):
        requests.take("acme")
    for _ in range(200):
        wait_s = refused_s(requests)
        assert wait_s == pytest.approx(1 / per_s)
        clock.now += wait_s * 0.99
        assert refused_s(requests) > 0
        clock.now += wait_s * 0.01
        requests.take("acme")
        requests.take("other")


def test_a_bucket_fills_up_to_its_burst_and_no_further(clock: Clock) -> None:
    requests = Requests({"acme": Rate(10, 3)}, clock=clock)
    clock.now += 3600
    for _ in range(3):
        requests.take("acme")

    assert refused_s(requests) == pytest.approx(0.1)


def test_items_may_be_more_than_are_left_and_are_owed(clock: Clock) -> None:
    requests = Requests({"acme": Rate(10, 5)}, clock=clock)
    requests.take("acme")
    assert requests.take_items("acme", 4) == 0, "one is left"
    assert requests.take_items("acme", 22) == refused_s(requests) == pytest.approx(2.1)
    clock.now += 2.1
    requests.take("acme")


def test_of_batches_that_were_let_in_together_one_goes_into_debt(clock: Clock) -> None:
    requests = Requests({"acme": Rate(10, 5)}, clock=clock)
    for _ in range(5):
        requests.take("acme")
    requests.take_items("acme", 1000)
    for _ in range(4):
        assert refused_s(requests, 1000) == pytest.approx(60.1), "600 are owed at most, and one is wanted"

    requests.take_items("other", 1000)


@pytest.mark.parametrize("per_s", [0.01, 5, 300])
@pytest.mark.parametrize("how", ["batch", "stream", "stream in pieces"])
def test_a_debt_is_never_above_a_minute_of_the_pace(clock: Clock, per_s: float, how: str) -> None:
    requests = Requests({"acme": Rate(per_s, 2)}, clock=clock)
    requests.take("acme")
    if how == "batch":
        requests.take_items("acme", 100_000)
    else:
        for _ in requests.counted("acme", range(100_000)):
            clock.now += 1e-4 if how == "stream in pieces" else 0
    clock.now += 60

    wait_s = refused_s(requests)
    assert wait_s == pytest.approx(1 / per_s), "the debt is paid, and one is wanted"
    clock.now += wait_s
    requests.take("acme")


def test_items_of_a_stream_are_counted_while_they_are_taken(clock: Clock) -> None:
    requests = Requests({"acme": Rate(1, 1000)}, clock=clock)
    requests.take("acme")
    items = requests.counted("acme", range(700))
    taken = [next(items) for _ in range(250)]
    items.close()  # type: ignore[attr-defined]  # as when what takes them fails
    requests.take_items("acme", 751)

    assert taken == list(range(250))
    assert refused_s(requests) == pytest.approx(1), "250 and 750 of 1,000 are spent"


@pytest.mark.parametrize("count", [0, 1, 2, 99, 100, 101, 102, 350])
def test_all_items_of_a_stream_are_counted_once(clock: Clock, count: int) -> None:
    requests = Requests({"acme": Rate(1, 1000)}, clock=clock)
    requests.take("acme")
    assert list(requests.counted("acme", range(count))) == list(range(count))
    requests.take_items("acme", 1001 - max(1, count))
    requests.take_items("acme", 2)

    assert refused_s(requests, 2) > 0


def test_failures_of_all_sources_are_logged_within_a_bound(clock: Clock) -> None:
    failures = Failures(30, clock=clock)
    logged = [failures.failed(f"10.{number >> 8}.{number & 255}.1") for number in range(2000)]
    assert logged == [True] * 600 + [False] * 1400
    clock.now += 1

    assert [failures.failed(f"11.0.0.{number}") for number in range(20)] == [True] * 10 + [False] * 10
