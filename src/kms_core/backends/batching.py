"""Calls of several threads to one server: joined in batches, or answered by one call for all of them.

No lock is held while a server is called. A forked child needs objects of its own: the thread that would
end a call of the parent is not there.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Final, Generic, TypeVar

from kms_core import http_client
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import KmsError

MOST_ITEMS: Final = 64
BATCHES: Final = 2  # a second caller does not wait for the first round trip; more gain nothing
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class _Call(Generic[Item, Outcome]):
    """One caller, woken by its outcome or with the batch that it has to send."""

    __slots__ = ("batch", "item", "outcome", "woken")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.woken = threading.Event()
        self.batch: Sequence[_Call[Item, Outcome]] = ()
        self.outcome: Outcome | KmsError = Busy("The request of several calls was interrupted")


class Batcher(Generic[Item, Outcome]):
    """Sends the items of several threads in batches, with at most ``batches`` in flight.

    ``send`` gets 1 to 64 items and returns, in their order, the outcome or the error of each; an error that
    it raises is the error of all.
    """

    def __init__(
        self, send: Callable[[Sequence[Item]], Sequence[Outcome | KmsError]], *, batches: int = BATCHES
    ) -> None:
        self._send = send
        self._free = batches
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Item, Outcome]] = deque()

    def call(self, item: Item, wait_s: float) -> Outcome:
        """The outcome of ``item``. Raises its error, and TimeoutError after ``wait_s`` without one.

        ``send`` runs in the thread of the last call of its batch, which has the most time left, and bounds
        its waits by that thread's deadline.
        """
        call: _Call[Item, Outcome] = _Call(item)
        with self._lock:
            self._waiting.append(call)
            self._start()
        if not call.woken.wait(wait_s):
            self._give_up(call)
        if call.batch:
            self._send_batch(call.batch)
        if isinstance(call.outcome, KmsError):
            raise call.outcome
        return call.outcome

    @property
    def waiting(self) -> int:
        """Number of calls that are in no batch yet."""
        return len(self._waiting)

    def _start(self) -> None:
        """Form a batch of the oldest calls, if one may be sent; the last of them sends it. Needs the lock."""
        if not self._free or not self._waiting:
            return
        self._free -= 1
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_ITEMS))]
        batch[-1].batch = batch
        batch[-1].woken.set()

    def _send_batch(self, batch: Sequence[_Call[Item, Outcome]]) -> None:
        outcomes: Sequence[Outcome | KmsError] = ()
        try:
            outcomes = self._send([call.item for call in batch])
        except KmsError as exc:
            outcomes = [exc] * len(batch)
        finally:
            with self._lock:
                self._free += 1
                self._start()
            for call, outcome in zip(batch, outcomes, strict=False):  # none if ``send`` was interrupted
                call.outcome = outcome
            for call in batch:
                call.woken.set()

    def _give_up(self, call: _Call[Item, Outcome]) -> None:
        """Raise TimeoutError, unless the call was woken at the same moment."""
        with self._lock:
            if call.woken.is_set():
                return
            if call in self._waiting:
                self._waiting.remove(call)
        raise TimeoutError


class SingleFlight(Generic[Outcome]):
    """Runs a function once for all threads that ask for the same name while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[Outcome]] = {}

    def run(self, name: Hashable, function: Callable[[], Outcome]) -> Outcome:
        """The result of ``function``, or of the call of this name that is running. Raises its error.

        Raises Unreachable if that call takes longer than ``http_client.within`` allows this thread.
        """
        mine: Future[Outcome] = Future()
        with self._lock:
            running = self._running.setdefault(name, mine)
        if running is not mine:
            try:
                return running.result(min(http_client.left_s(), threading.TIMEOUT_MAX))
            except TimeoutError:
                raise Unreachable("Another call waits for the same answer") from None
        error: KmsError = Busy("The request of several calls was interrupted")
        try:
            outcome = function()
        except KmsError as exc:
            error = exc
            raise
        else:
            mine.set_result(outcome)
            return outcome
        finally:
            with self._lock:
                del self._running[name]
            if not mine.done():
                mine.set_exception(error)
