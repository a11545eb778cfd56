"""Builds the HTTP application: the one function that wires settings, core and routes together."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp

from kms_api import bodies, broker, pages, problems, rules
from kms_api.deps import Service
from kms_api.edge import Edge
from kms_api.front import Front
from kms_api.gate import Entry, Gate, Limits
from kms_api.pages.screen import Screen
from kms_api.routes import (
    audit,
    batch,
    files,
    intake,
    jobs,
    keys,
    operations,
    secrets,
    ui,
    ui_forms,
    webhooks,
)
from kms_api.sessions import Sessions
from kms_core import __version__, metrics, wire
from kms_core.auth.scraping import Scraping
from kms_core.auth.throttle import Failures, Pace, Requests
from kms_core.jobs.build import Core
from kms_core.jobs.build import build as build_core
from kms_core.jobs.teller import Teller
from kms_core.settings import Settings
from kms_core.settings_lint import SETTINGS, weaknesses

_UPLOAD_THREADS = 64  # of their own: senders may be slow, and must not hold up the threads of other calls

ROUTERS: Final = tuple(
    part.router for part in (secrets, batch, jobs, files, intake, webhooks, keys, audit, operations)
)
UI: Final = (ui.router, ui_forms.router)


def build(settings: Settings) -> ASGIApp:
    """The application for these settings. Raises ConfigurationError; touches key files, and no peer."""
    queue = broker.connect(settings.kms.redis)
    core = build_core(settings, "api", queue.nudge)
    app = FastAPI(
        title="kms-service",
        version=__version__,
        summary="Encrypt, decrypt and run encryption jobs",
        lifespan=_with_teller(core),
        openapi_url="/openapi.json" if settings.kms.server.docs else None,
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
    for router in ROUTERS:
        rules.include(app, router, wire.PREFIX)
    rules.include(app, operations.probes)
    for router in UI:
        rules.include(app, router)
    problems.install(app)
    _document(app)
    metrics.BUILD_INFO.labels(__version__).set(1)
    weak = {weakness.setting for weakness in weaknesses(settings)}
    for setting in SETTINGS:
        metrics.WEAK_SETTING.labels(setting).set(setting in weak)
    limits = Limits(
        Failures(settings.kms.auth.failures_per_minute / settings.kms.server.processes),
        Requests(_paces(settings)),
        Scraping(settings.kms.server.metrics, core.doors, core.kms.policy),
    )
    entry = None if core.doors is None else Entry(core.doors, core.kms.trail, limits.failures)
    sessions = Sessions(settings.state_dir / "run" / "sessions")
    app.state.screen = Screen(pages.environment(), pages.files(), sessions, entry)
    front = ServerErrorMiddleware(Front(app, ROUTERS, wire.PREFIX), problems.unknown)
    gate = Gate(front, entry, sessions, limits)
    return Edge(gate, settings.kms.server.allowed_hosts, core.kms.trail)


def _paces(settings: Settings) -> dict[str, Pace]:
    """The requests a second of those tenants that have a bound; each of our processes allows its share."""
    share = 1 / settings.kms.server.processes
    return {
        name: Pace(
            tenant.requests_per_s * share,
            max(1.0, (tenant.burst or max(1.0, tenant.requests_per_s)) * share),
        )
        for name, tenant in settings.kms.tenants.items()
        if tenant.requests_per_s is not None
    }


def _with_teller(core: Core) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """While the application runs, its counts go to Redis, and its audit trail is kept in order."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        teller = Teller(core.kms.tally, core.shop.store.redis)
        teller.start()
        core.keeper.start()
        yield
        await anyio.to_thread.run_sync(teller.stop)
        await anyio.to_thread.run_sync(core.keeper.stop)

    return lifespan


def _document(app: FastAPI) -> None:
    """Put the msgspec shapes on the OpenAPI page."""
    page = app.openapi()
    page.setdefault("components", {}).setdefault("schemas", {}).update(bodies.components())
