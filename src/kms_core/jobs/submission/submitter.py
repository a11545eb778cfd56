"""Submission of jobs: checks a request and stores it as an immutable record. Does not use HTTP.

A request that every worker would refuse is refused here, before a byte is uploaded: an unknown key, a missing
context, a path outside the roots, a deadline that a job of its size cannot keep.
"""

import hmac
import uuid
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Final, Self, TypeVar

import msgspec

from kms_core import audit
from kms_core.age import header
from kms_core.auth.policy import Principal
from kms_core.jobs import authorization, bulk_lines
from kms_core.jobs.file_patterns import Tree, base_of, is_tree
from kms_core.jobs.model import Job
from kms_core.jobs.spec import MOVING, FileJob, FilesJob, ItemsJob, JobSpec, SmallBlob, TreeJob, UploadJob
from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import ITEMS, RESOURCE, UPLOAD, Label, Spool
from kms_core.jobs.store.store import JobStore
from kms_core.observability import tracing
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import (
    ContextRequired,
    GroupComplete,
    IdempotencyConflict,
    InvalidDeadline,
    InvalidRequest,
    RateLimited,
    RedisFull,
    RedisReadOnly,
    SpoolQuota,
    TooLarge,
)
from kms_protocol.units import MiB, time_text

WITHIN_S: Final = 86_400
"""Seconds in which a job starts, and in which it ends, unless it names other times."""
_MOST_S: Final = 30 * 86_400  # between now and a time that a job names, and for which its result is kept
JSON_BYTES: Final = 16 * MiB
"""The largest items of a job in JSON, not in NDJSON; in base64 they are a third larger."""
_JSON_ITEMS: Final = 10_000
_NOTHING: Final = "Give items, or source and target; to upload a file use /files/encrypt or /files/decrypt"
_Spec = TypeVar("_Spec", bound=JobSpec)


def deadlines(job: wire.JobIn, now: float, result_ttl_s: float) -> dict[str, float]:
    """Times of a ``JobSpec`` submitted at ``now`` (seconds since the epoch). Raises InvalidDeadline.

    Without ``keep_for`` its result is kept for ``result_ttl_s``. ``ttl_s`` says all three: start, end and
    deletion within so many seconds.
    """
    if job.ttl_s:
        if job.start_by or job.run_by or job.keep_for:
            raise InvalidDeadline("ttl_s stands for start_by, run_by and keep_for: give it, or those")
        until = now + job.ttl_s
        return {"start_by": until, "run_by": until, "expires_at": until}
    start_by, run_by = (at.timestamp() if at else None for at in (job.start_by, job.run_by))
    last = now + _MOST_S
    for name, at in (("start_by", start_by), ("run_by", run_by)):
        if at is not None and at <= now:
            raise InvalidDeadline(f"{name} is in the past: the service has {time_text(now)}")
        if at is not None and at > last:
            raise InvalidDeadline(f"{name} is after {time_text(last)}: name an earlier one")
    if start_by and run_by and run_by < start_by:
        raise InvalidDeadline("run_by is before start_by: a job cannot end before it starts")
    keep_for_s = job.keep_for or result_ttl_s
    if keep_for_s > _MOST_S:
        raise InvalidDeadline(f"keep_for is above {_MOST_S} s: name a shorter time")
    run_by = run_by or max(now + WITHIN_S, start_by or 0)
    start_by = start_by or min(now + WITHIN_S, run_by)
    return {
        "start_by": start_by,
        "run_by": run_by,
        "keep_for_s": keep_for_s,
        "expires_at": run_by + keep_for_s,
    }


def urls_of(job: wire.JobIn) -> dict[str, object]:
    """The fields of a ``FileJob`` or, with ``dry_run``, of a ``TreeJob``.

    ``target`` is the source itself for files that are replaced. Raises InvalidRequest for fields that do not
    go together.
    """
    source = job.source or ""
    target, many = source if job.target is None else job.target, is_tree(source)
    found: dict[str, object] = {"source": source, "target": target, "overwrite": bool(job.overwrite)}
    if many:
        Tree.parse(source)
        found["dry_run"] = bool(job.dry_run)
    if job.dry_run and not many:
        raise InvalidRequest("dry_run is for a source that names many files, with *")
    if job.dry_run and job.kind not in MOVING:
        raise InvalidRequest("dry_run is for rewrap and reseal")
    if job.target is None or (many and target == source):
        if job.kind not in MOVING:
            raise InvalidRequest(_NOTHING)
        if not job.overwrite and not job.dry_run:
            raise InvalidRequest("A job without a target replaces its source: say so with overwrite")
    elif many and (not target.endswith("/") or "*" in target):
        raise InvalidRequest("The target of many files is a directory: end it with a slash, and no star")
    return found


@dataclass(frozen=True, slots=True)
class SubmissionOptions:
    """A job as ``POST /jobs`` describes it, its submitter, and its contexts, parsed.

    ``job_id`` is that which its submitter chose, empty for a random one; ``digest`` (32 bytes, keyed) then
    distinguishes a replay from another job.
    """

    who: Principal
    job: wire.JobIn
    context: Context
    new_context: Context | None
    idempotency: str = ""
    job_id: str = ""
    digest: bytes = b""

    @classmethod
    def of(cls, who: Principal, job: wire.JobIn, *, idempotency: str = "") -> Self:
        """Raises InvalidContext."""
        new_context = None if job.new_context is None else Context.parse(job.new_context)
        return cls(who, job, Context.parse(job.context), new_context, idempotency)

    @property
    def annotations(self) -> dict[str, object]:
        """Options that workers do not go by, as fields of a ``JobSpec``, as far as they were given."""
        job = self.job
        found: dict[str, object] = {"release": job.release, "labels": job.labels, "metadata": job.metadata}
        if job.group:
            found |= {"group": job.group.name, "group_jobs": job.group.jobs}
            found["group_callback"] = job.group.callback
        return {name: value for name, value in found.items() if value}

    def idempotency_scope(self, route: str) -> str:
        """The text that the Redis key of an Idempotency-Key is a digest of; other callers have other texts.

        Tenants, routes and headers have no NUL; the name of a caller is at the end.
        """
        return f"{self.who.tenant}\0{route}\0{self.idempotency}\0{self.who.name}"


def new_id() -> str:
    """Return a random job id (UUID version 4)."""
    return str(uuid.uuid4())


class JobSubmitter:
    """Accepts uploads, items and file references."""

    def __init__(
        self,
        kms: Kms,
        store: JobStore,
        spool: Spool,
        places: Locations,
        require_install: Callable[[], None],
    ) -> None:
        """``require_install`` raises WrongInstall where spool and Redis do not belong together."""
        self.store = store
        self.spool = spool
        self._kms = kms
        self._places = places
        self._require_install = require_install
        self._section = store.section

    def check(self, options: SubmissionOptions, *, bulk: bool = False) -> None:
        """Raise what would fail for certain, before a body is received.

        Forbidden, UnknownKey, ContextRequired, InvalidDeadline, JobsUnavailable, RedisFull, …. Items of a
        bulk job may bring contexts of their own, so there each is asked for its own, later.
        """
        self._check_without_redis(options, bulk=bulk)
        self.store.ping()

    def _check_without_redis(self, options: SubmissionOptions, *, bulk: bool) -> None:
        """Raise as ``check``, but for the state of Redis."""
        job = options.job
        context = None if bulk else options.context
        authorization.check(self._kms, options.who, job, context, options.new_context)
        self._check_options(options, bulk=bulk)
        deadlines(job, self.store.now(), self.store.rules.result_ttl_s)

    def _check_options(self, options: SubmissionOptions, *, bulk: bool) -> None:
        """Raise UnknownKey, ContextRequired, InvalidRequest, WrongInstall."""
        job = options.job
        self._kms.keyring.named(job.key_id)
        sealing = job.kind == "encrypt" or options.new_context is not None
        context = options.context if options.new_context is None else options.new_context
        if self._section.require_context and sealing and not context and not bulk:
            raise ContextRequired
        group = job.group.callback if job.group else None
        for callback in filter(None, (job.callback, group)):
            endpoint = self._section.jobs.endpoints.get(callback)
            if endpoint is None or not endpoint.is_for(options.who.tenant):
                # another tenant's endpoint is as one that does not exist
                raise InvalidRequest("callback names no endpoint for your tenant: see [kms.jobs.endpoints]")
        self._require_install()

    def meter(self, options: SubmissionOptions, declared_bytes: int = 0) -> Callable[[int], None]:
        """Takes the size so far of an arriving body: raises SpoolQuota above the tenant's quota."""
        room = self.store.spool_room(options.who.tenant)

        def check(size_bytes: int) -> None:
            if room is not None and size_bytes > room:
                raise self.store.quota_error(options.who.tenant)

        check(declared_bytes)
        return check

    def require(self, who: Principal, operation: str) -> None:
        """Raise Forbidden unless a scope of the caller allows the operation."""
        self._kms.require(who, operation)

    def hasher(self, options: SubmissionOptions) -> hmac.HMAC:
        """A keyed digest of the request; the body is fed to it as it arrives."""
        new = b"-" if options.new_context is None else b"+" + options.new_context.canonical()
        job, annotations = options.job, msgspec.json.encode(options.annotations, order="sorted")
        times = [time_text(at, "microseconds") if at else "" for at in (job.start_by, job.run_by)]
        texts = (job.kind, job.key_id or "", job.callback or "", job.priority or "normal")
        encoded = (text.encode() for text in (*texts, f"{times} {job.keep_for} {job.ttl_s}"))
        return self.store.record_key.hasher(options.context.canonical(), new, annotations, *encoded)

    def submit(self, options: SubmissionOptions, charge: Callable[[int], object] | None = None) -> Job:
        """Submit a job of items, or one from URL to URL. Raises as ``check`` and these do.

        ``charge`` gets the number of items once the caller may submit them, and may raise.
        """
        body = options.job
        if body.items is None and body.source is not None:
            return self.files(options)
        self._check_without_redis(options, bulk=body.items is not None)
        if body.items is None or body.source is not None or body.target is not None:
            raise InvalidRequest(_NOTHING)
        if len(body.items) > _JSON_ITEMS:
            raise TooLarge(
                f"More than {_JSON_ITEMS} items: stream application/x-ndjson to POST /jobs?kind=… instead"
            )
        if charge is not None:
            charge(len(body.items))
        return self.items(options, body.items)

    def receive_upload(
        self, options: SubmissionOptions, declared_bytes: int
    ) -> Generator[None, tuple[memoryview, bool], Job]:
        """Seal and write an upload slab by slab, then submit its job; a broken upload leaves nothing.

        Each slab comes with whether more follow; ``declared_bytes`` is 0 for an unknown size. Raises as
        ``check``, and InvalidRequest, SpoolFull; NotACiphertext if the first slab begins as something else.
        """
        self.check(options)
        check_room = self.meter(options, declared_bytes)
        job_id = new_id()
        hasher = self.hasher(options) if options.idempotency else None
        label = Label(options.who.tenant, job_id, UPLOAD)
        with self.spool.writing(label, declared_bytes=declared_bytes, may_be_small=True) as out:
            more = True
            while more:
                slab, more = yield
                if not out.size and options.job.kind != "encrypt":
                    header.check_start(slab)
                out.write(slab, more=more)
                check_room(out.size)
                if hasher:
                    hasher.update(slab)
            if declared_bytes and out.size != declared_bytes:
                raise InvalidRequest("The upload ended before its Content-Length")
        digest = hasher.digest() if hasher else b""
        job = self._spec(UploadJob, options, job_id, digest, size_bytes=out.size, input_ref=out.ref)
        return self._store(options, job, out.small)

    def items(self, options: SubmissionOptions, items: Iterable[wire.JobItem]) -> Job:
        """A bulk job; its items go to the spool one by one. Raises InvalidRequest, TooLarge, SpoolFull."""
        job_id = options.job_id or new_id()
        hasher = self.hasher(options) if options.idempotency else None
        starts: list[int] = []
        count = 0
        check_room = self.meter(options)
        with self.spool.writing(Label(options.who.tenant, job_id, ITEMS), may_be_small=True) as out:
            for count, item in enumerate(items, start=1):
                bulk_lines.check_item(options.job.kind, count - 1, item)
                if len(starts) * bulk_lines.RUN_ITEMS < count:
                    starts.append(out.size)
                line = wire.encode(item) + b"\n"
                if hasher:
                    hasher.update(line)
                out.write(line)
                check_room(out.size)
            if not count:
                raise InvalidRequest("A bulk job needs at least one item")
            if out.size > self.store.rules.inline_bytes or not self.store.has_room:
                self.store.ping()  # a Redis that is away would leave the file in the spool
        fields = {"items": count, "size_bytes": out.size, "starts": tuple(starts), "input_ref": out.ref}
        job = self._spec(ItemsJob, options, job_id, hasher.digest() if hasher else b"", **fields)
        return self._store(options, job, out.small)

    def files(self, options: SubmissionOptions) -> Job:
        """A job over one file, or over all that a pattern names: a worker lists those.

        Raises as ``check``, and PathRefused, TargetExists, ….
        """
        hasher, urls = self.hasher(options), urls_of(options.job)
        hasher.update(repr(urls).encode())
        form: Callable[..., FileJob | TreeJob] = TreeJob if "dry_run" in urls else FileJob
        job = self._spec(form, options, options.job_id or new_id(), hasher.digest(), **urls)
        authorization.check_job(self._kms, job)
        self._check_options(options, bulk=False)
        return self._store(options, msgspec.structs.replace(job, size_bytes=self._places.admit(job)))

    def _spec(
        self,
        form: Callable[..., _Spec],
        options: SubmissionOptions,
        job_id: str,
        digest: bytes,
        **fields: object,
    ) -> _Spec:
        """The accepted specification; ``fields`` are those that this kind of job has."""
        now, who, job, new_context = self.store.now(), options.who, options.job, options.new_context
        try:
            times = deadlines(job, now, self.store.rules.result_ttl_s)
        except InvalidDeadline:  # it passed while the input arrived
            self.spool.delete(job_id)
            raise
        return form(
            job_id=job_id,
            tenant=who.tenant,
            principal=who.name,
            credential=who.credential,
            scopes=who.grant.scopes if who.grant else (),
            authorized_until=who.grant.until if who.grant else 0.0,
            kind=job.kind,
            key_id=job.key_id,
            context=options.context.pairs,
            new_context=None if new_context is None else new_context.pairs,
            callback=job.callback or "",
            priority=job.priority or "normal",
            request_id=audit.request_id.get(),
            traceparent=tracing.parent(),
            digest=options.digest or digest,
            created_at=now,
            **times,
            **options.annotations,
            **fields,
        )

    def _store(self, options: SubmissionOptions, accepted: JobSpec, blob: SmallBlob | None = None) -> Job:
        job_id = accepted.job_id
        route = f"files/{options.job.kind}" if isinstance(accepted, UploadJob) else "jobs"
        scope = options.idempotency_scope(route) if options.idempotency else ""
        try:
            with audit.recorded(self._kms.audit_log, options.who, "job.submit", job_id) as record:
                job = self.store.submit(accepted, scope, self._resources(accepted, blob), blob)
                record.job_id = job.job_id
        except (GroupComplete, IdempotencyConflict, RateLimited, SpoolQuota):
            self._discard(job_id, blob)
            raise
        except (RedisFull, RedisReadOnly):  # nothing was stored; a job that a client named may be there
            if not options.job_id:
                self._discard(job_id, blob, in_redis=False)
            raise
        # after any other JobsUnavailable the record may be there: the sweep decides
        if job.job_id != job_id:  # an earlier submission with this key: keep that one
            self._discard(job_id, blob)
            job = msgspec.structs.replace(job, is_replayed=True)
        return job

    def _discard(self, job_id: str, blob: SmallBlob | None, *, in_redis: bool = True) -> None:
        """Delete what was written of a job that was not stored; a small blob was not."""
        if blob is None:
            self.spool.delete(job_id, in_redis=in_redis)

    def _resources(self, job: JobSpec, blob: SmallBlob | None) -> list[str]:
        """The roots of a job, or the spool, and those of its buckets and backends whose use is bounded."""
        found = {RESOURCE: None} if not isinstance(job, FilesJob) and blob is None else {}
        if isinstance(job, FilesJob):
            source = base_of(job.source) if isinstance(job, TreeJob) else job.source
            found = dict.fromkeys(self._places.resource(url) for url in (source, job.target))
        found |= dict.fromkeys(f"backend:{name}" for name in self._kms.keyring.named(job.key_id).names)
        return [name for name in found if name.startswith("root:") or name in self.store.resource_leases]
