"""State shared by routes: the service, the caller of a request, and thread pools for calls that wait."""

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, ParamSpec, Self, TypeVar, cast

import anyio.to_thread
from fastapi import Request

from kms_core.age.header import BUNDLE
from kms_core.audit.verification.verify import AuditMonitor
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import Principal
from kms_core.auth.rate_limit import Requests
from kms_core.backend_watch import BackendWatch
from kms_core.jobs.hosts.install import Install
from kms_core.jobs.store.condition import StoreCondition, StoreProbe
from kms_core.jobs.submission.submitter import JobSubmitter
from kms_core.service import Kms
from kms_core.settings.model import Settings
from kms_protocol.errors import AuditUnavailable, JobsUnavailable

P = ParamSpec("P")
R = TypeVar("R")

INLINE_STANZAS: Final = 32
INLINE_BYTES: Final = 256 * 1024
_HEADER_BYTES: Final = 32 * 1024
_BUNDLED: Final = f"-> {BUNDLE} ".encode()
PRINCIPAL: Final = "kms.principal"
"""The key of a request's principal in its ASGI scope, where ``authentication.py`` puts it."""
LOCAL_CALLER: Final = Principal("local")
"""Every caller of a service without authentication, which only loopback reaches (``check_exposure``)."""
ANONYMOUS: Final = Principal("")
"""The caller of a public route, without a credential. The policy allows it nothing."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Threads of one purpose: calls that hang there leave the threads of other pools free.

    A ``tenant`` that is named holds half of them at most.
    """

    name: str
    threads: int = 16
    tenant: str = ""

    def of(self, tenant: str) -> Self:
        """These threads for a call whose work grows with what a caller of this tenant asks for."""
        return replace(self, tenant=tenant)


LOCAL_BATCHES: Final = Pool("local batch", 4)
"""Of keys that ask no server. Threads that only compute hinder each other, and calls on the event loop."""
KEYS: Final = Pool("keys")
STORE: Final = Pool("store", 40)
"""Calls that wait for Redis or a local disk."""
PROBES: Final = Pool("probes", 8)
"""Probes and the status: answered also while calls of jobs wait for a Redis that is silent."""


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that routes need, built once by ``app.build``."""

    settings: Settings
    kms: Kms
    submitter: JobSubmitter
    install: Install
    store_probe: StoreProbe
    audit_monitor: AuditMonitor
    watch: BackendWatch
    requests: Requests
    """Counts items of batches and jobs, and logins; ``authentication.py`` counts requests."""
    threads: Executor
    """The threads that seal, open, write and read the slabs of files."""
    authenticator: Authenticator | None
    """None if requests need no credentials."""
    started: float = field(default_factory=time.monotonic)
    limiters: dict[str, anyio.CapacityLimiter] = field(default_factory=dict)
    looks: dict[Hashable, asyncio.Task[Any]] = field(default_factory=dict)
    """Calls of ``run_shared`` that have not begun."""

    def can_record(self) -> bool:
        """Return whether audit records can be written now."""
        try:
            self.kms.audit_log.check()
        except AuditUnavailable:
            return False
        return True

    def answering(self) -> StoreCondition:
        """Return the condition of the job store. Raises JobsUnavailable, at once where that is known."""
        if (known := self.store_probe.condition()) == "unavailable":
            raise JobsUnavailable
        return known

    def batch_pool(self, who: Principal, key_ids: Iterable[str | None], files: Iterable[bytes] = ()) -> Pool:
        """The threads for many calls at once: those of a backend whose keys they name, or the local ones."""
        found = self.kms.keyring.waits_on(key_ids, files)
        return (Pool(f"batch {found}") if found else LOCAL_BATCHES).of(who.tenant)

    def rotation_pool(self, key_id: str) -> Pool:
        """The threads for a rotation, which writes files and waits for other processes, or for a network."""
        return Pool(self.kms.keyring.waits_on([key_id]) or KEYS.name)

    async def run(self, pool: Pool | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in a thread of ``pool``, or on the event loop if that is None."""
        if pool is None:
            return function(*args, **kwargs)
        called = partial(function, *args, **kwargs)
        threads = _limiter(self.limiters, pool.name, pool.threads)
        if not pool.tenant:
            return await anyio.to_thread.run_sync(called, limiter=threads)
        async with _limiter(self.limiters, f"{pool.name} of {pool.tenant}", (pool.threads + 1) // 2):
            return await anyio.to_thread.run_sync(called, limiter=threads)

    async def run_shared(self, pool: Pool, after_s: float, look: Callable[..., R], *about: Hashable) -> R:
        """Call a function in a thread of ``pool`` for all who ask for the same before it begins (ADR 68).

        It begins ``after_s`` seconds after the first of them, or later, so each finds what was true when it
        asked, or later. A caller that goes away ends the call for no other.
        """
        key = (look, about, after_s)

        def begun() -> R:
            del self.looks[key]
            return look(*about)

        async def called() -> R:
            await anyio.sleep(after_s)
            return await self.run(pool, begun)

        def settle(ended: asyncio.Task[R]) -> None:
            if self.looks.get(key) is ended:  # it could not begin, for want of a thread
                del self.looks[key]
            if not ended.cancelled():
                ended.exception()  # if all have gone

        task = self.looks.get(key)
        if task is None:
            task = self.looks[key] = asyncio.create_task(called())
            task.add_done_callback(settle)
        return cast("R", await asyncio.shield(task))


def _limiter(limiters: dict[str, anyio.CapacityLimiter], name: str, threads: int) -> anyio.CapacityLimiter:
    """The limiter of this name, made when it is first needed."""
    found = limiters.get(name)
    if found is None:
        found = limiters[name] = anyio.CapacityLimiter(threads)
    return found


def service(request: Request) -> Service:
    """The service that answers a request."""
    found: Service = request.app.service
    return found


def has_many_stanzas(file: bytes) -> bool:
    """Return whether a header has many stanzas, or a bundle, whose stanzas cannot be counted from outside."""
    many = file.count(b"\n-> ", 0, _HEADER_BYTES) > INLINE_STANZAS
    return many or file.find(_BUNDLED, 0, _HEADER_BYTES) >= 0
