"""Every Prometheus metric, declared once, and the names of usage counters. Labels come from closed sets."""

import collections
import os
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Final, get_args

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from kms_core.observability import multiprocess_metrics
from kms_protocol import __version__, wire

OPERATIONS: Final = "operations"
OF_TENANT: Final = "tenant"
MESSAGES: Final = "messages"
BYTES: Final = "bytes"
_FAST: Final = (2e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 5e-2, 0.25, 0.5, 1.0, 5.0)  # 0.5 and 1.0 are bounds of alerts
_SLOW: Final = (5e-3, 2e-2, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
_latest: Final = partial(Gauge, multiprocess_mode="livemostrecent")
"""Makes a gauge with the value that any process set last."""
_highest: Final = partial(Gauge, multiprocess_mode="livemax")
"""Makes a gauge with the highest value of the live processes."""
OPERATION_SECONDS: Final = Histogram(
    "kms_operation_duration_seconds",
    "Time of an operation in the core; result is ok or an error code",
    ["operation", "backend", "mode", "result"],
    buckets=_FAST,
)
PAYLOAD_BYTES: Final = Counter(
    "kms_payload_bytes_total", "Plaintext and ciphertext bytes", ["operation", "direction"]
)
HTTP_SECONDS: Final = Histogram(
    "kms_http_request_duration_seconds",
    "Time until the answer was sent; route is the template below /api/v1/kms, never the path",
    ["route", "method", "status"],
    buckets=_FAST,
)
INFLIGHT: Final = Gauge("kms_inflight", "HTTP requests being answered", multiprocess_mode="livesum")
AUTH_FAILURES: Final = Counter(
    "kms_auth_failures_total",
    "Failed authentications; reason is missing, malformed, unknown, expired, untrusted, signature, claims, "
    "certificate, revoked or limited",
    ["reason"],
)
CLIENT_CRL_EXPIRES: Final = Gauge(
    "kms_client_crl_expires_timestamp_seconds",
    "Expiry of the first revocation list of [kms.server] client_crl to expire (nextUpdate); 0 without one",
    multiprocess_mode="livemin",
)
AUDIT_EVENTS: Final = Counter("kms_audit_events_total", "Audit records by outcome of the write", ["result"])
AUDIT_OK: Final = _latest(
    "kms_audit_ok",
    "1, or 0: chain, once lines of the audit log were changed, cut or removed while this process ran; redis "
    "or directory, while the log lacks lines of the anchors there, or anchors are gone. NaN while they are "
    "not read",
    ["what"],
)
AUDIT_READ_AT: Final = _latest(
    "kms_audit_read_timestamp_seconds", "Time at which this process last read new lines of the audit log back"
)
JOBS: Final = Counter("kms_jobs_total", "Jobs that reached a state", ["kind", "state"])
JOB_SECONDS: Final = Histogram("kms_job_duration_seconds", "Run time of one attempt", ["kind"], buckets=_SLOW)
JOB_WAIT_SECONDS: Final = Histogram(
    "kms_job_queue_wait_seconds", "Time between acceptance and the first claim", ["kind"], buckets=_SLOW
)
JOB_ITEMS: Final = Counter("kms_job_items_total", "Items of bulk jobs by outcome", ["kind", "result"])
JOB_RESUMES: Final = Counter(
    "kms_job_resumes_total",
    "Jobs that were made ready again: by the reaper, or as their attempt advanced nothing for stall_s "
    "(stalled); and wake-ups that could not be sent (notify_failed)",
    ["reason"],
)
MESSAGES_REFUSED: Final = Counter(
    "kms_messages_refused_total",
    "Broker messages that were dropped: they are malformed, or kms.submit refused them, or a worker died of "
    "them twice; reason is a word of docs/operations.md or an error code",
    ["queue", "reason"],
)
SPOOL_REFUSED: Final = Counter(
    "kms_spool_blobs_refused_total",
    "Files of the spool that are not those that were written for their job; role is upload, items, head, "
    "result or files",
    ["role"],
)
WEBHOOK_DELIVERIES: Final = Counter(
    "kms_webhook_deliveries_total",
    "Requests to webhook endpoints; result is delivered, retried, gone or dead",
    ["endpoint", "result"],
)
WEBHOOK_OUTBOX: Final = _latest("kms_webhook_outbox", "Webhook deliveries that wait")
BACKEND_UP: Final = _latest(
    "kms_backend_up",
    "1 if the last health check passed, every 30 seconds; NaN without one for 90. use is seal for a root",
    ["key_id", "backend", "use"],
)
BACKEND_SECONDS: Final = Histogram(
    "kms_backend_duration_seconds",
    "Time of one call to a peer; result is ok, refused, unavailable, unreachable or error",
    ["backend", "call", "result"],
    buckets=_FAST,
)
BACKEND_RETRIES: Final = Counter("kms_backend_retries_total", "Calls to a peer made again", ["backend"])
BACKEND_FAILOVERS: Final = Counter(
    "kms_backend_failovers_total", "Tries to open a file that a backend did not answer in time", ["backend"]
)
BREAKER_OPEN: Final = _highest(
    "kms_backend_breaker_open", "1 while a backend is not asked because it did not answer", ["backend"]
)
KEY_AGE_SECONDS: Final = _latest(
    "kms_key_age_seconds", "Age of the version that seals", ["key_id", "backend"]
)
KEY_BUDGET: Final = _latest(
    "kms_key_budget_ratio",
    "Messages that the version in use has sealed, of those it may",
    ["key_id", "backend"],
)
KEY_ROTATION_DUE: Final = _latest(
    "kms_key_rotation_due", "1 if the version in use should be replaced", ["key_id", "backend"]
)
KEY_ROTATIONS: Final = Counter("kms_key_rotations_total", "Scheduled rotations by outcome", ["result"])
JOBS_IN_STATE: Final = _latest(
    "kms_jobs_in_state",
    "Open jobs by state. Those that are for_newer_workers are queued, too; dead ones used up their attempts",
    ["state"],
)
OLDEST_QUEUED: Final = _latest(
    "kms_jobs_oldest_queued_seconds", "Since when the oldest job waits that could run"
)
REDIS_OK: Final = _latest(
    "kms_redis_ok",
    "answers: 1 if Redis answered the last scrape, else 0; writes: 1 if it takes new jobs, 0 while it is "
    "full or takes no writes, NaN while it does not answer",
    ["what"],
)
STORAGE_USED: Final = _latest(
    "kms_storage_used_ratio",
    "redis: memory that Redis uses, of what it may (NaN while it does not answer); spool: size of the spool, "
    "of what it may have: spool_max_bytes, or less if its disk has less room",
    ["what"],
)
SPOOL_TENANT: Final = _latest(
    "kms_spool_tenant_bytes",
    "Size of uploads and items of jobs whose results have not expired, by tenant of the settings, or other",
    ["tenant"],
)
WEAK_SETTING: Final = _highest(
    "kms_setting_weak",
    "1 for a setting that is weaker than need be, unless [kms] accept_weak names it",
    ["setting"],
)
QUEUE_DEPTH: Final = _latest(
    "kms_queue_depth",
    "Messages waiting for a worker; priority is any where the broker does not tell",
    ["queue", "priority"],
)
STUCK_PROCESSES: Final = _latest(
    "kms_worker_stuck_processes",
    "Processes of workers that hang, or have made no progress in a job for some seconds",
)
RESOURCE_LEASES: Final = _latest(
    "kms_job_resource_leases",
    "Running jobs that use a root, bucket or backend with a bound ([kms.jobs.resource_leases])",
    ["resource"],
)
WORKERS: Final = _latest("kms_workers", "Worker processes seen lately")
REDIS_UNCONFIRMED: Final = Counter(
    "kms_redis_unconfirmed_total",
    "Changes of jobs that replicas of Redis did not acknowledge within [kms.redis] wait_ms",
)
INSTALL_OK: Final = _latest(
    "kms_install_ok",
    "0 while this host differs from others; what is id (of spool and Redis) or spool (the same on all hosts)",
    ["what"],
)
CLOCK_AHEAD: Final = _latest(
    "kms_clock_ahead_seconds", "Seconds that the clock of this host is ahead of Redis's"
)
DOCUMENT_AGE: Final = _highest(
    "kms_document_age_seconds",
    "Seconds since the store of a document answered; document is key-<id>, or tokens (0 where they are in a "
    "file)",
    ["document"],
)
BUILD_INFO: Final = _highest("kms_build_info", "Always 1; the version is the label", ["version"])
AUDIT_RECORD: Final = AUDIT_EVENTS.labels("ok")
answer_seconds: Final = lru_cache(maxsize=1024)(HTTP_SECONDS.labels)
"""``HTTP_SECONDS`` by labels: a lookup in the metric takes as long as counting."""
operation_seconds: Final = lru_cache(maxsize=1024)(OPERATION_SECONDS.labels)
payload_bytes: Final = lru_cache(maxsize=1024)(PAYLOAD_BYTES.labels)
_KINDS: Final = get_args(wire.JobKind)


def operations_used(counts: Mapping[str, int], tenant: str | None = None) -> dict[str, list[int]]:
    """The numbers of successful and of failed calls by operation, of one tenant or of all."""
    start = f"{OPERATIONS} " if tenant is None else f"{OF_TENANT} {tenant} "
    found: dict[str, list[int]] = {}
    for field, count in counts.items():
        if field.startswith(start):
            operation, _, result = field.removeprefix(start).partition(" ")
            found.setdefault(operation, [0, 0])[result != "ok"] += count
    return found


def usage_of_version(counts: Mapping[str, int], key_id: str, version: str, backend: str) -> tuple[int, int]:
    """The messages and the plaintext bytes that a key version has sealed."""
    name = f"{key_id} {version} {backend}"
    return counts.get(f"{MESSAGES} {name}", 0), counts.get(f"{BYTES} {name}", 0)


def added_usage(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """The sums of the counts of two sources."""
    return dict(collections.Counter(first) + collections.Counter(second))


def announce(backends: Collection[str], endpoints: Collection[str]) -> None:
    """Set the version, and start metrics of rare events at zero: an alert sees the first as an increase."""
    BUILD_INFO.labels(__version__).set(1)
    values: Mapping[Counter | Gauge, Sequence[Collection[str]]] = {  # of each label
        AUDIT_EVENTS: [("ok", "failed")],
        BACKEND_FAILOVERS: [backends],
        BACKEND_RETRIES: [backends],
        BREAKER_OPEN: [backends],
        DOCUMENT_AGE: [("tokens",)],
        JOBS: [_KINDS, ("queued", "succeeded", "failed", "cancelled")],
        JOB_ITEMS: [_KINDS, ("ok", "failed")],
        JOB_RESUMES: [("notify_failed", "requeued", "committing", "due", "parts_ended", "stalled")],
        KEY_ROTATIONS: [("ok", "failed")],
        SPOOL_REFUSED: [("upload", "items", "head", "result", "files")],
        WEBHOOK_DELIVERIES: [endpoints, ("delivered", "retried", "gone", "dead")],
    }
    for metric, of_labels in values.items():
        for labels in product(*of_labels):
            metric.labels(*labels)


def show_weak(settings: Iterable[str], weak: Container[str]) -> None:
    """Set the gauge of each of ``settings``: 1 for those in ``weak``."""
    for setting in settings:
        WEAK_SETTING.labels(setting).set(setting in weak)


def exposition(refresh: Callable[[], None] = lambda: None) -> bytes:
    """All metrics in Prometheus's text format: of this process, or of all that are scraped together.

    ``refresh`` is called first, to set those that are read when they are asked for.
    """
    refresh()
    folder = os.environ.get(multiprocess_metrics.FOLDER)
    if not folder:
        return generate_latest(REGISTRY)
    multiprocess_metrics.forget_dead(folder)
    shared = CollectorRegistry()
    MultiProcessCollector(shared, folder)  # type: ignore[no-untyped-call]  # untyped there
    ProcessCollector(registry=shared)  # of the process that answers
    return generate_latest(shared)
