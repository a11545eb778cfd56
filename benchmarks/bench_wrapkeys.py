"""Keys on OpenBao as production has them, beside an Age key: shared wrap keys, waiting calls, batches, jobs.

Two API processes, a token, each record written, as in ``bench_overhead``. OpenBao keeps a file audit where it
is the peer of a batch, and where its requests are counted.
"""

import functools
import json
import os
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
from benchmarks import http_load, report, running
from benchmarks.bench_overhead import ABOUT, CONTEXT, Server, Way, compared, ours, theirs
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, Reading, in_turn, say
from benchmarks.report import Scale
from benchmarks.wrapping import AAD, COLUMNS, SECRET, TITLE, cells, wraps

from kms_api.routes import batch
from kms_core.age.x25519 import X25519Identity
from kms_core.auth.policy import Principal
from kms_core.backends.remote import RemoteBackend, SharingBackend
from kms_core.backends.wrap_keys import WrapKeys
from kms_core.envelope import sealing
from kms_core.envelope.binding import KeyRef
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.wire import PREFIX
from support.age_kms import BlankingTrail, kms_over, write_pair
from support.embedded_valkey import EmbeddedValkey
from support.openbao import Bao, transit
from support.service import Service, core_of

CONNECTIONS: Final = (16, 64)
CALLERS: Final = (1, 16, 64)
ITEMS: Final = 100
OTHERS: Final = 16
"""Processes whose files are opened too: each has a wrap key of its own."""
SCOPES: Final = ("jobs:read,jobs:write key=x", "encrypt,decrypt key=def* context=env=prod,service=*")
AGE, SHARED, ALONE, SPARE = "def-age", "def-shared", "def-alone", "def-spare"
_SMALL: Final = b64encode(bytes(16)).decode()
_BATCH: Final = {"operation": "encrypt", "items": [{"plaintext": _SMALL, "context": CONTEXT}] * ITEMS}
_VAULT_BATCH: Final = json.dumps({"batch_input": [{"plaintext": _SMALL}] * ITEMS})
_RATE: Final = Scale(key="rate", unit="items/s", digits=0, more_is_better=True)
_COST: Final = Scale(key="cpu_s", unit="µs of processor an item", factor=1e6, digits=1)


def main() -> None:
    options = report.options(
        "wrapkeys",
        "Shared wrap keys, waiting calls, batches and bulk jobs, beside an Age key and OpenBao, in turn.",
        runs=5,
        budget_s=240.0,
        seconds=1.0,
        job_items=20_000,
        dir="/var/tmp",  # noqa: S108 -- as bench_overhead
    )
    if http_load.CLIENT != "wrk":
        say("SKIPPED: wrk is NOT INSTALLED, and a slower client would be what is measured")
        return
    budget = options.budget(3 * len(CONNECTIONS) + len(CALLERS) + 3)
    place = report.place(options.given.dir)
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        parts = [
            *_calls(folder / "calls", options, budget.share),
            _waiting(folder / "waiting", options, budget.share),
            *_batches(folder / "batches", options, budget.share),
            _parts_of_a_batch(folder / "parts", options, budget.share()),
            _jobs(folder / "jobs", options, budget.share()),
        ]
    options.write([*parts, ABOUT])


# -- single calls --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """OpenBao with a file audit, and the settings of a service that uses it."""

    bao: Bao
    log: Path
    key: str
    settings: str

    def requests(self) -> int:
        """The number of wraps and unwraps so far."""
        lines = self.log.read_text().splitlines()
        return sum('"type":"request"' in line and f"crypt/{self.key}" in line for line in lines)


@contextmanager
def _peer(folder: Path) -> Iterator[Peer]:
    folder.mkdir(parents=True)
    write_pair(folder / "age", X25519Identity.generate())
    bao = Bao(folder, audit=folder / "audit.log")
    token, key = folder / "token", bao.new_key()
    token.touch(mode=0o600)
    token.write_text(bao.token())
    age = f"age://{folder}/age/private_key.txt"
    keys = {
        AGE: age,
        SPARE: f"{age}?native=false",
        SHARED: f"transit:{key}?share=5m",
        ALONE: f"transit:{key}",
    }
    text = "[kms.keys]\n" + "".join(f'"{name}" = "{uri}"\n' for name, uri in keys.items())
    text += f'[kms.transit]\naddress = "{bao.url}"\ntoken_file = "{token}"\n'
    try:
        yield Peer(bao, folder / "audit.log", key, text)
    finally:
        bao.close()


def _calls(folder: Path, options: report.Options, share: Callable[[], float]) -> Sequence[str]:
    with ExitStack() as stack:
        peer = stack.enter_context(_peer(folder / "peer"))
        way = Way("kms", has_auth=True, durability="write", scopes=SCOPES, settings=peer.settings)
        server = stack.enter_context(ours(way, folder / "kms"))
        shots = {key: _shots(server, peer, key) for key in (AGE, SHARED, ALONE)}
        names = {
            SHARED: "kms: OpenBao, share=5m",
            AGE: "kms: Age key",
            ALONE: "kms: OpenBao, a call for each",
        }
        found = [
            compared(
                f"POST /{call}, 16 B" + (f", files of {OTHERS} processes" if call == "decrypt" else ""),
                [replace(server, name=name, shot=shots[key][call]) for key, name in names.items()],
                connections,
                options,
                share(),
            )
            for call in ("encrypt", "decrypt")
            for connections in CONNECTIONS
        ]
        before, done = peer.requests(), 0.0
        for call in ("encrypt", "decrypt"):
            done += http_load.load(shots[SHARED][call], 16, 2 * options.given.seconds)["requests"]
        counted = peer.requests() - before
    options.note("shared, remote calls", "1,000 operations", {"calls": 1000 * counted / done})
    return [*found, f"Wraps and unwraps that OpenBao saw for {done:,.0f} more of these calls: {counted}."]


def _shots(server: Server, peer: Peer, key: str) -> Mapping[str, Shot]:
    """A request to encrypt, and requests to decrypt what several processes sealed."""
    url = server.shot.url.removesuffix("/encrypt")
    sealed = json.dumps({"plaintext": _SMALL, "context": CONTEXT, "key_id": key})
    made = [
        running.ask(f"{url}/encrypt", sealed, server.shot.headers)["ciphertext"]
        if key != SHARED
        else b64encode(_of_another_process(peer, key)).decode()
        for _ in range(OTHERS)
    ]
    bodies = [json.dumps({"ciphertext": each, "context": CONTEXT}) for each in made]
    return {
        "encrypt": replace(server.shot, body=sealed),
        "decrypt": replace(server.shot, url=f"{url}/decrypt", body=bodies[0], more=bodies[1:]),
    }


def _of_another_process(peer: Peer, key: str) -> bytes:
    remote = RemoteBackend(transit(peer.bao, peer.key))
    ref = KeyRef("default", key, remote.versions()[-1].version, "transit")
    backend = SharingBackend(remote, WrapKeys(), 300.0)
    return sealing.seal(bytes(16), [(backend, ref)], Context.parse(CONTEXT))


# -- waiting calls -------------------------------------------------------------------------------------


class _Wrapping:
    """``Backend.wrap`` in the place of a cipher: with the circuit breaker and the stanza."""

    def __init__(self, backend: RemoteBackend) -> None:
        self._backend = backend

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        return self._backend.wrap(secret, KeyRef("default", "default", version, "transit"), aad).body


def _waiting(folder: Path, options: report.Options, share: Callable[[], float]) -> str:
    folder.mkdir()
    server = Bao(folder)
    try:
        token, rows = server.token(), []
        backend = RemoteBackend(transit(server, server.new_key(), token=token))
        cipher, seconds = cast("Any", _Wrapping(backend)), options.given.seconds
        body = {
            "plaintext": b64encode(SECRET).decode(),
            "associated_data": b64encode(AAD).decode(),
            "key_version": 1,
        }
        url = f"{server.url}/v1/transit/encrypt/{server.new_key()}"
        shot = Shot(url, json.dumps(body), {"X-Vault-Token": token})
        for callers in CALLERS:
            contenders = [
                Contender("Backend.wrap, transit", wraps(cipher, "1", callers, seconds)),
                Contender("OpenBao alone", functools.partial(http_load.load, shot, callers, seconds)),
            ]
            found = options.keep(f"waiting, {callers}", in_turn(contenders, options.plan, share()))
            rows += [[str(callers), *cells(series, found[-1])] for series in found]
    finally:
        server.close()
    return report.grid(TITLE, COLUMNS, rows)


# -- batches -------------------------------------------------------------------------------------------


def _batches(folder: Path, options: report.Options, share: Callable[[], float]) -> Sequence[str]:
    with ExitStack() as stack:
        peer = stack.enter_context(_peer(folder / "peer"))
        servers = []
        for key, name in ((SPARE, "kms: Age key, native=false"), (AGE, "kms: Age key")):
            items = [{"plaintext": _SMALL, "context": CONTEXT, "key_id": key}] * ITEMS
            way = Way(
                name,
                has_auth=True,
                durability="write",
                path=f"{PREFIX}/batch",
                body=json.dumps({"operation": "encrypt", "items": items}),
                scopes=SCOPES,
                settings=peer.settings,
            )
            servers.append(stack.enter_context(ours(way, folder / key)))
        servers.append(stack.enter_context(theirs(folder / "bao", has_audit=True, body=_VAULT_BATCH)))
        return [
            compared(f"Batches of {ITEMS} x 16 B, each a request", servers, connections, options, share())
            for connections in CONNECTIONS
        ]


class _NoLog(BlankingTrail):
    """An audit log that keeps nothing."""

    def append(self, record: object) -> str:
        del record
        return ""


def _parts_of_a_batch(folder: Path, options: report.Options, share_s: float) -> str:
    """Processor time of an item, in this process and one thread, with more and more of the service."""
    folder.mkdir()
    write_pair(folder / "age", X25519Identity.generate())
    uri = f"age://{folder}/age/private_key.txt?native=false"
    core = core_of(Service(folder / "kms", f'default_key_id = "k"\n[kms.keys]\nk = "{uri}"\n'))
    scoped = Principal("bench", "default", "none")
    key = core.kms.keyring.default
    keys, context = key.wrapping("default"), Context.parse(CONTEXT)
    raw, decode = msgspec.json.encode(_BATCH), msgspec.json.Decoder(wire.BatchIn).decode
    answer = _run(core.kms, scoped, decode(raw))

    def sealed() -> None:
        for _ in range(ITEMS):
            sealing.seal(bytes(16), keys, context)

    bare = kms_over(key.backend, trail=_NoLog())
    contenders = [
        Contender("seal alone: keys, stanzas, payload", _timed(sealed)),
        Contender("JSON in and out", _timed(lambda: (decode(raw), wire.encode(answer)))),
        Contender("the batch, without an audit log", _timed(lambda: _run(bare, scoped, decode(raw)))),
        Contender("the batch, with its audit log", _timed(lambda: _run(core.kms, scoped, decode(raw)))),
    ]
    found = options.keep("parts of a batch", in_turn(contenders, options.plan, share_s))
    return report.table(f"An item of a batch of {ITEMS} x 16 B, native=false, in process", found, _COST)


def _run(kms: Kms, who: Principal, body: wire.BatchIn) -> wire.BatchOut:
    limits = SimpleNamespace(sync_plaintext_bytes=1024 * 1024)
    settings = SimpleNamespace(kms=SimpleNamespace(limits=limits))
    service = _Parts(kms, settings, SimpleNamespace(take_items=lambda *_: 0.0))
    made = batch.batch(cast("Any", SimpleNamespace(service=service, caller=who, body=body)))
    if made.failed:
        raise RuntimeError(f"{made.results[0]}")
    return made


@dataclass(frozen=True)
class _Parts:
    """What the route takes of a service."""

    kms: Kms
    settings: object
    requests: object


def _timed(work: Callable[[], object]) -> Callable[[], Reading]:
    def run() -> Reading:
        best = min(_once(work) for _ in range(20))
        return {"cpu_s": best / ITEMS, "rate": ITEMS / best}

    return run


def _once(work: Callable[[], object]) -> float:
    before = time.thread_time()
    work()
    return time.thread_time() - before


# -- bulk jobs -----------------------------------------------------------------------------------------


def _jobs(folder: Path, options: report.Options, share_s: float) -> str:
    count = int(options.given.job_items)
    folder.mkdir()
    write_pair(folder / "age", X25519Identity.generate())
    uri = f"age://{folder}/age/private_key.txt"
    settings = f'[kms.keys]\n{AGE} = "{uri}"\n{SPARE} = "{uri}?native=false"\n'
    with EmbeddedValkey(folder / "valkey") as valkey:
        url = valkey.files.url_of(0)
        with Service(folder / "kms", settings, url) as service:
            service.start()
            lines = b"".join(
                json.dumps({"plaintext": b64encode(os.urandom(1024)).decode(), "context": CONTEXT}).encode()
                + b"\n"
                for _ in range(count)
            )
            contenders = [
                Contender("native=false", functools.partial(_bulk, service, SPARE, lines, count)),
                Contender("with native stanzas", functools.partial(_bulk, service, AGE, lines, count)),
            ]
            found = options.keep("bulk job", in_turn(contenders, options.plan, share_s))
    return report.table(f"A bulk job of {count:,} items of 1 KiB, from its start to its end", found, _RATE)


def _bulk(service: Service, key: str, lines: bytes, count: int) -> Reading:
    headers = {"Content-Type": "application/x-ndjson", "X-KMS-Key-Id": key}
    answer = service.http.post(f"{PREFIX}/jobs?kind=encrypt", content=lines, headers=headers)
    if answer.status_code != HTTPStatus.ACCEPTED:
        raise RuntimeError(answer.text)
    begun = time.perf_counter()
    service.wait(answer.json()["job_id"], "succeeded")
    return {"rate": count / (time.perf_counter() - begun)}


if __name__ == "__main__":
    main()
