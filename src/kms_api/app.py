"""Builds the HTTP application: the one function that wires settings, core and routes together."""

import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp

from kms_api import routing, ui
from kms_api.deps import Queue, Service
from kms_api.errors import problems
from kms_api.openapi import document, route
from kms_api.routes import (
    audit,
    batch,
    codec,
    filekeys,
    files,
    intake,
    jobs,
    keys,
    operations,
    secrets,
    webhooks,
)
from kms_api.transport.admission import Admission, Admitted
from kms_api.transport.authentication import AuthenticationLayer, AuthLimits, RequestAuthenticator
from kms_api.transport.client_address import ClientAddress
from kms_api.transport.fast_path import FastPath
from kms_api.transport.request_context import RequestContext
from kms_api.transport.sessions import Sessions
from kms_api.transport.tracing import Traced
from kms_api.ui import actions, runbooks, views
from kms_api.ui.render import Screen
from kms_api.vault_api import app as facade
from kms_core.audit.verification.monitor import AuditMonitor
from kms_core.audit_setup import build_watch
from kms_core.auth.metrics_access import MetricsAccess
from kms_core.auth.rate_limit import Failures, Rate, Requests
from kms_core.container import Core
from kms_core.container import build as build_core
from kms_core.jobs.store.usage_flush import UsageFlush
from kms_core.observability import metrics, tracing
from kms_core.proxies import Proxies
from kms_core.settings.lint import SETTINGS, unaccepted
from kms_core.settings.model import Settings
from kms_core.settings.redis_urls import is_shared
from kms_protocol import __version__, wire

_SLAB_THREADS = 8  # of their own: disks may be slow, and must not hold up the threads of other calls

ROUTERS: Final = tuple(
    part.router
    for part in (secrets, filekeys, batch, codec, jobs, files, intake, webhooks, keys, audit, operations)
)
UI: Final = (views.router, actions.router)
REFERENCE: Final = (route.router,)
DOCUMENTED: Final = {wire.PREFIX: ROUTERS, "": (operations.probes,)}
"""What the OpenAPI page is of, by prefix."""


class _App(FastAPI):
    """Serves our own OpenAPI page in place of the one that FastAPI would make."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = document.page(DOCUMENTED)
        return self.openapi_schema


def _core(settings: Settings) -> tuple[Core, Queue]:
    """The core, and whom to ask how many messages wait. Raises ConfigurationError."""
    if is_shared(settings.kms.redis):
        core = build_core(settings, "api", None)
        return core, core.desk.store
    from kms_api import broker  # noqa: PLC0415 -- Celery, of which few installs need the 8 MiB here

    queue = broker.connect(settings.kms.redis)
    return build_core(settings, "api", queue.nudge), queue


def build(settings: Settings) -> ASGIApp:
    """The application for these settings. Raises ConfigurationError; touches key files, and no peer."""
    traced = settings.kms.traces
    tracing.configure("kms-service", enabled=traced.enabled, endpoint=traced.endpoint)
    core, queue = _core(settings)
    watch = build_watch(settings, core.shop.store.redis)
    app = _App(
        title=document.TITLE,
        lifespan=_with_helpers(core, watch),
        openapi_url="/openapi.json" if settings.kms.server.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirected POST would send its secret twice
    )
    requests = Requests(_paces(settings))
    app.state.service = Service(
        settings,
        core.kms,
        core.desk,
        queue,
        watch,
        time.monotonic(),
        {},
        anyio.CapacityLimiter(settings.kms.server.uploads),
        requests,
        ThreadPoolExecutor(_SLAB_THREADS, "slab"),
        core.doors.revocations if core.doors else None,
    )
    for router in ROUTERS:
        routing.include(app, router, wire.PREFIX)
    routing.include(app, operations.probes)
    for router in (*UI, *(REFERENCE if settings.kms.server.docs else ())):
        routing.include(app, router)
    problems.install(app)
    metrics.BUILD_INFO.labels(__version__).set(1)
    metrics.show_weak(SETTINGS, unaccepted(settings))
    limits = AuthLimits(
        Failures(settings.kms.auth.failures_per_minute / settings.kms.server.processes),
        requests,
        MetricsAccess(
            settings.kms.server.metrics, core.doors, core.kms.policy, Proxies.of(settings.kms.server)
        ),
    )
    entry = None if core.doors is None else RequestAuthenticator(core.doors, core.kms.trail, limits.failures)
    sessions = Sessions(settings.state_dir / "run" / "sessions")
    app.state.screen = Screen(ui.environment(), ui.files(), runbooks.load(), sessions, entry)
    inner = facade.before(FastPath(app, ROUTERS, wire.PREFIX), app.state.service, core.doors)
    front = ServerErrorMiddleware(inner, problems.unknown)
    gate = AuthenticationLayer(front, entry, sessions, limits)
    edge = RequestContext(gate, settings.kms.server.allowed_hosts, core.kms.trail)
    admitted = Admitted(edge, Admission.of(settings.kms.server))
    outer = Traced(admitted) if traced.enabled else admitted
    proxies = Proxies.of(settings.kms.server)
    return ClientAddress(outer, proxies) if settings.kms.server.trusted_proxies else outer


def _paces(settings: Settings) -> dict[str, Rate]:
    """The requests a second of those tenants that have a bound; each of our processes allows its share."""
    share = 1 / settings.kms.server.processes
    return {
        name: Rate(
            tenant.requests_per_s * share,
            max(1.0, (tenant.burst or max(1.0, tenant.requests_per_s)) * share),
        )
        for name, tenant in settings.kms.tenants.items()
        if tenant.requests_per_s is not None
    }


def _with_helpers(core: Core, watch: AuditMonitor) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """While the application runs, counts go to Redis, and the audit trail is kept in order and read back."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        teller = UsageFlush(core.kms.tally, core.shop.store.redis)
        teller.start()
        core.keeper.start()
        watch.start()
        yield
        watch.stop()
        await anyio.to_thread.run_sync(teller.stop)
        await anyio.to_thread.run_sync(core.keeper.stop)
        await anyio.to_thread.run_sync(tracing.stop)

    return lifespan
