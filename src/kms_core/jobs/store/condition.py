"""The condition of the job store as probes report it, without waiting for a Redis that is silent."""

import math
import threading
import time
from collections.abc import Callable
from typing import Final, Literal

EVERY_S: Final = 1.0
StoreCondition = Literal["available", "unavailable", "full", "read_only"]


class StoreProbe:
    """Asks Redis in a thread, at a probe and once in ``every_s`` at most; all probes share the answer.

    A Redis that does not answer for ``patience_s`` is unavailable: probes do not wait for it longer. Once it
    has failed a probe waits for 0.1 s at most, in which a Redis that is back answers.
    """

    def __init__(
        self, look: Callable[[], StoreCondition], patience_s: float = EVERY_S, every_s: float = EVERY_S
    ) -> None:
        """``look`` asks Redis, and may block. The times are in seconds."""
        self._look, self._patience_s, self._every_s = look, patience_s, every_s
        self._lock, self._asking = threading.Lock(), threading.Thread()
        self._began = -math.inf
        self._known: StoreCondition = "available"

    def condition(self) -> StoreCondition:
        """Return whether jobs can be submitted, as Redis said within the last ``every_s``."""
        with self._lock:
            if not self._asking.is_alive() and time.monotonic() - self._began >= self._every_s:
                self._began = time.monotonic()
                self._asking = threading.Thread(target=self._ask, name="store-probe", daemon=True)
                self._asking.start()
            wait_s = 0.1 if self._known == "unavailable" else self._patience_s
            asking, left_s = self._asking, self._began + wait_s - time.monotonic()
        asking.join(max(0.0, left_s))
        return "unavailable" if asking.is_alive() else self._known

    def failed(self) -> None:
        """Report that Redis did not answer another probe: it is unavailable until this one asks again."""
        self._known = "unavailable"

    def _ask(self) -> None:
        self._known = self._look()
