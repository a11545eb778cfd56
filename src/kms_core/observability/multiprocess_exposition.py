"""The metrics of several processes as one page of Prometheus's text format; knows no metric of ours.

It says what the library's own collector says of the same files, in a fraction of the time: what a series is
called is worked out once in the life of this process, not once for each file and scrape.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.utils import floatToGoString

_HISTOGRAM: Final = "histogram"
_RECENT: Final = "mostrecent"
Values = dict[str, tuple[float, float]]
"""By key of the files: a value, and when it was set, where that matters."""


@dataclass(frozen=True, slots=True)
class _Series:
    """What one key stands for: how its line begins; for a bucket its bound, and the labels without it."""

    family: str
    about: str
    begin: str
    labels: str
    bound: float | None

    def line(self, value: float) -> str:
        return f"{self.begin} {floatToGoString(value)}\n"  # type: ignore[no-untyped-call]  # untyped there


def text(folder: str) -> bytes:
    """Everything in the files of a folder, as the last to write each of them left it."""
    found: dict[tuple[str, str], Values] = {}
    for path in sorted(Path(folder).glob("*.db")):
        kind, *rest = path.stem.split("_")
        mode = rest[0].removeprefix("live") if kind == "gauge" else "sum"
        with suppress(FileNotFoundError, struct.error):  # of a process that just ended or begins
            _merge(found.setdefault((kind, mode), {}), path, mode)
    families: dict[tuple[str, str], list[tuple[_Series, float]]] = {}
    for (kind, _), values in found.items():
        for key, (value, _) in values.items():
            series = _series(key)
            families.setdefault((series.family, kind), []).append((series, value))
    return "".join(part for (_, kind), rows in families.items() for part in _family(kind, rows)).encode()


def _merge(values: Values, path: Path, mode: str) -> None:
    for key, value, at, _ in MmapedDict.read_all_values_from_file(path):  # type: ignore[no-untyped-call]  # as above
        old, old_at = values.get(key, (None, 0.0))
        if mode == _RECENT:
            if at > old_at:
                values[key] = (value, at)
        elif old is None:
            values[key] = (value, 0.0)
        else:
            values[key] = (_together(mode, old, value), 0.0)


def _together(mode: str, old: float, new: float) -> float:
    match mode:
        case "sum":
            return old + new
        case "min":
            return min(old, new)
        case "max":
            return max(old, new)
        case _:
            raise ValueError(f"metrics of several processes cannot be told as {mode}")


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
    """Files hold how many fell into each bucket; the page says how many fell into it or a lower one."""
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
