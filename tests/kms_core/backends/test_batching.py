"""Calls that wait at once travel together, and none of them waits for company."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import pytest

from kms_core import http_client
from kms_core.backends.batching import MOST_ITEMS, Batcher, SingleFlight
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import DecryptFailed, KmsError
from support.waiting import WAIT_S, until

SHORT_S: Final = 0.05


class GatedSender:
    """What carries the batches: it holds each until told to let it through, and remembers all."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self._permits = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.error: BaseException | None = None

    def send(self, items: Sequence[str]) -> Sequence[str | KmsError]:
        self.batches.append(list(items))
        self.entered.release()
        assert self._permits.acquire(timeout=WAIT_S)
        if self.error:
            raise self.error
        return [DecryptFailed() if item == "bad" else item.upper() for item in items]

    def let(self, batches: int = 10_000) -> None:
        """Let so many through."""
        self._permits.release(batches)


@pytest.fixture
def sender() -> GatedSender:
    return GatedSender()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(128) as pool:
        yield pool


def gathered(
    sender: GatedSender, coalescer: Batcher[str, str], threads: ThreadPoolExecutor, items: Sequence[str]
) -> list[Future[str]]:
    """A call under way, and those of ``items`` waiting behind it, in their order; then all go through."""
    calls = [threads.submit(coalescer.call, "first", WAIT_S)]
    assert sender.entered.acquire(timeout=WAIT_S)
    for number, item in enumerate(items, start=1):
        calls.append(threads.submit(coalescer.call, item, WAIT_S))
        until(lambda expected=number: coalescer.waiting == expected, "one waits more", poll_s=0.001)  # type: ignore[misc]  # mypy: no default
    sender.let()
    return calls


def test_a_call_goes_alone_and_at_once(sender: GatedSender) -> None:
    sender.let()

    assert Batcher(sender.send, batches=1).call("a", WAIT_S) == "A"
    assert sender.batches == [["a"]]


def test_what_gathers_meanwhile_goes_together(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    calls = gathered(sender, Batcher(sender.send, batches=1), threads, ["b", "c", "d"])

    assert [call.result(WAIT_S) for call in calls] == ["FIRST", "B", "C", "D"]
    assert sender.batches == [["first"], ["b", "c", "d"]]


def test_a_batch_has_no_more_than_its_most(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    items = [f"i{number}" for number in range(MOST_ITEMS + 3)]
    calls = gathered(sender, Batcher(sender.send, batches=1), threads, items)

    assert [call.result(WAIT_S) for call in calls] == ["FIRST", *(item.upper() for item in items)]
    assert sender.batches == [["first"], items[:MOST_ITEMS], items[MOST_ITEMS:]]


def test_a_bad_item_fails_alone(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    first, good, bad, last = gathered(
        sender, Batcher(sender.send, batches=1), threads, ["good", "bad", "last"]
    )

    assert [first.result(WAIT_S), good.result(WAIT_S), last.result(WAIT_S)] == ["FIRST", "GOOD", "LAST"]
    assert isinstance(bad.exception(WAIT_S), DecryptFailed)


def test_an_error_of_the_whole_fails_all(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    sender.error = Unreachable("gone")
    calls = gathered(sender, Batcher(sender.send, batches=1), threads, ["b", "c"])

    assert {type(call.exception(WAIT_S)) for call in calls} == {Unreachable}
    assert sender.batches == [["first"], ["b", "c"]]


def test_what_breaks_off_the_sender_fails_the_others_so_that_they_try_again(
    sender: GatedSender, threads: ThreadPoolExecutor
) -> None:
    sender.error = ZeroDivisionError()
    coalescer = Batcher(sender.send, batches=1)
    first, follower, carrier = gathered(sender, coalescer, threads, ["b", "c"])

    assert isinstance(first.exception(WAIT_S), ZeroDivisionError)
    assert isinstance(carrier.exception(WAIT_S), ZeroDivisionError)
    assert isinstance(follower.exception(WAIT_S), Busy)
    sender.error = None
    assert coalescer.call("again", WAIT_S) == "AGAIN"


def test_a_call_that_has_waited_too_long_leaves_the_others(
    sender: GatedSender, threads: ThreadPoolExecutor
) -> None:
    coalescer = Batcher(sender.send, batches=1)
    first = threads.submit(coalescer.call, "first", WAIT_S)
    assert sender.entered.acquire(timeout=WAIT_S)

    with pytest.raises(TimeoutError):
        coalescer.call("late", SHORT_S)
    sender.let()
    assert first.result(WAIT_S) == "FIRST"
    assert coalescer.call("next", WAIT_S) == "NEXT"
    assert sender.batches == [["first"], ["next"]]


def test_a_call_that_another_carries_gives_up_alone(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    coalescer = Batcher(sender.send, batches=1)
    first = threads.submit(coalescer.call, "first", WAIT_S)
    assert sender.entered.acquire(timeout=WAIT_S)
    hasty = threads.submit(coalescer.call, "hasty", 10 * SHORT_S)
    until(lambda: coalescer.waiting == 1, "one waits")
    carrier = threads.submit(coalescer.call, "carrier", WAIT_S)
    until(lambda: coalescer.waiting == 2 or hasty.done(), "two wait")
    sender.let(1)

    assert isinstance(hasty.exception(WAIT_S), TimeoutError)
    sender.let()
    assert [first.result(WAIT_S), carrier.result(WAIT_S)] == ["FIRST", "CARRIER"]


def test_lanes_are_batches_under_way_at_a_time(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    coalescer = Batcher(sender.send)
    calls = [threads.submit(coalescer.call, item, WAIT_S) for item in ("a", "b")]
    for _ in calls:
        assert sender.entered.acquire(timeout=WAIT_S)
    calls.append(threads.submit(coalescer.call, "c", WAIT_S))
    until(lambda: coalescer.waiting == 1, "one waits")
    sender.let()

    assert [call.result(WAIT_S) for call in calls] == ["A", "B", "C"]
    assert sorted(sender.batches) == [["a"], ["b"], ["c"]]


def test_many_threads_all_get_their_own(sender: GatedSender, threads: ThreadPoolExecutor) -> None:
    sender.let()
    coalescer = Batcher(sender.send, batches=1)
    items = [f"i{number}" for number in range(2000)]

    assert list(threads.map(lambda item: coalescer.call(item, WAIT_S), items)) == [i.upper() for i in items]
    assert sorted(item for batch in sender.batches for item in batch) == sorted(items)
    assert max(map(len, sender.batches)) <= MOST_ITEMS


def test_one_who_waits_for_the_call_of_another_waits_no_longer_than_it_may(
    threads: ThreadPoolExecutor,
) -> None:
    flights, begun, go = SingleFlight[str](), threading.Event(), threading.Event()

    def asked() -> str:
        begun.set()
        assert go.wait(WAIT_S)
        return "late"

    first = threads.submit(flights.run, "versions", asked)
    assert begun.wait(WAIT_S)
    with http_client.within(SHORT_S), pytest.raises(Unreachable):
        flights.run("versions", asked)
    go.set()

    assert first.result(WAIT_S) == "late"
