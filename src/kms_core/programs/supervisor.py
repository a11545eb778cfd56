"""Runs child programs, and restarts them, until a signal to stop."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Final

from kms_core import secure_files
from kms_core.programs import tether
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, EXIT_UNAVAILABLE

STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
REPEAT_S: Final = 0.3  # a terminal and a wrapper may both deliver one Ctrl-C
FIRST_DELAY_S: Final = 0.2  # before a restart; each further one is twice as long
LONGEST_DELAY_S: Final = 10.0
STEADY_S: Final = 30.0  # a child that ran for so long is restarted after the first delay again
START_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.05
IDLE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Child:
    """One program: ``argv`` begins with an absolute path, ``env`` is its whole environment.

    ``ready`` is called until it returns True; it takes at most a second. ``grace_s`` is the time between
    SIGTERM and SIGKILL. ``first``: later children start once this one is ready. Its output is appended to
    ``log_path``, else to the standard error of this process. ``pass_fds`` stay open in it.
    """

    name: str
    argv: Sequence[str]
    ready: Callable[[], bool] = field(repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    grace_s: float = 10.0
    first: bool = False
    log_path: Path | None = None
    pass_fds: tuple[int, ...] = ()


def say(text: str) -> None:
    """Print a line for the user on standard error, unless that cannot be written."""
    with suppress(OSError):
        sys.stderr.write(f"kms: {text}\n")
        sys.stderr.flush()


@contextmanager
def stop_signals() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits for a signal, at most so many seconds; True for a signal to stop.

    The death of a child ends its wait too. For the main thread only.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.settimeout(0)  # a signal handler must not wait
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        wanted = STOP_SIGNALS | {signal.SIGCHLD}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            wanted -= {signal.SIGHUP}
        old = {number: signal.signal(number, lambda *_: None) for number in wanted}  # read from the socket
        try:
            yield partial(_wait, reader)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)


def _wait(reader: socket.socket, timeout_s: float) -> bool:
    readable, _, _ = select.select([reader], [], [], max(0.0, timeout_s))
    return bool(readable) and not STOP_SIGNALS.isdisjoint(reader.recv(4096))


class Supervisor:
    """Runs one child, and restarts it after growing delays."""

    def __init__(self, child: Child, pid_dir: Path) -> None:
        self.child = child
        self.was_ready = False
        self.refused = False
        self.start_at = 0.0
        self._delay_s = FIRST_DELAY_S
        self._started_at = 0.0
        self._pid_path = pid_dir / f"{child.name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None

    def tick(self) -> None:
        """Reap, start or check the child, as is due."""
        if self._process is not None and self._has_ended(self._process):
            self._plan_restart(self._reap(self._process))
        elif self._process is None and time.monotonic() >= self.start_at:
            self._start()
        if self._process is not None and not self.was_ready:
            self.was_ready = self.child.ready()

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def gone(self) -> bool:
        """Return whether the child has ended; reaps it and kills its process group."""
        if self._process is not None and self._has_ended(self._process):
            self._reap(self._process)
        return self._process is None

    def kill(self) -> None:
        """Kill the child and its process group."""
        if self._process is not None:
            self._reap(self._process)

    def _start(self) -> None:
        child = self.child
        log: AbstractContextManager[IO[bytes] | int] = nullcontext(tether.OUR_STDERR)
        with append_only(child.log_path) if child.log_path else log as output:
            self._process = tether.spawn(child.argv, env=child.env, output=output, pass_fds=child.pass_fds)
        self._started_at = time.monotonic()
        with suppress(OSError):  # without room for it the child works all the same
            secure_files.write(self._pid_path, b"%d\n" % self._process.pid, locked=True)

    @staticmethod
    def _has_ended(process: subprocess.Popen[bytes]) -> bool:
        """True if the process has ended; it is not reaped, so that its process group's number stays taken."""
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        """Kill what is left of the process group, and return the status of the child."""
        os.killpg(process.pid, signal.SIGKILL)
        self._process = None
        self._pid_path.unlink(missing_ok=True)
        return process.wait()

    def _plan_restart(self, status: int) -> None:
        if status == EXIT_CONFIGURATION:
            self.refused = True
            return
        now = time.monotonic()
        if now - self._started_at >= STEADY_S:
            self._delay_s = FIRST_DELAY_S
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        where = ""
        if path := self.child.log_path:
            last = path.read_text("utf-8", "replace").rstrip().rpartition("\n")[2]
            where = f": {last!r}, see {path}" if status > 0 else f", see {path}"
        say(f"{self.child.name} ended with {how}{where}; starting it again in {self._delay_s:g} s")
        self.start_at = now + self._delay_s
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)


def append_only(path: Path) -> IO[bytes]:
    """The file at ``path`` (0600), opened for appending."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600))


def supervise(children: Sequence[Child], *, pid_dir: Path, on_ready: Callable[[], None]) -> int:
    """Run ``children`` until SIGINT, SIGTERM or SIGHUP; return the exit code.

    They start in the given order. They stop at the same time, those that are ``first`` after the others, each
    within its grace; a second signal kills them. A child that ends is restarted, unless it exits with 78
    (wrong configuration): then all stop. Call it from the main thread. Returns 0 after a clean stop, 1 after
    a kill, 69 if not all were ready in time, 78 as said.
    """
    supervisors = [Supervisor(child, pid_dir) for child in children]
    with stop_signals() as wait:
        try:
            code = _watch(supervisors, wait, on_ready)
            return _stop(supervisors, wait, code)
        finally:
            for supervisor in supervisors:
                supervisor.kill()


def _watch(supervisors: list[Supervisor], wait: Callable[[float], bool], on_ready: Callable[[], None]) -> int:
    deadline = time.monotonic() + START_TIMEOUT_S
    announced = False
    while True:
        _tick(supervisors)
        refused = next((supervisor.child.name for supervisor in supervisors if supervisor.refused), None)
        if refused is not None:
            say(f"error: {refused} refused its configuration: see its message above")
            return EXIT_CONFIGURATION
        late = [supervisor.child.name for supervisor in supervisors if not supervisor.was_ready]
        if not late and not announced:
            announced = True
            on_ready()
        if late and time.monotonic() > deadline:
            say(f"error: not ready after {START_TIMEOUT_S:g} s: {', '.join(late)}")
            return EXIT_UNAVAILABLE
        if wait(_wait_s(supervisors)):
            return 0


def _tick(supervisors: list[Supervisor]) -> None:
    for supervisor in supervisors:
        supervisor.tick()
        if supervisor.child.first and not supervisor.was_ready:
            return


def _wait_s(supervisors: list[Supervisor]) -> float:
    """The time until the next restart can be due; deaths of children end the wait anyway."""
    if not all(supervisor.was_ready for supervisor in supervisors):
        return POLL_S
    due = [supervisor.start_at - time.monotonic() for supervisor in supervisors if not supervisor.alive]
    return min([IDLE_S, *due])


def _stop(supervisors: list[Supervisor], wait: Callable[[float], bool], code: int) -> int:
    """Stop the children, those that are ``first`` last. Return ``code``, or 1 to have what is left killed."""
    asked_at = time.monotonic()
    say("stopping; press Ctrl-C again to kill")
    for is_first in (False, True):
        group = [supervisor for supervisor in supervisors if supervisor.child.first == is_first]
        if not _stop_together(group, wait, asked_at):
            return EXIT_OTHER
    return code


def _stop_together(group: list[Supervisor], wait: Callable[[float], bool], asked_at: float) -> bool:
    """Return True once all have ended, False at a second signal to stop; the first was at ``asked_at``."""
    begun_at = time.monotonic()
    for supervisor in group:
        supervisor.ask_to_stop()
    while not all(supervisor.gone() for supervisor in group):
        again = wait(POLL_S)
        if again and time.monotonic() - asked_at > REPEAT_S:
            return False
        for supervisor in group:
            if supervisor.alive and time.monotonic() - begun_at > supervisor.child.grace_s:
                say(f"{supervisor.child.name} did not stop in {supervisor.child.grace_s:g} s; killing it")
                supervisor.kill()
    return True
