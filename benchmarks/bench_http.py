"""How many calls a second one API process answers, and how fast a file goes up, through a job, and down.

Peer now: a bare uvicorn application that does nothing with the same bytes, the floor of any Python service.
One that encrypts (OpenBao transit) joins by one more entry in ``servers``.
"""

import functools
import http.client
import json
import os
import shutil
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from benchmarks import http_load, report, running
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, Reading, Series, in_turn
from benchmarks.report import Scale

from kms_protocol.wire import ENDED, PREFIX

SIZES: Final = (16, 1024)
CONNECTIONS: Final = (1, 16, 64)
CONTEXT: Final = "env=prod,service=api"
_MIB: Final = 1024 * 1024
_RATE: Final = Scale(key="rate", unit="requests/s", digits=0, more_is_better=True)
_CELLS: Final = (
    _RATE.median,
    _RATE.spread,
    Scale(key="p50_s", factor=1e3).median,
    Scale(key="p99_s", factor=1e3).median,
)


@dataclass(frozen=True, slots=True)
class Server:
    """One that can be asked to encrypt and to decrypt."""

    name: str
    shots: Mapping[tuple[str, int], Shot]
    """By operation and plaintext size in bytes."""


def main() -> None:
    options = report.options(
        "http",
        "Calls and files over HTTP, ours and theirs in turn.",
        runs=3,
        budget_s=130.0,
        seconds=2.0,
        size_mib=1024,
        dir="/dev/shm",  # noqa: S108 -- a file system in memory is the point
    )
    http_load.warn_without_wrk()
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(options.given.dir)) as name:
        folder = Path(name)
        with running.service(folder) as service, running.plain_app(folder) as plain:
            budget = options.budget(14)
            options.note("size", "file", {"mib": options.given.size_mib})
            servers = [kms(service.url), nothing(plain, service.url)]
            parts = [
                f"Client: `{http_load.CLIENT}` on the same processors, one API process.",
                _calls(servers, options, budget.share),
            ]
            parts += _files(folder, service, plain, options, budget.share)
    options.write(parts)


# -- calls -------------------------------------------------------------------------------------------


def _calls(servers: Sequence[Server], options: report.Options, share: Callable[[], float]) -> str:
    """One row for each operation, size and number of connections."""
    columns = [column for server in servers for column in (server.name, "spread", "p50 ms", "p99 ms")]
    rows, failed = [], []
    for operation, size in servers[0].shots:
        for connections in CONNECTIONS:
            found = in_turn(
                [_loaded(server, (operation, size), connections, options) for server in servers],
                options.plan,
                share(),
            )
            cells = [cell(series) for series in found for cell in _CELLS]
            ratios = [_RATE.ratio(found[0], series) for series in found[1:]]
            dropped = sum(series.dropped for series in found)
            failed += [f"{series.name} failed: {series.failure}" for series in found if series.failure]
            rows.append([f"{operation} {size:,} B", str(connections), *cells, *ratios, str(dropped)])
    ratios = [f"{servers[0].name} is, of {server.name}" for server in servers[1:]]
    titles = ["call", "connections", *columns, *ratios, "dropped"]
    return "\n\n".join([report.grid("Requests a second", titles, rows), *failed])


def _loaded(server: Server, what: tuple[str, int], connections: int, options: report.Options) -> Contender:
    work = functools.partial(http_load.load, server.shots[what], connections, options.given.seconds)
    return Contender(server.name, work)


def kms(url: str) -> Server:
    """Our service; the shots of decrypt hold what its encrypt gave."""
    shots = {}
    for size in SIZES:
        plaintext = b64encode(os.urandom(size)).decode()
        sealing = Shot(f"{url}{PREFIX}/encrypt", json.dumps({"plaintext": plaintext, "context": CONTEXT}))
        ciphertext = _asked(sealing)["ciphertext"]
        opening = Shot(f"{url}{PREFIX}/decrypt", json.dumps({"ciphertext": ciphertext, "context": CONTEXT}))
        if _asked(opening)["plaintext"] != plaintext:
            raise RuntimeError("decrypt did not give back the plaintext")
        shots["encrypt", size], shots["decrypt", size] = sealing, opening
    return Server("kms", shots)


def nothing(plain: str, url: str) -> Server:
    """Bodies and answers of the sizes of ours, and no work in between."""
    ours = kms(url).shots
    shots = {
        what: Shot(f"{plain}/answer/{len(json.dumps(_asked(shot)))}", shot.body)
        for what, shot in ours.items()
    }
    return Server("bare uvicorn", shots)


def _asked(shot: Shot) -> dict[str, str]:
    found: dict[str, str] = running.ask(shot.url, shot.body)
    return found


# -- files -------------------------------------------------------------------------------------------


def _files(
    folder: Path,
    service: running.Service,
    plain: str,
    options: report.Options,
    share: Callable[[], float],
) -> list[str]:
    """Up, through the job and down, for encrypt and for decrypt; the bare application stores and serves."""
    size = options.given.size_mib * _MIB
    source, sealed = folder / "source", folder / "sealed"
    with source.open("wb") as out:
        for _ in range(options.given.size_mib):
            out.write(os.urandom(_MIB))

    def job(kind: str, file: Path) -> Job:
        return Job(service.url, kind, file, lambda job_id: shutil.rmtree(service.state / "spool" / job_id))

    job("encrypt", source).run(sealed)
    found = []
    for kind, file in (("encrypt", source), ("decrypt", sealed)):
        contenders = [
            Contender(f"kms, {kind} job", job(kind, file).run, size),
            Contender("bare uvicorn, files", functools.partial(store_and_serve, plain, file, folder), size),
        ]
        found.append((kind, options.keep(f"{kind} a file", in_turn(contenders, options.plan, share()))))
    return [_file_table(kind, series, size) for kind, series in found]


def _file_table(kind: str, found: Sequence[Series], size: int) -> str:
    rates = {
        name: Scale(key=key, unit="GB/s", amount=size / 1e9).median
        for name, key in (("up GB/s", "up_s"), ("down GB/s", "down_s"))
    }
    waits = {"job s": Scale(key="job_s").median}
    title = f"{kind} a file of {size // _MIB} MiB over HTTP, state in memory; all = up, job and down"
    whole = Scale(unit="GB/s in all", amount=size / 1e9)
    return report.table(title, found, whole, more={**rates, **waits})


@dataclass(frozen=True, slots=True)
class Job:
    """A file on its way through the service. ``forget`` empties its spool: results live on for hours."""

    url: str
    kind: str
    file: Path
    forget: Callable[[str], object]

    def run(self, target: Path | None = None) -> Reading:
        begun = time.perf_counter()
        accepted = json.loads(send(f"{self.url}{PREFIX}/files/{self.kind}", "POST", self.file))
        uploaded = time.perf_counter()
        job_id = accepted["job_id"]
        self._wait(job_id)
        done = time.perf_counter()
        receive(f"{self.url}{PREFIX}/jobs/{job_id}/result", target)
        ended = time.perf_counter()
        self.forget(job_id)
        return {
            "seconds": ended - begun,
            "up_s": uploaded - begun,
            "stored_s": done - begun,
            "job_s": done - uploaded,
            "down_s": ended - done,
        }

    def _wait(self, job_id: str) -> None:
        url = f"{self.url}{PREFIX}/jobs/{job_id}"
        while (job := running.ask(url))["state"] not in ENDED:
            time.sleep(0.01)
        if job["state"] != "succeeded":
            raise RuntimeError(f"the job {job['state']}: {job['error']}")


def store_and_serve(plain: str, file: Path, folder: Path) -> Reading:
    begun = time.perf_counter()
    send(f"{plain}/files/stored", "PUT", file)
    uploaded = time.perf_counter()
    receive(f"{plain}/files/stored", None)
    ended = time.perf_counter()
    (folder / "stored").unlink()
    up_s = uploaded - begun
    return {"seconds": ended - begun, "up_s": up_s, "stored_s": up_s, "down_s": ended - uploaded}


def send(url: str, method: str, file: Path) -> bytes:
    """Send a file as the body, in pieces of 1 MiB; the answer."""
    connection = running.connect(url)
    with file.open("rb", 0) as body:
        headers = {
            "Content-Length": str(file.stat().st_size),
            "X-KMS-Context": CONTEXT,
            "Content-Type": "application/octet-stream",
        }
        connection.request(method, urlsplit(url).path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    connection.close()
    if answer.status >= http.HTTPStatus.BAD_REQUEST:
        raise RuntimeError(f"{url} answered {answer.status}: {text[:300]!r}")
    return text


def receive(url: str, target: Path | None) -> None:
    """Read an answer into one buffer over and over, and write it down if there is a target."""
    connection = running.connect(url)
    connection.request("GET", urlsplit(url).path)
    answer = connection.getresponse()
    buffer = memoryview(bytearray(_MIB))
    with Path(target or os.devnull).open("wb", 0) as out:
        while got := answer.readinto(buffer):
            out.write(buffer[:got])
    connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise RuntimeError(f"{url} answered {answer.status}")


if __name__ == "__main__":
    main()
