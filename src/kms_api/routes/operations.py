"""What operators look at: health, status, probes and metrics. None of them tells a secret."""

import time
from datetime import UTC, datetime
from typing import Final, Literal

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from kms_api import bodies
from kms_api.deps import Service, call, service
from kms_core import __version__, metrics, wire
from kms_core.errors import JobsUnavailable
from kms_core.keyring import Key

router: Final = APIRouter(tags=["operations"])
probes: Final = APIRouter(tags=["probes"])


@router.get("/health", **bodies.documented(None, wire.HealthOut))
async def health(request: Request) -> Response:
    """Can the default key wrap and unwrap now? 200 or 503; needs no credential and tells no detail."""
    built = service(request)
    found = await call(built, built.kms.health_check)
    shape = wire.HealthOut(
        status="healthy" if found.healthy else "unhealthy",
        backend=built.kms.keyring.default.backend.name,
        checked_at=_time(found.checked_at) or "",
    )
    return bodies.answer(shape, 200 if found.healthy else 503)


@router.get("/status", **bodies.documented(None, wire.StatusOut))
async def status(request: Request) -> Response:
    """Backend, environment, version, operation counts, jobs, and what is degraded."""
    return bodies.answer(await anyio.to_thread.run_sync(_status, service(request)))


@router.get("/keys", **bodies.documented(None, wire.KeysOut))
async def keys(request: Request) -> Response:
    """The key ids of this install and their versions, the one in use last."""
    built = service(request)
    ring = built.kms.keyring
    return bodies.answer(
        wire.KeysOut(keys=[_key(key, default=key is ring.default) for _, key in sorted(ring.keys.items())])
    )


@probes.get("/livez", response_model=None)
async def livez() -> Response:
    """The process answers. Depends on nothing else."""
    return Response(b"ok\n", media_type="text/plain")


@probes.get("/readyz", response_model=None)
async def readyz(request: Request) -> Response:
    """Ready to answer single calls? Without Redis still 200, with jobs said to be unavailable."""
    built = service(request)
    found = await call(built, built.kms.health_check)
    jobs = await anyio.to_thread.run_sync(_jobs_word, built)
    shape = wire.ReadyOut(status="ready" if found.healthy else "not ready", jobs=jobs)
    return bodies.answer(shape, 200 if found.healthy else 503)


@probes.get("/metrics", response_model=None)
async def prometheus(request: Request) -> Response:
    """Prometheus text format. The state of jobs is read from Redis now, once for all API processes."""
    text = await anyio.to_thread.run_sync(_exposition, service(request))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _status(built: Service) -> wire.StatusOut:
    jobs, depth, workers, degraded = None, None, None, []
    try:
        jobs, workers = built.desk.store.open_counts(), built.desk.store.workers()
        depth = sum(built.broker.depths().values())
    except JobsUnavailable:
        degraded.append("redis")
    if workers == 0:
        degraded.append("workers")
    if not built.kms.health_check().healthy:
        degraded.append("backend")
    return wire.StatusOut(
        backend=built.kms.keyring.default.backend.name,
        environment=built.settings.environment,
        version=__version__,
        uptime_s=round(time.monotonic() - built.started, 3),
        operations=_operations(metrics.operation_counts()),
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


def _exposition(built: Service) -> bytes:
    try:
        for state, count in built.desk.store.open_counts().items():
            metrics.JOBS_IN_STATE.labels(state).set(count)
        metrics.WORKERS.set(built.desk.store.workers())
        for queue, depth in built.broker.depths().items():
            metrics.QUEUE_DEPTH.labels(queue).set(depth)
        metrics.REDIS_UP.set(1)
    except JobsUnavailable:
        metrics.REDIS_UP.set(0)
    built.kms.health_check()
    return generate_latest(REGISTRY)


def _key(key: Key, *, default: bool) -> wire.KeyOut:
    versions = [
        wire.KeyVersionOut(version=version.version, created_at=_time(version.created_at))
        for version in key.backend.versions()
    ]
    return wire.KeyOut(
        id=key.key_id,
        backend=key.backend.name,
        current_version=key.backend.current_version(),
        versions=versions,
        default=default,
    )


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
