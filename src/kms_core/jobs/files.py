"""Jobs from file to file under the roots: sealed or opened in parallel, committed once, by any worker.

A target is absent or complete. The commit is described in the job record before it happens, so that a
worker that dies in the middle leaves it to the next one, and finishing twice changes nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kms_core.envelope import disk, header
from kms_core.envelope.header import FILE_LIMITS
from kms_core.envelope.slabs import Extent
from kms_core.errors import JobsUnavailable, KmsError, PathRefused, TargetExists
from kms_core.jobs.lease import Lease
from kms_core.jobs.model import Commit
from kms_core.jobs.paths import OpenSource, Pending, Placement, Roots, temporary_name
from kms_core.jobs.store import JobStore
from kms_core.jobs.uploads import pace
from kms_core.service import Kms

_REFUSED: Final = (TargetExists, PathRefused)
_COPY_BYTES: Final = 8 * 1024 * 1024


def run(lease: Lease, kms: Kms, store: JobStore, roots: Roots) -> None:
    """Do the work, or finish what an attempt that died began. Raises PathRefused, TargetExists, SpoolFull."""
    job = lease.claim.accepted
    commit = lease.claim.commit
    if commit is None:
        commit = _attempt(lease, kms, store, roots)
    tag = _tag(job.job_id, commit.fence)
    placement = Placement(job.target, temporary_name(tag), commit.inode, commit.size_bytes, commit.mtime_ns)
    try:
        roots.finish(placement, overwrite=job.overwrite)
    except _REFUSED:  # somebody took the target's name: the job has failed, and its file is in nobody's way
        roots.discard(job.target, placement.temporary)
        raise


def _attempt(lease: Lease, kms: Kms, store: JobStore, roots: Roots) -> Commit:
    job, fence = lease.claim.accepted, lease.claim.fence
    if fence > 1:
        _sweep(job.job_id, job.target, fence, roots)
    tag = _tag(job.job_id, fence)
    work = {"encrypt": _encrypt, "decrypt": _decrypt, "rewrap": _rewrap}[job.kind]
    with (
        roots.open_source(job.source) as source,
        roots.prepare(job.target, tag, overwrite=job.overwrite) as pending,
        _discarded_on_failure(pending),
    ):
        work(lease, kms, source, pending)
        source.check_unchanged()
        placed = pending.settle()
        commit = Commit(
            fence=fence, inode=placed.inode, size_bytes=placed.size_bytes, mtime_ns=placed.mtime_ns
        )
        store.committing(lease.claim, commit)
    return commit


@contextmanager
def _discarded_on_failure(pending: Pending) -> Iterator[None]:
    """A failed attempt leaves nothing behind, unless Redis may have heard that it is committing."""
    try:
        yield
    except JobsUnavailable:
        raise
    except Exception:
        pending.discard()
        raise


def _sweep(job_id: str, target: str, fence: int, roots: Roots) -> None:
    """Remove what attempts that were killed left beside the target."""
    for earlier in range(1, fence):
        try:
            roots.discard(target, temporary_name(_tag(job_id, earlier)))
        except KmsError:  # the attempt itself will say what is wrong with the directory
            return


def _tag(job_id: str, fence: int) -> str:
    return f"{job_id}-{fence}"


def _encrypt(lease: Lease, kms: Kms, source: OpenSource, pending: Pending) -> None:
    job = lease.claim.accepted
    extent = Extent(source.fd, source.size_bytes)
    kms.encrypt_file(job.who, extent, pending.fd, job.bound_context, key_id=job.key_id, pace=pace(lease))


def _decrypt(lease: Lease, kms: Kms, source: OpenSource, pending: Pending) -> None:
    job = lease.claim.accepted
    extent = Extent(source.fd, source.size_bytes)
    kms.decrypt_file(job.who, extent, pending.fd, job.bound_context, key_id=job.key_id, pace=pace(lease))


def _rewrap(lease: Lease, kms: Kms, source: OpenSource, pending: Pending) -> None:
    """A new header, and the payload as it is: by reflink or in the kernel, where the file system can."""
    job = lease.claim.accepted
    head = header.read(source.fd, FILE_LIMITS)
    moved = kms.rewrap_file(
        job.who,
        head,
        job.bound_context,
        new_context=job.new_bound_context,
        key_id=job.key_id,
        size_bytes=source.size_bytes,
    )
    disk.write_all(pending.fd, memoryview(moved.ciphertext), 0)
    done, at = head.size, len(moved.ciphertext)
    while done < source.size_bytes:
        lease.check()
        copied = os.copy_file_range(source.fd, pending.fd, _COPY_BYTES, done, at)
        if not copied:
            break
        done, at = done + copied, at + copied
        lease.advance(copied)
