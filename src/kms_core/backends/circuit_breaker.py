"""Calls to a server with a budget of retries, a circuit breaker, and metrics of both. Times are in seconds.

Calls that went in one request fail by one exception, which counts once and costs one retry.

Only ``Unreachable`` opens the breaker: an error that request data can cause would let one caller lock out
the others.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar
from weakref import WeakSet

import structlog
from opentelemetry.trace import SpanKind

from kms_core import http_client
from kms_core.backoff import jittered_wait_s
from kms_core.http_client import Busy, Unreachable
from kms_core.observability import metrics, tracing
from kms_protocol.errors import BackendUnavailable, KmsError

T = TypeVar("T")
_LONGEST_WAIT_S: Final = 1.0
SILENT_S: Final = 30.0
"""Seconds after a call without an answer in which other backends of the key are asked first."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of retries, and of the circuit breaker.

    A retry costs one token of a bucket that each call fills by ``budget``: with 0.1, a failing server gets a
    tenth more calls, not three times as many. After ``failures`` consecutive calls without an answer the
    breaker is open for ``open_s``. Then one call probes the server, and each failed probe doubles the pause,
    up to ``longest_open_s``.
    """

    attempts: int = 3
    first_wait_s: float = 0.05
    budget: float = 0.1
    most_tokens: float = 10.0
    failures: int = 5
    open_s: float = 2.0
    longest_open_s: float = 30.0


class Breaker:
    """A circuit breaker: closed, open, or half open, when one call at a time probes the server."""

    def __init__(self, name: str, policy: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0  # above zero: not closed
        self._until = 0.0
        self._silent_until = 0.0  # above zero: the last call had no answer
        self._probing = False

    def was_silent(self) -> bool:
        """Return whether the last call had no answer, within 30 s; later False once, for one call to try."""
        with self._lock:
            now, until = self._clock(), self._silent_until
            if 0 < until <= now:
                self._silent_until = now + SILENT_S
            return now < until

    def enter(self) -> None:
        """Begin a call. Raises Unreachable while the breaker is open."""
        with self._lock:
            if not self._pause_s:
                return
            left = self._until - self._clock()
            if left <= 0 and not self._probing:
                self._probing = True
                return
            wait = max(left, self._policy.first_wait_s)
        raise Unreachable(
            f"The {self._name} backend has not answered lately; the next try is in {wait:.0f} s",
            retry_after_s=wait,
        )

    def answered(self) -> None:
        """Record an answer, whatever its content."""
        with self._lock:
            closed, self._pause_s = bool(self._pause_s), 0.0
            self._failures, self._silent_until, self._probing = 0, 0.0, False
        if closed:
            self._report(is_open=False)

    def failed(self) -> None:
        """Record a call without an answer."""
        with self._lock:
            self._failures, self._silent_until = self._failures + 1, self._clock() + SILENT_S
            opened = not self._pause_s and self._failures >= self._policy.failures
            if opened:
                self._pause_s = self._policy.open_s
            elif self._probing:
                self._pause_s = min(self._pause_s * 2, self._policy.longest_open_s)
            if opened or self._probing:
                self._until = self._clock() + self._pause_s
            self._probing = False
        if opened:
            self._report(is_open=True)

    def left(self) -> None:
        """Record a call that ended without information about the server, such as an interrupted probe."""
        with self._lock:
            self._probing = False

    def _report(self, *, is_open: bool) -> None:
        metrics.BREAKER_OPEN.labels(self._name).set(is_open)
        log = _log.warning if is_open else _log.info
        log("backend.breaker", backend=self._name, state="open" if is_open else "closed")


class RetryingCaller:
    """Calls to one server: timed, counted, and retried where that is safe and the budget allows."""

    def __init__(self, name: str, policy: RetryPolicy) -> None:
        self._name = name
        self._policy = policy
        self.breaker = Breaker(name, policy)
        self._lock = threading.Lock()
        self._tokens = policy.most_tokens
        self._counted: WeakSet[BackendUnavailable] = WeakSet()
        self._retried: WeakSet[BackendUnavailable] = WeakSet()

    def call(self, operation: str, function: Callable[[], T]) -> T:
        """Call ``function``, with retries while ``http_client.within`` leaves time for them.

        Raises its errors, and Unreachable while the breaker is open.
        """
        with self._lock:
            self._tokens = min(self._tokens + self._policy.budget, self._policy.most_tokens)
        for attempt in range(1, self._policy.attempts):
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
        """Call ``function`` once, for calls that must not be repeated. Raises as ``call`` does."""
        with tracing.span(f"{self._name} {operation}", SpanKind.CLIENT):
            if http_client.left_s() <= 0:
                raise Unreachable(f"The {self._name} backend did not answer in time")
            self.breaker.enter()
            started = time.perf_counter()
            result = "error"
            try:
                answer = function()
                result = "ok"
            except Unreachable as exc:
                result = "unreachable"
                if self._is_first(exc):
                    self.breaker.failed()
                raise
            except KmsError as exc:
                result = "unavailable" if isinstance(exc, BackendUnavailable) else "refused"
                self.breaker.answered()
                raise
            except BaseException:
                self.breaker.left()
                raise
            else:
                self.breaker.answered()
                return answer
            finally:
                seconds = time.perf_counter() - started
                metrics.BACKEND_SECONDS.labels(self._name, operation, result).observe(seconds)
                tracing.note(backend=self._name, operation=operation, result=result)

    def _is_first(self, exc: Unreachable) -> bool:
        """Return whether no other call of the same request had this error before."""
        with self._lock:
            first = exc not in self._counted
            self._counted.add(exc)
        return first

    def _wait(self, attempt: int, exc: BackendUnavailable) -> float | None:
        """Seconds until the next attempt. Calls of one request, which have one error, cost one token.

        None without budget, if the server asks for more than a second, or if no time is left.
        """
        first = self._policy.first_wait_s
        asked = exc.retry_after_s if isinstance(exc, Busy) else 0.0
        if max(first * 2.0 ** (attempt - 1), asked) > min(_LONGEST_WAIT_S, http_client.left_s()):
            return None
        with self._lock:
            if exc not in self._retried:
                if self._tokens < 1:
                    return None
                self._tokens -= 1
                self._retried.add(exc)
        return jittered_wait_s(first, attempt, at_least_s=asked)
