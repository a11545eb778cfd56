"""Jobs over one file or object: encrypt, decrypt or rewrap in parallel, commit once, by any worker.

A target is absent or complete. The commit is described in the job record before it happens, so that a
worker that dies in the middle leaves it to the next one, and finishing twice changes nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from kms_core import audit
from kms_core.jobs import authorization
from kms_core.jobs.ends import PlacedTarget
from kms_core.jobs.execution import upload
from kms_core.jobs.execution.lease import Commits, Held
from kms_core.jobs.model import Commit, CommitGone
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

    For one of many files, permissions are checked, and leftovers of other attempts removed, before the first.
    """

    job: FileJob
    target: JobTarget
    kms: Kms
    places: Locations
    is_one_of_many: bool = False

    def run(self, lease: Held, store: Commits) -> tuple[PlacedTarget, str]:
        """Do the work, or finish what an attempt that died began; if the result is in place, do nothing.

        Answers with the target, and the id of the file; that is empty where the result was in place. So a job
        that ended well does so again if Redis has forgotten it: whatever happened to its source, or to the
        permissions of its submitter. Raises Forbidden, PathRefused, TargetExists, SpoolFull, JobExpired,
        Unavailable.
        """
        if (commit := lease.claim.commit) is not None:
            store.confirm(self.job.job_id)  # a commit that replicas may not have puts nothing in place
            self._sweep(lease, commit)
            self._put_in_place(commit, None, lease, store)
            return _placed(commit)
        if placed := self.target.recognised():
            return placed, ""
        if not self.is_one_of_many:
            authorization.check(self.kms, self.job.who, authorization.of(self.job))
        self._sweep(lease)
        with self._attempt(lease) as (pending, commit):
            store.committing(lease.claim, commit)
        self._sweep(lease, commit)
        self._put_in_place(commit, pending, lease, store)
        return _placed(commit)

    def _sweep(self, lease: Held, commit: Commit | None = None) -> None:
        """Remove what other attempts have ready, or left when they were killed: they put it nowhere."""
        lease.check()  # a worker that lost its lease leaves the rest to its successor
        keep = {commit.attempt_id} if commit else set()
        if not self.is_one_of_many:
            self.places.sweep({self.job.job_id: self.job.target}, {lease.claim.attempt_id} | keep)

    def _put_in_place(
        self, commit: Commit, pending: PendingTarget | None, lease: Held, store: Commits
    ) -> None:
        job, target = self.job, self.target
        try:
            with audit.effect(self.kms.audit_log, job.who, "commit", f"{job.job_id}-{commit.attempt_id}"):
                if pending:
                    pending.finish(commit)
                elif not _finish_begun(job, commit, target, store):
                    with self._attempt(lease) as (again, _):
                        job.check_expiry(store.now)
                        again.finish(commit)
        except _REFUSED as exc:  # the job has failed, and its temporary file is gone
            target.give_up(commit)
            if pending and isinstance(exc, CommitGone):
                store.withdraw(lease.claim)  # raises LeaseLost if another attempt has put it in place
                raise Unavailable("Another attempt at this job removed what this one had ready") from exc
            raise

    @contextmanager
    def _attempt(self, lease: Held) -> Iterator[tuple[PendingTarget, Commit]]:
        """The work done, and its commit described. If the block fails, nothing is left behind."""
        job = self.job
        with ExitStack() as stack:
            source = stack.enter_context(self.places.open_source(job.source))
            lease.admit(source.size_bytes)
            room_bytes = 0 if job.kind == "rewrap" else source.size_bytes  # a payload may be moved as it is
            pending = stack.enter_context(self.target.prepare(lease.claim.attempt_id, room_bytes))
            stack.enter_context(_discarded_on_failure(pending))
            data = FileToFile(source.reader, pending.writer, _options(lease, job), pending.copy)
            new = job.new_bound_context
            made = self.kms.run(
                job.kind, job.who, data, job.bound_context, new_context=new, key_id=job.key_id
            )
            source.check_unchanged()
            settled = pending.settle(source, in_place=job.in_place)
            yield pending, msgspec.structs.replace(settled, file_id=made.file_id)


def _placed(commit: Commit) -> tuple[PlacedTarget, str]:
    target = PlacedTarget(
        size_bytes=commit.size_bytes, inode=commit.inode, mtime_ns=commit.mtime_ns, parts=commit.parts
    )
    return target, commit.file_id


def _finish_begun(job: FileJob, commit: Commit, target: JobTarget, store: Commits) -> bool:
    """Finish the commit of an earlier attempt; False if its work must be done again for that.

    Of an expired job only what is in place already counts: its record may have been put back by others.
    Raises JobExpired, ClocksApart, and as ``JobTarget.finish``.
    """
    try:
        job.check_expiry(store.now)
    except JobExpired:
        if not target.is_placed(commit):
            raise
        target.give_up(commit)  # what may be left beside it
        return True
    return target.finish(commit)


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


def _options(lease: Held, job: FileJob) -> ParallelOptions:
    options = upload.options(lease)
    if is_remote(job.source) or is_remote(job.target):
        return replace(options, threads=REMOTE_THREADS, slab_chunks=REMOTE_SLAB_CHUNKS)
    return options
