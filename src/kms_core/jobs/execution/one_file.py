"""Jobs over one file or object: encrypt, decrypt or rewrap in parallel, commit once, by any worker.

A target is absent or complete. The commit is described in the job record before it happens, so that a
worker that dies in the middle leaves it to the next one, and finishing twice changes nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from kms_core import audit
from kms_core.jobs import authorization
from kms_core.jobs.ends import PlacedTarget, Work
from kms_core.jobs.execution import upload
from kms_core.jobs.execution.lease import Commits, Lease
from kms_core.jobs.model import Attempt, Commit, CommitGone
from kms_core.jobs.spec import FileJob
from kms_core.jobs.storage.locations import JobTarget, Locations, PendingTarget, is_remote
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.whole import FileToFile
from kms_core.service import Kms
from kms_protocol.errors import JobExpired, JobsUnavailable, PathRefused, TargetExists, Unavailable

REMOTE_THREADS: Final = 4
REMOTE_SLAB_CHUNKS: Final = 32
"""2 MiB: each costs a request, and each thread holds one or two of them."""

_REFUSED: Final = (JobExpired, TargetExists, PathRefused)


@dataclass(frozen=True, slots=True)
class FileWork:
    """The work on one file, and what it needs.

    ``lease`` is that of ``claim``, or of the part with the file. For one of many files, permissions are
    checked, and leftovers of other attempts removed, before the first.
    """

    job: FileJob
    target: JobTarget
    kms: Kms
    places: Locations
    store: Commits
    lease: Lease
    claim: Attempt
    is_one_of_many: bool = False

    def run(self) -> Work:
        """Do the work, or finish what an attempt that died began; if the result is in place, do nothing.

        Answers with the target and the id of the file, which is empty where the result was in place. So a job
        that ended well does so again if Redis has forgotten it: whatever happened to its source, or to the
        permissions of its submitter. Raises Forbidden, PathRefused, TargetExists, SpoolFull, JobExpired,
        Unavailable.
        """
        if (commit := self.claim.commit) is not None:
            self.store.confirm(self.job.job_id)  # a commit that replicas may not have puts nothing in place
            self._sweep(commit)
            self._put_in_place(commit, None)
            return _placed(commit)
        if placed := self.target.recognised():
            return Work(target=placed)
        if not self.is_one_of_many:
            authorization.check(self.kms, self.job.who, authorization.of(self.job))
        self._sweep()
        with self._attempt() as (pending, commit):
            self.store.committing(self.claim, commit)
        self._sweep(commit)
        self._put_in_place(commit, pending)
        return _placed(commit)

    def _sweep(self, commit: Commit | None = None) -> None:
        """Remove what other attempts have ready, or left when they were killed: they put it nowhere."""
        self.lease.check()  # a worker that lost its lease leaves the rest to its successor
        keep = {commit.attempt_id} if commit else set()
        if not self.is_one_of_many:
            self.places.sweep({self.job.job_id: self.job.target}, {self.claim.attempt_id} | keep)

    def _put_in_place(self, commit: Commit, pending: PendingTarget | None) -> None:
        job, target = self.job, self.target
        try:
            with audit.effect(self.kms.audit_log, job.who, "commit", f"{job.job_id}-{commit.attempt_id}"):
                if pending:
                    pending.finish(commit)
                elif not self._finish_begun(commit):
                    with self._attempt() as (again, _):
                        job.check_expiry(self.store.now)
                        again.finish(commit)
        except _REFUSED as exc:  # the job has failed, and its temporary file is gone
            target.give_up(commit)
            if pending and isinstance(exc, CommitGone):
                self.store.withdraw(self.claim)  # raises LeaseLost if another attempt has put it in place
                raise Unavailable("Another attempt at this job removed what this one had ready") from exc
            raise

    def _finish_begun(self, commit: Commit) -> bool:
        """Finish the commit of an earlier attempt; False if its work must be done again for that.

        Of an expired job only what is in place already counts: its record may have been put back by others.
        Raises JobExpired, ClocksApart, and as ``JobTarget.finish``.
        """
        try:
            self.job.check_expiry(self.store.now)
        except JobExpired:
            if not self.target.is_placed(commit):
                raise
            self.target.give_up(commit)  # what may be left beside it
            return True
        return self.target.finish(commit)

    @contextmanager
    def _attempt(self) -> Iterator[tuple[PendingTarget, Commit]]:
        """The work done, and its commit described. If the block fails, nothing is left behind."""
        job = self.job
        with ExitStack() as stack:
            source = stack.enter_context(self.places.open_source(job.source))
            self.lease.admit(source.reader.size)
            room_bytes = 0 if job.kind == "rewrap" else source.reader.size  # a payload may be moved as it is
            begun: AbstractContextManager[PendingTarget] = self.target.prepare(
                self.claim.attempt_id, room_bytes
            )
            pending = stack.enter_context(begun)
            stack.enter_context(_discarded_on_failure(pending))
            data = FileToFile(source.reader, pending.writer, _options(self.lease, job), pending.copy)
            new = job.new_bound_context
            made = self.kms.run(
                job.kind, job.who, data, job.bound_context, new_context=new, key_id=job.key_id
            )
            source.check_unchanged()
            settled = pending.settle(source, in_place=job.in_place)
            yield pending, msgspec.structs.replace(settled, file_id=made.file_id)


def _placed(commit: Commit) -> Work:
    target = PlacedTarget(
        size_bytes=commit.size_bytes, inode=commit.inode, mtime_ns=commit.mtime_ns, parts=commit.parts
    )
    return Work(target=target, file_id=commit.file_id)


@contextmanager
def _discarded_on_failure(pending: PendingTarget) -> Iterator[None]:
    """A failed attempt leaves nothing behind, unless Redis may have heard that it is committing."""
    try:
        yield
    except JobsUnavailable:
        raise
    except Exception:
        pending.discard()
        raise


def _options(lease: Lease, job: FileJob) -> ParallelOptions:
    options = upload.options(lease)
    if is_remote(job.source) or is_remote(job.target):
        return replace(options, threads=REMOTE_THREADS, slab_chunks=REMOTE_SLAB_CHUNKS)
    return options
