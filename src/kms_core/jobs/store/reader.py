"""The reading side of the job store: jobs as their owners are told of them, with their ends verified.

The sealed part of a record says whose the job is and what was accepted. An end that needs a proof
(``ends.needs_proof``) and has none is told as ``failed`` with ``record_refused``; all other states are told
as Redis has them.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Final, NamedTuple, cast

import msgspec
import redis
import structlog

from kms_core.jobs.ends import CLOCK_LEEWAY_S, SignedEnd, needs_proof, spec_digest
from kms_core.jobs.model import REFUSED, Checkpoint, Fields, Job, JobSpec, StoreRules, part_id
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.store.maintenance import StoreMaintenance
from kms_core.jobs.store.redis_keys import (
    PREFIX,
    Cursor,
    answered,
    job_key,
    reading,
    record_errors,
    redis_errors,
)
from kms_protocol.errors import RecordRefused, UnknownJob

MOST_PARTS: Final = 100_000  # in Redis anything may stand
_AT_ONCE: Final = 200
_DEAD_SCAN: Final = 10_000
_log = structlog.get_logger(__name__)


class ParentRecord(NamedTuple):
    """The sealed record of a job in parts, and the signed list of them, as they lie in Redis."""

    sealed: bytes
    split: bytes


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part as it is told, its sealed record, opened (None if not sealed here) and as it lies, and its log.

    ``mark`` (32 bytes) stands for how it ended, in the end of its parent. ``is_unproven``: it says that it
    succeeded, or that only items failed, and cannot prove it.
    """

    job: Job
    accepted: JobSpec | None
    sealed: bytes
    log: Checkpoint
    mark: bytes
    is_unproven: bool


class JobReader(StoreMaintenance):
    """One job, a tenant's list, the sealed parts. JobStore inherits it; all raise JobsUnavailable."""

    def __init__(self, client: redis.Redis, record_key: RecordKey, rules: StoreRules) -> None:
        super().__init__(client)
        self.record_key = record_key
        self.rules = rules

    def get(self, job_id: str, tenant: str) -> Job:
        """One job of this tenant; UnknownJob for another's too, and for parts."""
        return self.seen(job_id, tenant)[0]

    def seen(self, job_id: str, tenant: str) -> tuple[Job, bytes]:
        """The same, and its sealed record, for scripts that are to change this job only."""
        with record_errors():
            raw = cast("dict[bytes, bytes]", self.redis.hgetall(job_key(job_id)))
        return self._owned(job_id, tenant, raw), raw.get(b"sealed", b"")

    def _owned(self, job_id: str, tenant: str, raw: Mapping[bytes, bytes]) -> Job:
        """A record as a Job. UnknownJob unless it is this tenant's and no part.

        The sealed record decides that; of one that was not sealed by this service, the plain fields.
        """
        job = self.told(job_id, raw, self._sealed(job_id, raw))
        if job.tenant != tenant or job.parent:
            raise UnknownJob
        return job

    def _sealed(self, job_id: str, raw: Mapping[bytes, bytes]) -> JobSpec | None:
        """The sealed part of a record; None if this service did not seal it."""
        try:
            return self.record_key.open(job_id, raw.get(b"sealed", b""))
        except UnknownJob:
            return None

    def part(self, job_id: str) -> Job:
        """A part of a job, for the service's own eyes: nobody may look at, cancel or retry it by itself."""
        with record_errors():
            raw = cast("dict[bytes, bytes]", self.redis.hgetall(job_key(job_id)))
        return self.told(job_id, raw, self._sealed(job_id, raw))

    def accepted(self, job_id: str) -> JobSpec:
        """The sealed part of a job, opened. UnknownJob if it is not there or was not sealed by us."""
        with record_errors():
            sealed = cast("bytes | None", self.redis.hget(job_key(job_id), "sealed"))
        if sealed is None:
            raise UnknownJob
        return self.record_key.open(job_id, sealed)

    def page(
        self, tenant: str, *, state: str | None, limit: int, before: str | None
    ) -> tuple[list[Job], str | None]:
        """Newest first. The cursor names the last one seen: what comes or goes meanwhile moves nothing.

        Raises InvalidRequest for a cursor that is not one.
        """
        at = Cursor.parse(before) if before else Cursor.newest()
        found: list[Job] = []
        while True:
            older = self._older(tenant, at, limit)
            for at, raw in zip(older, self._records([at.job_id for at in older]), strict=True):
                job = self._listed(at.job_id, tenant, raw)
                if job and state in {None, job.state}:
                    found.append(job)
                if len(found) == limit:
                    return found, str(at)
            if not older:
                return found, None

    def _older(self, tenant: str, at: Cursor, count: int) -> list[Cursor]:
        """The next jobs behind a cursor; none only at the end of the list."""
        start = 0
        while True:
            rows: list[tuple[bytes, float]] = self.shared(
                self.redis.zrevrangebyscore,
                f"{PREFIX}tenant:{tenant}",
                at.created_at,
                "-inf",
                start,
                count,
                withscores=True,
            )
            older = [one for row in rows if (one := Cursor.of(*row)) and one < at]
            if older or not rows:
                return older
            start += len(rows)

    def _listed(self, job_id: str, tenant: str, raw: Mapping[bytes, bytes]) -> Job | None:
        try:
            return self._owned(job_id, tenant, raw)
        except UnknownJob:  # it has expired: the caretaker takes it out of the list; or it is none of ours
            return None

    def dead(self, tenant: str, limit: int) -> list[Job]:
        """Dead letters of this tenant, newest first."""
        found: list[bytes] = self.shared(self.redis.zrevrange, f"{PREFIX}dead", 0, _DEAD_SCAN - 1)
        ids = [raw.decode(errors="replace") for raw in found]
        jobs = (self._listed(*each) for each in zip(ids, repeat(tenant), self._records(ids)))
        return list(islice(filter(None, jobs), limit))

    def log_of(self, job_id: str) -> Checkpoint:
        """How far a part came. UnknownJob if that was not written by us."""
        with record_errors():
            found = cast("list[bytes | None]", self.redis.hmget(job_key(job_id), "log", "sealed"))
        log, sealed = [value or b"" for value in found]
        return self._log(job_id, log, sealed) if log else Checkpoint()

    def _log(self, job_id: str, log: bytes, sealed: bytes) -> Checkpoint:
        try:
            return self.record_key.open_log(job_id, log, spec_digest(sealed))
        except UnknownJob:
            if self.record_key.open(job_id, sealed).signed_end:
                raise
        return self.record_key.open_log(job_id, log)

    def parent_record(self, job_id: str) -> ParentRecord:
        """What the end of a job in parts is made from; fields that are not there are empty."""
        with record_errors():
            found = cast("list[bytes | None]", self.redis.hmget(job_key(job_id), "sealed", "split"))
        return ParentRecord(*[value or b"" for value in found])

    def parts_cut(self, job: Job) -> list[str]:
        """The ids of the parts that a job was cut into, as was signed; none of a job that 0.1 cut."""
        if not job.parts:
            return []
        record = self.parent_record(job.job_id)
        try:
            split = self.record_key.open_split(job.job_id, record.split, spec_digest(record.sealed))
        except UnknownJob:
            return []
        return [part_id(job.job_id, number) for number in range(split.parts)]

    def parts_of(self, job_id: str, count: int) -> Iterator[PartRecord]:
        """The parts of a job in order. UnknownJob where one is not there."""
        ids = [part_id(job_id, number) for number in range(min(count, MOST_PARTS))]
        yield from map(self._part, ids, self._records(ids))

    def _records(self, ids: Sequence[str]) -> Iterator[dict[bytes, bytes]]:
        """The fields of these records, some hundred in one look; none where there is no record."""
        for start in range(0, len(ids), _AT_ONCE):
            with redis_errors():
                pipeline = self.redis.pipeline(transaction=False)
                for name in ids[start : start + _AT_ONCE]:
                    pipeline.hgetall(job_key(name))
                found = [answered(one) or {} for one in pipeline.execute(raise_on_error=False)]
            yield from found

    def parts_as_ended(self, job: Job) -> list[PartRecord]:
        """The parts of an ended job, in order. RecordRefused if they are not as its end was signed over."""
        try:
            found = list(self.parts_of(job.job_id, job.parts))
        except UnknownJob as exc:
            raise RecordRefused from exc
        if job.end and parts_digest(part.mark for part in found) != job.end.result_digest:
            raise RecordRefused
        return found

    def _part(self, job_id: str, raw: Mapping[bytes, bytes]) -> PartRecord:
        accepted, sealed, log = self._sealed(job_id, raw), raw.get(b"sealed", b""), raw.get(b"log", b"")
        job = self.told(job_id, raw, accepted)
        try:
            found = self._log(job_id, log, sealed) if log else Checkpoint()
        except UnknownJob:  # it was forged, which is why the part was given up
            found = Checkpoint()
        mark = raw[b"end"] if job.end else f"{job.state} {job.error}".encode() + log
        is_unproven = job.error == REFUSED and raw.get(b"error") != REFUSED.encode()
        return PartRecord(job, accepted, sealed, found, spec_digest(mark), is_unproven)

    def told(self, job_id: str, raw: Mapping[bytes, bytes], accepted: JobSpec | None) -> Job:
        """The fields of a record as a Job, its end verified. UnknownJob where they are not those of a job."""
        job = reading(job_id, raw, _sure(accepted) if accepted else {})
        if not needs_proof(job.state, job.error):
            return job
        sealed = raw.get(b"sealed", b"")
        end = self._end(job_id, raw.get(b"end", b""), spec_digest(sealed))
        if end and (end.state, end.error) == (job.state, job.error):
            return _as_signed(job, end)
        if accepted and not accepted.signed_end and self.is_kept(accepted):  # of 0.1
            return job
        _log.warning("job.end_refused", job_id=job_id)
        return msgspec.structs.replace(job, state="failed", error=REFUSED)

    def _end(self, job_id: str, signed: bytes, spec: bytes) -> SignedEnd | None:
        try:
            end = self.record_key.open_end(job_id, signed, spec)
        except UnknownJob:
            return None
        return end if time.time() <= end.kept_until + CLOCK_LEEWAY_S else None

    def is_kept(self, accepted: JobSpec) -> bool:
        """Whether its record can still be in Redis by itself; an older one was put back."""
        return time.time() <= accepted.expires_at + self.rules.keep_record_s + CLOCK_LEEWAY_S


def parts_digest(marks: Iterable[bytes]) -> bytes:
    """SHA-256 over the marks of all parts: what the end of their parent has as the digest of its result."""
    return hashlib.sha256(b"".join(marks)).digest()


def _sure(accepted: JobSpec) -> Fields:
    """The fields of a Job that its sealed part decides; a listing says how much many files are."""
    found = {"campaign": "", **accepted.plain, "parent": accepted.parent}
    counted = accepted.is_tree and not accepted.parent
    return {name: value for name, value in found.items() if not (counted and name in {"items", "bytes"})}


def _as_signed(job: Job, end: SignedEnd) -> Job:
    return msgspec.structs.replace(
        job,
        attempt=end.attempt,
        fence=end.fence,
        items=end.items,
        items_done=end.items_done,
        items_failed=end.items_failed,
        bytes=end.size_bytes,
        bytes_done=end.bytes_done,
        parts=end.parts,
        tallies=end.tallies,
        end=end,
    )
