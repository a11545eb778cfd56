"""A periodic thread: rounds, failures that do not end it, one last step."""

import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from kms_core.periodic import PeriodicThread
from support.waiting import WAIT_S, until


class Counting(PeriodicThread):
    """Counts its rounds; the second one fails."""

    def __init__(self, interval_s: float = 0.001) -> None:
        super().__init__("counting", interval_s, failed="counting.failed")
        self.rounds = 0
        self.is_finished = False

    def round(self) -> None:
        self.rounds += 1
        if self.rounds == 2:
            raise ValueError("the second round")

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def counting() -> Iterator[Counting]:
    made = Counting()
    yield made
    made.stop(WAIT_S)


def until_rounds(thread: Counting, number: int) -> None:
    until(lambda: thread.rounds >= number, f"round {number}", poll_s=0.001)


def test_a_failed_round_is_logged_and_not_the_last(counting: Counting) -> None:
    with capture_logs() as logs:
        counting.start()
        until_rounds(counting, 4)

    assert [(line["event"], line["error"]) for line in logs] == [("counting.failed", "ValueError")]


def test_rounds_that_go_on_failing_are_logged_once_a_minute() -> None:
    thread = Counting()

    def fail() -> None:
        raise OSError

    with capture_logs() as logs:
        for _ in range(3):
            thread.attempt(fail)
        thread.attempt(thread.finish)
        thread.attempt(fail)

    assert [line["event"] for line in logs] == [
        "counting.failed"
    ] * 2  # a success in between begins a new row


def test_a_stopped_thread_finishes_and_ends(counting: Counting) -> None:
    counting.start()
    counting.stop(WAIT_S)

    assert counting.is_finished
    assert not counting.is_alive()


def test_a_thread_that_is_woken_does_not_wait_for_its_interval() -> None:
    thread = Counting(3600.0)
    thread.wake()
    thread.start()
    until_rounds(thread, 1)
    thread.wake()
    until_rounds(thread, 2)
    thread.stop(WAIT_S)

    assert not thread.is_alive()


def test_no_round_runs_while_the_fork_lock_is_held() -> None:
    lock, asked = threading.Lock(), threading.Event()

    class ForkLock:
        def __enter__(self) -> None:
            asked.set()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    thread = Counting()
    thread.fork_lock = ForkLock()
    with lock:
        thread.start()
        assert asked.wait(WAIT_S)
        assert thread.rounds == 0
    until_rounds(thread, 1)
    thread.stop(WAIT_S)

    assert thread.is_finished
