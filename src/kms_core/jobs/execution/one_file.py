"""Jobs from place to place: sealed, opened or sealed anew in parallel, committed once, by any worker.

A target is absent or complete. The commit is described in the job record before it happens, so that a
worker that dies in the middle leaves it to the next one, and finishing twice changes nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final

from kms_core import audit
from kms_core.age import header
from kms_core.age.header import FILE_LIMITS
from kms_core.jobs.execution import upload
from kms_core.jobs.execution.lease import Commits, Held
from kms_core.jobs.model import Commit, JobSpec
from kms_core.jobs.storage.locations import JobSource, JobTarget, Locations, PendingTarget, is_remote
from kms_core.payload.parallel import ParallelOptions
from kms_core.service import Kms
from kms_protocol.errors import JobExpired, JobsUnavailable, KmsError, PathRefused, TargetExists

REMOTE_THREADS: Final = 4
REMOTE_SLAB_CHUNKS: Final = 32
"""2 MiB: each costs a request, and each thread holds one or two of them."""

_REFUSED: Final = (JobExpired, TargetExists, PathRefused)


def run(lease: Held, kms: Kms, store: Commits, places: Locations) -> Commit:
    """Do the work, or finish what an attempt that died began.

    Returns what is in place. Raises PathRefused, TargetExists, SpoolFull, JobExpired, Unavailable.
    """
    job, commit = lease.claim.accepted, lease.claim.commit
    target = places.target(job.target, job.job_id, overwrite=job.overwrite)
    pending = None
    if commit is None:
        target.sweep(lease.claim.fence)
        with _attempt(lease, kms, places, target) as (pending, commit):
            store.committing(lease.claim, commit)
        lease.check()  # whoever has been overtaken leaves the rest to the other
    try:
        with audit.effect(kms.trail, job.who, "commit", f"{job.job_id}-{commit.fence}"):
            if pending:
                pending.finish(commit)
            elif not _finish_begun(job, commit, target, store):
                with _attempt(lease, kms, places, target) as (pending, _):
                    job.check_expiry(store.now)
                    pending.finish(commit)
    except _REFUSED:  # the job has failed, and its file is in nobody's way
        target.give_up(commit)
        raise
    return commit


def _finish_begun(job: JobSpec, commit: Commit, target: JobTarget, store: Commits) -> bool:
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


def sweep(job_id: str, target: str, fence: int, places: Locations) -> None:
    """Remove what attempts before this fence left when they were killed. Raises PathRefused."""
    places.target(target, job_id, overwrite=False).sweep(fence)


@contextmanager
def _attempt(
    lease: Held, kms: Kms, places: Locations, target: JobTarget
) -> Iterator[tuple[PendingTarget, Commit]]:
    """The work done, and its commit described. If the block fails, nothing is left behind."""
    job = lease.claim.accepted
    work = {"encrypt": _encrypt, "decrypt": _decrypt, "rewrap": _rewrap, "reseal": _reseal}[job.kind]
    with ExitStack() as stack:
        source = stack.enter_context(places.open_source(job.source))
        lease.admit(source.size_bytes)
        room_bytes = 0 if job.kind == "rewrap" else source.size_bytes  # a payload may be moved as it is
        pending = stack.enter_context(target.prepare(lease.claim.fence, room_bytes))
        stack.enter_context(_discarded_on_failure(pending))
        work(lease, kms, source, pending)
        source.check_unchanged()
        yield pending, pending.settle(source, in_place=job.in_place)


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


def _pace(lease: Held) -> ParallelOptions:
    job, pace = lease.claim.accepted, upload.pace(lease)
    if is_remote(job.source) or is_remote(job.target):
        return replace(pace, threads=REMOTE_THREADS, slab_chunks=REMOTE_SLAB_CHUNKS)
    return pace


def _encrypt(lease: Held, kms: Kms, source: JobSource, pending: PendingTarget) -> None:
    job = lease.claim.accepted
    kms.encrypt_file(
        job.who, source.reader, pending.writer, job.bound_context, key_id=job.key_id, pace=_pace(lease)
    )


def _decrypt(lease: Held, kms: Kms, source: JobSource, pending: PendingTarget) -> None:
    job = lease.claim.accepted
    kms.decrypt_file(
        job.who, source.reader, pending.writer, job.bound_context, key_id=job.key_id, pace=_pace(lease)
    )


def _reseal(lease: Held, kms: Kms, source: JobSource, pending: PendingTarget) -> None:
    job = lease.claim.accepted
    kms.reseal_file(
        job.who,
        source.reader,
        pending.writer,
        job.bound_context,
        new_context=job.new_bound_context,
        key_id=job.key_id,
        pace=_pace(lease),
    )


def _rewrap(lease: Held, kms: Kms, source: JobSource, pending: PendingTarget) -> None:
    """A new header, and the payload as it is, which the file system or the store moves where it can."""
    job = lease.claim.accepted
    try:
        head = header.read_by(source.reader.read_at, FILE_LIMITS)
    except KmsError as exc:
        kms.refused(job.who, job.kind, job.bound_context, exc)
    moved = kms.rewrap_file(
        job.who,
        head,
        job.bound_context,
        new_context=job.new_bound_context,
        key_id=job.key_id,
        size_bytes=source.size_bytes,
    )
    new = memoryview(moved.ciphertext)
    payload = source.reader.tail(head.size)
    pending.writer.reserve(len(new) + payload.size)
    pending.writer.write_at(new, 0)
    pending.copy(payload, len(new), _pace(lease))
