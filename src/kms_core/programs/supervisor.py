"""Keeps child programs running until told to stop; knows nothing of what they do."""

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

from kms_core.programs import tether
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, EXIT_UNAVAILABLE

STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


@dataclass(frozen=True, slots=True)
class Child:
    """One program: ``argv`` begins with an absolute path, ``env`` is its whole environment.

    ``ready`` is asked again and again until it is true once; it answers within a second. ``grace_s``
    lies between SIGTERM and SIGKILL. ``first``: later children start when this one is ready.
    ``log_path`` takes what it prints, else our standard error does. ``pass_fds`` stay open in it.
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
    """How fast things happen. A child that lived ``steady_s`` is forgiven its earlier deaths."""

    first_delay_s: float = 0.2
    longest_delay_s: float = 10.0
    steady_s: float = 30.0
    start_timeout_s: float = 60.0
    poll_s: float = 0.05
    idle_s: float = 5.0


def say(text: str) -> None:
    """A line for the user, on standard error."""
    sys.stderr.write(f"kms: {text}\n")
    sys.stderr.flush()


class Signals:
    """Requests to stop and deaths of children, as something to wait for. Main thread only."""

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
        """Sleep until a signal comes or the time is over; True if somebody asks to stop."""
        readable, _, _ = select.select([self._reader], [], [], max(0.0, timeout_s))
        return bool(readable) and not STOP_SIGNALS.isdisjoint(self._reader.recv(4096))


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: the byte in the wakeup socket is the message."""


class Supervisor:
    """One child over its lives: starts it, notices its end, starts it again later and later."""

    def __init__(self, child: Child, pid_dir: Path, pace: RestartPolicy) -> None:
        self.child = child
        self.was_ready = False
        self.refused = False
        self.start_at = 0.0
        self._pace = pace
        self._delay_s = pace.first_delay_s
        self._started_at = 0.0
        self._pid_path = pid_dir / f"{child.name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None

    def tick(self) -> None:
        """Do what is due: bury, start, ask whether it is ready."""
        if self._process is not None and self._ended(self._process):
            self._plan_restart(self._bury(self._process))
        elif self._process is None and time.monotonic() >= self.start_at:
            self._start()
        if self._process is not None and not self.was_ready:
            self.was_ready = self.child.ready()

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def gone(self) -> bool:
        """Whether the child has ended; what is left of it is buried."""
        if self._process is not None and self._ended(self._process):
            self._bury(self._process)
        return self._process is None

    def kill(self) -> None:
        """End it and all that it started, now."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._bury(self._process)

    def _start(self) -> None:
        child = self.child
        output = tether.OUR_STDERR if child.log_path is None else append_only(child.log_path)
        try:
            self._process = tether.spawn(child.argv, env=child.env, output=output, pass_fds=child.pass_fds)
        finally:
            if output != tether.OUR_STDERR:
                os.close(output)
        self._started_at = time.monotonic()
        _write(self._pid_path, f"{self._process.pid}\n")

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> bool:
        """Look without reaping: until it is reaped nobody else can get its process group's number."""
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _bury(self, process: subprocess.Popen[bytes]) -> int:
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
        if now - self._started_at >= self._pace.steady_s:
            self._delay_s = self._pace.first_delay_s
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        where = f", see {self.child.log_path}" if self.child.log_path else ""
        say(f"{self.child.name} ended with {how}{where}; starting it again in {self._delay_s:g} s")
        self.start_at = now + self._delay_s
        self._delay_s = min(2 * self._delay_s, self._pace.longest_delay_s)


def append_only(path: Path) -> int:
    """A handle that adds to the file at ``path`` (0600); the caller closes it."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _write(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` (0600), whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)
    temporary.replace(path)


def supervise(
    children: Sequence[Child],
    *,
    pid_dir: Path,
    on_ready: Callable[[], None],
    pace: RestartPolicy | None = None,
) -> int:
    """Run ``children`` until SIGINT, SIGTERM or SIGHUP; return the exit code.

    They start in the order given. They stop all at once, those that are ``first`` after the others, each
    within its grace; a second signal kills. One that ends is started again, unless it exits with 78: a
    wrong configuration does not mend itself, so everything stops. Call it from the main thread. 0 after a
    clean stop, 1 after a kill, 69 if not all were ready in time, 78 as said.
    """
    pace = pace or RestartPolicy()
    minders = [Supervisor(child, pid_dir, pace) for child in children]
    with Signals() as signals:
        try:
            code = _watch(minders, signals, on_ready, pace)
            return _stop(minders, signals, code, pace)
        finally:
            for minder in minders:
                minder.kill()


def _watch(
    minders: list[Supervisor], signals: Signals, on_ready: Callable[[], None], pace: RestartPolicy
) -> int:
    deadline = time.monotonic() + pace.start_timeout_s
    announced = False
    while True:
        _tick(minders)
        refused = next((minder.child.name for minder in minders if minder.refused), None)
        if refused is not None:
            say(f"error: {refused} refused its configuration, as it says above")
            return EXIT_CONFIGURATION
        late = [minder.child.name for minder in minders if not minder.was_ready]
        if not late and not announced:
            announced = True
            on_ready()
        if late and time.monotonic() > deadline:
            say(f"error: not ready after {pace.start_timeout_s:g} s: {', '.join(late)}")
            return EXIT_UNAVAILABLE
        if signals.wait(_nap_s(minders, pace)):
            return 0


def _tick(minders: list[Supervisor]) -> None:
    for minder in minders:
        minder.tick()
        if minder.child.first and not minder.was_ready:
            return


def _nap_s(minders: list[Supervisor], pace: RestartPolicy) -> float:
    """Until something can be due; deaths wake us anyway."""
    if not all(minder.was_ready for minder in minders):
        return pace.poll_s
    due = [minder.start_at - time.monotonic() for minder in minders if not minder.alive]
    return min([pace.idle_s, *due])


def _stop(minders: list[Supervisor], signals: Signals, code: int, pace: RestartPolicy) -> int:
    asked_at = time.monotonic()
    say("stopping; press Ctrl-C again to kill")
    for together in _by_turns(minders):
        for minder in together:
            minder.ask_to_stop()
        asked = time.monotonic()
        while not all(minder.gone() for minder in together):
            again = signals.wait(pace.poll_s)
            if again and time.monotonic() - asked_at > Signals.REPEAT_S:
                return EXIT_OTHER  # the caller kills what is left
            for minder in together:
                if minder.alive and time.monotonic() - asked > minder.child.grace_s:
                    say(f"{minder.child.name} did not stop in {minder.child.grace_s:g} s; killing it")
                    minder.kill()
    return code


def _by_turns(minders: list[Supervisor]) -> list[list[Supervisor]]:
    """What stops together: all that nobody needs, then each of the ``first`` ones, the last one first."""
    others = [minder for minder in minders if not minder.child.first]
    return [others, *([minder] for minder in reversed(minders) if minder.child.first)]
