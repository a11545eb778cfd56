"""Builds the HTTP application: the one function that wires settings, core and routes together."""

import time

import anyio
from fastapi import FastAPI
from starlette.types import ASGIApp

from kms_api import bodies, problems
from kms_api.deps import Service
from kms_api.edge import Edge
from kms_api.routes import operations, secrets
from kms_core import __version__, keyring, metrics, wire
from kms_core.audit import JsonLines
from kms_core.envelope.header import Limits
from kms_core.policy import AllowAll
from kms_core.service import Kms, Rules
from kms_core.settings import Settings

_BACKEND_THREADS = 32


def build(settings: Settings) -> ASGIApp:
    """The application for these settings. Raises ConfigurationError; touches key files, and no peer."""
    limits = settings.kms.limits
    kms = Kms(
        keyring.build(settings),
        AllowAll(),
        JsonLines(settings.kms.audit.path / "api.jsonl", fsync=settings.kms.audit.durability == "fsync"),
        Rules(settings.kms.require_context, Limits(limits.sync_header_bytes, limits.sync_stanzas)),
    )
    app = FastAPI(
        title="kms-service", version=__version__, summary="Encrypt, decrypt and run encryption jobs"
    )
    app.state.service = Service(settings, kms, time.monotonic(), anyio.CapacityLimiter(_BACKEND_THREADS))
    for router in (secrets.router, operations.router):
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
