"""What routes share: the built service, the caller's principal, and how a core call is made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

import anyio.to_thread
from fastapi import Request

from kms_api.broker import Broker
from kms_core.jobs.desk import Desk
from kms_core.policy import Principal
from kms_core.service import Kms
from kms_core.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

INLINE_STANZAS: Final = 32
INLINE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that routes need, built once by ``app.build``."""

    settings: Settings
    kms: Kms
    desk: Desk
    broker: Broker
    started: float
    backend_limiter: anyio.CapacityLimiter
    upload_limiter: anyio.CapacityLimiter

    @property
    def blocks(self) -> bool:
        return any(key.backend.blocks for key in self.kms.keyring.keys.values())


def service(request: Request) -> Service:
    built: Service = request.app.state.service
    return built


def caller(request: Request) -> Principal:
    """Who calls. Authentication is by the start guard alone: nobody off this machine reaches this service."""
    del request
    return Principal("local")


async def call(built: Service, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call into the core: inline where that costs microseconds, in a bounded thread where it may wait.

    A call that waits on a network, carries a large body or a header with many stanzas must not hold up the
    event loop.
    """
    sizes = [arg for arg in args if isinstance(arg, bytes)]
    heavy = any(len(arg) > INLINE_BYTES or arg.count(b"\n-> ", 0, 1 << 15) > INLINE_STANZAS for arg in sizes)
    if not built.blocks and not heavy:
        return function(*args, **kwargs)
    return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=built.backend_limiter)
