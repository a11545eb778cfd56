"""Waits for a fact. One bound for every wait of the tests, which no healthy machine reaches, however busy."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import httpx2 as httpx
import pytest

WAIT_S: Final = 90.0  # below half of the timeout of a test, so that two waits can say what they waited for
POLL_S: Final = 0.05
_TAIL: Final = 3000  # characters of a log


def until(fact: Callable[[], object], what: str | Callable[[], str], *, poll_s: float = POLL_S) -> None:
    """Wait until ``fact`` is true. Raises AssertionError that says ``what``: a text, or a function of one."""
    deadline = time.monotonic() + WAIT_S
    while not fact():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {WAIT_S:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(poll_s)


def until_up(
    process: subprocess.Popen[bytes], is_up: Callable[[], object], log: Callable[[], str] = str
) -> None:
    """Wait until a server is up. Raises AssertionError with the end of its log if it is not, or has ended."""

    def fact() -> object:
        assert process.poll() is None, f"ended with {process.returncode}:\n{log()[-_TAIL:]}"
        return is_up()

    until(fact, lambda: f"the start of {process.args!r}\n{log()[-_TAIL:]}")


class RealTime:
    """Time that passes, for laws about seconds. ``first_tier.py`` refuses it to tests of the first tier."""

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    @staticmethod
    def now_s() -> float:
        """Return the seconds of the monotonic clock."""
        return time.monotonic()

    @staticmethod
    def processor_s() -> float:
        """Return the seconds of processor time that this process has taken."""
        return time.process_time()


@contextmanager
def monotonic_ahead(seconds: float) -> Iterator[None]:
    """The monotonic clock of this process is ahead by so many seconds."""
    genuine = time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: genuine() + seconds)
        yield


def answers(url: str) -> bool:
    """Whether a server of this machine answers GET of this URL well."""
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False
