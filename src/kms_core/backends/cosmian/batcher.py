"""Calls that wait at once travel together: what gathers while a message is under way makes the next one.

Nobody waits for company: with nothing under way a call goes alone, at once. Knows no protocol and no peer.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from kms_core.http_client import Busy
from kms_protocol.errors import KmsError

MOST_ITEMS: Final = 64
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class _Call(Generic[Item, Outcome]):
    """One caller, woken by its outcome or by the batch that it has to send."""

    __slots__ = ("batch", "item", "outcome", "woken")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.woken = threading.Event()
        self.batch: Sequence[_Call[Item, Outcome]] = ()
        self.outcome: Outcome | KmsError = Busy("The message of several calls was broken off")


class Batcher(Generic[Item, Outcome]):
    """Sends the items of several threads in batches, of which ``lanes`` are under way at a time.

    ``send`` gets 1 to 64 items, and answers in their order an outcome for each, or the error of that one
    alone; an error that it raises is the error of all.
    """

    def __init__(
        self, send: Callable[[Sequence[Item]], Sequence[Outcome | KmsError]], *, lanes: int = 1
    ) -> None:
        self._send = send
        self._free = lanes
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Item, Outcome]] = deque()

    def call(self, item: Item, wait_s: float) -> Outcome:
        """The outcome of ``item``. Raises its error, and TimeoutError after ``wait_s`` without one.

        ``send`` runs in the thread of the last call of its batch, the one with the most time left, and
        bounds its own waits by that thread's time.
        """
        call: _Call[Item, Outcome] = _Call(item)
        with self._lock:
            self._waiting.append(call)
            self._start()
        if not call.woken.wait(wait_s):
            self._give_up(call)
        if call.batch:
            self._carry(call.batch)
        if isinstance(call.outcome, KmsError):
            raise call.outcome
        return call.outcome

    @property
    def waiting(self) -> int:
        """How many calls are in no batch yet."""
        return len(self._waiting)

    def _start(self) -> None:
        """Under the lock: with a lane free the oldest calls make a batch, which the last of them carries."""
        if not self._free or not self._waiting:
            return
        self._free -= 1
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_ITEMS))]
        batch[-1].batch = batch
        batch[-1].woken.set()

    def _carry(self, batch: Sequence[_Call[Item, Outcome]]) -> None:
        outcomes: Sequence[Outcome | KmsError] = ()
        try:
            outcomes = self._send([call.item for call in batch])
        except KmsError as exc:
            outcomes = [exc] * len(batch)
        finally:
            with self._lock:
                self._free += 1
                self._start()
            for call, outcome in zip(batch, outcomes, strict=False):  # none if ``send`` was broken off
                call.outcome = outcome
            for call in batch:
                call.woken.set()

    def _give_up(self, call: _Call[Item, Outcome]) -> None:
        """Raises TimeoutError, unless the call was woken this very moment."""
        with self._lock:
            if call.woken.is_set():
                return
            if call in self._waiting:
                self._waiting.remove(call)
        raise TimeoutError
