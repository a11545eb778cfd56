"""How many file keys a second OpenBao wraps for us, and what we add to the server's own time.

The server is the real one, a dev server on loopback, on the same processors as the callers, which are threads
of one process. Its own time is that of our very request, sent by wrk over as many connections as there are
callers. vault-kv asks the server for its key once a minute, and wraps here.
"""

import functools
import json
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import http_load, report
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, in_turn
from benchmarks.wrapping import AAD, COLUMNS, SECRET, TITLE, cells, wraps

from support.openbao import Bao, kv, transit

CALLERS: Final = (1, 16, 64)


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
            rows += [[str(callers), *cells(series, found[-1])] for series in found]
    options.write([report.grid(TITLE, COLUMNS, rows)])


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
