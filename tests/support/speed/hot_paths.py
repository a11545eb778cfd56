"""An install with a token in this process, and its hot paths by name: what is counted."""

import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import msgspec
import uvloop

from kms_api import app
from kms_core.age import header, stream
from kms_core.audit import query
from kms_core.audit.query import EventFilter
from kms_core.audit.verification import receipt
from kms_core.audit.verification.verify import verify
from kms_core.envelope import sealing
from kms_core.http_protocol import BODY
from kms_core.jobs.execution import lease
from kms_core.jobs.execution.runner import run_claimed
from kms_core.jobs.store import broker
from kms_core.observability import logs
from kms_core.payload import parallel
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.context import Context
from kms_protocol.wire import PREFIX
from support.audit_logs import AuditFolder, chain_name, record
from support.credentials import REQUIRED, SecuredService
from support.service import core_of
from support.speed.counting import Function

CONTEXT: Final = "env=prod,service=api"
SECRET: Final = bytes(1024)
FILE_BYTES: Final = 16 * 1024 * 1024
LINES: Final = 1000
SINGLE_THREAD: Final = ParallelOptions(threads=1)
SCOPES: Final = "encrypt,decrypt,jobs:read,jobs:write key=def* context=env=prod,service=*"
JOB_SLEEP_S: Final = 0.02
"""How long each job sleeps: a claim pays for its first moments, so only the rest is charged at its end."""
COMPLETE_BODY: Final = SimpleNamespace(more_body=False, flow=SimpleNamespace(write_paused=False))
"""What uvicorn leaves of a request whose body came with its head."""
ON_DISK: Final = '[kms.audit]\ndurability = "fsync"\n'


class Install:
    """Its calls, the innermost first. ``redis`` may be shared by several."""

    def __init__(self, folder: Path, redis: str, more: str = "") -> None:
        logs.configure("info", json=True, stream=folder.with_suffix(".log").open("a"))
        install = SecuredService(folder, REQUIRED + more, redis)
        install.http.close()
        self.audit = AuditFolder(folder / "read")
        self.audit.root.mkdir()
        self._token = install.token_header(SCOPES)["Authorization"]
        self._app = app.build(install.settings)
        self._loop = uvloop.new_event_loop()
        self._core = core_of(install, broker.connect(install.settings.kms.redis))
        self._kms, doors = self._core.kms, self._core.authenticator
        assert doors
        self._who = doors.principal(self._token.removeprefix("Bearer "))
        self._context = Context.parse(CONTEXT)
        self.backend = self._kms.keyring.default.backend
        self.ref = self._kms.keyring.default.ref(self._who.tenant)
        self.sealed = self.encrypt()

    def seal(self) -> bytes:
        return sealing.seal(SECRET, [(self.backend, self.ref)], self._context)

    def open(self) -> bytes:
        head = header.parse(self.sealed, header.SYNC_LIMITS)
        file_key = sealing.unwrap_file(head, self.backend, self.ref, context=self._context).file_key
        return sealing.open_(self.sealed, head, file_key)

    def encrypt(self) -> bytes:
        return self._kms.encrypt(self._who, SECRET, self._context).ciphertext

    def decrypt(self) -> bytes:
        return self._kms.decrypt(self._who, self.sealed, self._context).plaintext

    def batch(self, count: int) -> None:
        items = [{"plaintext": SECRET, "context": CONTEXT}] * count
        assert not self.post("/batch", operation="encrypt", items=items)["failed"]

    def submit(self, count: int) -> str:
        items = [{"plaintext": SECRET[:16]}] * count
        return str(self.post("/jobs", kind="encrypt", context=CONTEXT, items=items)["job_id"])

    def job(self, count: int) -> None:
        """From submission to its end; the worker's side of the broker is Celery's, and not here."""
        job_id, context = self.submit(count), self._core.worker_context
        with patch.object(lease, "_REPORT_EVERY_S", 60.0):  # or a slow machine counts a renewal
            claim = context.store.claim(job_id, "meter/1")
            assert claim
            time.sleep(JOB_SLEEP_S)
            run_claimed(claim, context)
        assert context.store.get(job_id, self._who.tenant).state == "succeeded"

    def post(self, path: str, **body: object) -> dict[str, Any]:
        """The JSON that the application answers, called as uvicorn calls it; bytes become base64."""
        return self._loop.run_until_complete(self._post(f"{PREFIX}{path}", msgspec.json.encode(body)))

    async def _post(self, path: str, body: bytes) -> dict[str, Any]:
        answer: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: object) -> None:
            answer.append(message)

        headers = [(b"host", b"localhost"), (b"authorization", self._token.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        state = {BODY: (None, COMPLETE_BODY)}
        await self._app({**scope, "client": ("127.0.0.1", 50_000), "state": state}, receive, send)
        assert answer[0]["status"] in {200, 202}, answer
        found: dict[str, Any] = msgspec.json.decode(answer[1]["body"])
        return found


def paths(install: Install, on_disk: Install) -> dict[str, Function]:
    """Every hot path, ready to be called again and again. ``on_disk`` has each record on disk."""
    seal_file, open_file = partial(parallel.seal_file, SECRET[:32]), partial(parallel.open_file, SECRET[:32])
    return {
        "sealing.seal of 1 KiB": install.seal,
        "sealing.open of 1 KiB": install.open,
        "Kms.encrypt of 1 KiB": install.encrypt,
        "Kms.decrypt of 1 KiB": install.decrypt,
        "Kms.encrypt of 1 KiB, its record on disk": on_disk.encrypt,
        "POST /encrypt of 1 KiB": partial(install.post, "/encrypt", plaintext=SECRET, context=CONTEXT),
        "POST /decrypt of 1 KiB": partial(
            install.post, "/decrypt", ciphertext=install.sealed, context=CONTEXT
        ),
        "POST /batch, 100 of 1 KiB": partial(install.batch, 100),
        "POST /batch, 10 of 1 KiB, records on disk": partial(on_disk.batch, 10),
        "a job of one item, submitted and run": partial(install.job, 1),
        **_reads(install.audit),
        "slabs.seal_file of 16 MiB": partial(seal_file, *files(), options=SINGLE_THREAD),
        "slabs.open_file of 16 MiB": partial(open_file, *files(sealed=True), options=SINGLE_THREAD),
    }


def _reads(place: AuditFolder) -> dict[str, Function]:
    """Reads of a log of 1,000 records, every tenth of them an outcome, as commands and pages read it."""
    trail, keys = place.trail(), place.keys()
    for number in range(LINES):
        name = f"ada-{number:08}"  # so long that the last block that is read is half full
        trail.append(record(principal=name, stage="" if number % 10 else "outcome"))
    first = f"{chain_name(trail)}:1"
    trail.close()
    tenant = EventFilter(equal=(("tenant", "acme"),))
    return {
        "the audit log of 1,000 records, verified": partial(verify, place.folder, keys),
        "the newest 50 records of a tenant": partial(query.newest, place.logs, tenant, 50),
        "a receipt over 1,000 records": partial(receipt.make, place.folder, first),
    }


def files(*, sealed: bool = False) -> tuple[FileRange, FileWriter]:
    """A source and a target in memory, where every file system is the same."""
    source, target = os.memfd_create("source"), os.memfd_create("target")
    os.truncate(source, FILE_BYTES)
    if not sealed:
        return FileRange(source, FILE_BYTES), FileWriter(target)
    parallel.seal_file(SECRET[:32], FileRange(source, FILE_BYTES), FileWriter(target), options=SINGLE_THREAD)
    return FileRange(target, stream.sealed_size(FILE_BYTES)), FileWriter(source)
