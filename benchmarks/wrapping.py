"""Callers who wrap file keys again and again, and the table that shows it: for every remote backend alike."""

import statistics
import threading
import time
from collections.abc import Callable
from typing import Final

from benchmarks.measure import Reading, Series
from benchmarks.report import Scale

from kms_core.backends.remote import Cipher

SECRET: Final = bytes(16)
AAD: Final = bytes(200)
TITLE: Final = "Wrap a file key: 16 bytes under 200 bytes of AAD"
COLUMNS: Final = (
    "callers",
    "",
    "wraps/s",
    "spread",
    "p50 ms",
    "over the server's",
    "p99 ms",
    "our µs",
    "runs (dropped)",
)
_RATE: Final = Scale(key="rate", digits=0, more_is_better=True)
_P50: Final = Scale(key="p50_s", factor=1e3)
_P99: Final = Scale(key="p99_s", factor=1e3, digits=1)


def wraps(cipher: Cipher, version: str, callers: int, seconds: float) -> Callable[[], Reading]:
    """Callers who wrap again and again: a rate, latencies, and the processor time of one wrap on our side."""

    def caller(ends: float, times: list[float]) -> None:
        while (before := time.perf_counter()) < ends:
            cipher.encrypt(SECRET, version, AAD)
            times.append(time.perf_counter() - before)

    def batch() -> Reading:
        times: list[float] = []
        used, begun = time.process_time(), time.perf_counter()
        ends = begun + seconds
        threads = [threading.Thread(target=caller, args=(ends, times)) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent, used = time.perf_counter() - begun, time.process_time() - used
        cut, count = statistics.quantiles(times, n=100), len(times)
        return {"rate": count / spent, "p50_s": cut[49], "p99_s": cut[98], "cpu_s": used / count}

    return batch


def cells(series: Series, own: Series) -> list[str]:
    """A row but for its callers; ``own`` is the server alone."""
    p50, least, used = series.median("p50_s"), own.median("p50_s"), series.median("cpu_s")
    added = f"{(p50 - least) * 1e3:+.2f}" if p50 and least and series is not own else ""
    ours = f"{used * 1e6:.0f}" if used else ""
    rate, latencies = [_RATE.median(series), _RATE.spread(series)], [_P50.median(series), added]
    runs = series.failure or f"{len(series.readings)} ({series.dropped})"
    return [series.name, *rate, *latencies, _P99.median(series), ours, runs]
