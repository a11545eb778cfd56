"""What routes share: the built service, the caller's principal, and how a core call is made."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar

import anyio.to_thread
from fastapi import Request

from kms_core.age.header import BUNDLE
from kms_core.audit.verification.monitor import AuditMonitor
from kms_core.auth.policy import Principal
from kms_core.auth.rate_limit import Requests
from kms_core.auth.revocation import Revocations
from kms_core.jobs.submission.submitter import JobSubmitter
from kms_core.service import Kms
from kms_core.settings.model import Settings

P = ParamSpec("P")
R = TypeVar("R")

INLINE_STANZAS: Final = 32
INLINE_BYTES: Final = 256 * 1024
BACKEND_THREADS: Final = 16
_LOOK_BYTES: Final = 32 * 1024
_BUNDLED: Final = f"-> {BUNDLE} ".encode()
LOCAL: Final = "local"
WHO: Final = "kms.who"  # where the gate leaves the principal in a request's scope
LOCAL_CALLER: Final = Principal("local")
"""Everybody, where callers are not authenticated: the start guard keeps others than this machine out."""
LET_IN: Final = Principal("")
"""Nobody: the route asks for no credential. The core allows him nothing."""


class Queue(Protocol):
    """Where messages wait for workers."""

    def depths(self) -> dict[tuple[str, str], int]:
        """How many, by queue and priority. Raises JobsUnavailable."""


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that routes need, built once by ``app.build``."""

    settings: Settings
    kms: Kms
    desk: JobSubmitter
    broker: Queue
    watch: AuditMonitor
    started: float
    limiters: dict[str, anyio.CapacityLimiter]
    upload_limiter: anyio.CapacityLimiter
    """The threads that work on streams of items while these arrive, one for each."""
    requests: Requests
    """Counts items of batches and jobs, and logins; ``authentication.py`` counts the requests."""
    threads: Executor
    """Where the slabs of files are sealed and opened, written and read."""
    revocations: Revocations | None
    """The revocation lists of client certificates, where settings name any."""

    @property
    def blocks(self) -> bool:
        """Whether any call may wait: on a network, or for its record to be on disk, which many share."""
        waits_for_disk = self.settings.kms.audit.durability == "fsync"
        return waits_for_disk or any(key.blocks for key in self.kms.keyring.keys.values())

    def limiter(self, name: str, threads: int = BACKEND_THREADS) -> anyio.CapacityLimiter:
        """The threads of one backend: while it hangs, calls on others have theirs."""
        return self.limiters.setdefault(name, anyio.CapacityLimiter(threads))


def service(request: Request) -> Service:
    built: Service = request.app.state.service
    return built


def caller(request: Request) -> Principal:
    """Who calls, as the gate has found out."""
    who: Principal = request.scope[WHO]
    return who


async def call(built: Service, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call into the core: inline where that costs microseconds, in a bounded thread where it may wait.

    A call that waits on a network, carries a large body or a header with many stanzas must not hold up the
    event loop. ``key_id`` among the keywords, and ciphertexts among the arguments, tell which threads.
    """
    sizes = [arg for arg in args if isinstance(arg, bytes)]
    heavy = any(map(_is_heavy, sizes))
    if not built.blocks and not heavy:
        return function(*args, **kwargs)
    key_id = kwargs.get("key_id")
    waits_on = built.kms.keyring.waits_on(key_id if isinstance(key_id, str) else None, *sizes)
    limiter = built.limiter(waits_on or LOCAL)
    return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=limiter)


def _is_heavy(data: bytes) -> bool:
    """A large body, many stanzas, or a bundle, whose stanzas cannot be counted from outside."""
    many = data.count(b"\n-> ", 0, _LOOK_BYTES) > INLINE_STANZAS
    return len(data) > INLINE_BYTES or many or data.find(_BUNDLED, 0, _LOOK_BYTES) >= 0
