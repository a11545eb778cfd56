"""Composition root: builds from settings what the API, the worker and commands share; connects to no peer."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import redis

from kms_core import backend_watch, key_opening, keyring, stores
from kms_core.audit.maintenance import AuditMaintenance, build_audit
from kms_core.audit.sinks import anchor_sinks
from kms_core.audit.verification.verify import AuditMonitor
from kms_core.auth import authenticator, logins, tokens
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import AllowAll, ByScopes, Policy
from kms_core.backend_watch import BackendWatch
from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.key_document import KeyDocument
from kms_core.documents.local_copy import LocalCopy
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.hosts.install import Facts, Install
from kms_core.jobs.hosts.notes import Host, HostNotes, SpoolMarks, digest, key_place
from kms_core.jobs.model import NotifyWorker, RecordKey
from kms_core.jobs.storage import s3, spool_bucket
from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.storage.local import Roots
from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.storage.spool_folder import DiskSync, SpoolFolder
from kms_core.jobs.store.replicas import verify_replicas
from kms_core.jobs.store.small_blobs import SmallBlobs
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.celery_intake import Intake
from kms_core.jobs.submission.submitter import JobSubmitter
from kms_core.key_selection import SelectionRules
from kms_core.observability import metrics
from kms_core.patterns import Pattern
from kms_core.redis_client import connect
from kms_core.secure_files import make_folders
from kms_core.service import Kms
from kms_core.settings.model import Settings
from kms_core.settings.validation import private
from kms_protocol.errors import BackendUnavailable, JobsUnavailable, PathRefused, Unavailable


def build_monitor(settings: Settings, client: redis.Redis | None) -> AuditMonitor:
    """The monitor of the log. It is not started."""
    section = settings.kms.audit
    return AuditMonitor(section.path, section.signing_key_path, anchor_sinks(settings, client))


_ASK_S: Final = 1.0
_SAME_ON_ALL_HOSTS: Final = (
    "attempts",
    "durability",
    "inline_bytes",
    "input_grace_s",
    "lease_s",
    "open_jobs",
    "result_ttl_s",
    "stall_s",
    "tenant_leases",
)


@dataclass(frozen=True, slots=True)
class Core:
    """The objects of one process. ``authenticator`` is None where requests need no credentials.

    ``copies`` are this host's copies of signed documents: of the tokens, and of keys. The API and the
    maintenance process of a worker poll them, and run ``watch``.
    """

    kms: Kms
    submitter: JobSubmitter
    worker_context: WorkerContext
    audit_maintenance: AuditMaintenance
    authenticator: Authenticator | None
    install: Install
    watch: BackendWatch
    copies: tuple[LocalCopy, ...] = ()


def build(settings: Settings, process: str, notify: NotifyWorker | None) -> Core:
    """Build the core of a process (``api`` or ``worker``). Raises ConfigurationError.

    Redis need not be reachable. ``notify`` is None where the broker is the Redis that holds the jobs
    (``settings.redis_urls.is_shared``).
    """
    section, jobs = settings.kms, settings.kms.jobs
    client = connect(section.redis)
    sealed = key_opening.of_process(settings)
    audit_log, maintenance = build_audit(settings, process, client, sealed.open)
    token_copy = _token_copy(settings)
    tokens_ = token_source(settings, token_copy)
    keyring_ = keyring.build(settings, sealed)
    spool_key = key_opening.own_key(settings, key_opening.SPOOL)
    record_key = RecordKey(spool_key.secrets())
    authenticator_ = authenticator.build(settings, tokens_, record_key.derived(logins.INFO))
    metrics.announce({name for key in keyring_.keys.values() for name in key.names}, jobs.endpoints)
    rules = SelectionRules(section.require_context)
    kms = Kms(keyring_, _policy(settings, authenticator_), audit_log, rules)
    blobs = blob_store(settings)
    install = _install(settings, client, partial(facts_of, settings, keyring_, record_key))
    for key_id, native in keyring_.natives.items():
        native.elsewhere = partial(install.elsewhere, key_id)
    store = JobStore(client, record_key, notify, section, tokens.several_tenants(settings, tokens_))
    small = SmallBlobs(client, jobs.inline_bytes, lambda: store.has_room)
    spool = Spool(blobs, spool_key, jobs.spool_max_bytes, small)
    locations = Locations(
        _roots(settings),
        s3.build_buckets(settings),
        s3.MultipartJournal(blobs),
        record_key,
        blobs,
        jobs,
    )
    return Core(
        kms,
        JobSubmitter(kms, store, spool, locations, install.require),
        WorkerContext(kms, store, spool, locations),
        maintenance,
        authenticator_,
        install,
        backend_watch.build(settings, keyring_),
        (*([token_copy] if token_copy else ()), *_key_copies(keyring_)),
    )


def blob_store(settings: Settings, *, makes: bool = True) -> BlobStore:
    """Build the place of the spool's blobs; ``makes`` its directory if that is missing.

    Raises ConfigurationError.
    """
    jobs = settings.kms.jobs
    if jobs.spool_bucket:
        return spool_bucket.build(settings, jobs.spool_bucket)
    if makes:
        make_folders(jobs.spool_dir)
    return SpoolFolder(jobs.spool_dir, DiskSync(jobs.spool_dir, enabled=jobs.durability == "fsync"))


def check(settings: Settings) -> None:
    """Check that key servers have our keys, and compare this host with Redis and with the hosts that serve.

    Raises ConfigurationError for a missing key, or if Redis cannot do what the settings want of its replicas,
    belongs to another install, or knows a host with another spool, or if a bucket of signed documents ignores
    conditional writes. A Redis that does not answer is compared later, and a bucket is not.
    """
    backend_watch.check_keys(settings, key_opening.of_process(settings))
    with suppress(redis.RedisError):  # it may come back as another one, and each write is waited for anyway
        verify_replicas(settings.kms.redis)
    with suppress(JobsUnavailable, redis.RedisError), connect(settings.kms.redis, _ASK_S) as client:
        client.ping()  # one that does not answer is told of later
        _install(settings, client).begin()
    # a host that may only read a document changes nothing in it
    storages = [key.document.storage for key in key_opening.documents(settings).values()]
    if settings.kms.auth.tokens and settings.kms.auth.mode == "required":
        storages.append(token_document(settings, None).storage)
    for storage in storages:
        with suppress(Unavailable, PathRefused):
            storage.check()


def marks(settings: Settings, *, makes: bool = True) -> SpoolMarks:
    """The marks in the spool, which are durable whatever ``durability`` says. Raises as ``blob_store``."""
    blobs = blob_store(settings, makes=makes)
    return SpoolMarks(replace(blobs, sync=DiskSync(blobs.path)) if isinstance(blobs, SpoolFolder) else blobs)


def facts(settings: Settings) -> Facts:
    """Facts that this host would tell others. Raises ConfigurationError, BackendUnavailable."""
    keyring_ = keyring.build(settings, key_opening.of_process(settings))
    return facts_of(settings, keyring_, RecordKey(key_opening.own_key(settings, key_opening.SPOOL).secrets()))


def facts_of(settings: Settings, keyring_: keyring.Keyring, record_key: RecordKey) -> Facts:
    """Facts that this host tells others of itself; none is secret."""
    natives = keyring_.natives
    shared = {f"[kms.jobs] {name}": str(getattr(settings.kms.jobs, name)) for name in _SAME_ON_ALL_HOSTS}
    shared["spool key"] = record_key.digest(b"hosts").hex()[:16]
    shared["key ids"] = " ".join(sorted(keyring_.keys))
    shared["[kms.jobs.buckets]"] = " ".join(sorted(settings.kms.jobs.buckets)) or "none"
    shared["[kms.tenants]"] = " ".join(sorted(settings.kms.tenants)) or "none"
    with suppress(OSError, ValueError):  # a file that only the service may read
        file = settings.kms.auth.tokens_path
        tokens_ = f"a file {digest(file.read_text())}" if file.is_file() else "no file"
        shared["[kms.auth] tokens"] = settings.kms.auth.tokens or tokens_
    for key_id, native in natives.items():
        with suppress(BackendUnavailable):
            versions = native.versions()
            shared[f"version of key {key_id}"] = f"{versions[-1].version} of {len(versions)}"
    return Facts({key_id: key_place(native.source.private) for key_id, native in natives.items()}, shared)


def _install(
    settings: Settings, client: redis.Redis, facts_: Callable[[], Facts] = lambda: Facts({}, {})
) -> Install:
    own_marks = marks(settings)  # makes the directory that is part of the host's id
    host = Host.here(settings.state_dir, settings.kms.jobs.spool_dir)
    return Install(HostNotes(client), own_marks, host, facts_)


def build_intake(settings: Settings, submitter_: JobSubmitter) -> Intake | None:
    """Build the reader of ``kms.submit`` messages; None without an intake key. Raises ConfigurationError."""
    if not settings.kms.jobs.intake_identity_path.exists():
        return None
    key = key_opening.own_key(settings, key_opening.INTAKE)
    tokens_ = token_source(settings, _token_copy(settings))
    return Intake(key, submitter_, authenticator.build(settings, tokens_))


def token_document(settings: Settings, client: redis.Redis | None) -> SignedDocument:
    """The document of ``[kms.auth] tokens``. Raises ConfigurationError."""
    key = RecordKey(key_opening.own_key(settings, key_opening.SPOOL).secrets()).derived(tokens.DOCUMENT_INFO)
    anchors = Anchors(tokens.DOCUMENT_NAME, stores.documents_folder(settings), client, key)
    storage = stores.document_storage(settings, settings.kms.auth.tokens or "")
    return SignedDocument(tokens.DOCUMENT_NAME, storage, key, anchors)


def token_source(settings: Settings, copy: LocalCopy | None) -> tokens.Tokens:
    """The tokens of the settings: of the host's copy of a document, or of the token file."""
    if copy is not None:
        return tokens.DocumentTokens(copy)
    return tokens.TokenFile(settings.kms.auth.tokens_path, strict=settings.is_prod)


def _token_copy(settings: Settings) -> LocalCopy | None:
    auth = settings.kms.auth
    if not auth.tokens or auth.mode != "required":
        return None
    document = token_document(settings, stores.anchor_client(settings))
    return LocalCopy(document, stores.documents_folder(settings), auth.max_stale_s)


def _key_copies(keyring_: keyring.Keyring) -> Iterator[LocalCopy]:
    sources = (native.source for native in keyring_.natives.values())
    return (source.copy for source in sources if isinstance(source, KeyDocument))


def _policy(settings: Settings, authenticator_: Authenticator | None) -> Policy:
    if authenticator_ is None:
        return AllowAll()
    tenants = settings.kms.tenants.items()
    patterns = {name: [Pattern.parse(text) for text in section.keys] for name, section in tenants}
    return ByScopes(authenticator_.scopes_of, patterns)


def _roots(settings: Settings) -> Roots:
    """The directories that jobs may read and write, without the service's own files below them."""
    jobs = settings.kms.jobs
    default = settings.state_dir.absolute() / "files"
    if default in jobs.roots:  # in dev; a root that the operator names must exist
        default.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Roots(jobs.roots, [path for _, path in private(settings)])
