"""Metrics of several processes that are scraped together: files of prometheus_client's multiprocess mode."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from prometheus_client import multiprocess, values

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
    values.ValueClass = values.MultiProcessValue(lambda: slot) if slot else values.MultiProcessValue()  # type: ignore[no-untyped-call]  # as above


def forget_dead(folder: str) -> None:
    """Remove the gauges of processes without a slot that have ended; their counts stay."""
    for path in Path(folder).glob("gauge_live*_[0-9]*.db"):
        pid = path.stem.rpartition("_")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # untyped there
