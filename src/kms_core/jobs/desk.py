"""The accepting side of jobs: checks what is asked for, stores it as an immutable record; knows no HTTP.

What a worker would refuse for certain is refused here, before a byte is uploaded: an unknown key, a missing
context, a path outside the roots.
"""

import hmac
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from kms_core import audit, wire
from kms_core.context import Context
from kms_core.errors import ContextRequired, IdempotencyConflict, InvalidRequest, TooLarge
from kms_core.jobs import bulk
from kms_core.jobs.blobs import ITEMS, UPLOAD, Label, Spool
from kms_core.jobs.model import Accepted, Job
from kms_core.jobs.paths import Roots
from kms_core.jobs.store import JobStore
from kms_core.policy import Principal
from kms_core.service import Kms


@dataclass(frozen=True, slots=True)
class Named:
    """A job that its submitter named; ``digest`` (32 bytes, keyed) tells a replay from another job."""

    job_id: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Terms:
    """What every job is asked for with."""

    who: Principal
    kind: wire.JobKind
    context: Context
    key_id: str | None = None
    new_context: Context | None = None
    ttl_s: int | None = None
    idempotency: str = ""
    named: Named | None = None
    callback: str = ""

    def job_id(self) -> str:
        """The submitter's, or a new one each time."""
        return self.named.job_id if self.named else new_id()


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits of acceptance, from settings."""

    result_ttl_s: int
    item_bytes: int
    require_context: bool
    callbacks: frozenset[str] = frozenset()


def new_id() -> str:
    return str(uuid.uuid4())


class Desk:
    """Accepts uploads, items and file references."""

    def __init__(self, kms: Kms, store: JobStore, spool: Spool, roots: Roots, rules: Rules) -> None:
        self.store = store
        self.spool = spool
        self._kms = kms
        self._roots = roots
        self._rules = rules

    def check(self, terms: Terms, *, bulk: bool = False) -> None:
        """Raise what would fail for certain: UnknownKey, ContextRequired, InvalidRequest, JobsUnavailable.

        Items of a bulk job may bring contexts of their own, so there each is asked for its own, later.
        """
        self._kms.keyring.named(terms.key_id)
        sealing = terms.kind == "encrypt" or terms.new_context is not None
        context = terms.context if terms.new_context is None else terms.new_context
        if self._rules.require_context and sealing and not context and not bulk:
            raise ContextRequired
        if terms.callback and terms.callback not in self._rules.callbacks:
            raise InvalidRequest("callback names no endpoint of this service: see [kms.jobs.endpoints]")
        self.store.ping()

    def hasher(self, terms: Terms) -> hmac.HMAC:
        """A keyed digest of what is asked for; the body is fed to it as it arrives."""
        new = b"-" if terms.new_context is None else b"+" + terms.new_context.canonical()
        asked = (terms.kind.encode(), terms.context.canonical(), (terms.key_id or "").encode(), new)
        rest = (str(terms.ttl_s or ""), terms.callback)
        return self.store.record_key.hasher(*asked, *(part.encode() for part in rest))

    def submit(self, terms: Terms, body: wire.JobIn, most_items: int) -> Job:
        """A job as ``POST /jobs`` describes it: items, or a reference. Raises as ``check`` and these do."""
        self.check(terms, bulk=body.items is not None)
        if body.items is not None and body.source is None and body.target is None:
            check_count(len(body.items), most_items)
            return self.items(terms, body.items)
        if body.items is None and body.source is not None and body.target is not None:
            return self.reference(terms, body.source, body.target, overwrite=bool(body.overwrite))
        raise InvalidRequest(
            "Give items, or source and target; to upload a file use /files/encrypt or /files/decrypt"
        )

    def upload(self, terms: Terms, job_id: str, size_bytes: int, digest: bytes) -> Job:
        """A job over an upload that has arrived whole."""
        return self._submit(terms, job_id, source=UPLOAD, size_bytes=size_bytes, digest=digest)

    def items(self, terms: Terms, items: Iterable[wire.JobItem]) -> Job:
        """A bulk job; its items go to the spool one by one. Raises InvalidRequest, TooLarge, SpoolFull."""
        job_id = terms.job_id()
        hasher = self.hasher(terms)
        starts: list[int] = []
        count = 0
        with self.spool.writing(Label(terms.who.tenant, job_id, ITEMS)) as out:
            for index, item in enumerate(items):
                bulk.check_item(terms.kind, index, item, self._rules.item_bytes)
                if index % bulk.PART_ITEMS == 0:
                    starts.append(out.size)
                line = wire.encode(item) + b"\n"
                hasher.update(line)
                out.write(line)
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
            digest=hasher.digest(),
        )

    def reference(self, terms: Terms, source: str, target: str, *, overwrite: bool) -> Job:
        """A job from file to file under the roots. Raises PathRefused, TargetExists, InvalidRequest."""
        self._roots.check(target)
        with self._roots.open_source(source) as opened:
            size = opened.size_bytes
        hasher = self.hasher(terms)
        hasher.update(f"{source}\n{target}\n{overwrite}".encode())
        return self._submit(
            terms,
            terms.job_id(),
            source=source,
            target=target,
            overwrite=overwrite,
            size_bytes=size,
            digest=hasher.digest(),
        )

    def _submit(self, terms: Terms, job_id: str, *, source: str, digest: bytes, **fields: object) -> Job:
        now = time.time()
        new_context = terms.new_context
        accepted = msgspec.convert(
            {
                "job_id": job_id,
                "tenant": terms.who.tenant,
                "principal": terms.who.name,
                "credential": terms.who.credential,
                "kind": terms.kind,
                "source": source,
                "key_id": terms.key_id,
                "context": terms.context.pairs,
                "new_context": None if new_context is None else new_context.pairs,
                "callback": terms.callback,
                "request_id": audit.request_id.get(),
                "digest": terms.named.digest if terms.named else digest,
                "created_at": now,
                "expires_at": now + (terms.ttl_s or self._rules.result_ttl_s),
                **fields,
            },
            Accepted,
        )
        route = f"files/{terms.kind}" if source == UPLOAD else "jobs"
        scope = (
            f"{terms.who.tenant} {terms.who.name} {route} {terms.idempotency}" if terms.idempotency else ""
        )
        try:
            job = self.store.submit(accepted, idempotency=scope)
        except IdempotencyConflict:  # after JobsUnavailable the record may be there: the sweep decides
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
