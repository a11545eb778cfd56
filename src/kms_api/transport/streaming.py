"""Bodies of any size on their way through: a thread works on one slab while the loop moves the next.

Knows no route, no job and no cipher. A peer that is slow, or sends nothing, holds no thread.
"""

import asyncio
import contextvars
import mmap
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import anyio
from fastapi import Request

from kms_api.transport.transfer_rate import TransferLimits
from kms_api.transport.upload_reader import UploadReader

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Slab = tuple[memoryview, bool]
"""Bytes of a body, which are overwritten later, and whether it is certain that more follow."""

_SLAB_BYTES: Final = 1024 * 1024


async def receive(
    request: Request, sink: Generator[None, Slab, T], threads: Executor, limits: TransferLimits
) -> T:
    """Send a body to ``sink`` slab by slab, in threads; what it returns after the last slab.

    The sink is begun before the body is read, and closed if that breaks off. Raises what the sink raises,
    ClientDisconnect, and BodyTimeout if the sender is slower than ``limits`` allow.
    """
    worker = _Worker(threads)
    try:
        await _outcome(await worker.begin(next, sink))
        inlet = UploadReader(request, limits)
        slab, other = (memoryview(mmap.mmap(-1, _SLAB_BYTES)) for _ in range(2))  # costs what is filled
        while (filled := await inlet.fill(slab)).more:
            await worker.begin(sink.send, (slab, True))
            slab, other = other, slab
        return await _outcome(await worker.begin(_last, sink, slab[: filled.size]))
    finally:
        await worker.close(sink)


async def send(slabs: Generator[T], threads: Executor) -> AsyncGenerator[T]:
    """What ``slabs`` gives, each made in a thread while the one before is on its way.

    Raises what making them raises. A forged slab breaks the connection: no clean end is sent.
    """
    worker = _Worker(threads)
    try:
        ahead = await worker.begin(next, slabs, None)
        while (slab := await _outcome(ahead)) is not None:
            ahead = await worker.begin(next, slabs, None)
            yield slab
    finally:
        await worker.close(slabs)  # a download that breaks off leaves no file open


def _last(sink: Generator[None, Slab, T], slab: memoryview) -> T:
    try:
        sink.send((slab, False))
    except StopIteration as ended:
        returned: T = ended.value
        return returned
    raise RuntimeError("the sink waits for more than there is")


class _Worker:
    """Runs one call at a time in the threads of a pool, each in the context that this was made in."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._context = contextvars.copy_context()
        self._latest: asyncio.Future[Any] | None = None

    async def begin(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Start a call once the one before has ended. Raises what that one raised."""
        if self._latest:
            await _outcome(self._latest)
        run = partial(self._context.run, function, *args, **kwargs)
        call = asyncio.get_running_loop().run_in_executor(self._threads, run)
        self._latest = call
        return call

    async def close(self, generator: Generator[object, Any, object]) -> None:
        """Close the generator that the calls went through, once none of them is in it any more."""
        with anyio.CancelScope(shield=True):
            if self._latest:
                await asyncio.wait([self._latest])
                self._latest.exception()  # was told, unless the body broke off for another reason first
            await asyncio.get_running_loop().run_in_executor(self._threads, generator.close)


async def _outcome(call: asyncio.Future[R]) -> R:
    """What it returned. Raises what it raised."""
    if not call.done():
        await asyncio.wait([call])  # which, unlike awaiting it, never cancels it
    return call.result()
