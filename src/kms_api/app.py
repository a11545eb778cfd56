"""Builds the HTTP application from settings, core and routes."""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api import routing
from kms_api.deps import Service
from kms_api.routes import audit, batch, files, jobs, keys, operations, secrets
from kms_api.routing import DOCS, Dispatcher
from kms_api.transport.admission import Admitted, budgets_of
from kms_api.transport.authentication import AuthenticationLayer, RequestAuthenticator
from kms_api.transport.page_layer import PageLayer
from kms_api.transport.request_context import ClientAddress, RequestContext
from kms_api.ui import job_pages, login, overview, views
from kms_api.ui.render import STATIC_FILES, Screen, refused
from kms_api.ui.sessions import Sessions
from kms_api.vault_api import sys, transit
from kms_api.vault_api.routing import LOGIN
from kms_core.audit.verification.verify import AuditMonitor
from kms_core.auth.rate_limit import Failures, Rate, Requests
from kms_core.container import Core, build_monitor
from kms_core.container import build as build_core
from kms_core.documents.local_copy import CopyPoll
from kms_core.jobs.hosts.install import InstallWatch
from kms_core.jobs.store import processes
from kms_core.jobs.store.condition import StoreProbe
from kms_core.jobs.store.usage import UsageFlush
from kms_core.observability import metrics, tracing
from kms_core.periodic import PeriodicThread
from kms_core.proxies import Proxies
from kms_core.settings.lint import SETTINGS, unaccepted
from kms_core.settings.model import Settings
from kms_core.settings.redis_urls import is_shared
from kms_protocol import wire

_SLAB_THREADS = 8  # a separate pool: slow disks must not take the threads of other calls

ROUTERS: Final = (
    *(part.router for part in (secrets, batch, jobs, files)),
    operations.webhooks,
    *(part.router for part in (keys, audit, operations)),
)
UI: Final = (login.router, overview.router, job_pages.router, views.router)
REFERENCE: Final = (views.docs,)
VAULT: Final = (transit.routes, sys.routes)
PAGES: Final = frozenset({DOCS, "/openapi.json"})
"""The public documentation, which ``[kms.server] docs`` turns off."""


_DOCUMENT: Final = Path(__file__).with_name("openapi") / "openapi.json"
"""Written by ``scripts/openapi``."""


class Application(FastAPI):
    """Answers requests by ``layers``, and serves our OpenAPI document instead of FastAPI's.

    ``entry`` None: requests need no credentials.
    """

    layers: ASGIApp
    service: Service
    screen: Screen
    entry: RequestAuthenticator | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the service
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        await self.layers(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = json.loads(_DOCUMENT.read_bytes())
        return self.openapi_schema


def _core(settings: Settings) -> Core:
    """Build the core. Raises ConfigurationError."""
    if is_shared(settings.kms.redis):
        return build_core(settings, "api", None)
    from kms_core.jobs.store import broker  # noqa: PLC0415 -- Celery, of which few installs need the 8 MiB here

    return build_core(settings, "api", broker.connect(settings.kms.redis))


def build(settings: Settings) -> Application:
    """The application for these settings. Reads key files, calls no peer. Raises ConfigurationError."""
    traced = settings.kms.traces
    tracing.configure("kms-service", enabled=traced.enabled, endpoint=traced.endpoint)
    core = _core(settings)
    monitor = build_monitor(settings, core.worker_context.store.redis)
    app = Application(
        title="kms-service",
        lifespan=_lifespan_of(core, monitor),
        openapi_url="/openapi.json" if settings.kms.server.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirected POST would send its secret twice
    )
    service = app.service = Service(
        settings,
        core.kms,
        core.submitter,
        core.install,
        StoreProbe(core.worker_context.store.condition),
        monitor,
        core.watch,
        Requests(_request_rates(settings)),
        ThreadPoolExecutor(_SLAB_THREADS, "slab"),
        core.authenticator,
    )
    metrics.show_weak(SETTINGS, unaccepted(settings))
    failures = Failures(settings.kms.auth.failures_per_minute / settings.kms.server.processes)
    authenticator = (
        None
        if core.authenticator is None
        else RequestAuthenticator(core.authenticator, core.kms.audit_log, failures)
    )
    sessions = Sessions(core.worker_context.store.redis, core.worker_context.store.record_key)
    app.entry = authenticator
    app.screen = Screen.load(sessions)
    reference = REFERENCE if settings.kms.server.docs else ()
    vault = VAULT if settings.kms.facade.enabled else ()
    parts = {wire.PREFIX: ROUTERS, "": (operations.probes, *UI, *reference, *vault)}
    layer: ASGIApp = Dispatcher(app, parts)
    public = open_paths(settings.kms.auth.logins)
    layer = AuthenticationLayer(layer, authenticator, sessions, service, public)
    layer = PageLayer(layer, public, core.worker_context.store.condition)
    server = settings.kms.server
    layer = RequestContext(layer, server.allowed_hosts, core.kms.audit_log, server.codec_origins, refused)
    layer = Admitted(layer, budgets_of(settings.kms.server))
    if settings.kms.server.trusted_proxies:
        layer = ClientAddress(layer, Proxies(settings.kms.server.trusted_proxies))
    app.layers = layer
    return app


def open_paths(logins: Iterable[str] = ()) -> frozenset[str]:
    """The paths that need no credential; ``logins`` are the mounts of logins."""
    parts = ((wire.PREFIX, ROUTERS), ("", (operations.probes, *UI, *REFERENCE, *VAULT)))
    routes = ((prefix, route) for prefix, each in parts for part in each for route in part.declared)
    fixed = {prefix + route.path for prefix, route in routes if route.rule.open and "{" not in route.path}
    static = {f"{routing.UI}/static/{name}" for name in STATIC_FILES}
    return PAGES.union(fixed, static, (LOGIN.replace("{mount}", mount) for mount in logins))


def _request_rates(settings: Settings) -> dict[str, Rate]:
    """The request rates of tenants that have one, of which each process allows its share."""
    share = 1 / settings.kms.server.processes
    return {
        name: Rate(
            tenant.requests_per_s * share,
            max(1.0, (tenant.burst or max(1.0, tenant.requests_per_s)) * share),
        )
        for name, tenant in settings.kms.tenants.items()
        if tenant.requests_per_s is not None
    }


def _lifespan_of(core: Core, monitor: AuditMonitor) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Run the periodic threads with the application: usage counts, audit log, backends, and install."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        core.audit_maintenance.begun = monitor.wake
        threads: list[PeriodicThread] = [
            *map(CopyPoll, core.copies),
            monitor,
            core.watch,
            InstallWatch(core.install),
            processes.Presence(core.worker_context.store, "api", processes.new_name()),
            UsageFlush(core.kms.usage, core.worker_context.store.redis),
            core.audit_maintenance,
        ]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            await anyio.to_thread.run_sync(thread.stop)
        await anyio.to_thread.run_sync(tracing.stop)

    return lifespan
