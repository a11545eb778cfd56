"""Runs programs, alone or as a pipeline, and says what each run cost; knows no contender.

The peak of memory is the kernel's own high-water mark, looked at every 20 ms: ``ru_maxrss`` would be at least
that of the process which started the program.
"""

import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from benchmarks.measure import Reading, say

ROOT: Final = Path(__file__).parents[1]
PYTHON: Final = (sys.executable, "-m")
KMS: Final = (str(Path(sys.executable).with_name("kms")),)  # as installed
_AS_INSTALLED: Final = str(Path(__file__).with_name("as_installed"))
_OURS: Final = re.compile(r"KMS_|PROVISIONING_ENV$|COSMIAN_")
_LOOK_EVERY_MS: Final = 20
_PEAK: Final = re.compile(r"VmHWM:\s+(\d+) kB")


def environ(**more: str) -> Mapping[str, str]:
    """The environment, less what would configure the service and what only tests installed, and ``more``."""
    path = os.pathsep.join(filter(None, (_AS_INSTALLED, os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
    return kept | {"PYTHONPATH": path} | more


def installed(argv: Sequence[str]) -> bool:
    """Whether the program is there; says loudly that it is left out if not."""
    if shutil.which(argv[0]):
        return True
    say(f"SKIPPED {argv[0]}: it is not installed")
    return False


def run(argv: Sequence[str], *, limit_s: float = 600.0) -> Reading:
    """Run a program. Raises CalledProcessError unless it ends well, TimeoutExpired after ``limit_s``."""
    started = time.perf_counter()
    with (
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=environ(),
        ) as process,
    ):
        peak = _watch(process, limit_s)
        return _ended(process, started, peak)


def run_between_cats(argv: Sequence[str], source: Path) -> Reading:
    """Run ``cat SOURCE | argv | cat > /dev/null``: wall time of all, memory and processor time of argv."""
    started = time.perf_counter()
    with (
        subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as first,
        subprocess.Popen(
            argv,
            stdin=first.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environ(),
        ) as process,
        subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL) as last,
    ):
        for ours in (first.stdout, process.stdout):
            if ours:
                ours.close()
        peak = _watch(process, 600.0)
        last.wait()
        return _ended(process, started, peak)


def _watch(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """Wait for the end without taking it; its peak memory in bytes. Kills it after ``limit_s``."""
    peak = 0
    ends = time.monotonic() + limit_s
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll(_LOOK_EVERY_MS):
            peak = _peak_bytes(process.pid) or peak
            if time.monotonic() > ends:
                process.kill()
                raise subprocess.TimeoutExpired(process.args, limit_s)
    finally:
        os.close(pidfd)
    return peak


def _ended(process: subprocess.Popen[bytes], started: float, peak: int) -> Reading:
    seconds = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        errors = process.stderr.read().decode(errors="replace") if process.stderr else ""
        raise RuntimeError(f"exit code {process.returncode} {errors[-300:].strip()}")
    found = {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}
    return found | ({"peak_bytes": peak} if peak else {})


def _peak_bytes(pid: int) -> int:
    with suppress(OSError):
        found = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0
