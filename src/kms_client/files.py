"""Whole files: sent, converted by a job, and written to targets; or given a new header.

A target gets its name once it is whole and on disk. All outlive a restart of the service.
"""

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeVar

from kms_client import requests
from kms_client.attempts import Attempts
from kms_client.http_client import Download, Engine, Upload
from kms_client.job_wait import JobWait
from kms_client.requests import RewrapOptions, ServiceUnreachable, UnexpectedAnswer, UploadOptions
from kms_protocol import small_files, wire
from kms_protocol.errors import InvalidRequest, KmsError, NotACiphertext, TargetExists
from kms_protocol.units import KiB, MiB
from kms_protocol.whole_files import replacing

P = TypeVar("P")
T = TypeVar("T")
FileName = str | os.PathLike[str]
Stage = Literal["sending", "waiting", "receiving"]
FileProgress = Callable[[Stage, int, int | None], None]
"""Receives the stage of a transfer, the bytes done in it, and all of them if known."""
_HEADER_BYTES: Final = 256 * KiB  # the most that the service reads
_LAST_LINE: Final = b"\n---"  # as no other line of a header begins (age-encryption.org/v1, Header)
_NONCE_BYTES: Final = 16


class FileTransfer:
    """The transfer of one file within the deadline of a client."""

    def __init__(self, engine: Engine, progress: FileProgress | None) -> None:
        self._engine = engine
        self._attempts = engine.attempts(lasting=True)
        self._progress = progress

    async def convert(
        self, kind: wire.JobKind, source: Path, target: Path, options: UploadOptions, *, overwrite: bool
    ) -> wire.JobOut:
        """Send a file and fetch the result of its job: see ``AsyncClient.encrypt_file``."""
        target = checked_target(target, overwrite=overwrite)
        with open_source(source) as file:
            upload = Upload(file, self._report("sending"))
            accepted = await self._engine.send(requests.upload(kind, options), upload, self._attempts)
        try:
            job = await self._ended(accepted.job_id)
            await self.fetch(accepted.job_id, target, overwrite=overwrite)
        except (KmsError, OSError) as exc:
            exc.add_note(f"job id {accepted.job_id}")
            raise
        if not options.get("idempotency_key"):  # by which a caller that dies now finds the job again
            with contextlib.suppress(KmsError):  # the result expires by itself
                await self._engine.send(requests.change_job("DELETE", accepted.job_id, "/result"))
        return job

    async def _ended(self, job_id: str) -> wire.JobOut:
        """Wait for the end of a job. Raises its error, JobNotFinished at the deadline."""
        self._attempts.progressed()
        show = self._report("waiting")

        def progress(job: wire.JobOut) -> None:
            if show is not None:
                show(job.progress.bytes_done, job.progress.bytes)

        wait = JobWait(self._engine, job_id, self._attempts.until, self._attempts)
        job = await wait.end(progress if show else None)
        if error := requests.job_error(job):
            raise error
        return job

    async def fetch(self, job_id: str, target: Path, *, overwrite: bool) -> int:
        """Write the result of a job to a file: see ``AsyncClient.download_to``."""
        target = checked_target(target, overwrite=overwrite)
        async with self._writing(target, overwrite=overwrite) as file:
            part = Download(file, self._report("receiving"), hashed=True)
            await receive(self._engine, job_id, part, self._attempts)
        return part.offset

    async def rewrap(
        self, source: Path, target: Path, options: RewrapOptions, *, overwrite: bool
    ) -> wire.EncryptOut:
        """Write a file with a new header: see ``AsyncClient.rewrap_file``."""
        target = checked_target(target, overwrite=overwrite)
        with open_source(source) as file:
            before = os.fstat(file.fileno())
            header = header_of(file)
            call = requests.post("/rewrap", wire.RewrapIn(ciphertext=header, **options), wire.EncryptOut)
            answer = await self._engine.send(call, attempts=self._attempts)
            if answer.ciphertext[-_NONCE_BYTES:] != header[-_NONCE_BYTES:]:
                raise UnexpectedAnswer("The answer of the service is the header of another file")
            async with self._writing(target, overwrite=overwrite) as written:
                if hasattr(os, "fchmod"):  # not on Windows
                    os.fchmod(written.fileno(), before.st_mode & 0o777)
                written.write(answer.ciphertext)
                while part := await self._call(file.read, MiB):
                    await self._call(written.write, part)
                after = os.fstat(file.fileno())
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise InvalidRequest("The source changed while it was copied: try again when it is whole")
        return answer

    @contextlib.asynccontextmanager
    async def _writing(self, target: Path, *, overwrite: bool) -> AsyncIterator[BinaryIO]:
        """Open a file that replaces the target at the end. Raises TargetExists, OSError."""
        file = replacing(target, overwrite=overwrite)
        with contextlib.ExitStack() as stack:
            yield stack.enter_context(file)
            try:
                await self._call(lambda kept: kept.close(), stack.pop_all())
            except FileExistsError as exc:
                raise TargetExists(f"{target} exists") from exc

    async def _call(self, work: Callable[[P], T], given: P) -> T:
        return await self._engine.transport.call(work, given)

    def _report(self, stage: Stage) -> Callable[[int, int | None], None] | None:
        return self._progress and partial(self._progress, stage)


async def receive(engine: Engine, job_id: str, part: Download, attempts: Attempts) -> None:
    """Fetch a result, or what is missing of it, until all is there.

    The digest of a ``part`` that has one is compared with that of the service. Raises ServiceUnreachable if
    ``attempts`` end.
    """
    attempts.progressed()
    await _complete(engine, job_id, part, attempts)
    while part.hashed:
        call = requests.result_digest(job_id, part.offset)
        if await engine.send(call, attempts=attempts) in {b"", part.digest()}:
            return
        part.restart()
        await attempts.pause(ServiceUnreachable("The result arrived damaged"))
        await _complete(engine, job_id, part, attempts)


async def _complete(engine: Engine, job_id: str, part: Download, attempts: Attempts) -> None:
    """Fetch what is missing of a result."""
    while True:
        before = part.offset
        try:
            await engine.fetch(requests.result(job_id, part.headers()), part, attempts)
        except ServiceUnreachable as exc:
            if part.offset > before:
                attempts.progressed()
            await attempts.pause(exc)
        else:
            return


def open_source(path: Path) -> BinaryIO:
    """Open a regular file. Raises InvalidRequest for a pipe or device, OSError."""
    file = open(path, "rb", opener=small_files.at_once)  # noqa: SIM115 -- without a wait; callers close it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InvalidRequest(f"{path} is not a regular file: use upload_encrypt or upload_decrypt for a pipe")
    return file


def header_of(file: BinaryIO) -> bytes:
    """Read the header of an age file and the nonce after it, 16 bytes. Raises NotACiphertext."""
    start = file.read(_HEADER_BYTES)
    line = start.find(_LAST_LINE)
    end = start.find(b"\n", line + 1) + 1 + _NONCE_BYTES
    if line < 0 or not _NONCE_BYTES < end <= len(start):
        raise NotACiphertext
    file.seek(end)
    return start[:end]


def checked_target(target: Path, *, overwrite: bool) -> Path:
    """Return what to replace: of a link its target.

    Raises TargetExists for an existing target, OSError for a folder, and for one in no folder.
    """
    if not overwrite and os.path.lexists(target):
        raise TargetExists(f"{target} exists: name another target, or set overwrite")
    target.parent.stat()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    return target.resolve() if overwrite else target
