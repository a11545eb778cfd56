"""The sync client: the async one's methods over a transport that blocks instead of awaiting.

SyncTransport's coroutines never suspend, so ``run`` finishes any coroutine over it in one step, without an
event loop, and works inside one as well (where it blocks it, as sync code does).
"""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from types import TracebackType
from typing import BinaryIO, Self, TypeVar, Unpack

import httpcore2

from kms_client.aio import AsyncClient, JobProgress
from kms_client.http_client import Progress, new_pool
from kms_client.requests import UploadOptions
from kms_client.settings import DEFAULT_URL, ClientSettings, Options
from kms_protocol import admin, wire
from kms_protocol.wire import ContextIn

T = TypeVar("T")
P = TypeVar("P")


def run(work: Coroutine[object, object, T]) -> T:
    """Run a coroutine that never suspends, and return its value."""
    try:
        work.send(None)
    except StopIteration as end:
        answer: T = end.value
        return answer
    work.close()
    raise RuntimeError("a coroutine over the sync transport must not suspend")


def each(items: AsyncGenerator[T]) -> Iterator[T]:
    """Iterate over an async generator that never suspends."""
    try:
        while True:
            yield run(items.__anext__())
    except StopAsyncIteration:
        return
    finally:
        run(items.aclose())


class SyncTransport:
    """Blocks the calling thread."""

    def __init__(self, settings: ClientSettings) -> None:
        self._pool = new_pool(httpcore2.ConnectionPool, settings)

    async def open(self, request: httpcore2.Request) -> httpcore2.Response:
        return self._pool.handle_request(request)

    async def chunks(self, answer: httpcore2.Response) -> AsyncGenerator[bytes]:
        for chunk in answer.iter_stream():
            yield chunk

    async def close(self, answer: httpcore2.Response) -> None:
        answer.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # never on an event loop: see run

    async def call(self, work: Callable[[P], T], given: P) -> T:
        return work(given)

    def body(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        return parts

    async def shut(self) -> None:
        self._pool.close()


class Client:
    """A blocking client of the service, with the methods of AsyncClient.

    >>> with Client("https://kms.example.com", token_file="/run/secrets/kms") as kms:  # doctest: +SKIP
    ...     sealed = kms.encrypt(b"secret-data", context={"env": "prod"})
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[Options]) -> None:
        settings = ClientSettings(url, **options)
        self._api = AsyncClient.over(settings, SyncTransport(settings))

    @classmethod
    def over(cls, settings: ClientSettings, transport: SyncTransport) -> Self:
        """Return a client over a custom transport that never suspends."""
        client = cls.__new__(cls)
        client._api = AsyncClient.over(settings, transport)  # noqa: SLF001 - its own class
        return client

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
        """Encrypt up to 1 MiB. Raises TooLarge: use ``upload_encrypt``."""
        return run(self._api.encrypt(plaintext, context=context, key_id=key_id))

    def decrypt(
        self, ciphertext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.DecryptOut:
        """Decrypt a ciphertext. Raises DecryptFailed for a wrong key, a wrong context or damage."""
        return run(self._api.decrypt(ciphertext, context=context, key_id=key_id))

    def generate_data_key(
        self,
        spec: wire.KeySpec = "AES_256",
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        without_plaintext: bool = False,
    ) -> wire.GenerateKeyOut:
        """Generate a data key, plain and encrypted. Raises DataKeysUnsupported if the backend has none."""
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
        """Rewrap a ciphertext under its current key or ``key_id``; ``new_context`` replaces its context."""
        return run(self._api.rewrap(ciphertext, context=context, new_context=new_context, key_id=key_id))

    def wrap(self, file_key: bytes, *, context: ContextIn = None, key_id: str | None = None) -> wire.WrapOut:
        """Wrap the 16-byte file key of an age file. The answer has the stanza for its header."""
        return run(self._api.wrap(file_key, context=context, key_id=key_id))

    def unwrap(
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
        return run(self._api.unwrap(stanzas, context=context, key_id=key_id, nonce=nonce))

    def batch(self, operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> wire.BatchOut:
        """Send up to 1,000 items in one call. A failed item has an ``error`` in its result."""
        return run(self._api.batch(operation, items))

    def health(self) -> admin.HealthOut:
        """Return the health of the active backend. An unhealthy backend raises no exception."""
        return run(self._api.health())

    def status(self) -> admin.StatusOut:
        """Return backend, version, uptime, and counts of operations and jobs."""
        return run(self._api.status())

    def audit(self, *, after: str | None = None, limit: int | None = None, **filters: str) -> admin.AuditOut:
        """Return a page of the audit log of the tenant, oldest first. ``after`` is the ``next`` of a page.

        ``filters`` are those of the API: operation, key_id, principal, result, job_id, since and so on.
        """
        return run(self._api.audit(after=after, limit=limit, **filters))

    def keys(self) -> admin.KeysOut:
        """Return the keys that the caller may see, with their versions."""
        return run(self._api.keys())

    def key(self, key_id: str) -> admin.KeyOut:
        """Return one key, with the number of encryptions of each version."""
        return run(self._api.key(key_id))

    def rotate(self, key_id: str) -> admin.RotateOut:
        """Create a new version of a key. Never retried: if no answer arrives, check with ``key``."""
        return run(self._api.rotate(key_id))

    # -- jobs ----------------------------------------------------------------------------------------

    def submit(
        self, job: wire.JobIn, *, idempotency_key: str | None = None, wait_s: int = 0
    ) -> wire.JobAccepted:
        """Submit a job. Once this returns, the job survives the end of any process.

        With ``wait_s`` (at most 60) this returns once the job has ended, or after so many seconds.
        """
        return run(self._api.submit(job, idempotency_key=idempotency_key, wait_s=wait_s))

    def job(self, job_id: str, *, wait_s: int = 0) -> wire.JobOut:
        """Return the state of a job: now, or at its end if that comes within ``wait_s`` (at most 60) seconds.

        Raises UnknownJob.
        """
        return run(self._api.job(job_id, wait_s=wait_s))

    def many(self, job_ids: Iterable[str]) -> wire.JobsOut:
        """Return the current states of up to 1,000 jobs in one call."""
        return run(self._api.many(job_ids))

    def jobs(
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
        return run(self._api.jobs(state=state, labels=labels, limit=limit, cursor=cursor))

    def cancel(self, job_id: str) -> wire.JobOut:
        """Cancel a job. Raises JobCommitting if it is too late."""
        return run(self._api.cancel(job_id))

    def group(self, name: str, *, wait_s: int = 0) -> wire.GroupOut:
        """Return the counts of a group, at its end if that comes within ``wait_s`` (at most 60) seconds.

        Raises UnknownJob.
        """
        return run(self._api.group(name, wait_s=wait_s))

    def release(self, job_id: str) -> wire.JobOut:
        """Delete the result of an ended job now, which frees its room. Raises JobNotFinished."""
        return run(self._api.release(job_id))

    def dead(self, *, limit: int = 100) -> wire.JobList:
        """Return the jobs that used up their attempts, newest first."""
        return run(self._api.dead(limit=limit))

    def retry(self, job_id: str) -> wire.JobOut:
        """Retry a job that used up its attempts. Raises JobNotDead for any other job."""
        return run(self._api.retry(job_id))

    def wait(
        self, job_id: str, *, progress: JobProgress | None = None, timeout_s: float | None = None
    ) -> wire.JobOut:
        """Wait until a job ends in any state. ``progress`` receives changes, about once a second."""
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
        """Send a file of any size. ``progress`` receives the bytes sent and the total, if known."""
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
        """Send a ciphertext of any size, as ``upload_encrypt``."""
        return run(
            self._api.upload_decrypt(source, context=context, key_id=key_id, progress=progress, **options)
        )

    def result(self, job_id: str) -> Iterator[bytes]:
        """Yield the result as it arrives. Raises JobNotFinished, ResultExpired. ``download`` can resume."""
        return each(self._api.result(job_id))

    def items(self, job_id: str) -> Iterator[wire.ItemResult]:
        """Yield the results of a bulk job in item order. A failed item has an ``error``."""
        return each(self._api.items(job_id))

    def download(
        self,
        job_id: str,
        target: BinaryIO,
        *,
        progress: Progress | None = None,
        release: bool = False,
    ) -> int:
        """Write the result to ``target``, resuming broken connections. Return its size in bytes.

        With ``release`` the service deletes the result once it has been written.
        """
        return run(self._api.download(job_id, target, progress=progress, release=release))
