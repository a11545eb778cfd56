"""What stands between us and a peer: a budget of retries, a breaker, and the figures of both.

Only ``Unreachable`` opens the breaker: an error that request data can cause would let one caller lock out
the others. Times are in seconds.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from kms_core.http_client import Busy, Unreachable
from kms_core.observability import metrics, tracing
from kms_protocol.errors import BackendUnavailable, KmsError

T = TypeVar("T")
_LONGEST_WAIT_S: Final = 1.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often to try, and when to stop asking.

    A retry costs one token of a bucket that each call fills by ``budget``: with 0.1, a peer that fails gets
    a tenth more calls, not three times as many. After ``failures`` calls in a row without an answer nobody
    asks for ``open_s``; then one call probes, and each probe that fails doubles the pause, up to
    ``longest_open_s``.
    """

    attempts: int = 3
    first_wait_s: float = 0.05
    budget: float = 0.1
    most_tokens: float = 10.0
    failures: int = 5
    open_s: float = 2.0
    longest_open_s: float = 30.0


class Breaker:
    """Closed, open, or half open: then one call at a time finds out whether the peer is back."""

    def __init__(self, name: str, patience: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0  # above zero: not closed
        self._until = 0.0
        self._probing = False

    def enter(self) -> None:
        """Before a call. Raises Unreachable while the breaker is open."""
        with self._lock:
            if not self._pause_s:
                return
            left = self._until - self._clock()
            if left <= 0 and not self._probing:
                self._probing = True
                return
            wait = max(left, self._patience.first_wait_s)
        raise Unreachable(
            f"The {self._name} backend has not answered lately; the next try is in {wait:.0f} s",
            retry_after_s=wait,
        )

    def answered(self) -> None:
        """The peer is there, whatever it said."""
        with self._lock:
            closed, self._pause_s = bool(self._pause_s), 0.0
            self._failures, self._probing = 0, False
        if closed:
            self._tell(is_open=False)

    def failed(self) -> None:
        """The peer did not answer."""
        with self._lock:
            self._failures += 1
            opened = not self._pause_s and self._failures >= self._patience.failures
            if opened:
                self._pause_s = self._patience.open_s
            elif self._probing:
                self._pause_s = min(self._pause_s * 2, self._patience.longest_open_s)
            if opened or self._probing:
                self._until = self._clock() + self._pause_s
            self._probing = False
        if opened:
            self._tell(is_open=True)

    def left(self) -> None:
        """A call ended without telling anything about the peer: a probe does not stay under way."""
        with self._lock:
            self._probing = False

    def _tell(self, *, is_open: bool) -> None:
        metrics.BREAKER_OPEN.labels(self._name).set(is_open)
        log = _log.warning if is_open else _log.info
        log("backend.breaker", backend=self._name, state="open" if is_open else "closed")


class Guard:
    """Calls to one peer: timed, counted, tried again where that is safe and the budget allows."""

    def __init__(self, name: str, patience: RetryPolicy) -> None:
        self._name = name
        self._patience = patience
        self._breaker = Breaker(name, patience)
        self._lock = threading.Lock()
        self._tokens = patience.most_tokens

    def call(self, operation: str, function: Callable[[], T]) -> T:
        """A call that may be repeated. Raises what ``function`` raises, and Unreachable while open."""
        with self._lock:
            self._tokens = min(self._tokens + self._patience.budget, self._patience.most_tokens)
        for attempt in range(1, self._patience.attempts):
            try:
                return self.once(operation, function)
            except (Unreachable, Busy) as exc:
                wait = self._wait(attempt, exc)
                if wait is None:
                    raise
                metrics.BACKEND_RETRIES.labels(self._name).inc()
                time.sleep(wait)
        return self.once(operation, function)

    def once(self, operation: str, function: Callable[[], T]) -> T:
        """A call that must not be repeated."""
        with tracing.span(f"{self._name} {operation}", "client"):
            return self._once(operation, function)

    def _once(self, operation: str, function: Callable[[], T]) -> T:
        self._breaker.enter()
        started = time.perf_counter()
        result = "error"
        try:
            answer = function()
            result = "ok"
        except Unreachable:
            result = "unreachable"
            self._breaker.failed()
            raise
        except (Busy, BackendUnavailable):
            result = "unavailable"
            self._breaker.answered()
            raise
        except KmsError:
            result = "refused"
            self._breaker.answered()
            raise
        except BaseException:
            self._breaker.left()
            raise
        else:
            self._breaker.answered()
            return answer
        finally:
            seconds = time.perf_counter() - started
            metrics.BACKEND_SECONDS.labels(self._name, operation, result).observe(seconds)
            tracing.note(backend=self._name, operation=operation, result=result)

    def _wait(self, attempt: int, exc: BackendUnavailable) -> float | None:
        """Seconds until the next try, or None: no budget, or the peer wants more time than a caller has."""
        wait = self._patience.first_wait_s * 2.0 ** (attempt - 1)
        if isinstance(exc, Busy):
            wait = max(wait, exc.retry_after_s)
        if wait > _LONGEST_WAIT_S:
            return None
        with self._lock:
            if self._tokens < 1:
                return None
            self._tokens -= 1
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, no secret
