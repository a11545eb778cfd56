"""What a spool in a bucket costs beside one in a directory: a large file's way, small jobs, requests, memory.

The stores are SeaweedFS and, where it is on the PATH, MinIO, on the same processors and the same file system.
Neither syncs its writes, which the directory does. Requests are counted by a proxy before the store. Memory
is looked at while that proxy withholds the store's answers, so that all buffers of uploads are full.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks import bench_jobs, drive_s3, report, running
from benchmarks.bench_http import Job, send
from benchmarks.bench_s3 import weed
from benchmarks.jobs_install import Ends, Install, installed, resident_bytes, wait
from benchmarks.measure import Contender, Reading, in_turn, say
from benchmarks.report import Scale

from kms_core.s3.connection import S3Request
from kms_protocol.errors import KmsError
from kms_protocol.wire import PREFIX, JobItem
from support.object_stores import ObjectStore, S3Proxy, SeenRequest

_MIB: Final = 1024 * 1024
_UPLOADS: Final = 16
_INLINE_BYTES: Final = 64 * 1024
_BUFFER_BYTES: Final = 256 * _MIB  # the default
_SPOOL_BYTES: Final = 64 * 1024**3
_HELD_S: Final = 2.0  # without growth
_LONGEST_HELD_S: Final = 15.0
_UNTIL_HELD_S: Final = 20.0
_LOOK_EVERY_S: Final = 0.02
_JOB_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-")
_RATE: Final = Scale(key="rate", unit="jobs a second", digits=0, more_is_better=True)


def main() -> None:
    options = report.options(
        "spool",
        "Jobs whose spool is a bucket or a directory, in turn.",
        runs=5,
        budget_s=240.0,
        size_mib=1024,
        jobs=1000,
        upload_mib=64,
        minio="minio",
        dir="/var/tmp",  # noqa: S108 -- a disk: spool, volumes of the store and Redis are on it
    )
    given = options.given
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name,
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place("/dev/shm")) as memory,  # noqa: S108 -- the client's file
        ExitStack() as stores,
    ):
        folder, file = Path(name), Path(memory, "file")
        with file.open("wb") as out:
            for _ in range(given.size_mib):
                out.write(os.urandom(_MIB))
        options.note("size", "file", {"mib": given.size_mib})
        endpoints = {"bucket of SeaweedFS": stores.enter_context(weed(_new(folder / "weed")))}
        if found := shutil.which(given.minio):
            endpoints["bucket of MinIO"] = stores.enter_context(_minio(_new(folder / "minio"), found))
        else:
            say(f"SKIPPED {given.minio}: it is not installed")
        endpoint, budget = endpoints["bucket of SeaweedFS"], options.budget(2)
        with ExitStack() as stack:
            installs = {
                name: stack.enter_context(_install(folder, name, at))
                for name, at in {**endpoints, "directory": ""}.items()
            }
            parts = [
                _files(installs, file, options, budget.share()),
                _small(installs, options, budget.share()),
            ]
        with S3Proxy(ObjectStore(endpoint)) as s3_proxy, _install(folder, "counted", s3_proxy.url) as install:
            parts += [
                _requests(install, s3_proxy, file, options),
                _memory(install, s3_proxy, Path(memory), options),
            ]
    options.write([f"State, spool and the store's volumes in `{given.dir}`.", *parts])


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@contextmanager
def _minio(folder: Path, program: str) -> Iterator[str]:
    """A MinIO server with the bucket, until the block ends; its address."""
    url = f"http://127.0.0.1:{running.free_port()}"
    argv = [program, "server", "--quiet", f"--address={url.removeprefix('http://')}", str(folder / "data")]
    env = {"MINIO_ROOT_USER": drive_s3.ACCESS_KEY, "MINIO_ROOT_PASSWORD": drive_s3.SECRET}
    env |= {"MINIO_UPDATE": "off", "MINIO_BROWSER": "off", "MINIO_CI_CD": "1", "HOME": str(folder)}
    with (folder / "minio.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
    with running.stopped(process):
        wait(lambda: _is_made(url), what="MinIO")
        yield url


def _is_made(url: str) -> bool:
    try:
        return drive_s3.bucket(url).line.ask(S3Request("PUT", f"/{drive_s3.BUCKET}")).ok
    except KmsError:
        return False


@contextmanager
def _install(folder: Path, name: str, endpoint: str) -> Iterator[Install]:
    """An API process and a worker of two, with the spool in the bucket if there is an endpoint."""
    place = _new(folder / name.rpartition(" ")[2])
    jobs: dict[str, object] = {"spool_max_bytes": _SPOOL_BYTES, "inline_bytes": 0}
    if endpoint:
        secret = place / "secret"
        secret.write_text(drive_s3.SECRET)
        secret.chmod(0o600)
        jobs |= {
            "inline_bytes": _INLINE_BYTES,
            "spool_bucket": {
                "url": f"s3://{drive_s3.BUCKET}/{place.name.lower()}",
                "endpoint": endpoint,
                "allow_http": True,
                "access_key_id": drive_s3.ACCESS_KEY,
                "secret_key_file": str(secret),
                "buffer_bytes": _BUFFER_BYTES,
            },
        }
    with installed(place, "everysec", **jobs) as install:  # type: ignore[arg-type]  # no port is among them
        install.api()
        install.worker("worker")
        yield install


def _way_of(install: Install, file: Path) -> Job:
    spool = install.core.worker_context.spool
    return Job(f"http://127.0.0.1:{install.port}", "encrypt", file, spool.delete)


# -- in turn -----------------------------------------------------------------------------------------


def _files(installs: dict[str, Install], file: Path, options: report.Options, seconds: float) -> str:
    size = file.stat().st_size
    contenders = [
        Contender(f"spool in a {name}", _way_of(install, file).run, size)
        for name, install in installs.items()
    ]
    found = options.keep("file", in_turn(contenders, options.plan, seconds))
    more: dict[str, report.Cell] = {
        f"{what} s": Scale(key=f"{what}_s").median for what in ("up", "job", "down")
    }
    title = f"Encrypt a file of {size // _MIB} MiB over HTTP: up, job and down"
    return report.table(title, found, Scale(unit="GB/s in all", amount=size / 1e9), more=more)


def _small(installs: dict[str, Install], options: report.Options, seconds: float) -> str:
    contenders = [
        Contender(f"spool in a {name}", functools.partial(_all_at_once, install, options.given.jobs))
        for name, install in installs.items()
    ]
    found = options.keep("small jobs", in_turn(contenders, options.plan, seconds))
    title = (
        f"{options.given.jobs:,} jobs of one item at once, sent in process: with the bucket "
        f"`inline_bytes = {_INLINE_BYTES:,}`, with the directory 0"
    )
    return report.table(title, found, _RATE)


def _all_at_once(install: Install, count: int) -> Reading:
    items = [JobItem(plaintext=b"secret")]

    def submit(number: int) -> None:
        del number
        install.core.submitter.items(bench_jobs.TERMS, items)

    return bench_jobs.all_at_once(submit, lambda: Ends(install.redis).await_end, count)


# -- counted -----------------------------------------------------------------------------------------


def _requests(install: Install, s3_proxy: S3Proxy, file: Path, options: report.Options) -> str:
    """Of the second small job and the second file, its removal included."""
    ways: dict[str, tuple[str, Callable[[], object]]] = {
        "small job": ("a job of one item", functools.partial(_small_job, install)),
        "file": (f"a file of {file.stat().st_size // _MIB} MiB", _way_of(install, file).run),
    }
    rows = []
    for kept, (name, work) in ways.items():
        work()
        del s3_proxy.seen[:]
        work()
        names = Counter(seen.operation for seen in list(s3_proxy.seen) if _JOB_ID.search(seen.path))
        options.note("requests", kept, {"calls": names.total()})
        rows.append([name, str(names.total()), ", ".join(f"{names[each]} {each}" for each in sorted(names))])
    title = "Requests to the store that name the job, from submission until it is removed"
    return report.grid(title, ["", "requests", ""], rows)


def _small_job(install: Install) -> None:
    ends = Ends(install.redis)
    job_id = install.core.submitter.items(bench_jobs.TERMS, [JobItem(plaintext=b"secret")]).job_id
    ends.await_end(1)
    running.ask(f"http://127.0.0.1:{install.port}{PREFIX}/jobs/{job_id}/result")


def _memory(install: Install, s3_proxy: S3Proxy, folder: Path, options: report.Options) -> str:
    """Resident memory of the API process: before, and the most while uploads are under way."""
    file, url = folder / "upload", f"http://127.0.0.1:{install.port}{PREFIX}/files/encrypt"
    file.write_bytes(bytes(options.given.upload_mib * _MIB))
    pid, held, may_go = install.running["api"][0].pid, threading.Event(), threading.Event()

    def withhold(seen: SeenRequest) -> None:
        if seen.operation == "UploadPart":
            held.set()
            may_go.wait(_UNTIL_HELD_S)

    before, sizes = resident_bytes(pid), [0]
    s3_proxy.intercept = withhold
    with ThreadPoolExecutor(_UPLOADS) as pool:
        sent = [pool.submit(send, url, "POST", file) for _ in range(_UPLOADS)]
        held.wait(_UNTIL_HELD_S)
        began = grown = time.monotonic()
        while not all(upload.done() for upload in sent):
            now, size = time.monotonic(), resident_bytes(pid)
            grown = now if size > max(sizes) else grown
            sizes.append(size)
            if now > min(grown + _HELD_S, began + _LONGEST_HELD_S):
                may_go.set()
            time.sleep(_LOOK_EVERY_S)
        for upload in sent:
            upload.result()
    most = max(sizes)
    figures = {"before": before, "most": most, "beyond": most - _BUFFER_BYTES}
    options.note("memory", "API", figures)
    rows = [
        ["before", f"{before / _MIB:,.0f} MiB"],
        [
            f"the most while {_UPLOADS} uploads of {options.given.upload_mib} MiB are under way",
            f"{most / _MIB:,.0f} MiB",
        ],
        [
            f"the same without `buffer_bytes`, {_BUFFER_BYTES // _MIB} MiB",
            f"{figures['beyond'] / _MIB:,.0f} MiB",
        ],
    ]
    return report.grid("Resident memory of an API process", ["", ""], rows)


if __name__ == "__main__":
    main()
