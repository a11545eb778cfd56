"""The maintenance process of a worker: what is done at an interval and waits for a disk or another peer.

The parent forks it, and another one when it ends. So neither the heartbeat nor a fork waits for a bucket, a
mount or a receiver of webhooks that hangs.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import structlog

from kms_core.periodic import PeriodicThread
from kms_core.programs.tether import PR_SET_PDEATHSIG

NAME: Final = "kms-maintenance"
"""The name of the process, in ``ps`` and ``/proc/<pid>/comm``."""
_PR_SET_NAME: Final = 15  # prctl(2)
_EVERY_S: Final = 1.0
_EXIT_FAILED: Final = 70  # EX_SOFTWARE
_log = structlog.get_logger(__name__)


class Maintenance(PeriodicThread):
    """Forks the maintenance process, and another one whenever it has ended, which is looked at every second.

    The process ends with its parent, also if that is killed.
    """

    def __init__(self, prepare: Callable[[], object], build: Callable[[], Sequence[PeriodicThread]]) -> None:
        """Both are called in the new process: ``prepare`` first; ``build`` makes the threads that it runs."""
        super().__init__("maintenance", _EVERY_S, failed="maintenance.not_started")
        self._prepare, self._build = prepare, build
        self._pid, self._leave_s = 0, 0.0

    def start(self) -> None:
        """Fork it now, before there are other threads, and look after it from then on."""
        self.attempt(self.round)
        super().start()

    def round(self) -> None:
        if not self._pid or self._has_ended():
            self._pid = self._fork()

    def end(self, wait_s: float) -> None:
        """Have the threads of the process end their rounds, for ``wait_s`` seconds at most."""
        self._leave_s = wait_s
        self.stop(wait_s + _EVERY_S)

    def finish(self) -> None:
        """End the process from the thread that forked it: the kernel kills it with that thread (prctl(2))."""
        if not self._pid:
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
            until = time.monotonic() + self._leave_s
            while not self._has_ended() and time.monotonic() < until:
                time.sleep(0.02)

    def _has_ended(self) -> bool:
        with suppress(ChildProcessError):
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if not ended:
                return False
            if not self.stopping:
                _log.error("maintenance.ended", pid=self._pid, status=os.waitstatus_to_exitcode(status))
        return True

    def _fork(self) -> int:
        parent, pid = os.getpid(), os.fork()
        if pid:
            return pid
        try:
            libc = ctypes.CDLL(None)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            libc.prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)
            if os.getppid() == parent:  # else it ended before that
                self._prepare()
                _work(self._build)
        except BaseException as exc:  # noqa: BLE001 -- the top of the process
            _log.exception("maintenance.failed", error=type(exc).__name__)
        finally:
            os._exit(_EXIT_FAILED)


def _work(build: Callable[[], Sequence[PeriodicThread]]) -> None:
    """Run the threads until SIGTERM. Other signals are for the parent alone."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threads = build()
    for thread in threads:
        thread.start()
    stopping.wait()
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join()
    os._exit(os.EX_OK)
