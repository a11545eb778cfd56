"""Which calls into the core the event loop runs itself."""

import os
import threading
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from kms_api import deps
from kms_api.deps import LOCAL_CALLER, Pool, Service
from kms_api.routing import Call
from kms_core.age.header import Stanza, bundle, render_stanza
from support.waiting import WAIT_S

pytestmark = pytest.mark.anyio
THREADS = Pool("lists", 2)
ONE = Stanza(("X25519", "a"), bytes(32))


@pytest.mark.parametrize(
    ("data", "apart"),
    [
        (b"salary", False),
        (render_stanza(ONE) * 2, False),
        (render_stanza(ONE) * (deps.INLINE_STANZAS + 2), True),
        (render_stanza(bundle([ONE] * 2)), True),
        (bytes(deps.INLINE_BYTES + 1), True),
    ],
    ids=["small", "few stanzas", "many stanzas", "a bundle", "large"],
)
async def test_what_may_take_long_does_not_hold_up_the_loop(data: bytes, apart: bool) -> None:
    keyring = SimpleNamespace(waits_on=lambda *_: None, blocks=False)
    settings = SimpleNamespace(kms=SimpleNamespace(audit=SimpleNamespace(durability="write")))
    kms = SimpleNamespace(keyring=keyring)
    local = cast("Service", SimpleNamespace(settings=settings, kms=kms, limiters={}))

    call = cast("Call[None]", SimpleNamespace(service=local, caller=LOCAL_CALLER))

    pool = Call.key_pool(call, None, file=data)
    thread = await Service.run(local, pool, threading.get_ident)

    assert (thread != threading.get_ident()) is apart


def threads_only() -> Service:
    """A service without settings, keys or jobs."""
    nothing = cast("Any", None)
    return Service(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, None)


async def test_all_who_ask_before_a_look_begins_share_it_and_none_who_asks_later() -> None:
    service, go, begun = threads_only(), threading.Event(), threading.Event()
    numbers, found = iter(range(9)), list[int]()

    def look() -> int:
        begun.set()
        assert go.wait(WAIT_S)
        return next(numbers)

    async def ask() -> None:
        found.append(await service.run_shared(THREADS, 0.0, look))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(ask)
        await anyio.to_thread.run_sync(begun.wait, WAIT_S)
        for _ in range(3):
            tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        go.set()

    assert sorted(found) == [0, 0, 0, 1, 1, 1]


async def test_a_look_goes_on_for_the_others_if_the_first_who_asked_has_gone() -> None:
    service, go, found = threads_only(), threading.Event(), list[bool]()
    turn = THREADS.of("acme")

    async def ask() -> None:
        found.append(await service.run_shared(turn, 0.0, go.is_set))

    async with anyio.create_task_group() as others:
        others.start_soon(service.run, turn, go.wait, WAIT_S)
        async with anyio.create_task_group() as first:
            first.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            others.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        go.set()

    assert found == [True]


async def test_a_look_that_finds_no_thread_fails_no_later_one() -> None:
    service = threads_only()
    with pytest.raises(ValueError, match="tokens"):
        await service.run_shared(Pool("none", -1), 0.0, os.getpid)

    assert await service.run_shared(THREADS, 0.0, os.getpid) == os.getpid()


async def test_one_tenant_takes_half_of_the_threads_of_long_reads() -> None:
    service, go = threads_only(), threading.Event()

    async with anyio.create_task_group() as tasks:
        for _ in range(THREADS.threads):
            tasks.start_soon(service.run, THREADS.of("flood"), go.wait, WAIT_S)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(WAIT_S / 2):
            await service.run(THREADS.of("other"), go.set)
