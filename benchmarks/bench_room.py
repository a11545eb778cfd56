"""What a job of one item takes in Redis and in the spool: while it waits, and from its end to its expiry."""

import secrets
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.bench_jobs import TERMS
from benchmarks.jobs_install import Ends, Install, installed

from kms_protocol.wire import JobItem

_SIZES: Final = (1_024, 8_192)
_EVENTS: Final = "kms:events"
_FIRST: Final = 20
_QUIET_S: Final = 8.0
_BLOCK_BYTES: Final = 512  # of st_blocks, whatever the file system's own are
_COLUMNS: Final = [
    "item",
    "`inline_bytes`",
    "Redis, waiting",
    "spool, waiting",
    "Redis, ended",
    "spool, ended",
    "its events",
    "commands",
    "µs of Redis",
]


def main() -> None:
    options = report.options(
        "room", "Bytes of a job in Redis and in the spool.", runs=1, budget_s=120.0, jobs=1_000
    )
    count, rows = options.given.jobs, []
    for inline in (0, 16_384):
        for size in _SIZES:
            with (
                tempfile.TemporaryDirectory(prefix="kms-bench-") as name,
                installed(Path(name), "always", inline_bytes=inline, input_grace_s=1) as install,
            ):
                found = _measured(install, size, count)
            options.note("room of a job", f"{size} bytes, inline_bytes {inline}", found)
            rows.append([f"{size:,} bytes", f"{inline:,}", *(f"{value:,.0f}" for value in found.values())])
    explanation = (
        f"Redis: `used_memory` without the stream `{_EVENTS}`, whose share is in the last column; it keeps "
        "the last 100,000 events of all jobs. Spool: blocks of files and folders. Waiting: with the message "
        "and the input. Ended: with the result, once the input is gone. "
        "Commands and µs of processor: of Redis, from the first submission to the last end. "
        "Taken in one run, whatever else the machine did: neither bytes nor commands depend on that."
    )
    options.write(
        [report.grid(f"Bytes of a job of one item, means of {count:,}", _COLUMNS, rows), explanation]
    )


def _measured(install: Install, size: int, count: int) -> Mapping[str, float]:
    """Bytes for each job, in the order of the columns."""
    items = [JobItem(plaintext=secrets.token_bytes(size))]
    _send(install, items, _FIRST)  # scripts, streams and keys of the install are there from now on
    _end(install, _FIRST)
    empty = _sizes(install)
    asked = _asked(install)
    _send(install, items, count)
    waiting = _sizes(install)
    until_then = _end(install, count)
    ended = _sizes(install)
    memory, spool, events = range(3)
    return {
        "Redis, waiting": (waiting[memory] - empty[memory]) / count,
        "spool, waiting": (waiting[spool] - empty[spool]) / count,
        "Redis, ended": (ended[memory] - empty[memory]) / count,
        "spool, ended": (ended[spool] - empty[spool]) / count,
        "events": (waiting[events] + ended[events]) / count,
        "commands": (until_then[0] - asked[0]) / count,
        "processor": (until_then[1] - asked[1]) / count,
    }


def _send(install: Install, items: list[JobItem], count: int) -> None:
    for _ in range(count):
        install.core.submitter.items(TERMS, items)


def _end(install: Install, count: int) -> tuple[float, float]:
    """Have a worker do the jobs, wait until nothing more is deleted, and end it; ``_asked`` of their end."""
    ends = Ends(install.redis)
    install.worker("worker")
    ends.await_end(count)
    done = _asked(install)
    seen, since = _spool(install), time.monotonic()
    while time.monotonic() - since < _QUIET_S:
        time.sleep(0.5)
        if (now := _spool(install)) != seen:
            seen, since = now, time.monotonic()
    install.end("worker")
    return done


def _sizes(install: Install) -> tuple[int, int, int]:
    """Bytes of Redis without the events, of the spool, and of the events since the last call."""
    client = install.redis
    before: int = client.info("memory")["used_memory"]
    client.xtrim(_EVENTS, maxlen=0, approximate=False)
    used: int = client.info("memory")["used_memory"]
    return used, _spool(install), before - used


def _asked(install: Install) -> tuple[float, float]:
    """Commands that Redis did, and the microseconds of processor that it took."""
    found = install.redis.info("all")
    return found["total_commands_processed"], 1e6 * (found["used_cpu_user"] + found["used_cpu_sys"])


def _spool(install: Install) -> int:
    found = 0
    for path in (install.state / "spool").rglob("*"):
        with suppress(FileNotFoundError):  # it was deleted just now
            found += path.stat().st_blocks * _BLOCK_BYTES
    return found


if __name__ == "__main__":
    main()
