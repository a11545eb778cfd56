"""Builds the HTTP application: the one function that wires settings, core and routes together."""

import time

import anyio
from fastapi import FastAPI
from starlette.types import ASGIApp

from kms_api import bodies, broker, problems
from kms_api.deps import Service
from kms_api.edge import Edge
from kms_api.routes import batch, files, intake, jobs, operations, secrets
from kms_core import __version__, metrics, wire
from kms_core.jobs.build import build as build_core
from kms_core.settings import Settings

_UPLOAD_THREADS = 64  # of their own: senders may be slow, and must not hold up the threads of other calls


def build(settings: Settings) -> ASGIApp:
    """The application for these settings. Raises ConfigurationError; touches key files, and no peer."""
    queue = broker.connect(settings.kms.redis.broker_url)
    core = build_core(settings, "api", queue.nudge)
    app = FastAPI(
        title="kms-service", version=__version__, summary="Encrypt, decrypt and run encryption jobs"
    )
    app.state.service = Service(
        settings,
        core.kms,
        core.desk,
        queue,
        time.monotonic(),
        {},
        anyio.CapacityLimiter(_UPLOAD_THREADS),
    )
    for router in (secrets.router, batch.router, jobs.router, files.router, intake.router, operations.router):
        app.include_router(router, prefix=wire.PREFIX)
    app.include_router(operations.probes)
    problems.install(app)
    _document(app)
    metrics.BUILD_INFO.labels(__version__).set(1)
    return Edge(app, settings.kms.server.allowed_hosts)


def _document(app: FastAPI) -> None:
    """Put the msgspec shapes on the OpenAPI page."""
    page = app.openapi()
    page.setdefault("components", {}).setdefault("schemas", {}).update(bodies.components())
