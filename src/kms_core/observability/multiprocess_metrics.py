"""Metrics of several processes that are scraped together: files of prometheus_client's multiprocess mode."""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import multiprocess, values
from prometheus_client.mmap_dict import MmapedDict

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable in which prometheus_client finds the folder of the files."""
SLOT: Final = "PROMETHEUS_MULTIPROC_SLOT"
"""The environment variable with the name of a process that takes over the counts of its predecessor."""


def share(environ: Mapping[str, str]) -> None:
    """Keep the metrics of this process in files, if ``environ`` names their folder (``FOLDER``).

    Call it before a metric is declared (``kms_core.observability.metrics``): a metric without labels creates
    its file then. With ``SLOT`` a restarted process goes on with the counts of its predecessor, and removes
    the predecessor's gauges; without it each process has files of its own.
    """
    folder, slot = environ.get(FOLDER), environ.get(SLOT)
    if not folder:
        return
    if "kms_core.observability.metrics" in sys.modules:
        raise RuntimeError("metrics are declared already")
    os.environ[FOLDER] = folder
    if slot:
        multiprocess.mark_process_dead(slot, folder)  # type: ignore[no-untyped-call]  # untyped there
    values.MmapedDict = _PreallocatedDict  # type: ignore[attr-defined,assignment]  # no parameter is for that
    values.ValueClass = values.MultiProcessValue(lambda: slot) if slot else values.MultiProcessValue()  # type: ignore[no-untyped-call]  # as above


class _PreallocatedDict(MmapedDict):
    """The values of one process in a file, whose blocks are allocated before they are written.

    A write to a hole of a full disk would end the process (SIGBUS, mmap(2)). A value without room is kept in
    memory, and written once there is room. All of a file that cannot be made stays in memory.
    """

    def __init__(self, filename: str) -> None:
        try:
            with open(filename, "ab") as file:  # noqa: PTH123 -- as its parent opens it
                os.posix_fallocate(file.fileno(), 0, 4096)
        except OSError:
            Path(filename).unlink(missing_ok=True)  # an empty one fails each scrape
            filename = f"/proc/self/fd/{os.memfd_create('kms-metrics')}"
        super().__init__(filename)  # type: ignore[no-untyped-call]  # untyped there

    def read_value(self, key: str) -> tuple[float, float]:
        return super().read_value(key) if self._has_room(key) else (0.0, 0.0)  # type: ignore[no-untyped-call]  # as above

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        if self._has_room(key):
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]  # as above

    def _has_room(self, key: str) -> bool:
        with suppress(OSError):
            if key not in self._positions:
                os.posix_fallocate(self._f.fileno(), 0, self._used + len(key) + 64)  # of a value 28 at most
            return True
        return False


def forget_dead(folder: str) -> None:
    """Remove the gauges of processes without a slot that have ended; their counts stay."""
    for path in Path(folder).glob("gauge_live*_[0-9]*.db"):
        pid = path.stem.rpartition("_")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # untyped there
