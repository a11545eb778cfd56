"""What operators look at: health, status, probes and metrics. None of them tells a secret."""

import time
from datetime import UTC, datetime
from typing import Final, Literal

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from kms_api import json_body
from kms_api.deps import Service, call, caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.store import queue_stats, usage_flush
from kms_core.observability import metrics, usage
from kms_protocol import __version__, wire
from kms_protocol.errors import AuditUnavailable, JobsUnavailable

router: Final = APIRouter(tags=["operations"], route_class=ScopedRoute)
probes: Final = APIRouter(tags=["probes"], route_class=ScopedRoute)
_TEXT: Final = {describe.TEXT: {"schema": {"type": "string"}}}


@router.get(
    "/health",
    **describe.described(
        "health",
        answers={
            200: describe.gives(wire.HealthOut, "It can"),
            503: describe.gives(wire.HealthOut, "It cannot"),
        },
    ),
)
async def health(request: Request) -> Response:
    """Can the default key wrap and unwrap now? 200 or 503; needs no credential and tells no detail."""
    built = service(request)
    found = await call(built, built.kms.health_check)
    shape = wire.HealthOut(
        status="healthy" if found.healthy else "unhealthy",
        backend=built.kms.keyring.default.backend.name,
        checked_at=_time(found.checked_at) or "",
    )
    return json_body.answer(shape, 200 if found.healthy else 503)


@router.get(
    "/status",
    **describe.described("status", answers={200: describe.gives(wire.StatusOut, "How things are")}),
)
async def status(request: Request) -> Response:
    """Backend, environment, version, what is degraded, and counts of operations and jobs.

    Counts are of the caller's tenant; of all for whoever may read the metrics.
    """
    return json_body.answer(await anyio.to_thread.run_sync(condition, service(request), caller(request)))


@probes.get(
    "/livez",
    **describe.described("livez", answers={200: describe.raw("`ok` and a line end", _TEXT)}),
)
async def livez() -> Response:
    """The process answers. Depends on nothing else."""
    return Response(b"ok\n", media_type="text/plain")


@probes.get(
    "/readyz",
    **describe.described(
        "readyz",
        answers={
            200: describe.gives(wire.ReadyOut, "Ready"),
            503: describe.gives(wire.ReadyOut, "Not ready"),
        },
    ),
)
async def readyz(request: Request) -> Response:
    """Ready to answer single calls? Without Redis still 200; 503 while no audit record can be written."""
    built = service(request)
    found = await call(built, built.kms.health_check)
    jobs = await anyio.to_thread.run_sync(_jobs_word, built)
    trail = await anyio.to_thread.run_sync(_audit_word, built)
    ready = found.healthy and trail == "available"
    shape = wire.ReadyOut(status="ready" if ready else "not ready", jobs=jobs, audit=trail)
    return json_body.answer(shape, 200 if ready else 503)


@probes.get(
    "/metrics",
    **describe.described("metrics", answers={200: describe.raw("Metrics", _TEXT)}),
)
async def prometheus(request: Request) -> Response:
    """Prometheus text format. The state of jobs is read from Redis now, once for all API processes."""
    text = await anyio.to_thread.run_sync(_exposition, service(request))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def condition(built: Service, who: Principal) -> wire.StatusOut:
    tenant = None if allows(built.kms.policy, who, "metrics") else who.tenant
    jobs, depth, workers, degraded = None, None, None, []
    counts = built.kms.tally.peek()
    try:
        counts = usage.together(usage_flush.shared(built.desk.store.redis), counts)
        found = queue_stats.survey(built.desk.store, tenant)
        jobs, workers = found.jobs, found.workers
        depth = found.jobs["queued"] if tenant else sum(built.broker.depths().values())
    except JobsUnavailable:
        degraded.append("redis")
    if workers == 0:
        degraded.append("workers")
    if not built.kms.health_check().healthy:
        degraded.append("backend")
    degraded += _degraded_audit(built)
    if built.revocations and not built.revocations.is_current():
        degraded.append("client_crl")
    return wire.StatusOut(
        backend=built.kms.keyring.default.backend.name,
        environment=built.settings.environment,
        version=__version__,
        uptime_s=round(time.monotonic() - built.started, 3),
        operations=_operations(usage.operations(counts, tenant)),
        jobs=jobs,
        queue_depth=depth,
        workers=workers,
        degraded=degraded,
    )


def _jobs_word(built: Service) -> Literal["available", "unavailable"]:
    try:
        built.desk.store.ping()
    except JobsUnavailable:
        return "unavailable"
    return "available"


def _degraded_audit(built: Service) -> list[str]:
    found = built.watch.condition
    states = {
        "audit": _audit_word(built) == "unavailable",
        "audit_chain": found.problems,
        "audit_anchors": found.anchors,
        "audit_anchors_away": found.not_compared,
        "audit_unread": found.unread,
    }
    return [name for name, is_so in states.items() if is_so]


def _audit_word(built: Service) -> Literal["available", "unavailable"]:
    try:
        built.kms.trail.check()
    except AuditUnavailable:
        return "unavailable"
    return "available"


def _exposition(built: Service) -> bytes:
    try:
        queue_stats.tell(queue_stats.survey(built.desk.store))
        for (queue, priority), depth in built.broker.depths().items():
            metrics.QUEUE_DEPTH.labels(queue, priority).set(depth)
        metrics.REDIS_UP.set(1)
    except JobsUnavailable:
        metrics.REDIS_UP.set(0)
        queue_stats.lost()
    built.kms.health_check()
    return metrics.exposition()


def _time(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _operations(counts: dict[tuple[str, str], int]) -> wire.Operations:
    by: dict[str, list[int]] = {}
    for (operation, result), count in counts.items():
        sums = by.setdefault(operation, [0, 0])
        sums[result != "ok"] += count
    shapes = {
        operation: wire.OperationCount(ok=ok, failed=failed) for operation, (ok, failed) in sorted(by.items())
    }
    return wire.Operations(total=sum(map(sum, by.values())), by=shapes)
