"""What operators look at: health, status, probes and metrics. None of them tells a secret."""

import time
from datetime import UTC
from typing import Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from kms_api import bodies
from kms_api.deps import call, service
from kms_core import __version__, metrics, wire

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
        checked_at=found.checked_at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )
    return bodies.answer(shape, 200 if found.healthy else 503)


@router.get("/status", **bodies.documented(None, wire.StatusOut))
async def status(request: Request) -> Response:
    """Backend, environment, version, operation counts, jobs, and what is degraded."""
    built = service(request)
    return bodies.answer(
        wire.StatusOut(
            backend=built.kms.keyring.default.backend.name,
            environment=built.settings.environment,
            version=__version__,
            uptime_s=round(time.monotonic() - built.started, 3),
            operations=_operations(metrics.operation_counts()),
            jobs=None,
            queue_depth=None,
            workers=None,
            degraded=["redis"],
        )
    )


@probes.get("/livez", response_model=None)
async def livez() -> Response:
    """The process answers. Depends on nothing else."""
    return Response(b"ok\n", media_type="text/plain")


@probes.get("/readyz", response_model=None)
async def readyz(request: Request) -> Response:
    """Ready to answer sync calls; says whether jobs are available, and is 200 without them."""
    built = service(request)
    found = await call(built, built.kms.health_check)
    return Response(
        wire.encode({"status": "ready" if found.healthy else "not ready", "jobs": "unavailable"}),
        200 if found.healthy else 503,
        media_type="application/json",
    )


@probes.get("/metrics", response_model=None)
async def prometheus(request: Request) -> Response:
    """Prometheus text format."""
    del request
    text = await anyio.to_thread.run_sync(generate_latest, REGISTRY)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _operations(counts: dict[tuple[str, str], int]) -> wire.Operations:
    by: dict[str, list[int]] = {}
    for (operation, result), count in counts.items():
        sums = by.setdefault(operation, [0, 0])
        sums[result != "ok"] += count
    shapes = {
        operation: wire.OperationCount(ok=ok, failed=failed) for operation, (ok, failed) in sorted(by.items())
    }
    return wire.Operations(total=sum(map(sum, by.values())), by=shapes)
