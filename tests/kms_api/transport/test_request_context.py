import re
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx2 as httpx
import pytest
from fastapi import Request, Response
from prometheus_client import REGISTRY
from starlette.responses import StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api import problems
from kms_api.deps import PRINCIPAL
from kms_api.routing import is_ui
from kms_api.transport.request_context import RequestContext
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_core.http_protocol import by_name
from kms_protocol.errors import Forbidden, Unauthenticated, UnknownJob
from support.age_kms import MemoryTrail

CANARY = "kanarienvogel"
pytestmark = pytest.mark.anyio


async def thing(request: Request) -> Response:
    del request
    return Response(audit.request_id.get())


async def cached(request: Request) -> Response:
    del request
    return Response(headers={"Cache-Control": "max-age=60"})


async def refused(request: Request) -> Response:
    del request
    raise UnknownJob


async def crash(request: Request) -> Response:
    del request
    raise ZeroDivisionError


async def broken(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one"
        raise UnknownJob

    del request
    return StreamingResponse(parts())


def application() -> ASGIApp:
    """Starlette's router, which answers no exception but its own."""
    things = {"/things/{thing}": thing, "/cached": cached, "/refused": refused, "/crash": crash}
    things |= {"/v1/refused": refused, "/v1/crash": crash, "/broken": broken}
    return Router([Route(path, endpoint) for path, endpoint in things.items()])


async def get(
    path: str = "/things/1", headers: Mapping[str, str] | None = None, hosts: Sequence[str] = ()
) -> httpx.Response:
    transport = httpx.ASGITransport(RequestContext(application(), hosts), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8082") as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8082"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Host": "evil@localhost"},
        {"Host": "localhost:99999999999"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Host": "["},
        {"Host": "[::1"},
        {"Host": "[zz]"},
        {"Host": "a/b?c#d"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "Anything"},
    ],
    ids=str,
)
async def test_foreign_page_or_name_is_refused(headers: Mapping[str, str]) -> None:
    answer = await get(headers=headers)

    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "forbidden"
    assert "allowed_hosts" in answer.json()["detail"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "evil" not in answer.text


@pytest.mark.parametrize(
    ("headers", "hosts"),
    [
        ({"Host": "localhost"}, []),
        ({"Host": "LocalHost:8082"}, []),
        ({"Host": "127.0.0.1:1"}, []),
        ({"Host": "[::1]:8082"}, []),
        ({"Origin": "http://127.0.0.1:8082"}, []),
        ({"Sec-Fetch-Site": "same-origin"}, []),
        ({"Sec-Fetch-Site": "none"}, []),
        ({"Host": "KMS.internal:443"}, ["kms.Internal"]),
        ({"Host": "any.example"}, ["*"]),
    ],
    ids=str,
)
async def test_own_page_local_and_configured_names_are_let_in(
    headers: Mapping[str, str], hosts: Sequence[str]
) -> None:
    assert (await get(headers=headers, hosts=hosts)).status_code == 200


async def test_a_name_that_is_not_configured_is_refused_beside_one_that_is() -> None:
    assert (await get(headers={"Host": "kms.other"}, hosts=["kms.internal"])).status_code == 403


@pytest.mark.parametrize("hosts", [("localhost", "evil.example"), ("evil.example", "localhost")], ids=str)
async def test_two_hosts_are_none(hosts: tuple[str, str]) -> None:
    transport = httpx.ASGITransport(RequestContext(application(), []))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8082") as client:
        answer = await client.get("/things/1", headers=[("Host", host) for host in hosts])

    assert answer.status_code == 403


@pytest.mark.parametrize("name", [b"origin", b"sec-fetch-site", b"x-request-id"])
async def test_of_headers_of_one_name_the_first_counts(name: bytes) -> None:
    assert by_name([(b"host", b"h"), (name, b"first"), (name, b"second")])[name] == b"first"


@pytest.mark.parametrize(
    ("path", "is_page"),
    [("/ui", True), ("/ui/", True), ("/ui/jobs", True), ("/uix", False), ("/ui-jobs", False)],
)
async def test_pages_are_below_ui(path: str, *, is_page: bool) -> None:
    """A session's cookie opens pages only."""
    assert is_ui(path) is is_page


async def test_the_address_that_was_reached_is_let_in_and_no_other() -> None:
    transport = httpx.ASGITransport(RequestContext(application(), []))
    async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.7:8082") as client:
        reached = await client.get("/things/1")
        others = [
            await client.get("/things/1", headers={"Host": host}) for host in ("10.0.0.8:8082", "pod.example")
        ]

    assert reached.status_code == 200
    assert [answer.status_code for answer in others] == [403, 403]


@pytest.mark.parametrize("given", ["a", "Req_1.2-3", "x" * 64], ids=["short", "marks", "long"])
async def test_request_id_of_the_caller_is_kept(given: str) -> None:
    answer = await get(headers={"X-Request-Id": given})

    assert answer.headers["x-request-id"] == answer.text == given


@pytest.mark.parametrize("given", ["", "x" * 65, CANARY + " x", CANARY + "\t", CANARY + '"'], ids=repr)
async def test_request_id_that_is_no_word_is_replaced(given: str) -> None:
    answer = await get(headers={"X-Request-Id": given})

    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.text == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/things/1", "/refused", "/none"], ids=str)
async def test_answers_are_neither_stored_nor_guessed_at(path: str) -> None:
    answer = await get(path)

    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_route_may_say_otherwise_about_storing() -> None:
    assert (await get("/cached")).headers["cache-control"] == "max-age=60"


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        (f"/things/{CANARY}", "/things/{thing}", "200"),
        (f"/{CANARY}", "unrouted", "404"),
        ("/crash", "/crash", "500"),
    ],
    ids=["template", "unrouted", "crash"],
)
async def test_requests_are_counted_by_template_never_by_path(path: str, route: str, status: str) -> None:
    labels = {"route": route, "method": "GET", "status": status}
    before = REGISTRY.get_sample_value("kms_http_request_duration_seconds_count", labels) or 0

    await get(path)

    assert REGISTRY.get_sample_value("kms_http_request_duration_seconds_count", labels) == before + 1
    assert REGISTRY.get_sample_value("kms_inflight") == 0


@pytest.mark.parametrize(("path", "status"), [("/v1/refused", 404), ("/v1/crash", 500)])
async def test_clients_of_vault_read_errors_in_their_form(path: str, status: int) -> None:
    answer = await get(path)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"errors"}


@pytest.mark.parametrize(("path", "error"), [("/crash", ZeroDivisionError), ("/broken", UnknownJob)])
async def test_the_server_logs_faults_and_errors_within_an_answer(path: str, error: type[Exception]) -> None:
    transport = httpx.ASGITransport(RequestContext(application(), []))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8082") as client:
        with pytest.raises(error):
            await client.get(path)


# -- what callers without a credential can have written to the audit log: 60 denials a minute

A_MINUTE = 60


async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses everybody; who has a name is known."""
    named = dict(scope["headers"]).get(b"x-name")
    if named:
        scope[PRINCIPAL] = Principal(named.decode())
    error = Forbidden() if named else Unauthenticated("No credential was sent", reason="missing")
    await problems.answer(error)(scope, receive, send)


async def denied(trail: MemoryTrail, requests: int, **headers: str) -> int:
    """How many records so many refusals leave."""
    before = len(trail.lines)
    edge = RequestContext(refusing, [], trail)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://localhost") as client:
        for _ in range(requests):
            assert (await client.get("/x", headers=headers)).status_code in {401, 403}
    return len(trail.lines) - before


async def test_anonymous_denials_are_recorded_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 59.9)

    assert await denied(MemoryTrail(), 2 * A_MINUTE + 1) == A_MINUTE


async def test_denials_of_known_callers_are_all_recorded() -> None:
    assert await denied(MemoryTrail(), 2 * A_MINUTE + 1, **{"x-name": "ada"}) == 2 * A_MINUTE + 1
