"""The async client: a method for each call of the service."""

import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Final, Self, Unpack

from kms_client import requests
from kms_client.files import FileName, FileProgress, FileTransfer, receive
from kms_client.http_client import Download, Engine, Progress, Transport, Upload
from kms_client.job_wait import JobProgress, JobWait
from kms_client.requests import RewrapOptions, UploadOptions, decoded
from kms_client.settings import ClientSettings, Options
from kms_protocol import admin, wire
from kms_protocol.errors import ConfigurationError
from kms_protocol.wire import ContextIn

_LINE: Final = "A line of the result"
_NO_EXTRA: Final = "AsyncClient needs anyio and httpcore2: install the client with its extra async"


class AsyncClient:
    """An async client of the service. Each method raises the KmsError that the ``code`` of an answer names.

    >>> async with AsyncClient("https://kms.example.com", token_file="/run/secrets/kms") as kms:
    ...     sealed = await kms.encrypt(b"secret-data", context={"env": "prod"})      # doctest: +SKIP
    """

    def __init__(self, url: str | None = None, **options: Unpack[Options]) -> None:
        """Without an address it is DEFAULT_URL, whose service is checked first.

        Raises ConfigurationError for wrong settings, and without the extra ``async``.
        """
        try:
            from kms_client.async_transport import AsyncTransport  # noqa: PLC0415 -- Client works without it
        except ImportError as exc:
            raise ConfigurationError(_NO_EXTRA) from exc
        settings = ClientSettings.of(url, options)
        self._engine = Engine(settings, AsyncTransport(settings))

    @classmethod
    def over(cls, settings: ClientSettings, transport: Transport) -> Self:
        """Return a client over a custom transport, such as an ASGI app in the same process."""
        client = cls.__new__(cls)
        client._engine = Engine(settings, transport)  # noqa: SLF001 - its own class
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._engine.transport.shut()

    def within(self, deadline_s: float | None) -> Self:
        """Return this client with another ``deadline_s``, over the same connections: close one of them.

        >>> await kms.within(20).encrypt(b"secret-data")                              # doctest: +SKIP
        """
        client = type(self).__new__(type(self))
        client._engine = self._engine.within(deadline_s)  # noqa: SLF001 - its own class
        return client

    # -- single calls --------------------------------------------------------------------------------

    async def encrypt(
        self, plaintext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.EncryptOut:
        """Encrypt up to 1 MiB. Raises TooLarge: use ``upload_encrypt``."""
        body = wire.EncryptIn(plaintext=plaintext, context=context, key_id=key_id)
        return await self._engine.send(requests.post("/encrypt", body, wire.EncryptOut))

    async def decrypt(
        self, ciphertext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.DecryptOut:
        """Decrypt a ciphertext. Raises DecryptFailed for a wrong key, a wrong context or damage."""
        body = wire.DecryptIn(ciphertext=ciphertext, context=context, key_id=key_id)
        return await self._engine.send(requests.post("/decrypt", body, wire.DecryptOut))

    async def generate_data_key(
        self,
        spec: wire.KeySpec = "AES_256",
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        without_plaintext: bool = False,
    ) -> wire.GenerateKeyOut:
        """Generate a data key, plain and encrypted. Raises DataKeysUnsupported if the backend has none."""
        body = wire.GenerateKeyIn(
            key_spec=spec, context=context, key_id=key_id, without_plaintext=without_plaintext or None
        )
        return await self._engine.send(requests.post("/generate-key", body, wire.GenerateKeyOut))

    async def rewrap(
        self,
        ciphertext: bytes,
        *,
        context: ContextIn = None,
        new_context: ContextIn = None,
        key_id: str | None = None,
    ) -> wire.EncryptOut:
        """Rewrap a ciphertext under its current key or ``key_id``; ``new_context`` replaces its context."""
        body = wire.RewrapIn(ciphertext=ciphertext, context=context, new_context=new_context, key_id=key_id)
        return await self._engine.send(requests.post("/rewrap", body, wire.EncryptOut))

    async def wrap(
        self, file_key: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.WrapOut:
        """Wrap the 16-byte file key of an age file. The answer has the stanza for its header."""
        body = wire.WrapIn(file_key=file_key, context=context, key_id=key_id)
        return await self._engine.send(requests.post("/wrap", body, wire.WrapOut))

    async def unwrap(
        self,
        stanzas: bytes,
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        nonce: bytes | None = None,
    ) -> wire.UnwrapOut:
        """Return the file key of an age file. The caller must check the MAC of the header.

        ``nonce`` is that of the payload, which proves the origin of files of any key.
        """
        body = wire.UnwrapIn(stanzas=stanzas, context=context, key_id=key_id, nonce=nonce)
        return await self._engine.send(requests.post("/unwrap", body, wire.UnwrapOut))

    async def batch(self, operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> wire.BatchOut:
        """Send up to 1,000 items in one call. A failed item has an ``error`` in its result."""
        body = wire.BatchIn(operation=operation, items=list(items))
        return await self._engine.send(requests.post("/batch", body, wire.BatchOut))

    async def health(self) -> admin.HealthOut:
        """Return the health of the active backend. An unhealthy backend raises no exception."""
        return await self._engine.send(requests.health())

    async def status(self) -> admin.StatusOut:
        """Return backend, version, uptime, and counts of operations and jobs."""
        return await self._engine.send(requests.get("/status", admin.StatusOut))

    async def audit(
        self, /, *, after: str | None = None, limit: int | None = None, **filters: str
    ) -> admin.AuditOut:
        """Return a page of the audit log of the tenant, oldest first. ``after`` is the ``next`` of a page.

        ``filters`` are those of the API: operation, key_id, principal, result, job_id, since and so on.
        """
        query = {"after": after, "limit": limit, **filters}
        return await self._engine.send(requests.get("/audit", admin.AuditOut, query))

    async def keys(self) -> admin.KeysOut:
        """Return the keys that the caller may see, with their versions."""
        return await self._engine.send(requests.get("/keys", admin.KeysOut))

    async def key(self, key_id: str) -> admin.KeyOut:
        """Return one key, with the number of encryptions of each version."""
        return await self._engine.send(requests.get(requests.path_of("/keys", key_id), admin.KeyOut))

    async def rotate(self, key_id: str) -> admin.RotateOut:
        """Create a new version of a key. Never retried: if no answer arrives, check with ``key``."""
        return await self._engine.send(requests.rotate(key_id))

    # -- jobs ----------------------------------------------------------------------------------------

    async def submit(
        self, job: wire.JobIn, *, idempotency_key: str | None = None, wait_s: int = 0
    ) -> wire.JobAccepted:
        """Submit a job. Once this returns, the job survives the end of any process.

        With ``wait_s`` (at most 60) this returns once the job has ended, or after so many seconds.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}  # the same of all attempts
        return await self._engine.send(requests.post("/jobs", job, wire.JobAccepted, headers, wait_s=wait_s))

    async def job(self, job_id: str, *, wait_s: int = 0) -> wire.JobOut:
        """Return the state of a job: now, or at its end if that comes within ``wait_s`` (at most 60) seconds.

        Raises UnknownJob.
        """
        return await self._engine.send(requests.job(job_id, wait_s))

    async def many(self, job_ids: Iterable[str]) -> wire.JobsOut:
        """Return the current states of up to 1,000 jobs in one call."""
        body = wire.JobsIn(job_ids=list(job_ids))
        return await self._engine.send(requests.post("/jobs/status", body, wire.JobsOut))

    async def jobs(
        self,
        *,
        state: wire.JobState | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> wire.JobList:
        """Return a page of jobs that have all ``labels``, newest first.

        Its ``next`` is the ``cursor`` of the following page.
        """
        named = [f"{name}={value}" for name, value in (labels or {}).items()]
        query = {"state": state, "label": named, "limit": limit, "cursor": cursor}
        return await self._engine.send(requests.get("/jobs", wire.JobList, query))

    async def cancel(self, job_id: str) -> wire.JobOut:
        """Cancel a job. Raises JobCommitting if it is too late."""
        return await self._engine.send(requests.change_job("DELETE", job_id))

    async def group(self, name: str, *, wait_s: int = 0) -> wire.GroupOut:
        """Return the counts of a group, at its end if that comes within ``wait_s`` (at most 60) seconds.

        Raises UnknownJob.
        """
        path = requests.path_of("/job-groups", name)
        return await self._engine.send(requests.get(path, wire.GroupOut, wait_s=wait_s))

    async def release(self, job_id: str) -> wire.JobOut:
        """Delete the result of an ended job now, which frees its room. Raises JobNotFinished."""
        return await self._engine.send(requests.change_job("DELETE", job_id, "/result"))

    async def dead(self, *, limit: int = 100) -> wire.JobList:
        """Return the jobs that used up their attempts, newest first."""
        return await self._engine.send(requests.get("/jobs/dead", wire.JobList, {"limit": limit}))

    async def retry(self, job_id: str) -> wire.JobOut:
        """Retry a job that used up its attempts. Raises JobNotDead for any other job."""
        return await self._engine.send(requests.change_job("POST", job_id, "/retry"))

    async def wait(
        self, job_id: str, *, progress: JobProgress | None = None, timeout_s: float | None = None
    ) -> wire.JobOut:
        """Wait until a job ends in any state. ``progress`` receives changes, about once a second.

        Raises JobNotFinished after ``timeout_s``, Unavailable if the service is unreachable for a minute.
        """
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        attempts = self._engine.within(None).attempts(lasting=True)
        return await JobWait(self._engine, job_id, until, attempts).end(progress)

    # -- streams -------------------------------------------------------------------------------------

    async def upload_encrypt(
        self, source: BinaryIO, *, progress: Progress | None = None, **options: Unpack[UploadOptions]
    ) -> wire.JobAccepted:
        """Send a file of any size. ``progress`` receives the bytes sent and the total, if known."""
        return await self._engine.send(requests.upload("encrypt", options), Upload(source, progress))

    async def upload_decrypt(
        self, source: BinaryIO, *, progress: Progress | None = None, **options: Unpack[UploadOptions]
    ) -> wire.JobAccepted:
        """Send a ciphertext of any size, as ``upload_encrypt``."""
        return await self._engine.send(requests.upload("decrypt", options), Upload(source, progress))

    def result(self, job_id: str) -> AsyncGenerator[bytes]:
        """Yield the result as it arrives. Raises JobNotFinished, ResultExpired. ``download`` can resume."""
        return self._engine.stream(requests.result(job_id))

    async def items(self, job_id: str) -> AsyncGenerator[wire.ItemResult]:
        """Yield the results of a bulk job in item order. A failed item has an ``error``."""
        rest = b""
        async with contextlib.aclosing(self.result(job_id)) as chunks:
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield decoded(line, wire.ItemResult, _LINE)
        if rest:
            yield decoded(rest, wire.ItemResult, _LINE)

    async def download(
        self, job_id: str, target: BinaryIO, *, progress: Progress | None = None, release: bool = False
    ) -> int:
        """Write the result to ``target`` and return its size in bytes.

        With ``release`` the service deletes the result once it has been written. A broken connection is
        resumed by a Range request. Raises ServiceUnreachable if attempts make no progress, or if fewer bytes
        arrive than the service announced.
        """
        part = Download(target, progress)
        await receive(self._engine, job_id, part, self._engine.attempts())
        if release:
            await self.release(job_id)
        return part.offset

    # -- files ---------------------------------------------------------------------------------------

    async def encrypt_file(
        self,
        source: FileName,
        target: FileName,
        *,
        overwrite: bool = False,
        progress: FileProgress | None = None,
        **options: Unpack[UploadOptions],
    ) -> wire.JobOut:
        """Encrypt a file of any size by a job, and return the job. ``options`` are those of an upload.

        ``target`` gets its name (mode 0600) once it is whole and on disk; an existing one is replaced only if
        ``overwrite`` is set. With the same ``idempotency_key`` a repetition after a crash finds the same job
        and fetches its result again, so with one the result is kept until it expires; else it is deleted.
        Outlives an outage of the service up to the deadline of the client, or without one of a minute.

        Raises TargetExists, the error of a failed job, JobNotFinished or Unavailable at the deadline,
        UnexpectedAnswer, OSError of source or target.
        """
        transfer = FileTransfer(self._engine, progress)
        return await transfer.convert("encrypt", Path(source), Path(target), options, overwrite=overwrite)

    async def decrypt_file(
        self,
        source: FileName,
        target: FileName,
        *,
        overwrite: bool = False,
        progress: FileProgress | None = None,
        **options: Unpack[UploadOptions],
    ) -> wire.JobOut:
        """Decrypt a file of any size by a job, as ``encrypt_file``. Raises DecryptFailed, too."""
        transfer = FileTransfer(self._engine, progress)
        return await transfer.convert("decrypt", Path(source), Path(target), options, overwrite=overwrite)

    async def rewrap_file(
        self,
        source: FileName,
        target: FileName,
        *,
        overwrite: bool = False,
        **options: Unpack[RewrapOptions],
    ) -> wire.EncryptOut:
        """Write a file with a new header, as ``rewrap`` of its header. The payload is copied, and not sent.

        ``target`` may be ``source`` with ``overwrite``; see ``encrypt_file``. Returns the new header. Raises
        TargetExists, NotACiphertext, DecryptFailed, InvalidRequest if the source changes, OSError.
        """
        transfer = FileTransfer(self._engine, None)
        return await transfer.rewrap(Path(source), Path(target), options, overwrite=overwrite)

    async def download_to(
        self,
        job_id: str,
        target: FileName,
        *,
        overwrite: bool = False,
        progress: FileProgress | None = None,
        release: bool = False,
    ) -> int:
        """Write the result of an ended job to a file, and return its size in bytes; as ``encrypt_file``.

        With ``release`` the service deletes the result once the target is in place. Raises TargetExists,
        JobNotFinished, ResultExpired, Unavailable, OSError.
        """
        size = await FileTransfer(self._engine, progress).fetch(job_id, Path(target), overwrite=overwrite)
        if release:
            await self.release(job_id)
        return size
