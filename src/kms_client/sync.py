"""The sync client: the async one's methods over a transport that blocks instead of awaiting.

SyncTransport's coroutines never suspend, so ``run`` finishes any coroutine over it in one step, without an
event loop, and works inside one as well (where it blocks it, as sync code does).
"""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import BinaryIO, Self, TypeVar, Unpack

import httpcore

from kms_client.aio import AsyncClient, JobProgress
from kms_client.http_client import AnswerHead, pool_options, transport_errors
from kms_client.requests import UploadOptions
from kms_client.settings import DEFAULT_URL, ClientSettings, Options
from kms_client.transfer import Progress
from kms_protocol import wire
from kms_protocol.wire import ContextIn

T = TypeVar("T")
P = TypeVar("P")


def run(work: Coroutine[object, object, T]) -> T:
    """Finish a coroutine that never suspends."""
    try:
        work.send(None)
    except StopIteration as end:
        answer: T = end.value
        return answer
    work.close()
    raise RuntimeError("a coroutine over the sync transport must not suspend")


def each(items: AsyncGenerator[T]) -> Iterator[T]:
    """An async generator that never suspends, as an iterator."""
    try:
        while True:
            yield run(_next(items))
    except StopAsyncIteration:
        return
    finally:
        run(_close(items))


async def _next(items: AsyncGenerator[T]) -> T:
    return await anext(items)


async def _close(items: AsyncGenerator[T]) -> None:
    await items.aclose()


class SyncTransport:
    """Blocks the calling thread."""

    def __init__(self, settings: ClientSettings) -> None:
        self._url = settings.url
        self._pool = httpcore.ConnectionPool(**pool_options(settings))

    async def open(self, request: httpcore.Request) -> AnswerHead:
        with transport_errors(self._url):
            return AnswerHead.of(self._pool.handle_request(request))

    async def read(self, answer: AnswerHead) -> bytes:
        with transport_errors(self._url):
            return answer.raw.read()

    async def chunks(self, answer: AnswerHead) -> AsyncGenerator[bytes]:
        with transport_errors(self._url):
            for chunk in answer.raw.iter_stream():
                yield chunk

    async def close(self, answer: AnswerHead) -> None:
        answer.raw.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # never on an event loop: see run

    async def call(self, work: Callable[[P], T], given: P) -> T:
        return work(given)

    def body(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        return pieces

    async def shut(self) -> None:
        self._pool.close()


class Client:
    """The service from ordinary code. AsyncClient has the same methods, and their full descriptions.

    >>> with Client("https://kms.example.com", token_file="/run/secrets/kms") as kms:  # doctest: +SKIP
    ...     sealed = kms.encrypt(b"secret-data", context={"env": "prod"})
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[Options]) -> None:
        settings = ClientSettings.of(url, options)
        self._api = AsyncClient.over(settings, SyncTransport(settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        run(self._api.close())

    # -- single calls --------------------------------------------------------------------------------

    def encrypt(
        self, plaintext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.EncryptOut:
        """Seal up to 1 MiB (the server's setting; TooLarge above it: use ``upload_encrypt``)."""
        return run(self._api.encrypt(plaintext, context=context, key_id=key_id))

    def decrypt(
        self, ciphertext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.DecryptOut:
        """Open a ciphertext. Raises DecryptFailed for a wrong key, wrong context and damage alike."""
        return run(self._api.decrypt(ciphertext, context=context, key_id=key_id))

    def generate_data_key(
        self,
        spec: wire.KeySpec = "AES_256",
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        without_plaintext: bool = False,
    ) -> wire.GenerateKeyOut:
        """A random key, plain and sealed. Raises DataKeysUnsupported where the backend hands out none."""
        return run(
            self._api.generate_data_key(
                spec, context=context, key_id=key_id, without_plaintext=without_plaintext
            )
        )

    def rewrap(
        self,
        ciphertext: bytes,
        *,
        context: ContextIn = None,
        new_context: ContextIn = None,
        key_id: str | None = None,
    ) -> wire.EncryptOut:
        """The same payload under the current key, or another; without ``new_context`` the old one stays."""
        return run(self._api.rewrap(ciphertext, context=context, new_context=new_context, key_id=key_id))

    def wrap(self, file_key: bytes, *, context: ContextIn = None, key_id: str | None = None) -> wire.WrapOut:
        """Wrap the 16-byte file key of an age file of one's own; the answer's stanza goes into its header."""
        return run(self._api.wrap(file_key, context=context, key_id=key_id))

    def unwrap(
        self, stanzas: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.UnwrapOut:
        """The file key of an age file. Check the header's MAC with it: the service has not seen that."""
        return run(self._api.unwrap(stanzas, context=context, key_id=key_id))

    def batch(self, operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> wire.BatchOut:
        """Up to 1,000 calls in one; a refused item is an ``error`` in its place, not an exception."""
        return run(self._api.batch(operation, items))

    def health(self) -> wire.HealthOut:
        """Whether the active backend works. An unhealthy one is an answer, not an exception."""
        return run(self._api.health())

    def status(self) -> wire.StatusOut:
        """Backend, version, uptime, and counts of operations and jobs."""
        return run(self._api.status())

    def audit(self, *, after: str | None = None, limit: int | None = None, **filters: str) -> wire.AuditOut:
        """Recorded operations of the caller's tenant, oldest first; ``after`` is the ``next`` of a page.

        ``filters`` are those of the API: operation, key_id, principal, result, job_id, since and so on.
        """
        return run(self._api.audit(after=after, limit=limit, **filters))

    def keys(self) -> wire.KeysOut:
        """The keys this caller may see, with their versions."""
        return run(self._api.keys())

    def key(self, key_id: str) -> wire.KeyOut:
        """One key, with what its versions have sealed."""
        return run(self._api.key(key_id))

    def rotate(self, key_id: str) -> wire.RotateOut:
        """Make a new version of a key. Never repeated: without an answer, look with ``key`` what happened."""
        return run(self._api.rotate(key_id))

    # -- jobs ----------------------------------------------------------------------------------------

    def submit(self, job: wire.JobIn, *, idempotency_key: str | None = None) -> wire.JobAccepted:
        """Hand in a job; once this returns, the job survives the death of any process."""
        return run(self._api.submit(job, idempotency_key=idempotency_key))

    def job(self, job_id: str) -> wire.JobOut:
        """The job as it stands. Raises UnknownJob."""
        return run(self._api.job(job_id))

    def jobs(
        self, *, state: wire.JobState | None = None, limit: int | None = None, cursor: str | None = None
    ) -> wire.JobList:
        """One page; its ``next`` is the cursor of the page after it."""
        return run(self._api.jobs(state=state, limit=limit, cursor=cursor))

    def cancel(self, job_id: str) -> wire.JobOut:
        """Ask for the end of a job. Raises JobCommitting when it is too late."""
        return run(self._api.cancel(job_id))

    def dead(self, *, limit: int = 100) -> wire.JobList:
        """Dead letters: jobs that used up their attempts, newest first."""
        return run(self._api.dead(limit=limit))

    def retry(self, job_id: str) -> wire.JobOut:
        """Give a dead letter all its attempts again. Raises JobNotDead for any other job."""
        return run(self._api.retry(job_id))

    def wait(
        self, job_id: str, *, progress: JobProgress | None = None, timeout_s: float | None = None
    ) -> wire.JobOut:
        """The job when it has ended, in whichever state; ``progress`` sees every change."""
        return run(self._api.wait(job_id, progress=progress, timeout_s=timeout_s))

    # -- streams -------------------------------------------------------------------------------------

    def upload_encrypt(
        self,
        source: BinaryIO,
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        progress: Progress | None = None,
        **options: Unpack[UploadOptions],
    ) -> wire.JobAccepted:
        """Send a file of any size in pieces of 1 MiB; ``progress`` gets bytes sent, and in all if known."""
        return run(
            self._api.upload_encrypt(source, context=context, key_id=key_id, progress=progress, **options)
        )

    def upload_decrypt(
        self,
        source: BinaryIO,
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        progress: Progress | None = None,
        **options: Unpack[UploadOptions],
    ) -> wire.JobAccepted:
        """As ``upload_encrypt``, for a ciphertext."""
        return run(
            self._api.upload_decrypt(source, context=context, key_id=key_id, progress=progress, **options)
        )

    def result(self, job_id: str) -> Iterator[bytes]:
        """The result as it comes; ``download`` survives a broken line."""
        return each(self._api.result(job_id))

    def items(self, job_id: str) -> Iterator[wire.ItemResult]:
        """The results of a bulk job in item order; a refused item carries ``error``."""
        return each(self._api.items(job_id))

    def download(self, job_id: str, target: BinaryIO, *, progress: Progress | None = None) -> int:
        """Write the result to ``target``, resuming where a connection broke; return its size in bytes."""
        return run(self._api.download(job_id, target, progress=progress))
