"""Runs child programs, and restarts them, until a signal to stop."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from kms_core import secure_files
from kms_core.programs import tether
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, EXIT_UNAVAILABLE

STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


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


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Delays and timeouts in seconds. After ``steady_s`` of running, delays begin at the first one again."""

    first_delay_s: float = 0.2
    longest_delay_s: float = 10.0
    steady_s: float = 30.0
    start_timeout_s: float = 60.0
    poll_s: float = 0.05
    idle_s: float = 5.0


def say(text: str) -> None:
    """Print a line for the user on standard error."""
    sys.stderr.write(f"kms: {text}\n")
    sys.stderr.flush()


class Signals:
    """Waits for signals to stop and for deaths of children. For the main thread only."""

    REPEAT_S: Final = 0.3  # a terminal and a wrapper may both deliver one Ctrl-C

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.settimeout(0)  # a signal handler must not wait
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        wanted = STOP_SIGNALS | {signal.SIGCHLD}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            wanted -= {signal.SIGHUP}
        self._old = {number: signal.signal(number, _heard) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a signal, at most ``timeout_s`` seconds; True for a signal to stop."""
        readable, _, _ = select.select([self._reader], [], [], max(0.0, timeout_s))
        return bool(readable) and not STOP_SIGNALS.isdisjoint(self._reader.recv(4096))


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal is read from the wakeup socket."""


class Supervisor:
    """Runs one child, and restarts it after growing delays."""

    def __init__(self, child: Child, pid_dir: Path, policy: RestartPolicy) -> None:
        self.child = child
        self.was_ready = False
        self.refused = False
        self.start_at = 0.0
        self._policy = policy
        self._delay_s = policy.first_delay_s
        self._started_at = 0.0
        self._pid_path = pid_dir / f"{child.name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None

    def tick(self) -> None:
        """Reap, start or check the child, as is due."""
        if self._process is not None and self._ended(self._process):
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
        if self._process is not None and self._ended(self._process):
            self._reap(self._process)
        return self._process is None

    def kill(self) -> None:
        """Kill the child and its process group."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._reap(self._process)

    def _start(self) -> None:
        child = self.child
        output = tether.OUR_STDERR if child.log_path is None else append_only(child.log_path)
        try:
            self._process = tether.spawn(child.argv, env=child.env, output=output, pass_fds=child.pass_fds)
        finally:
            if output != tether.OUR_STDERR:
                os.close(output)
        self._started_at = time.monotonic()
        secure_files.write(self._pid_path, b"%d\n" % self._process.pid, locked=True)

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> bool:
        """True if the process has ended; it is not reaped, so that its process group's number stays taken."""
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        os.killpg(process.pid, signal.SIGKILL)  # pool processes that outlived their parent
        self._process = None
        self._pid_path.unlink(missing_ok=True)
        return process.wait()

    def _plan_restart(self, status: int) -> None:
        if status == EXIT_CONFIGURATION:
            self.refused = True
            return
        now = time.monotonic()
        if now - self._started_at >= self._policy.steady_s:
            self._delay_s = self._policy.first_delay_s
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        where = f", see {self.child.log_path}" if self.child.log_path else ""
        say(f"{self.child.name} ended with {how}{where}; starting it again in {self._delay_s:g} s")
        self.start_at = now + self._delay_s
        self._delay_s = min(2 * self._delay_s, self._policy.longest_delay_s)


def append_only(path: Path) -> int:
    """A descriptor that appends to the file at ``path`` (0600); the caller closes it."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def supervise(
    children: Sequence[Child],
    *,
    pid_dir: Path,
    on_ready: Callable[[], None],
    policy: RestartPolicy | None = None,
) -> int:
    """Run ``children`` until SIGINT, SIGTERM or SIGHUP; return the exit code.

    They start in the given order. They stop at the same time, those that are ``first`` after the others, each
    within its grace; a second signal kills them. A child that ends is restarted, unless it exits with 78
    (wrong configuration): then all stop. Call it from the main thread. Returns 0 after a clean stop, 1 after
    a kill, 69 if not all were ready in time, 78 as said.
    """
    policy = policy or RestartPolicy()
    supervisors = [Supervisor(child, pid_dir, policy) for child in children]
    with Signals() as signals:
        try:
            code = _watch(supervisors, signals, on_ready, policy)
            return _stop(supervisors, signals, code, policy)
        finally:
            for supervisor in supervisors:
                supervisor.kill()


def _watch(
    supervisors: list[Supervisor], signals: Signals, on_ready: Callable[[], None], policy: RestartPolicy
) -> int:
    deadline = time.monotonic() + policy.start_timeout_s
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
            say(f"error: not ready after {policy.start_timeout_s:g} s: {', '.join(late)}")
            return EXIT_UNAVAILABLE
        if signals.wait(_wait_s(supervisors, policy)):
            return 0


def _tick(supervisors: list[Supervisor]) -> None:
    for supervisor in supervisors:
        supervisor.tick()
        if supervisor.child.first and not supervisor.was_ready:
            return


def _wait_s(supervisors: list[Supervisor], policy: RestartPolicy) -> float:
    """The time until the next restart can be due; deaths of children end the wait anyway."""
    if not all(supervisor.was_ready for supervisor in supervisors):
        return policy.poll_s
    due = [supervisor.start_at - time.monotonic() for supervisor in supervisors if not supervisor.alive]
    return min([policy.idle_s, *due])


def _stop(supervisors: list[Supervisor], signals: Signals, code: int, policy: RestartPolicy) -> int:
    asked_at = time.monotonic()
    say("stopping; press Ctrl-C again to kill")
    for group in _stop_groups(supervisors):
        for supervisor in group:
            supervisor.ask_to_stop()
        asked = time.monotonic()
        while not all(supervisor.gone() for supervisor in group):
            again = signals.wait(policy.poll_s)
            if again and time.monotonic() - asked_at > Signals.REPEAT_S:
                return EXIT_OTHER  # the caller kills what is left
            for supervisor in group:
                if supervisor.alive and time.monotonic() - asked > supervisor.child.grace_s:
                    say(f"{supervisor.child.name} did not stop in {supervisor.child.grace_s:g} s; killing it")
                    supervisor.kill()
    return code


def _stop_groups(supervisors: list[Supervisor]) -> list[list[Supervisor]]:
    """Groups that stop group: all but the ``first`` ones, then each of those in reverse order."""
    others = [supervisor for supervisor in supervisors if not supervisor.child.first]
    return [others, *([supervisor] for supervisor in reversed(supervisors) if supervisor.child.first)]
