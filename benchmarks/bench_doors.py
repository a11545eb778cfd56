"""Other interfaces for small calls, beside OpenBao: the Vault API under the same client, batches of 100.

As in ``bench_overhead``: two API processes, a token, each record written; OpenBao with its log and without.
"""

import json
import tempfile
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import http_load, report
from benchmarks.bench_overhead import ABOUT, CONTEXT, SIZE, Way, compared, ours, theirs
from benchmarks.measure import say

from kms_protocol.wire import PREFIX

CONNECTIONS: Final = (1, 16)
ITEMS: Final = 100
_ANYTHING: Final = ("encrypt",)
_ONE: Final = json.dumps({"plaintext": b64encode(bytes(SIZE)).decode()})
_SMALL: Final = b64encode(bytes(16)).decode()
_OUR_BATCH: Final = json.dumps(
    {"operation": "encrypt", "items": [{"plaintext": _SMALL, "context": CONTEXT}] * ITEMS}
)
_VAULT_BATCH: Final = json.dumps({"batch_input": [{"plaintext": _SMALL}] * ITEMS})
_FACADE: Final = "/v1/transit/encrypt/default"
_SINGLE: Final = (
    Way(
        "kms: Vault API",
        has_auth=True,
        durability="write",
        path=_FACADE,
        body=_ONE,
        method="PUT",
        scopes=_ANYTHING,
    ),
    Way("kms: POST /encrypt", has_auth=True, durability="write"),
)
_BATCHES: Final = (
    Way(
        "kms: POST /batch",
        has_auth=True,
        durability="write",
        path=f"{PREFIX}/batch",
        body=_OUR_BATCH,
        scopes=_ANYTHING,
    ),
    Way(
        "kms: Vault API", has_auth=True, durability="write", path=_FACADE, body=_VAULT_BATCH, scopes=_ANYTHING
    ),
)


def main() -> None:
    options = report.options(
        "doors",
        "The Vault API and batches, beside OpenBao, in turn.",
        runs=4,
        budget_s=80.0,
        seconds=1.0,
        dir="/var/tmp",  # noqa: S108 -- as bench_overhead
    )
    if http_load.CLIENT != "wrk":
        say("SKIPPED: wrk is NOT INSTALLED, and a slower client would be what is measured")
        return
    budget = options.budget(2 * len(CONNECTIONS))
    parts = []
    for title, ways, theirs_sent, method in (
        (f"PUT by the Vault API, {SIZE:,} B", _SINGLE, _ONE, "PUT"),
        (f"Batches of {ITEMS} x 16 B, each a request", _BATCHES, _VAULT_BATCH, "POST"),
    ):
        with ExitStack() as stack:
            name = tempfile.TemporaryDirectory(
                prefix="kms-bench-", dir=report.place(options.given.dir), ignore_cleanup_errors=True
            )
            folder = Path(stack.enter_context(name))
            servers = [stack.enter_context(ours(way, folder / str(at))) for at, way in enumerate(ways)]
            for has_audit in (True, False):
                server = theirs(
                    folder / f"bao-{has_audit}", has_audit=has_audit, body=theirs_sent, method=method
                )
                servers.append(stack.enter_context(server))
            parts += [
                compared(title, servers, connections, options, budget.share()) for connections in CONNECTIONS
            ]
    options.write([*parts, ABOUT])


if __name__ == "__main__":
    main()
