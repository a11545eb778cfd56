"""Pages of other sites that may call the codec server, and whatever could be taken for one of them."""

from collections.abc import Sequence

import httpx2 as httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kms_api.transport.request_context import RequestContext
from kms_protocol.wire import PREFIX
from support.routes import RULES

pytestmark = pytest.mark.anyio

PAGE = "https://temporal.example.com"
LOCAL = "http://localhost:8233"
CODEC = ("/api/v1/kms/codec/encode", "/api/v1/kms/codec/decode")
FROM_PAGE = [("Origin", PAGE), ("Sec-Fetch-Site", "cross-site")]
ASKS = [("Access-Control-Request-Method", "POST")]
CORS = "access-control-allow-"


async def called(scope: Scope, receive: Receive, send: Send) -> None:
    """The application, which no preflight reaches."""
    await Response(status_code=418)(scope, receive, send)


async def ask(
    method: str = "POST",
    path: str = CODEC[0],
    headers: Sequence[tuple[str, str]] = (),
    *,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (PAGE, LOCAL),
) -> httpx.Response:
    transport = httpx.ASGITransport(RequestContext(called, hosts, codec_origins=origins))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8082") as client:
        return await client.request(method, path, headers=list(headers))


def check_foreign(answer: httpx.Response) -> None:
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith(CORS)]


@pytest.mark.parametrize("origin", [PAGE, LOCAL])
@pytest.mark.parametrize("path", CODEC)
async def test_preflight_of_a_named_page_is_answered(path: str, origin: str) -> None:
    headers = [("Origin", origin), ("Sec-Fetch-Site", "cross-site"), *ASKS]

    answer = await ask("OPTIONS", path, headers)

    assert (answer.status_code, answer.content) == (204, b"")
    assert {name: value for name, value in answer.headers.items() if name.startswith("access-")} == {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "POST",
        "access-control-allow-headers": "Content-Type, X-Namespace, Authorization, Authorization-Extras",
        "access-control-max-age": "600",
    }
    assert answer.headers["vary"] == "Origin"


async def test_call_of_a_named_page_is_let_in_without_credentials_of_the_browser() -> None:
    answer = await ask(headers=FROM_PAGE)

    assert answer.status_code == 418
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


LOOKALIKES = [
    "https://other.example",
    "https://temporal.example.com.evil.example",
    "https://eviltemporal.example.com",
    "https://evil.temporal.example.com",
    "https://temporal.example.co",
    "https://temporal.example.com:8443",
    "https://temporal.example.com:443",
    "https://temporal.example.com/",
    "https://temporal.example.com.",
    "https://user@temporal.example.com",
    "https://evil.example#https://temporal.example.com",
    "https://temporal.example.com https://evil.example",
    "https://TEMPORAL.example.com",
    "HTTPS://temporal.example.com",
    "http://temporal.example.com",
    "http://localhost",
    "http://localhost:82330",
    "https://localhost:8233",
    "http://127.0.0.1:8233",
    "null",
    "*",
    "",
]


@pytest.mark.parametrize("origin", LOOKALIKES)
@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
async def test_another_origin_is_refused(method: str, origin: str) -> None:
    headers = [("Origin", origin), ("Sec-Fetch-Site", "cross-site"), *ASKS]

    answer = await ask(method, headers=headers)

    check_foreign(answer)
    assert answer.headers["vary"] == "Origin"
    assert "codec_origins" in answer.json()["detail"]


@pytest.mark.parametrize("origins", [(PAGE, PAGE), (PAGE, "https://evil.example"), ("null", PAGE)], ids=str)
async def test_two_origins_are_none(origins: Sequence[str]) -> None:
    check_foreign(await ask(headers=[("Origin", origin) for origin in origins]))


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_page_that_hides_its_origin_is_refused(site: str) -> None:
    check_foreign(await ask(headers=[("Sec-Fetch-Site", site), ("Referer", f"{PAGE}/"), *ASKS]))


async def test_program_without_an_origin_calls_as_before() -> None:
    answer = await ask()

    assert answer.status_code == 418
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in answer.headers


OTHERS = [
    *sorted({f"{PREFIX}{path}" for _, path in RULES} - set(CODEC)),
    "/ui",
    "/ui/login",
    "/docs",
    "/metrics",
    "/v1/transit/encrypt/k",
    f"{CODEC[0]}/",
    f"{CODEC[0]}/../../encrypt",
    f"{PREFIX}/codec",
    f"/{CODEC[0]}",
    CODEC[0].upper(),
]


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
async def test_other_routes_refuse_the_named_page(method: str, path: str) -> None:
    answer = await ask(method, path, [*FROM_PAGE, *ASKS])

    check_foreign(answer)
    assert "vary" not in answer.headers
    assert "codec_origins" not in answer.text


@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
async def test_unknown_host_is_refused_to_the_named_page_too(method: str) -> None:
    """Another name of this machine, of which a page could have been told by DNS."""
    answer = await ask(method, headers=[("Host", "temporal.example.com"), *FROM_PAGE, *ASKS])

    assert answer.status_code == 403
    assert "allowed_hosts" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
async def test_no_page_may_call_unless_one_is_named(method: str) -> None:
    answer = await ask(method, headers=[*FROM_PAGE, *ASKS], origins=())

    check_foreign(answer)
    assert "vary" not in answer.headers


async def test_any_host_makes_no_other_page_a_reader() -> None:
    answer = await ask(headers=[("Origin", "https://evil.example")], hosts=["*"])

    assert answer.status_code == 418
    assert "access-control-allow-origin" not in answer.headers


async def test_options_that_are_no_preflight_are_a_call() -> None:
    answer = await ask("OPTIONS", headers=FROM_PAGE)

    assert answer.status_code == 418
    assert answer.headers["access-control-allow-origin"] == PAGE


async def test_routes_of_the_codec_server_are_these() -> None:
    assert {f"{PREFIX}{path}" for _, path in RULES if "/codec" in path} == set(CODEC)
