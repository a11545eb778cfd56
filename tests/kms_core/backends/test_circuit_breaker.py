"""The breaker, the retry budget, and what may open or spend them."""

from collections.abc import Callable
from typing import Final

import pytest

from kms_core import http_client
from kms_core.backends.circuit_breaker import Breaker, RetryingCaller, RetryPolicy
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError
from support.clock import Clock

QUICK: Final = RetryPolicy(first_wait_s=0.0, failures=3, open_s=10.0, longest_open_s=15.0)


class Peer:
    """Answers with what it is given, call by call, then with ``ok``."""

    def __init__(self, *answers: KmsError) -> None:
        self._answers = list(answers)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self._answers:
            raise self._answers.pop(0)
        return "ok"


def open_breaker(clock: Callable[[], float]) -> Breaker:
    breaker = Breaker("peer", QUICK, clock)
    for _ in range(QUICK.failures):
        breaker.enter()
        breaker.failed()
    return breaker


@pytest.mark.parametrize("error", [Unreachable("gone"), Busy("soon")])
def test_a_peer_that_is_silent_or_busy_once_is_asked_again(error: KmsError) -> None:
    peer = Peer(error)

    assert RetryingCaller("peer", QUICK).call("wrap", peer) == "ok"
    assert peer.calls == 2


@pytest.mark.parametrize(
    ("error", "may_repeat"),
    [
        (DecryptFailed(), True),
        (BackendUnavailable("token refused"), True),
        (Busy("later", retry_after_s=30), True),  # more than a caller has
        (Unreachable("gone"), False),
    ],
)
def test_a_refusal_or_what_must_not_be_repeated_is_not_asked_again(
    error: KmsError, *, may_repeat: bool
) -> None:
    caller, peer = RetryingCaller("peer", QUICK), Peer(error)

    with pytest.raises(type(error)):
        (caller.call if may_repeat else caller.once)("wrap", peer)
    assert peer.calls == 1


def test_retries_end_when_the_budget_is_spent() -> None:
    patience = RetryPolicy(first_wait_s=0.0, failures=10_000, most_tokens=4.0)
    guard, peer = RetryingCaller("peer", patience), Peer(*(Unreachable("gone") for _ in range(1000)))
    for _ in range(100):
        with pytest.raises(Unreachable):
            guard.call("wrap", peer)

    assert peer.calls <= 100 + 4 + 100 * patience.budget + 1


def test_silence_opens_the_breaker_and_then_nobody_asks() -> None:
    guard, peer = RetryingCaller("peer", QUICK), Peer(*(Unreachable("gone") for _ in range(3)))
    for _ in range(3):
        with pytest.raises(Unreachable):
            guard.once("wrap", peer)
    with pytest.raises(Unreachable) as refused:
        guard.once("wrap", peer)

    assert peer.calls == 3
    assert refused.value.retry_after_s > 1


@pytest.mark.parametrize("error", [DecryptFailed(), Busy("500"), BackendUnavailable("403")])
def test_no_error_that_a_request_can_cause_opens_the_breaker(error: KmsError) -> None:
    guard, peer = RetryingCaller("peer", QUICK), Peer(*(error for _ in range(20)))
    for _ in range(20):
        with pytest.raises(type(error)):
            guard.once("unwrap", peer)

    assert guard.once("unwrap", peer) == "ok"


def test_silences_with_answers_between_them_do_not_add_up() -> None:
    guard = RetryingCaller("peer", QUICK)
    for _ in range(10):
        with pytest.raises(Unreachable):
            guard.once("wrap", Peer(Unreachable("gone")))
        guard.once("wrap", Peer())

    assert guard.once("wrap", Peer()) == "ok"


def test_one_call_probes_after_the_pause_and_an_answer_closes() -> None:
    clock = Clock()
    breaker = open_breaker(clock)
    clock.now += QUICK.open_s
    breaker.enter()
    with pytest.raises(Unreachable):
        breaker.enter()  # a probe is under way
    breaker.answered()
    breaker.enter()
    breaker.enter()


def test_a_probe_that_fails_doubles_the_pause_up_to_a_limit() -> None:
    clock = Clock()
    breaker = open_breaker(clock)
    for pause in (QUICK.open_s, 15.0, 15.0):
        clock.now += pause - 0.1
        with pytest.raises(Unreachable):
            breaker.enter()
        clock.now += 0.1
        breaker.enter()
        breaker.failed()


def test_a_call_that_is_broken_off_while_it_probes_does_not_close_the_peer_for_ever() -> None:
    def broken_off() -> str:
        raise KeyboardInterrupt

    guard = RetryingCaller("peer", RetryPolicy(attempts=1, failures=1, open_s=1e-6, longest_open_s=1e-6))
    with pytest.raises(Unreachable):
        guard.once("wrap", Peer(Unreachable("gone")))
    with pytest.raises(KeyboardInterrupt):
        guard.once("wrap", broken_off)

    assert guard.once("wrap", Peer()) == "ok"


# -- the time of a caller, and which backend is asked first --------------------------------------------


def test_no_retry_is_made_for_which_no_time_is_left() -> None:
    caller, peer = RetryingCaller("peer", RetryPolicy(first_wait_s=0.9)), Peer(Unreachable("gone"))
    with http_client.within(0.8), pytest.raises(Unreachable):
        caller.call("wrap", peer)
    assert peer.calls == 1
    with http_client.within(0), pytest.raises(Unreachable, match="in time"):
        caller.call("wrap", peer)

    assert peer.calls == 1


def test_a_peer_that_was_silent_counts_as_such_for_a_while_and_then_one_call_tries() -> None:
    clock = Clock()
    breaker = Breaker("peer", QUICK, clock)
    assert not breaker.was_silent()
    breaker.failed()
    assert breaker.was_silent()
    clock.now += 30
    assert [breaker.was_silent() for _ in range(3)] == [False, True, True]
    breaker.answered()

    assert not breaker.was_silent()


# -- calls that went in one request ------------------------------------------------------------------


def test_calls_of_one_request_count_once_and_cost_one_retry() -> None:
    """64 callers of a batch whose connection broke are no 64 failures: the breaker stays closed."""
    caller = RetryingCaller("memory", RetryPolicy(first_wait_s=0.0, failures=2, budget=0.0, most_tokens=1.0))
    lost = Unreachable("the connection of a batch broke")
    assert [caller.call("wrap", Peer(lost)) for _ in range(64)] == ["ok"] * 64

    with pytest.raises(Unreachable):  # the next failure finds no token
        caller.call("wrap", Peer(Unreachable("another")))
    assert caller.once("wrap", Peer()) == "ok"
