"""Usage counters: operations by result, and messages and bytes sealed by each key version.

They are counted in memory and flushed to Redis every 2 seconds (``kms_core.jobs.store.usage_flush``), so a
call needs no round trip. A killed process loses the counts of the last seconds: the sums are lower bounds.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

SEALING: Final = frozenset({"encrypt", "generate_data_key", "rewrap", "reseal", "wrap"})
OPERATIONS: Final = "operations"
OF_TENANT: Final = "tenant"
MESSAGES: Final = "messages"
BYTES: Final = "bytes"


class Counted(Protocol):
    """The fields of an audit record that are counted."""

    operation: str
    tenant: str
    backend: str
    key_id: str
    key_version: str
    job_id: str
    bytes_in: int
    bytes_out: int


class UsageCounters:
    """The counts of this process that are not flushed yet. Safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def note(self, record: Counted, result: str) -> None:
        """Count an operation. A message is one seal under a key version; bytes are those of its plaintext."""
        with self._lock:
            self._counts[f"{OPERATIONS} {record.operation} {result}"] += 1
            self._counts[f"{OF_TENANT} {record.tenant} {record.operation} {result}"] += 1
            if result == "ok" and record.operation in SEALING:
                version = f"{record.key_id} {record.key_version} {record.backend}"
                self._counts[f"{MESSAGES} {version}"] += 1
                self._counts[f"{BYTES} {version}"] += record.bytes_in

    def take(self) -> dict[str, int]:
        """Remove and return the counts; ``put_back`` returns them if they could not be flushed."""
        with self._lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken

    def put_back(self, counts: Mapping[str, int]) -> None:
        with self._lock:
            self._counts.update(counts)

    def peek(self) -> dict[str, int]:
        """The counts that are not flushed yet."""
        with self._lock:
            return dict(self._counts)


def operations(counts: Mapping[str, int], tenant: str | None = None) -> dict[str, list[int]]:
    """The numbers of successful and of failed calls by operation, of one tenant or of all."""
    start = f"{OPERATIONS} " if tenant is None else f"{OF_TENANT} {tenant} "
    found: dict[str, list[int]] = {}
    for field, count in counts.items():
        if field.startswith(start):
            operation, _, result = field.removeprefix(start).partition(" ")
            found.setdefault(operation, [0, 0])[result != "ok"] += count
    return found


def of_version(counts: Mapping[str, int], key_id: str, version: str, backend: str) -> tuple[int, int]:
    """The messages and the plaintext bytes that a key version has sealed."""
    name = f"{key_id} {version} {backend}"
    return counts.get(f"{MESSAGES} {name}", 0), counts.get(f"{BYTES} {name}", 0)


def together(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """The sums of the counts of two sources."""
    return dict(Counter(first) + Counter(second))
