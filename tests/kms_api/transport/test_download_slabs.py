"""Slabs made ahead of a slow reader: in order, one at a time, and never after the end."""

import contextvars
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from kms_api.transport import bodies
from kms_protocol.errors import DecryptFailed

ABOUT: Final = contextvars.ContextVar("about", default="nothing")
pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


async def test_slabs_come_in_order_from_threads_that_know_the_request(threads: ThreadPoolExecutor) -> None:
    def numbers() -> Generator[tuple[int, str, bool]]:
        for number in range(100):
            yield number, ABOUT.get(), threading.current_thread() is threading.main_thread()

    ABOUT.set("this request")

    found = [slab async for slab in bodies.send(numbers(), threads)]
    assert found == [(number, "this request", False) for number in range(100)]


async def test_slabs_before_a_forged_one_are_sent_and_then_it_raises(threads: ThreadPoolExecutor) -> None:
    def forged() -> Generator[bytes]:
        yield b"genuine"
        raise DecryptFailed

    sending = bodies.send(forged(), threads)

    assert await anext(sending) == b"genuine"
    with pytest.raises(DecryptFailed):
        await anext(sending)


async def test_a_reader_that_goes_away_closes_the_source_once_nothing_runs_in_it(
    threads: ThreadPoolExecutor,
) -> None:
    may_go_on, closed = threading.Event(), threading.Event()

    def slow() -> Generator[bytes]:
        try:
            yield b"first"
            may_go_on.wait(60)
            yield b"second"
        finally:
            closed.set()

    sending = bodies.send(slow(), threads)
    first = await anext(sending)
    threading.Timer(0.05, may_go_on.set).start()
    await sending.aclose()

    assert first == b"first"
    assert closed.is_set()
