"""How many file keys a second OpenBao wraps for us, and what we add to the server's own time.

The server is the real one, a dev server on loopback, on the same processors as the callers, which are threads
of one process. Its own time is that of our very request, sent by wrk over as many connections as there are
callers. vault-kv asks the server for its key once a minute, and wraps here.
"""

import functools
import json
import statistics
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import http_load, report
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, Reading, Series, in_turn
from benchmarks.report import Scale

from bao import Bao, kv, transit
from kms_core.backends.remote import Cipher

CALLERS: Final = (1, 16, 64)
SECRET: Final = bytes(16)
AAD: Final = bytes(200)
_RATE: Final = Scale(key="rate", digits=0, more_is_better=True)
_P50: Final = Scale(key="p50_s", factor=1e3)
_P99: Final = Scale(key="p99_s", factor=1e3, digits=1)


def main() -> None:
    options = report.options("backends", "Wraps by OpenBao.", runs=5, budget_s=90.0, seconds=1.0)
    http_load.warn_without_wrk()
    with _server() as server:
        token = server.token()
        mine, path = transit(server, server.new_key(), token=token), "kms/bench"
        kept = kv(server, path, cache_s=60.0, token=token)
        kept.rotate()
        budget = options.budget(len(CALLERS))
        rows = []
        for callers in CALLERS:
            shot, seconds = _shot(server, server.new_key(), token), options.given.seconds
            own = Contender("transit alone", functools.partial(http_load.load, shot, callers, seconds))
            contenders = [
                Contender("transit", wraps(mine, "1", callers, seconds)),
                Contender("vault-kv", wraps(kept, "1", callers, seconds)),
                own,
            ]
            found = in_turn(contenders, options.plan, budget.share())
            rows += [[str(callers), *_cells(series, found[-1])] for series in found]
    names = ["callers", "", "wraps/s", "spread", "p50 ms", "over the server's", "p99 ms", "our µs"]
    title = "Wrap a file key: 16 bytes under 200 bytes of AAD"
    options.write([report.grid(title, [*names, "runs (dropped)"], rows)])


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


def _cells(series: Series, own: Series) -> list[str]:
    p50, least, used = series.median("p50_s"), own.median("p50_s"), series.median("cpu_s")
    added = f"{(p50 - least) * 1e3:+.2f}" if p50 and least and series is not own else ""
    ours = f"{used * 1e6:.0f}" if used else ""
    rate, latencies = [_RATE.median(series), _RATE.spread(series)], [_P50.median(series), added]
    runs = series.failure or f"{len(series.readings)} ({series.dropped})"
    return [series.name, *rate, *latencies, _P99.median(series), ours, runs]


def _shot(server: Bao, key: str, token: str) -> Shot:
    """The request of one wrap, as the cipher sends it."""
    body = {
        "plaintext": b64encode(SECRET).decode(),
        "associated_data": b64encode(AAD).decode(),
        "key_version": 1,
    }
    url = f"{server.url}/v1/transit/encrypt/{key}"
    return Shot(url, json.dumps(body), {"X-Vault-Token": token})


@contextmanager
def _server() -> Iterator[Bao]:
    with tempfile.TemporaryDirectory(prefix="kms-bench-", ignore_cleanup_errors=True) as folder:
        server = Bao(Path(folder))
        try:
            yield server
        finally:
            server.close()


if __name__ == "__main__":
    main()
