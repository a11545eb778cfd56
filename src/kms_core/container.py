"""Builds what API and worker share: keys, service, store and spool, from settings; calls no peer."""

from dataclasses import dataclass

from kms_core import keyring
from kms_core.age.header import HeaderLimits
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit_setup import build as build_audit
from kms_core.auth import tenants
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.authenticator import build as build_doors
from kms_core.auth.policy import AllowAll, ByScopes, Policy
from kms_core.backends.age import AgeBackend, KeyFiles
from kms_core.jobs.execution.runner import WorkerContext
from kms_core.jobs.model import NotifyWorker, StoreRules
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.storage import buckets
from kms_core.jobs.storage.local_paths import Roots
from kms_core.jobs.storage.locations import Locations, SourceLimits
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission import celery_intake, submitter
from kms_core.jobs.submission.celery_intake import Intake
from kms_core.jobs.submission.submitter import JobSubmitter
from kms_core.key_selection import SelectionRules as CallRules
from kms_core.observability import metrics
from kms_core.patterns import Pattern
from kms_core.redis_client import connect
from kms_core.rotation_limit import RotationLimit
from kms_core.service import Kms
from kms_core.settings.model import Settings
from kms_core.settings.validate_auth import auth_files


@dataclass(frozen=True, slots=True)
class Core:
    """One process's core."""

    kms: Kms
    desk: JobSubmitter
    shop: WorkerContext
    keeper: AuditMaintenance
    doors: Authenticator | None


def build(settings: Settings, process: str, nudge: NotifyWorker | None) -> Core:
    """The core of a process (``api``, ``worker``). Raises ConfigurationError; an absent Redis is no error.

    ``nudge`` is None where the broker is the Redis that holds the jobs (``settings_redis.is_shared``).
    """
    section, jobs, limits = settings.kms, settings.kms.jobs, settings.kms.limits
    client = connect(section.redis)
    trail, keeper = build_audit(settings, process, client)
    doors = build_doors(settings)
    ring = keyring.build(settings)
    metrics.announce({name for key in ring.keys.values() for name in key.names}, jobs.endpoints)
    kms = Kms(
        ring,
        _policy(settings, doors),
        trail,
        CallRules(
            section.require_context,
            HeaderLimits(limits.sync_header_bytes, limits.sync_stanzas),
            RotationLimit(section.rotation.max_per_hour, section.rotation.every_days),
        ),
    )
    spool_key = AgeBackend(KeyFiles(jobs.spool_identity_path, strict=settings.is_prod))
    jobs.spool_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    record_key = RecordKey(spool_key.secrets())
    spool = Spool(jobs.spool_dir, spool_key, record_key, jobs.spool_max_bytes)
    store = JobStore(
        client,
        record_key,
        nudge,
        StoreRules(
            jobs.lease_s,
            jobs.attempts,
            keep_record_s=jobs.result_ttl_s,
            open_jobs=jobs.open_jobs,
            tenant_leases=jobs.tenant_leases,
            large_job_bytes=jobs.large_job_bytes,
            large_leases=max(1, jobs.concurrency - jobs.reserved_processes),
            has_several_tenants=tenants.several(settings) if jobs.reserved_processes else lambda: False,
            tenant_open={
                name: tenant.open_jobs for name, tenant in section.tenants.items() if tenant.open_jobs
            },
            tenant_spool_bytes={
                name: tenant.spool_bytes for name, tenant in section.tenants.items() if tenant.spool_bytes
            },
        ),
    )
    forbidden = (
        jobs.spool_dir,
        jobs.spool_identity_path,
        jobs.intake_identity_path,
        section.audit.path,
        section.audit.key_path,
        section.audit.signing_key_path,
        section.age.private_key_path,
        section.age.public_key_path,
        settings.state_dir / "run",
        *(path for _, path, _ in auth_files(settings)),
    )
    for root in jobs.roots:
        if (
            root == settings.state_dir.absolute() / "files"
        ):  # the default in dev; an operator's own root must be there
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
    limits_ = SourceLimits(jobs.source_max_bytes, jobs.source_max_hole_bytes)
    notes = MultipartJournal(jobs.spool_dir / "multipart")
    places = Locations(Roots(jobs.roots, forbidden), buckets.build(settings), notes, limits_)
    callbacks = {name: endpoint.tenants for name, endpoint in jobs.endpoints.items()}
    rules = submitter.SubmissionRules(
        jobs.result_ttl_s, limits.sync_plaintext_bytes, section.require_context, callbacks
    )
    shop = WorkerContext(kms, store, spool, places, jobs.fanout_files)
    return Core(kms, JobSubmitter(kms, store, spool, places, rules), shop, keeper, doors)


def _policy(settings: Settings, doors: Authenticator | None) -> Policy:
    if doors is None:
        return AllowAll()
    tenants = settings.kms.tenants.items()
    patterns = {name: [Pattern.parse(text) for text in section.keys] for name, section in tenants}
    return ByScopes(doors, patterns)


def build_intake(settings: Settings, desk_: JobSubmitter) -> Intake | None:
    """What opens ``kms.submit`` messages, or None without an intake key. Raises ConfigurationError."""
    jobs, limits = settings.kms.jobs, settings.kms.limits
    if not jobs.intake_identity_path.exists():
        return None
    key = AgeBackend(KeyFiles(jobs.intake_identity_path, strict=settings.is_prod))
    head = HeaderLimits(limits.sync_header_bytes, limits.sync_stanzas)
    rules = celery_intake.IntakeRules(limits.json_job_bytes, limits.json_job_items, head, jobs.result_ttl_s)
    return Intake(key, desk_, rules, build_doors(settings))
