"""What callers without a credential can have written to the audit log: 60 denials a minute."""

import time
from typing import Final

import httpx2 as httpx
import pytest
from starlette.types import Receive, Scope, Send

from kms_api import problems
from kms_api.deps import PRINCIPAL
from kms_api.transport.request_context import RequestContext
from kms_core.auth.policy import Principal
from kms_protocol.errors import Forbidden, Unauthenticated
from support.age_kms import Kept

A_MINUTE: Final = 60
pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses everybody; who has a name is known."""
    named = dict(scope["headers"]).get(b"x-name")
    if named:
        scope[PRINCIPAL] = Principal(named.decode())
    error = Forbidden() if named else Unauthenticated("No credential was sent", reason="missing")
    await problems.answer(error)(scope, receive, send)


async def denied(trail: Kept, requests: int, **headers: str) -> int:
    """How many records so many refusals leave."""
    before = len(trail.lines)
    edge = RequestContext(refusing, [], trail)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://localhost") as client:
        for _ in range(requests):
            assert (await client.get("/x", headers=headers)).status_code in {401, 403}
    return len(trail.lines) - before


async def test_anonymous_denials_are_recorded_up_to_a_bound() -> None:
    """A run that sees a minute end is repeated: the next one has a bound of its own."""
    written, minute = 0, -1.0
    while minute != time.monotonic() // 60:
        minute = time.monotonic() // 60
        written = await denied(Kept(), 2 * A_MINUTE + 1)

    assert written == A_MINUTE


async def test_denials_of_known_callers_are_all_recorded() -> None:
    assert await denied(Kept(), 2 * A_MINUTE + 1, **{"x-name": "ada"}) == 2 * A_MINUTE + 1
