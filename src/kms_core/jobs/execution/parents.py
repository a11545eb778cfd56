"""Ends a job that was cut into parts: the worker that ended the last part verifies the ends of all of them.

A part that succeeded, or whose items failed, counts with its signed end. Of one that was given up, the files
that its signed log settles count as done and all others as failed. The end of the whole is then signed too.
"""

import hashlib
from collections import Counter

from kms_core.jobs.ends import ITEMS_FAILED, SignedEnd, SignedSplit, needs_proof, spec_digest
from kms_core.jobs.execution.key_migration import FileOutcome, OutcomeCounts
from kms_core.jobs.model import REFUSED, Job, JobSpec
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.store.reader import ParentRecord, PartRecord, parts_digest
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import UnknownJob


def end(job: Job, store: JobStore) -> Job:
    """End a job whose parts have all ended, and answer with it as it is told from now on.

    ``record_refused`` if a part cannot prove how it ended, or is not the one that the job was cut into. A
    worker that does so at the same time comes to the same. Raises JobsUnavailable, UnknownJob.
    """
    record = store.parent_record(job.job_id)
    try:
        found = _end_of(job, record, store)
    except UnknownJob:
        found = SignedEnd(fence=job.fence, attempt=job.attempt, state="failed", error=REFUSED, kept_until=0.0)
    store.end_parent(job, found, spec_digest(record.sealed))
    return store.get(job.job_id, job.tenant)


def _end_of(job: Job, record: ParentRecord, store: JobStore) -> SignedEnd:
    accepted = store.record_key.open(job.job_id, record.sealed)
    split = _split(job, accepted, record, store.record_key)
    sums, specs = _Sums(), hashlib.sha256()
    for part in store.parts_of(job.job_id, split.parts):
        sums.add(part)
        specs.update(part.sealed)
    if split.digest and specs.digest() != split.digest:
        raise UnknownJob("The parts of this job are not those that it was cut into")
    return sums.end(job, split.parts, accepted.expires_at + store.rules.keep_record_s)


def _split(job: Job, accepted: JobSpec, record: ParentRecord, key: RecordKey) -> SignedSplit:
    """What the job was cut into; of one that 0.1 cut, Redis alone says in how many parts."""
    if not record.split and not accepted.signed_end:
        return SignedSplit(parts=job.parts, digest=b"")
    return key.open_split(job.job_id, record.split, spec_digest(record.sealed))


class _Sums:
    """Counts over the parts of a job, and a digest of how each ended."""

    def __init__(self) -> None:
        self._items = self._failed = self._bytes = 0
        self._tallies: Counter[str] = Counter()
        self._marks: list[bytes] = []

    def add(self, part: PartRecord) -> None:
        """Count one part. UnknownJob if it has not ended, or cannot prove how."""
        job = part.job
        if part.is_unproven or not job.ended:
            raise UnknownJob("A part of this job cannot prove how it ended")
        self._marks.append(part.mark)
        if needs_proof(job.state, job.error):
            self._count(job.items, job.items_failed, job.bytes, job.tallies)
            return
        given_up = part.accepted
        if given_up is None:
            raise UnknownJob("A part of this job was not sealed by this service")
        tally = OutcomeCounts(map(FileOutcome.parse, part.log.settled))
        failed = given_up.items - tally.done
        self._count(given_up.items, failed, given_up.size_bytes, tally.counts(given_up))

    def _count(self, items: int, failed: int, size_bytes: int, tallies: dict[str, int]) -> None:
        self._items += items
        self._failed += failed
        self._bytes += size_bytes
        self._tallies.update(tallies)

    def end(self, job: Job, parts: int, kept_until: float) -> SignedEnd:
        """The end of the whole."""
        return SignedEnd(
            fence=job.fence,
            attempt=job.attempt,
            state="failed" if self._failed else "succeeded",
            error=ITEMS_FAILED if self._failed else "",
            items=self._items,
            items_done=self._items,
            items_failed=self._failed,
            size_bytes=self._bytes,
            bytes_done=self._bytes,
            parts=parts,
            tallies=dict(self._tallies),
            result_digest=parts_digest(self._marks),
            kept_until=kept_until,
        )
