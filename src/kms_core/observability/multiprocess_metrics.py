"""Metrics of several processes that are scraped together: files that they share, and the page made of them.

The page has the samples of prometheus_client's ``MultiProcessCollector``, in a fraction of its time: a
process parses the labels of a series once, not once for each file and scrape (ADR 26).
"""

import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from prometheus_client import multiprocess, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.utils import floatToGoString

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable in which prometheus_client finds the folder of the files."""
SLOT: Final = "PROMETHEUS_MULTIPROC_SLOT"
"""The environment variable with the name of a process that takes over the counts of its predecessor."""
_HISTOGRAM: Final = "histogram"
_RECENT: Final = "mostrecent"
Values = dict[str, tuple[float, float]]
"""By key of the files: a value, and the time at which it was set, where that matters."""


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


@dataclass(frozen=True, slots=True)
class _Series:
    """One key: the begin of its line; for a bucket its bound, and the labels without it."""

    family: str
    about: str
    begin: str
    labels: str
    bound: float | None

    def line(self, value: float) -> str:
        return f"{self.begin} {floatToGoString(value)}\n"  # type: ignore[no-untyped-call]  # untyped there


def text(folder: str) -> bytes:
    """The page of all files in a folder, in Prometheus's text format."""
    found: dict[tuple[str, str], Values] = {}
    for path in sorted(Path(folder).glob("*.db")):
        kind, *rest = path.stem.split("_")
        mode = rest[0].removeprefix("live") if kind == "gauge" else "sum"
        with suppress(FileNotFoundError, struct.error):  # of a process that just ended or begins
            _merge(found.setdefault((kind, mode), {}), path, mode)
    families: dict[tuple[str, str], list[tuple[_Series, float]]] = {}
    for (kind, _), merged in found.items():
        for key, (value, _) in merged.items():
            series = _series(key)
            families.setdefault((series.family, kind), []).append((series, value))
    return "".join(part for (_, kind), rows in families.items() for part in _family(kind, rows)).encode()


def _merge(merged: Values, path: Path, mode: str) -> None:
    for key, value, at, _ in MmapedDict.read_all_values_from_file(path):  # type: ignore[no-untyped-call]  # as above
        old, old_at = merged.get(key, (None, 0.0))
        if mode == _RECENT:
            if at > old_at:
                merged[key] = (value, at)
        elif old is None:
            merged[key] = (value, 0.0)
        else:
            merged[key] = (_combined(mode, old, value), 0.0)


def _combined(mode: str, old: float, new: float) -> float:
    match mode:
        case "sum":
            return old + new
        case "min":
            return min(old, new)
        case "max":
            return max(old, new)
        case _:
            raise ValueError(f"gauges of several processes cannot be merged as {mode}")


@lru_cache(maxsize=64 * 1024)
def _series(key: str) -> _Series:
    family, name, labels, about = json.loads(key)
    bound = labels.pop("le", None)
    written = [f'{label}="{_escaped(value)}"' for label, value in sorted(labels.items())]
    if bound is None:
        return _Series(family, about, _named(name, written), ",".join(written), None)
    return _Series(family, about, _named(name, [*written, f'le="{bound}"']), ",".join(written), float(bound))


def _family(kind: str, rows: list[tuple[_Series, float]]) -> Iterator[str]:
    first = rows[0][0]
    name = f"{first.family}_total" if kind == "counter" else first.family
    about = first.about.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
    yield from _histogram(rows) if kind == _HISTOGRAM else (series.line(value) for series, value in rows)


def _histogram(rows: Iterable[tuple[_Series, float]]) -> Iterator[str]:
    """Files hold the count of each bucket; the page has cumulative counts."""
    buckets: dict[str, list[tuple[float, _Series, float]]] = {}
    for series, value in rows:
        if series.bound is None:
            yield series.line(value)
        else:
            buckets.setdefault(series.labels, []).append((series.bound, series, value))
    for labels, several in buckets.items():
        total = 0.0
        for _, series, value in sorted(several, key=lambda each: each[0]):
            total += value
            yield series.line(total)
        family = several[0][1].family
        yield _Series(family, "", _named(f"{family}_count", [labels] if labels else []), "", None).line(total)


def _named(name: str, labels: list[str]) -> str:
    return f"{name}{{{','.join(labels)}}}" if labels else name


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
