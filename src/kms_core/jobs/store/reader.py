"""The reading side of the job store: jobs as their owners see them, with verified ends.

The sealed part of a record says whose the job is and what was accepted. An end that needs a proof
(``spec.needs_proof``) and has none is reported as ``failed`` with ``record_refused``; all other states are
reported as stored.
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Final, NamedTuple, Self, cast

import msgspec
import structlog

from kms_core.jobs.model import REFUSED, Checkpoint, Job, part_id
from kms_core.jobs.spec import (
    CLOCK_LEEWAY_S,
    AnyJob,
    Fields,
    JobSpec,
    SignedEnd,
    SignedSplit,
    TreeJob,
    needs_proof,
    spec_digest,
)
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.job_redis import JobRedis
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.records import named, number, reading
from kms_core.settings.model import TenantSection
from kms_protocol.errors import InvalidRequest, JobNotFinished, RecordRefused, SpoolQuota, UnknownJob
from kms_protocol.units import size_text
from kms_protocol.wire import STATES

MOST_SEEN: Final = 5000
"""Jobs that one page of a list looks at."""
MOST_GROUPED: Final = 10_000
_LIST_NAME_BYTES: Final = 16
FETCHED_S: Final = 60.0
"""So long a fetched result stays: its reader resumes, if the last bytes that were sent did not arrive."""
_CURSOR: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)-([0-9a-f-]{36})")
_AT_ONCE: Final = 20
"""Records in one look. Threads that wait for Redis this often leave the interpreter to the other calls."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part as it is reported, its sealed record as it lies, and its checkpoint.

    ``mark`` (32 bytes) stands for how it ended, in the end of its parent. ``is_unproven``: it says that it
    succeeded, or that only items failed, and cannot prove it.
    """

    job: Job
    sealed: bytes
    log: Checkpoint
    mark: bytes
    is_unproven: bool


class Cursor(NamedTuple):
    """A place in a tenant's list of jobs: the age and id of one of them. Later ones are greater."""

    created_at: float
    job_id: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InvalidRequest unless it is what ``str`` gave."""
        found = _CURSOR.fullmatch(text)
        if not found:
            raise InvalidRequest("cursor is what the page before gave as next")
        return cls(float(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.created_at!r}-{self.job_id}"


class JobReader(JobRedis):
    """One job, a tenant's list, sealed parts, results. JobStore inherits it; all raise JobsUnavailable."""

    def get(self, job_id: str, tenant: str) -> Job:
        """One job of this tenant; UnknownJob for another's too, and for parts."""
        return self.seen(job_id, tenant)[0]

    def seen(self, job_id: str, tenant: str) -> tuple[Job, bytes]:
        """Return a job and its sealed record, for scripts that change this job only."""
        (raw,) = self._records([job_id])
        return self._owned(job_id, tenant, raw), raw.get(b"sealed", b"")

    def _owned(self, job_id: str, tenant: str, raw: Mapping[bytes, bytes]) -> Job:
        """A record as a Job. UnknownJob unless it is this tenant's and no part.

        The sealed record decides that; of one that was not sealed by this service, the plain fields.
        """
        job = self._verified(job_id, raw)
        if job.tenant != tenant or job.parent:
            raise UnknownJob
        return job

    def release(self, job: Job) -> None:
        """Let go of the result of an ended job, which is gone at once. Raises JobNotFinished, UnknownJob.

        What lies in the spool is the caller's to delete; the reaper does it if the caller dies first.
        """
        if self._let_go(job, 0.0) == b"open":
            raise JobNotFinished

    def fetched(self, job: Job, start: int, stop: int, size: int) -> None:
        """Note that bytes of the result were sent, from ``start`` to before ``stop`` of ``size``.

        Once all were, from the first on, the result is released after ``FETCHED_S``. Raises UnknownJob.
        """
        self._let_go(job, FETCHED_S, start, stop, size)

    def _let_go(self, job: Job, delay_s: float, *sent: int) -> bytes:
        _, sealed = self.seen(job.job_id, job.tenant)
        (word,) = self.call("release", job.job_id, sealed, delay_s, *sent)
        if word == b"gone":
            raise UnknownJob
        return word

    def purged(self, *job_ids: str) -> None:
        """Note that the results are gone, and remove small blobs; the records themselves expire later."""
        self.call_each("purged", job_ids)

    def exists(self, job_id: str) -> bool:
        with redis_errors():
            return bool(self.redis.exists(job_key(job_id)))

    def resources(self, job_id: str) -> list[str]:
        """Return the roots, buckets and backends that a job uses and that are watched or bounded."""
        with redis_errors():
            found = cast("bytes | None", self.redis.hget(job_key(job_id), "resources"))
        return (found or b"").decode(errors="replace").split()

    def part(self, job_id: str) -> PartRecord:
        """A part of a job, internal to the service: clients cannot get, cancel or retry it by itself."""
        (raw,) = self._records([job_id])
        return self._part(job_id, raw)

    def accepted(self, job_id: str) -> AnyJob:
        """The sealed part of a job, opened. UnknownJob if it is not there or was not sealed by us."""
        with redis_errors():
            sealed = cast("bytes | None", self.redis.hget(job_key(job_id), "sealed"))
        if sealed is None:
            raise UnknownJob
        return self.record_key.open(job_id, sealed)

    def states(self, tenant: str) -> Mapping[str, int]:
        """The number of listed jobs of a tenant by state, and of dead letters as ``dead``.

        Records that expired just now may be among them.
        """
        keys: dict[str, str] = {state: f"{PREFIX}state:{tenant}:{state}" for state in STATES}
        keys["dead"] = f"{PREFIX}dead:{tenant}"
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for key in keys.values():
                pipeline.zcard(key)
            counts = pipeline.execute()
        return {name: int(count) for name, count in zip(keys, counts, strict=True)}

    def page(  # noqa: PLR0913 -- the filters of a list
        self,
        tenant: str,
        *,
        state: str | None,
        limit: int,
        before: str | None,
        labels: Mapping[str, str] | None = None,
        kind: str | None = None,
        matches: Callable[[Job], bool] = lambda _: True,
    ) -> tuple[list[Job], str | None]:
        """Newest first. The cursor names the last one seen: jobs that come or go between pages move nothing.

        ``state``, ``kind`` and ``labels`` are those that each job has, and ``matches`` accepts it. A page has
        fewer jobs than ``limit`` at the end of the list, and where ``MOST_SEEN`` jobs were looked at. Raises
        InvalidRequest for a cursor that is not one.
        """
        at = Cursor.parse(before) if before else Cursor(math.inf, "")
        wanted = (labels or {}).items()
        key, seen = self._shortest(tenant, state, dict(wanted)), 0
        found: list[Job] = []
        while True:
            older = self._older(key, at, limit)
            for at, raw in zip(older, self._records([at.job_id for at in older]), strict=True):
                job = self._listed(at.job_id, tenant, raw)
                is_sought = job and state in {None, job.state} and kind in {None, job.kind}
                if job and is_sought and wanted <= job.labels.items() and matches(job):
                    found.append(job)
                if len(found) == limit:
                    return found, str(at)
            if not older:
                return found, None
            seen += len(older)
            if seen >= MOST_SEEN:
                return found, str(at)

    def _shortest(self, tenant: str, state: str | None, labels: Mapping[str, str]) -> str:
        """The key of the shortest list that has all jobs of this state with these labels."""
        if not labels:
            return f"{PREFIX}state:{tenant}:{state}" if state else f"{PREFIX}tenant:{tenant}"
        keys = [f"{PREFIX}label:{digest}" for digest in self.label_digests(tenant, labels)]
        if state:
            keys.append(f"{PREFIX}state:{tenant}:{state}")
        with redis_errors():
            return min(keys, key=lambda key: int(self.redis.zcard(key)))

    def label_digests(self, tenant: str, labels: Mapping[str, str]) -> list[str]:
        """The names of the lists of jobs with these labels: keyed digests, so Redis learns nothing."""
        return [self._list_name("label", tenant, *label) for label in sorted(labels.items())]

    def index_fields(self, accepted: JobSpec, resources: Sequence[str]) -> dict[str, str]:
        """The fields of a record by which the scripts keep lists and the outbox, as far as it has them."""
        group = ""
        if accepted.group:
            group = f"{self.group_digest(accepted.tenant, accepted.group)} {accepted.group_jobs}"
        labels = self.label_digests(accepted.tenant, accepted.labels)
        found = {"labels": " ".join(labels), "resources": " ".join(resources), "group": group}
        found |= {"callback": accepted.callback, "group_callback": accepted.group_callback}
        return {name: value for name, value in found.items() if value}

    def group_digest(self, tenant: str, name: str) -> str:
        """The name of the list of a group's jobs, keyed as those of labels are."""
        return self._list_name("group", tenant, name)

    def _list_name(self, *texts: str) -> str:
        return self.record_key.digest(*map(str.encode, texts))[:_LIST_NAME_BYTES].hex()

    def group(self, tenant: str, name: str) -> list[Job]:
        """The jobs of a group in their verified states, by age; only those that named it themselves.

        Raises UnknownJob if there is none.
        """
        key = f"{PREFIX}group:{self.group_digest(tenant, name)}"
        with redis_errors():
            raw = cast("list[bytes]", self.redis.zrange(key, 0, MOST_GROUPED - 1))
        jobs = self.many([named(each) for each in raw], tenant)
        found = [job for job in jobs if job.accepted and job.accepted.group == name]
        if not found:
            raise UnknownJob("No job of this group is known")
        return found

    def group_counts(self, tenant: str, name: str) -> tuple[int, int]:
        """The number of jobs of a group, and of those that have not ended, as Redis says; not verified."""
        digest = self.group_digest(tenant, name)
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.zcard(f"{PREFIX}group:{digest}")
            pipeline.scard(f"{PREFIX}group-open:{digest}")
            submitted, still_open = pipeline.execute()
        return submitted, still_open

    def many(self, job_ids: Sequence[str], tenant: str) -> list[Job]:
        """Return the jobs among these ids that are the tenant's, in this order."""
        jobs = (self._listed(*each) for each in zip(job_ids, repeat(tenant), self._records(job_ids)))
        return list(filter(None, jobs))

    def _older(self, key: str, at: Cursor, count: int) -> list[Cursor]:
        """The next jobs behind a cursor; none only at the end of the list."""
        start = 0
        while True:
            with redis_errors():
                found = self.redis.zrevrangebyscore(key, at.created_at, "-inf", start, count, withscores=True)
            rows = cast("list[tuple[bytes, float]]", found)
            older = [one for name, score in rows if (one := Cursor(score, named(name))) < at]
            if older or not rows:
                return older
            start += len(rows)

    def _listed(self, job_id: str, tenant: str, raw: Mapping[bytes, bytes]) -> Job | None:
        try:
            return self._owned(job_id, tenant, raw)
        except UnknownJob:  # it has expired and the reaper takes it out of the list, or it is foreign
            return None

    def spool_room(self, tenant: str) -> int | None:
        """Bytes that a tenant may still upload, None without a quota. ``submit`` has the last word."""
        most = self.spool_quota(tenant)
        return max(0, most - self.spooled_bytes(tenant)) if most else None

    def spool_quota(self, tenant: str) -> int:
        """Bytes that a tenant may have in the spool; 0 for any number."""
        own = self.section.tenants.get(tenant, TenantSection()).spool_bytes
        share = self.rules.spool_max_bytes // 2 if self.has_several_tenants() else 0
        return own or self.rules.tenant_spool_bytes or share

    def spooled_bytes(self, tenant: str) -> int:
        """Bytes of uploads and items of a tenant's jobs whose results have not expired."""
        with redis_errors():
            return int(number(cast("bytes | None", self.redis.hget(f"{PREFIX}spooled:{tenant}", "sum"))))

    def quota_error(self, tenant: str) -> SpoolQuota:
        """The error of a tenant whose quota of the spool is spent, which says what to do."""
        used, most = self.spooled_bytes(tenant), self.spool_quota(tenant)
        return SpoolQuota(
            f"Your tenant has {size_text(used)} of at most {size_text(most)} in the spool: release fetched "
            "results (`kms job release`, or DELETE of the result), or wait until they expire"
        )

    def dead(self, tenant: str, limit: int) -> list[Job]:
        """Dead letters of this tenant, newest first."""
        with redis_errors():
            found = cast("list[bytes]", self.redis.zrevrange(f"{PREFIX}dead:{tenant}", 0, 2 * limit - 1))
        return self.many([named(raw) for raw in found], tenant)[:limit]

    def split_of(self, job_id: str) -> tuple[SignedSplit, bytes]:
        """The parts of a job as was signed, and the digest of its sealed record. UnknownJob if forged."""
        with redis_errors():
            found = cast("list[bytes | None]", self.redis.hmget(job_key(job_id), "sealed", "split"))
        sealed, split = [value or b"" for value in found]
        spec = spec_digest(sealed)
        return self.record_key.verified(SignedSplit, job_id, split, spec), spec

    def parts_cut(self, job: Job) -> list[str]:
        """The ids of the parts that a job was cut into, as was signed; none where that was forged."""
        if not job.parts:
            return []
        try:
            split, _ = self.split_of(job.job_id)
        except UnknownJob:
            return []
        return [part_id(job.job_id, number) for number in range(split.parts)]

    def parts_of(self, job_id: str, count: int) -> Iterator[PartRecord]:
        """The parts of a job in order. UnknownJob where one is not there."""
        ids = [part_id(job_id, number) for number in range(count)]
        return map(self._part, ids, self._records(ids))

    def _records(self, ids: Sequence[str]) -> Iterator[dict[bytes, bytes]]:
        """The fields of these records, ``_AT_ONCE`` in one look; none where there is no record."""
        for start in range(0, len(ids), _AT_ONCE):
            with redis_errors():
                pipeline = self.redis.pipeline(transaction=False)
                for name in ids[start : start + _AT_ONCE]:
                    pipeline.hgetall(job_key(name))
                found = pipeline.execute()
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
        sealed, log = raw.get(b"sealed", b""), raw.get(b"log", b"")
        job, found = self._verified(job_id, raw), Checkpoint()
        with suppress(UnknownJob):  # there is none, or it was forged, which is why the part was given up
            found = self.record_key.verified(Checkpoint, job_id, log, spec_digest(sealed))
        mark = raw[b"end"] if job.end else f"{job.state} {job.error}".encode() + log
        is_unproven = job.error == REFUSED and raw.get(b"error") != REFUSED.encode()
        return PartRecord(job, sealed, found, spec_digest(mark), is_unproven)

    def _verified(self, job_id: str, raw: Mapping[bytes, bytes]) -> Job:
        """The fields of a record as a Job, its end verified. UnknownJob where they are not those of a job."""
        sealed, accepted = raw.get(b"sealed", b""), None
        with suppress(UnknownJob):
            accepted = self.record_key.open(job_id, sealed)
        job = reading(job_id, raw, _sure(accepted) if accepted else {})
        if accepted:
            until = accepted.result_until(job.ended_at) if job.ended and job.ended_at else accepted.expires_at
            job = msgspec.structs.replace(job, accepted=accepted, expires_at=until)
        if not needs_proof(job.state, job.error):
            return job
        end = self._end(job_id, raw.get(b"end", b""), spec_digest(sealed))
        if end and (end.state, end.error) == (job.state, job.error):
            return _as_signed(job, end)
        _log.warning("job.end_refused", job_id=job_id)
        return msgspec.structs.replace(job, state="failed", error=REFUSED)

    def _end(self, job_id: str, signed: bytes, spec: bytes) -> SignedEnd | None:
        try:
            end = self.record_key.verified(SignedEnd, job_id, signed, spec)
        except UnknownJob:
            return None
        return end if time.time() <= end.kept_until + CLOCK_LEEWAY_S else None

    def is_kept(self, accepted: JobSpec) -> bool:
        """Return whether its record can still be in Redis by itself; an older one was put back."""
        return time.time() <= accepted.expires_at + self.rules.result_ttl_s + CLOCK_LEEWAY_S


def parts_digest(marks: Iterable[bytes]) -> bytes:
    """SHA-256 over the marks of all parts: what the end of their parent has as the digest of its result."""
    return hashlib.sha256(b"".join(marks)).digest()


def _sure(accepted: JobSpec) -> Fields:
    """The fields of a Job that its sealed part decides; a listing says how much many files are."""
    found = {"campaign": "", **accepted.plain, "parent": accepted.parent}
    counted = {"items", "bytes"} if isinstance(accepted, TreeJob) and not accepted.parent else set()
    return {name: value for name, value in found.items() if name not in counted}


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
