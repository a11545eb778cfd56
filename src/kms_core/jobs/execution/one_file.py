"""Jobs over one file, object, upload or list of items: encrypt, decrypt or rewrap, commit once.

A target is absent or complete. The commit is described in the job record before it happens, so that a
worker that dies in the middle leaves it to the next one, and finishing twice changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import msgspec

from kms_core import audit
from kms_core.age import header
from kms_core.envelope import binding
from kms_core.jobs import authorization
from kms_core.jobs.bulk_lines import MOST_PARTS, RUN_ITEMS, decode, lines
from kms_core.jobs.execution.lease import Lease, WorkerContext
from kms_core.jobs.model import Commit, CommitGone, part_id
from kms_core.jobs.spec import NOT_OF_PARTS, FileJob, ItemsJob, PlacedTarget, UploadJob, WorkResult
from kms_core.jobs.storage.local import file_errors
from kms_core.jobs.storage.locations import JobTarget, PendingTarget, is_remote
from kms_core.jobs.storage.spool import HEAD, ITEMS, UPLOAD, Blob, Label, Spool, result_label
from kms_core.operation import Opened, Sealed
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.streaming import FileToFile
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import (
    InvalidRequest,
    JobExpired,
    JobsUnavailable,
    KmsError,
    PathRefused,
    RecordRefused,
    TargetExists,
    Unavailable,
)

# Jobs over an uploaded file: the payload stays in place, and the result of the job is a new head for it.
#
# Encrypt: the upload is already sealed under the spool key, so its file key is wrapped for the target key.
# The result is that header and the stored payload of the blob. Other uploads are the content of theirs.
# Decrypt: every chunk is authenticated; the head is the file key, with which a download opens the payload.
# Rewrap: the head is the new header of the same payload. Every head ends with the payload nonce of the
# file.

REMOTE_THREADS: Final = 4
REMOTE_SLAB_CHUNKS: Final = 32
"""2 MiB: each costs a request, and each thread holds one or two of them."""


def run_upload(lease: Lease, job: UploadJob, kms: Kms, spool: Spool) -> None:
    """Make the head of the result.

    Raises what ``Kms`` raises, DecryptFailed for a damaged payload, RecordRefused for another upload.
    """
    make_head = {"encrypt": _encrypt, "decrypt": _decrypt, "rewrap": _rewrap}.get(job.kind)
    if make_head is None:
        raise InvalidRequest("An upload cannot be resealed: name a source and a target")
    with ExitStack() as stack:
        try:
            blob = stack.enter_context(spool.blob(upload_label(job), lease.claim.small_input))
        except RecordRefused as exc:
            kms.raise_recorded(job.who, job.kind, job.bound_context, exc)
        head = make_head(lease, job, kms, blob)
        label = Label(job.tenant, job.job_id, HEAD, lease.claim.attempt_id)
        with spool.writing(label, may_be_small=blob.is_small) as out:
            out.write(head)
        lease.made = WorkResult(result_digest=out.ref, blob=out.small, file_id=file_id(head))


def upload_label(job: UploadJob) -> Label:
    """The spool label of a job's upload."""
    return Label(job.tenant, job.job_id, UPLOAD, ref=job.input_ref)


def file_id(head: bytes) -> str:
    """The id of the file of a head (see ``binding.file_id``)."""
    return binding.file_id(head[-header.NONCE_BYTES :])


def _options(lease: Lease, *urls: str) -> ParallelOptions:
    """Slab by slab: report progress, stop on loss or cancellation. Threads as the places of ``urls`` bear."""
    options = ParallelOptions(progress=lease.advance, check=lease.check)
    if any(map(is_remote, urls)):
        return replace(options, threads=REMOTE_THREADS, slab_chunks=REMOTE_SLAB_CHUNKS)
    return options


def _encrypt(lease: Lease, job: UploadJob, kms: Kms, blob: Blob) -> bytes:
    size = blob.content.size
    lease.advance(size)
    made = kms.encrypt_header(
        job.who, (blob.file_key, blob.nonce), job.bound_context, size_bytes=size, key_id=job.key_id
    )
    return made + blob.nonce


def _decrypt(lease: Lease, job: UploadJob, kms: Kms, blob: Blob) -> bytes:
    found = kms.decrypt_header(
        job.who, blob.content, job.bound_context, key_id=job.key_id, options=_options(lease)
    )
    return found.file_key + found.nonce


def _rewrap(lease: Lease, job: UploadJob, kms: Kms, blob: Blob) -> bytes:
    moved, nonce = kms.rewrap_header(
        job.who, blob.content, job.bound_context, new_context=job.new_bound_context, key_id=job.key_id
    )
    lease.advance(blob.content.size)
    return moved.ciphertext + nonce


_REFUSED: Final = (JobExpired, TargetExists, PathRefused)


@dataclass(frozen=True, slots=True)
class FileWork:
    """The work on one file, and what it needs.

    ``lease`` is that of the job, or of the part with the file. ``record`` records a commit before it happens,
    or takes it back, as ``JobStore.committing``; ``commit`` is the one that an earlier attempt recorded. For
    one of many files, permissions are checked, and leftovers of other attempts removed, before the first.
    """

    job: FileJob
    target: JobTarget
    context: WorkerContext
    lease: Lease
    record: Callable[[Commit | None], None]
    commit: Commit | None
    is_one_of_many: bool = False

    def run(self) -> WorkResult:
        """Do the work, or finish what an attempt that died began; if the result is in place, do nothing.

        Answers with the target and the id of the file, which is empty where the result was in place. So a job
        that ended well does so again if Redis has forgotten it: whatever happened to its source, or to the
        permissions of its submitter. Raises Forbidden, PathRefused, TargetExists, SpoolFull, JobExpired,
        Unavailable.
        """
        commit, pending = self.commit, None
        if commit:
            self.context.store.confirm(self.job.job_id)  # what replicas may not have puts nothing in place
        elif placed := self.target.recognised():
            return WorkResult(target=placed)
        else:
            if not self.is_one_of_many:
                authorization.check_job(self.context.kms, self.job)
            self._sweep()
            with self._attempt() as (pending, commit):
                self.record(commit)
        self._sweep(commit)
        self._put_in_place(commit, pending)
        target = {name: getattr(commit, name) for name in PlacedTarget.__struct_fields__}
        return WorkResult(target=PlacedTarget(**target), file_id=commit.file_id)

    def _sweep(self, commit: Commit | None = None) -> None:
        """Remove what other attempts have ready, or left when they were killed: they put it nowhere."""
        self.lease.check()  # a worker that lost its lease leaves the rest to its successor
        if not self.is_one_of_many:
            keep = {self.lease.claim.attempt_id} | ({commit.attempt_id} if commit else set())
            self.context.places.sweep({self.job.job_id: self.job.target}, keep)

    def _put_in_place(self, commit: Commit, pending: PendingTarget | None) -> None:
        job, log, name = self.job, self.context.kms.audit_log, f"{self.job.job_id}-{commit.attempt_id}"
        try:
            with audit.effect(log, job.who, "commit", name):
                if pending:
                    pending.finish(commit)
                elif self._finish_begun(commit):
                    self.lease.advance(job.size_bytes)
                else:
                    with self._attempt() as (again, _):
                        job.check_expiry(self.context.store.now)
                        again.finish(commit)
        except _REFUSED as exc:  # the job has failed, and its temporary file is gone
            self.target.give_up(commit)
            if pending and isinstance(exc, CommitGone):
                self.record(None)  # raises LeaseLost if another attempt has put it in place
                raise Unavailable("Another attempt at this job removed what this one had ready") from exc
            raise

    def _finish_begun(self, commit: Commit) -> bool:
        """Finish the commit of an earlier attempt; False if its work must be done again for that.

        Of an expired job only what is in place already counts: its record may have been put back by others.
        Raises JobExpired, ClocksApart, and as ``JobTarget.finish``.
        """
        try:
            self.job.check_expiry(self.context.store.now)
        except JobExpired:
            if not self.target.is_placed(commit):
                raise
            self.target.give_up(commit)  # what may be left beside it
            return True
        return self.target.finish(commit)

    @contextmanager
    def _attempt(self) -> Iterator[tuple[PendingTarget, Commit]]:
        """The work done, and its commit described. Raises as ``file_errors``.

        If the block fails, nothing is left behind, unless Redis may have it that it is committing.
        """
        job = self.job
        with self.context.places.open_source(job.source) as source:
            size = source.reader.size
            self.lease.admit(size)
            room_bytes = 0 if job.kind == "rewrap" else size  # a payload may be moved as it is
            with self.target.prepare(self.lease.claim.attempt_id, room_bytes) as pending:
                try:
                    options = _options(self.lease, job.source, job.target)
                    data = FileToFile(source.reader, pending.writer, options, pending.copy)
                    with file_errors():
                        made = self.context.kms.run(
                            job.kind,
                            job.who,
                            data,
                            job.bound_context,
                            new_context=job.new_bound_context,
                            key_id=job.key_id,
                        )
                    source.check_unchanged()
                    settled = pending.settle(source, in_place=job.in_place)
                    yield pending, msgspec.structs.replace(settled, file_id=made.file_id)
                except JobsUnavailable:
                    raise
                except Exception:
                    pending.discard()
                    raise


def run_file(lease: Lease, job: FileJob, context: WorkerContext) -> None:
    """Do the work of a job over one file or object. Raises as ``FileWork.run``."""
    target = context.places.target(job, job.job_id, lease.claim.spec)
    record = partial(context.store.committing, lease.claim)
    lease.made = FileWork(job, target, context, lease, record, lease.claim.commit).run()


def run_items(lease: Lease, job: ItemsJob, kms: Kms, spool: Spool) -> None:
    """Work through the items of a job, or of its part, and write one result line each, in order.

    Raises Unavailable as it comes: the part is then done again, from its first item.
    """
    new_context, context = job.new_bound_context, job.bound_context
    run = partial(kms.for_job().run, job.kind, job.who, new_context=new_context, key_id=job.key_id)
    label = Label(job.tenant, job.owner, ITEMS, ref=job.input_ref)
    begin = job.starts[0]
    with (
        kms.audit_log.together(),
        spool.opened(label, lease.claim.small_input) as reader,
        spool.writing(
            result_label(job.tenant, job.owner, job.part, lease.claim.attempt_id), may_be_small=True
        ) as out,
    ):
        for index, line in enumerate(lines(reader.slabs(begin, begin + job.size_bytes)), start=job.first):
            lease.check()
            answer = _answer(run, context, index, decode(line))
            out.write(wire.encode(answer) + b"\n")
            lease.item(len(line) + 1, failed=isinstance(answer.error, wire.ErrorCode))
            if isinstance(answer.error, wire.ErrorCode):
                lease.failures.add(index, answer.error.code)
    lease.made = WorkResult(result_digest=out.ref, blob=out.small)


def item_parts(job: ItemsJob) -> list[ItemsJob]:
    """The job cut into parts, which several workers can run at once. Doing it again gives the same ids.

    A large job has larger parts, or Redis would do nothing else while it stores them.
    """
    runs = -(-len(job.starts) // MOST_PARTS)
    starts, most = job.starts[::runs], runs * RUN_ITEMS
    ends = (*starts[1:], job.size_bytes)
    return [
        msgspec.structs.replace(
            job,
            job_id=part_id(job.job_id, number),
            parent=job.job_id,
            part=number,
            first=number * most,
            items=min(most, job.items - number * most),
            starts=(start,),
            size_bytes=end - start,
            **NOT_OF_PARTS,
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _answer(
    run: Callable[[bytes, Context], Sealed | Opened], bound: Context, index: int, item: wire.JobItem
) -> wire.ItemResult:
    """Work on one item; ``bound`` is the context of those without one. Raises Unavailable."""
    try:
        context = bound if item.context is None else Context.parse(item.context)
        made = run(item.plaintext or item.ciphertext or b"", context)
    except Unavailable:
        raise
    except KmsError as exc:
        return wire.ItemResult(index=index, error=wire.ErrorCode(code=exc.code))
    if isinstance(made, Opened):
        return wire.ItemResult(index=index, plaintext=made.plaintext, file_id=made.file_id)
    return wire.ItemResult(index=index, ciphertext=made.ciphertext, file_id=made.file_id)
