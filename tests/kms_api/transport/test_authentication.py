"""Look-ups of credentials: who waits for which."""

import threading
from collections.abc import Callable
from typing import Any, Final, cast

import anyio
import pytest

from kms_api.transport.authentication import RequestAuthenticator
from kms_core.auth.jwks import KeysPending
from kms_core.auth.policy import Principal
from support.waiting import WAIT_S

ADA: Final = Principal("ada", "acme", "token:1")
pytestmark = pytest.mark.anyio


def known_after(look_up: Callable[[], object], source: object) -> Callable[[], Principal]:
    """A credential that is known once it was looked up at a source."""
    known = threading.Event()

    def looked_up() -> None:
        look_up()
        known.set()

    def verify() -> Principal:
        if not known.is_set():
            raise KeysPending(looked_up, source)
        return ADA

    return verify


def of(address: str) -> dict[str, object]:
    """What a request from this address has."""
    return {"client": (address, 40000)}


async def test_a_source_that_hangs_delays_no_credential_of_another() -> None:
    entry = RequestAuthenticator(cast("Any", None), cast("Any", None), cast("Any", None))
    hanging, began = threading.Event(), []

    def hang() -> None:
        began.append(True)
        assert hanging.wait(WAIT_S)

    async with anyio.create_task_group() as tasks:
        for number in range(40):
            tasks.start_soon(entry.verified, of(f"192.0.2.{number}"), known_after(hang, "slow issuer"))
        with anyio.fail_after(WAIT_S):
            while len(began) < 16:  # noqa: ASYNC110 -- told by threads
                await anyio.sleep(0.01)
            for source in ("other issuer", "tokens"):
                assert await entry.verified({}, known_after(began.copy, source)) == ADA
            assert await entry.verified({}, lambda: ADA) == ADA
        assert len(began) == 16, "no more threads at once for one source"
        hanging.set()


@pytest.mark.parametrize("flood", ["192.0.2.1", "2001:db8::%d"])
async def test_a_flood_of_one_address_delays_no_other(flood: str) -> None:
    """As junk JWTs do at a login whose issuer reviews each one; an IPv6 network counts as one address."""
    entry = RequestAuthenticator(cast("Any", None), cast("Any", None), cast("Any", None))
    hanging, began = threading.Event(), []

    def hang() -> None:
        began.append(True)
        assert hanging.wait(WAIT_S)

    async with anyio.create_task_group() as tasks:
        for number in range(40):
            address = flood.replace("%d", str(number + 1))
            tasks.start_soon(entry.verified, of(address), known_after(hang, "reviews"))
        try:
            with anyio.fail_after(WAIT_S / 2):
                for address in ("192.0.2.2", "192.0.2.3"):
                    assert await entry.verified(of(address), known_after(began.copy, "reviews")) == ADA
                while len(began) < 4:  # noqa: ASYNC110 -- told by threads
                    await anyio.sleep(0.01)
            assert len(began) == 4, "no more threads at once for one address"
        finally:
            hanging.set()
    assert len(began) == 40, "all have had their turn"
