"""The accepting side of jobs: checks what is asked for, stores it as an immutable record; knows no HTTP.

What a worker would refuse for certain is refused here, before a byte is uploaded: an unknown key, a missing
context, a path outside the roots.
"""

import hmac
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from kms_core import audit
from kms_core.auth.policy import Principal
from kms_core.jobs import authorization, bulk_lines
from kms_core.jobs.authorization import JobAccess
from kms_core.jobs.file_patterns import is_tree
from kms_core.jobs.model import Job, JobSpec
from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import ITEMS, UPLOAD, Label, Spool
from kms_core.jobs.store.store import SHED_S, JobStore
from kms_core.jobs.submission.references import Reference
from kms_core.observability import tracing
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import ContextRequired, IdempotencyConflict, InvalidRequest, RateLimited, TooLarge


@dataclass(frozen=True, slots=True)
class ClientJobId:
    """A job that its submitter named; ``digest`` (32 bytes, keyed) tells a replay from another job."""

    job_id: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class SubmissionOptions:
    """What every job is asked for with."""

    who: Principal
    kind: wire.JobKind
    context: Context
    key_id: str | None = None
    new_context: Context | None = None
    ttl_s: int | None = None
    idempotency: str = ""
    named: ClientJobId | None = None
    callback: str = ""
    priority: wire.Priority = "normal"

    def job_id(self) -> str:
        """The submitter's, or a new one each time."""
        return self.named.job_id if self.named else new_id()

    def idempotency_scope(self, route: str) -> str:
        """The text that the Redis key of an Idempotency-Key is a digest of; other callers have other texts.

        Tenants and routes have no spaces. Spaces separate a name that has none, as they always did; a name
        with spaces could end like a route, so it stands at the end, behind NULs, which no header can hold.
        """
        who = self.who
        if " " in who.name:
            return f"{who.tenant}\0{route}\0{self.idempotency}\0{who.name}"
        return f"{who.tenant} {who.name} {route} {self.idempotency}"


@dataclass(frozen=True, slots=True)
class SubmissionRules:
    """Limits of acceptance, from settings. ``callbacks``: whose each endpoint is; None is everybody's."""

    result_ttl_s: int
    item_bytes: int
    require_context: bool
    callbacks: Mapping[str, Collection[str] | None] = field(default_factory=dict)

    def knows(self, callback: str, tenant: str) -> bool:
        """Whether a tenant may name it. Another tenant's endpoint is as one that does not exist."""
        tenants = self.callbacks.get(callback, ())
        return tenants is None or tenant in tenants


def new_id() -> str:
    return str(uuid.uuid4())


class JobSubmitter:
    """Accepts uploads, items and file references."""

    def __init__(
        self, kms: Kms, store: JobStore, spool: Spool, places: Locations, rules: SubmissionRules
    ) -> None:
        self.store = store
        self.spool = spool
        self._kms = kms
        self._places = places
        self._rules = rules

    def check(self, terms: SubmissionOptions, *, bulk: bool = False) -> None:
        """Raise what would fail for certain: Forbidden, UnknownKey, ContextRequired, JobsUnavailable, ….

        Items of a bulk job may bring contexts of their own, so there each is asked for its own, later.
        """
        asked = JobAccess(terms.kind, terms.key_id, None if bulk else terms.context, terms.new_context)
        authorization.check(self._kms, terms.who, asked)
        self._kms.keyring.named(terms.key_id)
        sealing = terms.kind == "encrypt" or terms.new_context is not None
        context = terms.context if terms.new_context is None else terms.new_context
        if self._rules.require_context and sealing and not context and not bulk:
            raise ContextRequired
        if terms.callback and not self._rules.knows(terms.callback, terms.who.tenant):
            raise InvalidRequest("callback names no endpoint for your tenant: see [kms.jobs.endpoints]")
        self.store.ping()

    def meter(self, terms: SubmissionOptions, declared_bytes: int = 0) -> Callable[[int], None]:
        """To be told the size so far of what arrives: raises RateLimited above the tenant's quota."""
        room = self.store.spool_room(terms.who.tenant)

        def check(size_bytes: int) -> None:
            if room is not None and size_bytes > room:
                raise RateLimited("Your tenant has as much in the spool as it may", retry_after_s=SHED_S)

        check(declared_bytes)
        return check

    def allow(self, who: Principal, operation: str) -> None:
        """Raise Forbidden unless the caller may do this at all."""
        self._kms.allow(who, operation)

    def hasher(self, terms: SubmissionOptions) -> hmac.HMAC:
        """A keyed digest of what is asked for; the body is fed to it as it arrives."""
        new = b"-" if terms.new_context is None else b"+" + terms.new_context.canonical()
        asked = (terms.kind.encode(), terms.context.canonical(), (terms.key_id or "").encode(), new)
        rest = [str(terms.ttl_s or ""), terms.callback]
        if terms.priority != "normal":  # what was asked for before there were priorities keeps its digest
            rest.append(terms.priority)
        return self.store.record_key.hasher(*asked, *(part.encode() for part in rest))

    def submit(
        self,
        terms: SubmissionOptions,
        body: wire.JobIn,
        most_items: int,
        charge: Callable[[int], None] | None = None,
    ) -> Job:
        """A job as ``POST /jobs`` describes it: items, or a reference. Raises as ``check`` and these do.

        ``charge`` is told the number of items once the caller may submit them, and may raise.
        """
        self.check(terms, bulk=body.items is not None)
        if body.items is not None and body.source is None and body.target is None:
            check_count(len(body.items), most_items)
            if charge is not None:
                charge(len(body.items))
            return self.items(terms, body.items)
        if body.items is None and body.source is not None:
            asked = Reference.of(body)
            return self.many(terms, asked) if is_tree(asked.source) else self._one(terms, asked)
        raise InvalidRequest(
            "Give items, or source and target; to upload a file use /files/encrypt or /files/decrypt"
        )

    def upload(
        self, terms: SubmissionOptions, job_id: str, size_bytes: int, digest: bytes, ref: bytes
    ) -> Job:
        """A job over an upload that has arrived whole; ``ref`` is that of its blob."""
        fields = {"size_bytes": size_bytes, "input_ref": ref}
        return self._submit(terms, job_id, source=UPLOAD, digest=digest, **fields)

    def items(self, terms: SubmissionOptions, items: Iterable[wire.JobItem]) -> Job:
        """A bulk job; its items go to the spool one by one. Raises InvalidRequest, TooLarge, SpoolFull."""
        job_id = terms.job_id()
        hasher = self.hasher(terms)
        starts: list[int] = []
        count = 0
        check_room = self.meter(terms)
        with self.spool.writing(Label(terms.who.tenant, job_id, ITEMS)) as out:
            for index, item in enumerate(items):
                bulk_lines.check_item(terms.kind, index, item, self._rules.item_bytes)
                if index % bulk_lines.PART_ITEMS == 0:
                    starts.append(out.size)
                line = wire.encode(item) + b"\n"
                hasher.update(line)
                out.write(line)
                check_room(out.size)
                count += 1
            if not count:
                raise InvalidRequest("A bulk job needs at least one item")
            size = out.size
        return self._submit(
            terms,
            job_id,
            source=ITEMS,
            items=count,
            size_bytes=size,
            starts=tuple(starts),
            input_ref=out.ref,
            digest=hasher.digest(),
        )

    def reference(self, terms: SubmissionOptions, source: str, target: str, *, overwrite: bool) -> Job:
        """A job from file to file under the roots. Raises Forbidden, PathRefused, TargetExists, …."""
        return self._one(terms, Reference(source, target, overwrite))

    def _one(self, terms: SubmissionOptions, asked: Reference) -> Job:
        self._check_files(terms, asked)
        self._places.check(asked.target)
        with self._places.open_source(asked.source) as opened:
            if terms.kind != "rewrap":  # a file system may move a payload without copying it
                self._places.check_room(asked.target, opened.size_bytes)
            return self._submit_files(terms, asked, size_bytes=opened.size_bytes)

    def many(self, terms: SubmissionOptions, asked: Reference) -> Job:
        """A job over all files that a pattern names; a worker lists them. Raises Forbidden, PathRefused."""
        self._check_files(terms, asked)
        self._places.check_base(asked.tree.base)
        if not asked.in_place:
            self._places.check_directory(asked.target)
        return self._submit_files(terms, asked, dry_run=asked.dry_run, rate_per_s=asked.rate_per_s)

    def _check_files(self, terms: SubmissionOptions, asked: Reference) -> None:
        who = replace(terms.who, source=asked.source, target=asked.target)
        authorization.check(
            self._kms, who, JobAccess(terms.kind, terms.key_id, terms.context, terms.new_context)
        )

    def _submit_files(self, terms: SubmissionOptions, asked: Reference, **fields: object) -> Job:
        hasher = self.hasher(terms)
        hasher.update(asked.text.encode())
        return self._submit(
            terms,
            terms.job_id(),
            source=asked.source,
            target=asked.target,
            overwrite=asked.overwrite,
            digest=hasher.digest(),
            **fields,
        )

    def _submit(
        self, terms: SubmissionOptions, job_id: str, *, source: str, digest: bytes, **fields: object
    ) -> Job:
        now = self.store.now()
        new_context = terms.new_context
        accepted = msgspec.convert(
            {
                "job_id": job_id,
                "tenant": terms.who.tenant,
                "principal": terms.who.name,
                "credential": terms.who.credential,
                "scopes": terms.who.grant.scopes if terms.who.grant else (),
                "authorized_until": terms.who.grant.until if terms.who.grant else 0.0,
                "kind": terms.kind,
                "source": source,
                "key_id": terms.key_id,
                "context": terms.context.pairs,
                "new_context": None if new_context is None else new_context.pairs,
                "callback": terms.callback,
                "priority": terms.priority,
                "request_id": audit.request_id.get(),
                "traceparent": tracing.parent(),
                "signed_end": True,
                "digest": terms.named.digest if terms.named else digest,
                "created_at": now,
                "expires_at": now + (terms.ttl_s or self._rules.result_ttl_s),
                **fields,
            },
            JobSpec,
        )
        route = f"files/{terms.kind}" if source == UPLOAD else "jobs"
        scope = terms.idempotency_scope(route) if terms.idempotency else ""
        try:
            with audit.recorded(self._kms.trail, terms.who, "job.submit", job_id):
                job = self.store.submit(accepted, idempotency=scope)
        except (
            IdempotencyConflict,
            RateLimited,
        ):  # after JobsUnavailable the record may be there: the sweep decides
            self.spool.delete(job_id)
            raise
        if job.job_id != job_id:  # an earlier submission with this key: keep that one
            self.spool.delete(job_id)
        return job


MAX_JSON_HINT: Final = "stream application/x-ndjson to POST /jobs?kind=… instead"


def check_count(count: int, limit: int) -> None:
    """The item limit of a JSON submission."""
    if count > limit:
        raise TooLarge(f"More than {limit} items: {MAX_JSON_HINT}")
