"""The async client: every method of the service, and the transport that awaits."""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import BinaryIO, Self, TypeVar, Unpack

import anyio
import anyio.to_thread
import httpcore
import msgspec

from kms_client import requests
from kms_client.engine import Engine
from kms_client.follow import JobWait
from kms_client.http_client import AnswerHead, Transport, pool_options, transport_errors
from kms_client.problems import ServiceUnreachable, UnexpectedAnswer
from kms_client.requests import UploadOptions
from kms_client.settings import DEFAULT_URL, ClientSettings, Options
from kms_client.transfer import Download, Progress, Upload
from kms_protocol import wire
from kms_protocol.errors import JobNotFinished
from kms_protocol.wire import ContextIn

T = TypeVar("T")
P = TypeVar("P")
JobProgress = Callable[[wire.JobOut], None]


class AsyncTransport:
    """Runs on asyncio or trio, whichever the caller does."""

    def __init__(self, settings: ClientSettings) -> None:
        self._url = settings.url
        self._pool = httpcore.AsyncConnectionPool(**pool_options(settings))

    async def open(self, request: httpcore.Request) -> AnswerHead:
        with transport_errors(self._url):
            return AnswerHead.of(await self._pool.handle_async_request(request))

    async def read(self, answer: AnswerHead) -> bytes:
        with transport_errors(self._url):
            return await answer.raw.aread()

    async def close(self, answer: AnswerHead) -> None:
        await answer.raw.aclose()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def chunks(self, answer: AnswerHead) -> AsyncGenerator[bytes]:
        with transport_errors(self._url):
            async for chunk in answer.raw.aiter_stream():
                yield chunk

    async def call(self, work: Callable[[P], T], given: P) -> T:
        return await anyio.to_thread.run_sync(work, given)

    async def body(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        while piece := await self.call(_next_piece, pieces):
            yield piece

    async def shut(self) -> None:
        await self._pool.aclose()


def _next_piece(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")


class AsyncClient:
    """The service from an event loop. Each method raises the KmsError that the answer's ``code`` names.

    >>> async with AsyncClient("https://kms.example.com", token_file="/run/secrets/kms") as kms:
    ...     sealed = await kms.encrypt(b"secret-data", context={"env": "prod"})      # doctest: +SKIP
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[Options]) -> None:
        settings = ClientSettings.of(url, options)
        self._engine = Engine(settings, AsyncTransport(settings))

    @classmethod
    def over(cls, settings: ClientSettings, transport: Transport) -> Self:
        """A client over a transport of one's own, such as an ASGI app in the same process."""
        client = cls.__new__(cls)
        client._engine = Engine(settings, transport)  # noqa: SLF001 - its own class
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._engine.transport.shut()

    # -- single calls --------------------------------------------------------------------------------

    async def encrypt(
        self, plaintext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.EncryptOut:
        """Seal up to 1 MiB (the server's setting; TooLarge above it: use ``upload_encrypt``)."""
        return await self._engine.send(requests.encrypt(plaintext, context, key_id))

    async def decrypt(
        self, ciphertext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.DecryptOut:
        """Open a ciphertext. Raises DecryptFailed for a wrong key, wrong context and damage alike."""
        return await self._engine.send(requests.decrypt(ciphertext, context, key_id))

    async def generate_data_key(
        self,
        spec: wire.KeySpec = "AES_256",
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        without_plaintext: bool = False,
    ) -> wire.GenerateKeyOut:
        """A random key, plain and sealed. Raises DataKeysUnsupported where the backend hands out none."""
        return await self._engine.send(
            requests.generate_data_key(spec, context, key_id, without_plaintext=without_plaintext)
        )

    async def rewrap(
        self,
        ciphertext: bytes,
        *,
        context: ContextIn = None,
        new_context: ContextIn = None,
        key_id: str | None = None,
    ) -> wire.EncryptOut:
        """The same payload under the current key, or another; without ``new_context`` the old one stays."""
        return await self._engine.send(requests.rewrap(ciphertext, context, new_context, key_id))

    async def wrap(
        self, file_key: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.WrapOut:
        """Wrap the 16-byte file key of an age file of one's own; the answer's stanza goes into its header."""
        return await self._engine.send(requests.wrap(file_key, context, key_id))

    async def unwrap(
        self, stanzas: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.UnwrapOut:
        """The file key of an age file. Check the header's MAC with it: the service has not seen that."""
        return await self._engine.send(requests.unwrap(stanzas, context, key_id))

    async def batch(self, operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> wire.BatchOut:
        """Up to 1,000 calls in one; a refused item is an ``error`` in its place, not an exception."""
        return await self._engine.send(requests.batch(operation, items))

    async def health(self) -> wire.HealthOut:
        """Whether the active backend works. An unhealthy one is an answer, not an exception."""
        return await self._engine.send(requests.health())

    async def status(self) -> wire.StatusOut:
        """Backend, version, uptime, and counts of operations and jobs."""
        return await self._engine.send(requests.status())

    async def audit(
        self, *, after: str | None = None, limit: int | None = None, **filters: str
    ) -> wire.AuditOut:
        """Recorded operations of the caller's tenant, oldest first; ``after`` is the ``next`` of a page.

        ``filters`` are those of the API: operation, key_id, principal, result, job_id, since and so on.
        """
        return await self._engine.send(requests.audit(after, limit, filters))

    async def keys(self) -> wire.KeysOut:
        """The keys this caller may see, with their versions."""
        return await self._engine.send(requests.keys())

    async def key(self, key_id: str) -> wire.KeyOut:
        """One key, with what its versions have sealed."""
        return await self._engine.send(requests.key(key_id))

    async def rotate(self, key_id: str) -> wire.RotateOut:
        """Make a new version of a key. Never repeated: without an answer, look with ``key`` what happened."""
        return await self._engine.send(requests.rotate(key_id))

    # -- jobs ----------------------------------------------------------------------------------------

    async def submit(self, job: wire.JobIn, *, idempotency_key: str | None = None) -> wire.JobAccepted:
        """Hand in a job; once this returns, the job survives the death of any process."""
        return await self._engine.send(requests.submit(job, idempotency_key))

    async def job(self, job_id: str) -> wire.JobOut:
        """The job as it stands. Raises UnknownJob."""
        return await self._engine.send(requests.job(job_id))

    async def jobs(
        self, *, state: wire.JobState | None = None, limit: int | None = None, cursor: str | None = None
    ) -> wire.JobList:
        """One page; its ``next`` is the cursor of the page after it."""
        return await self._engine.send(requests.jobs(state, limit, cursor))

    async def cancel(self, job_id: str) -> wire.JobOut:
        """Ask for the end of a job. Raises JobCommitting when it is too late."""
        return await self._engine.send(requests.cancel(job_id))

    async def dead(self, *, limit: int = 100) -> wire.JobList:
        """Dead letters: jobs that used up their attempts, newest first."""
        return await self._engine.send(requests.dead(limit))

    async def retry(self, job_id: str) -> wire.JobOut:
        """Give a dead letter all its attempts again. Raises JobNotDead for any other job."""
        return await self._engine.send(requests.retry(job_id))

    async def wait(
        self, job_id: str, *, progress: JobProgress | None = None, timeout_s: float | None = None
    ) -> wire.JobOut:
        """The job when it has ended, in whichever state; ``progress`` sees every change.

        Raises JobNotFinished after ``timeout_s``, Unavailable when the service is away for a minute.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        async with contextlib.aclosing(JobWait(self._engine, job_id, deadline).states()) as states:
            async for job in states:
                if progress is not None:
                    progress(job)
                if job.state in wire.ENDED:
                    return job
        raise JobNotFinished("The job has not finished in the time given")

    # -- streams -------------------------------------------------------------------------------------

    async def upload_encrypt(
        self,
        source: BinaryIO,
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        progress: Progress | None = None,
        **options: Unpack[UploadOptions],
    ) -> wire.JobAccepted:
        """Send a file of any size in pieces of 1 MiB; ``progress`` gets bytes sent, and in all if known."""
        return await self._engine.send(
            requests.upload("encrypt", context, key_id, options), Upload(source, progress)
        )

    async def upload_decrypt(
        self,
        source: BinaryIO,
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        progress: Progress | None = None,
        **options: Unpack[UploadOptions],
    ) -> wire.JobAccepted:
        """As ``upload_encrypt``, for a ciphertext."""
        return await self._engine.send(
            requests.upload("decrypt", context, key_id, options), Upload(source, progress)
        )

    def result(self, job_id: str) -> AsyncGenerator[bytes]:
        """The result as it comes (JobNotFinished, ResultExpired); ``download`` survives a broken line."""
        return self._engine.stream(requests.result(job_id, {}))

    async def items(self, job_id: str) -> AsyncGenerator[wire.ItemResult]:
        """The results of a bulk job in item order; a refused item carries ``error``."""
        rest = b""
        async with contextlib.aclosing(self.result(job_id)) as chunks:
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield _item(line)
        if rest:
            yield _item(rest)

    async def download(self, job_id: str, target: BinaryIO, *, progress: Progress | None = None) -> int:
        """Write the result to ``target`` and return its size in bytes.

        A broken connection is resumed by Range where it stopped. Raises ServiceUnreachable when attempts
        make no headway, or fewer bytes came than the service had named.
        """
        part, idle = Download(target, progress), 0
        while not part.complete:
            before = part.offset
            try:
                await self._engine.fetch(requests.result(job_id, part.headers()), part)
            except ServiceUnreachable as exc:
                idle = 0 if part.offset > before else idle + 1
                await self._engine.pause(exc, exc.retry_after_s * 2**idle, idle)
        return part.offset


def _item(line: bytes) -> wire.ItemResult:
    try:
        return msgspec.json.decode(line, type=wire.ItemResult)
    except wire.NOT_JSON as exc:
        raise UnexpectedAnswer("A line of the result does not have the shape of this API") from exc
