"""Every Prometheus metric of the service, declared once. Label values come from closed sets only."""

from functools import lru_cache
from typing import Final, Protocol

from prometheus_client import Counter, Gauge, Histogram

_FAST: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW: Final = (5e-3, 2e-2, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)

OPERATIONS: Final = Counter(
    "kms_operations_total",
    "Operations by outcome; result is ok or an error code",
    ["operation", "backend", "mode", "result"],
)
OPERATION_SECONDS: Final = Histogram(
    "kms_operation_duration_seconds",
    "Time of an operation in the core",
    ["operation", "backend", "mode"],
    buckets=_FAST,
)
PAYLOAD_BYTES: Final = Counter(
    "kms_payload_bytes_total", "Plaintext and ciphertext bytes", ["operation", "direction"]
)
HTTP_REQUESTS: Final = Counter(
    "kms_http_requests_total",
    "HTTP requests; route is the template, never the path",
    ["route", "method", "status"],
)
HTTP_SECONDS: Final = Histogram(
    "kms_http_request_duration_seconds", "Time until the answer was sent", ["route", "method"], buckets=_FAST
)
INFLIGHT: Final = Gauge("kms_inflight", "HTTP requests being answered", multiprocess_mode="livesum")
AUDIT_EVENTS: Final = Counter("kms_audit_events_total", "Audit records by outcome of the write", ["result"])
JOBS: Final = Counter("kms_jobs_total", "Jobs that reached a state", ["kind", "state"])
JOB_SECONDS: Final = Histogram("kms_job_duration_seconds", "Run time of one attempt", ["kind"], buckets=_SLOW)
JOB_WAIT_SECONDS: Final = Histogram(
    "kms_job_queue_wait_seconds", "Time between acceptance and the first claim", ["kind"], buckets=_SLOW
)
JOB_ITEMS: Final = Counter("kms_job_items_total", "Items of bulk jobs by outcome", ["kind", "result"])
JOB_BYTES: Final = Counter("kms_job_bytes_total", "Payload bytes that jobs have processed", ["kind"])
JOB_RESUMES: Final = Counter(
    "kms_job_resumes_total", "Jobs taken up again after a lost lease or message", ["reason"]
)
WEBHOOK_DELIVERIES: Final = Counter(
    "kms_webhook_deliveries_total",
    "Requests to webhook endpoints; result is delivered, retried, gone or dead",
    ["endpoint", "result"],
)
WEBHOOK_OUTBOX: Final = Gauge(
    "kms_webhook_outbox", "Webhook deliveries that wait", multiprocess_mode="livemostrecent"
)
BACKEND_UP: Final = Gauge(
    "kms_backend_up", "1 if the last health check passed", ["backend"], multiprocess_mode="livemin"
)
BACKEND_SECONDS: Final = Histogram(
    "kms_backend_duration_seconds",
    "Time of one call to a peer; result is ok, refused, unavailable, unreachable or error",
    ["backend", "call", "result"],
    buckets=_FAST,
)
BACKEND_RETRIES: Final = Counter("kms_backend_retries_total", "Calls to a peer made again", ["backend"])
BACKEND_FAILOVERS: Final = Counter(
    "kms_backend_failovers_total", "Files that another backend had to open, or none could", ["backend"]
)
BREAKER_OPEN: Final = Gauge(
    "kms_backend_breaker_open",
    "1 while a backend is not asked because it did not answer",
    ["backend"],
    multiprocess_mode="livemax",
)
JOBS_IN_STATE: Final = Gauge(
    "kms_jobs_in_state", "Open jobs by state", ["state"], multiprocess_mode="livemostrecent"
)
QUEUE_DEPTH: Final = Gauge(
    "kms_queue_depth", "Messages waiting for a worker", ["queue"], multiprocess_mode="livemostrecent"
)
WORKERS: Final = Gauge("kms_workers", "Worker processes seen lately", multiprocess_mode="livemostrecent")
REDIS_UP: Final = Gauge(
    "kms_redis_up", "1 if Redis answered the last scrape", multiprocess_mode="livemostrecent"
)
BUILD_INFO: Final = Gauge(
    "kms_build_info", "Always 1; the version is the label", ["version"], multiprocess_mode="livemax"
)


class _Operation(Protocol):
    """What is counted of an audit record."""

    operation: str
    backend: str
    job_id: str
    bytes_in: int
    bytes_out: int


def count_operation(record: _Operation, result: str, seconds: float) -> None:
    """Count one operation of the core: outcome, time and bytes."""
    mode = "job" if record.job_id else "sync"
    count, duration, taken, given = _children(record.operation, record.backend, mode, result)
    count.inc()
    duration.observe(seconds)
    taken.inc(record.bytes_in)
    given.inc(record.bytes_out)


@lru_cache(maxsize=1024)
def _children(
    operation: str, backend: str, mode: str, result: str
) -> tuple[Counter, Histogram, Counter, Counter]:
    """The labelled metrics of one kind of operation: looking them up costs more than counting."""
    return (
        OPERATIONS.labels(operation, backend, mode, result),
        OPERATION_SECONDS.labels(operation, backend, mode),
        PAYLOAD_BYTES.labels(operation, "in"),
        PAYLOAD_BYTES.labels(operation, "out"),
    )


def operation_counts() -> dict[tuple[str, str], int]:
    """Operations of this process by (operation, result): what the status endpoint sums."""
    counts: dict[tuple[str, str], int] = {}
    for metric in OPERATIONS.collect():
        for sample in metric.samples:
            if sample.name == "kms_operations_total":
                at = (sample.labels["operation"], sample.labels["result"])
                counts[at] = counts.get(at, 0) + int(sample.value)
    return counts
