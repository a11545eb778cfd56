"""Counts that outlive processes: operations by outcome, and what each key version has sealed.

Kept in memory, handed to Redis every few seconds (``kms_core.jobs.teller``): a call costs no round trip,
and a process that is killed loses the counts of the last seconds. So they are lower bounds.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

SEALING: Final = frozenset({"encrypt", "generate_data_key", "rewrap", "reseal"})
OPERATIONS: Final = "operations"
OF_TENANT: Final = "tenant"
MESSAGES: Final = "messages"
BYTES: Final = "bytes"


class Counted(Protocol):
    """What is counted of an audit record."""

    operation: str
    tenant: str
    backend: str
    key_id: str
    key_version: str
    bytes_in: int


class Tally:
    """What this process has counted and not yet handed over. Safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def note(self, record: Counted, result: str) -> None:
        """One operation of the core. A message is one seal under a key version; bytes are its plaintext."""
        with self._lock:
            self._counts[f"{OPERATIONS} {record.operation} {result}"] += 1
            self._counts[f"{OF_TENANT} {record.tenant} {record.operation} {result}"] += 1
            if result == "ok" and record.operation in SEALING:
                version = f"{record.key_id} {record.key_version} {record.backend}"
                self._counts[f"{MESSAGES} {version}"] += 1
                self._counts[f"{BYTES} {version}"] += record.bytes_in

    def take(self) -> dict[str, int]:
        """Everything counted since the last time; ``put_back`` if it could not be handed over."""
        with self._lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken

    def put_back(self, counts: Mapping[str, int]) -> None:
        with self._lock:
            self._counts.update(counts)

    def peek(self) -> dict[str, int]:
        """What has not been handed over yet."""
        with self._lock:
            return dict(self._counts)


def operations(counts: Mapping[str, int], tenant: str | None = None) -> dict[tuple[str, str], int]:
    """(operation, result) to count; of one tenant, or of all."""
    start = f"{OPERATIONS} " if tenant is None else f"{OF_TENANT} {tenant} "
    found = (field for field in counts if field.startswith(start))
    return {_pair(field.removeprefix(start)): counts[field] for field in found}


def _pair(text: str) -> tuple[str, str]:
    operation, _, result = text.partition(" ")
    return operation, result


def of_version(counts: Mapping[str, int], key_id: str, version: str, backend: str) -> tuple[int, int]:
    """Messages and plaintext bytes that a key version has sealed."""
    name = f"{key_id} {version} {backend}"
    return counts.get(f"{MESSAGES} {name}", 0), counts.get(f"{BYTES} {name}", 0)


def together(*parts: Mapping[str, int]) -> dict[str, int]:
    """The sum of several counts."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
