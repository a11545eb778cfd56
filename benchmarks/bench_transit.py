"""Small calls as services make them, beside OpenBao transit: a token, a record on each side, metrics on.

Servers and their settings are those of ``bench_overhead``; here each is asked to encrypt and to decrypt small
and less small secrets, over one connection and over many.
"""

import json
import tempfile
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import http_load, report, running
from benchmarks.bench_overhead import ABOUT, CONTEXT, Server, Way, compared, ours, theirs
from benchmarks.http_load import Shot
from benchmarks.measure import say

SIZES: Final = (16, 1024)
CONNECTIONS: Final = (1, 16, 64)
_SCOPES: Final = (
    "jobs:read,jobs:write key=x",
    "decrypt key=other-*",
    "encrypt,decrypt key=def* context=env=prod,service=*",
)
_WAY: Final = Way("kms", has_auth=True, durability="write", scopes=_SCOPES)
Calls = Mapping[tuple[str, int], Shot]


def main() -> None:
    options = report.options(
        "transit",
        "POST /encrypt and /decrypt beside OpenBao transit, in turn.",
        runs=4,
        budget_s=150.0,
        seconds=1.0,
        dir="/var/tmp",  # noqa: S108 -- a disk is the point: both audit logs lie there
    )
    if http_load.CLIENT != "wrk":
        say("SKIPPED: wrk is NOT INSTALLED, and a slower client would be what is measured")
        return
    with ExitStack() as stack:
        name = tempfile.TemporaryDirectory(
            prefix="kms-bench-", dir=report.place(options.given.dir), ignore_cleanup_errors=True
        )
        folder = Path(stack.enter_context(name))
        mine = stack.enter_context(ours(_WAY, folder / "kms"))
        servers = [(mine, _calls(mine, _our_body))]
        for has_audit in (True, False):
            other = stack.enter_context(theirs(folder / f"bao-{has_audit}", has_audit=has_audit))
            servers.append((other, _calls(other, _vault_body)))
        budget = options.budget(len(CONNECTIONS) * len(servers[0][1]))
        parts = [
            compared(
                f"POST /{what[0]}, {what[1]:,} B",
                [replace(server, shot=calls[what]) for server, calls in servers],
                connections,
                options,
                budget.share(),
            )
            for what in servers[0][1]
            for connections in CONNECTIONS
        ]
    options.write([*parts, ABOUT])


def _our_body(name: str, value: str) -> str:
    return json.dumps({name: value, "context": CONTEXT})


def _vault_body(name: str, value: str) -> str:
    return json.dumps({name: value})


def _calls(server: Server, body: Callable[[str, str], str]) -> Calls:
    """By operation and size of the plaintext; what is decrypted was encrypted by the same server."""
    shots = {}
    for size in SIZES:
        plaintext = b64encode(bytes(size)).decode()
        sealing = replace(server.shot, body=body("plaintext", plaintext))
        ciphertext = _asked(sealing)["ciphertext"]
        opening = replace(
            sealing, url=sealing.url.replace("/encrypt", "/decrypt"), body=body("ciphertext", ciphertext)
        )
        if _asked(opening)["plaintext"] != plaintext:
            raise RuntimeError(f"{server.name}: decrypt did not give back the plaintext")
        shots["encrypt", size], shots["decrypt", size] = sealing, opening
    return shots


def _asked(shot: Shot) -> dict[str, str]:
    answer = running.ask(shot.url, shot.body, shot.headers)
    found: dict[str, str] = answer.get("data", answer)
    return found


if __name__ == "__main__":
    main()
