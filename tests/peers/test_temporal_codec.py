"""The codec server, called as Temporal's tools do, with Temporal's own data converter at both ends.

Also by a page of another site in Chromium, which sends what Temporal's page does.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import temporalio.converter
from google.protobuf import json_format
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.converter import DataConverter, PayloadCodec

from kms_protocol.wire import PREFIX
from support.chromium import Chromium
from support.credentials import REQUIRED, SecuredService
from support.http_servers import QuietHandler, served
from support.service import Service, b64, check_problem, unb64
from support.vault_api import NO_REDIS
from support.waiting import until

NAMESPACE = {"X-Namespace": "payroll"}


class Remote(PayloadCodec):
    """What Temporal's samples call a remote codec: each list of payloads is one POST of their JSON."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return self._post("encode", payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return self._post("decode", payloads)

    def _post(self, verb: str, payloads: Sequence[Payload]) -> list[Payload]:
        body = json_format.MessageToDict(Payloads(payloads=payloads))
        answer = self._service.post(f"/codec/{verb}", body, headers=NAMESPACE)
        assert answer.status_code == 200, answer.text
        return list(json_format.ParseDict(answer.json(), Payloads()).payloads)


def converter(service: Service) -> DataConverter:
    return DataConverter(payload_codec=Remote(service))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


VALUES = ["salary", {"row": 7, "euro": 4200}, b"\x00\xff", None, 3.5]


@pytest.mark.anyio
async def test_values_of_a_workflow_go_there_and_back(service: Service) -> None:
    sealed = await converter(service).encode(VALUES)

    assert {payload.metadata["encoding"] for payload in sealed} == {b"binary/encrypted"}
    assert all(b"salary" not in payload.data for payload in sealed)
    assert await converter(service).decode(sealed, [str, dict, bytes, type(None), float]) == VALUES


@pytest.mark.anyio
async def test_payloads_that_are_not_sealed_stay_as_they_are(service: Service) -> None:
    plain = await temporalio.converter.default().encode(["before the codec"])

    assert await converter(service).decode(plain, [str]) == ["before the codec"]


def sealed(service: Service) -> dict[str, object]:
    payload = {"metadata": {"encoding": b64(b"json/plain")}, "data": b64(b'"x"')}
    answer = service.post("/codec/encode", {"payloads": [payload]}, headers=NAMESPACE)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


@pytest.mark.parametrize("namespace", [{}, {"X-Namespace": "other"}], ids=["none", "other"])
def test_namespace_is_bound(service: Service, namespace: dict[str, str]) -> None:
    check_problem(service.post("/codec/decode", sealed(service), headers=namespace), 400, "decrypt_failed")


def test_ciphertext_that_holds_no_payload_is_refused(service: Service) -> None:
    context = {"temporal:namespace": "payroll"}
    data = b64(service.encrypt(b"not a payload", context))
    body = {"payloads": [{"metadata": {"encoding": b64(b"binary/encrypted")}, "data": data}]}

    check_problem(service.post("/codec/decode", body, headers=NAMESPACE), 422, "invalid_request")


def test_key_is_named_in_the_payload(service: Service) -> None:
    payload = json.loads(json.dumps(sealed(service)))["payloads"][0]

    assert unb64(payload["metadata"]["encryption-key-id"]) == b"default"


@pytest.mark.parametrize(
    "body", [{"payloads": [{"data": "x"}]}, {"payloads": [{"more": 1}]}, {"payload": []}], ids=repr
)
@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_what_is_no_payload_is_refused(service: Service, verb: str, body: object) -> None:
    check_problem(service.post(f"/codec/{verb}", body), 422, "invalid_request")


@pytest.mark.parametrize("payloads", [[], [{"data": b64(b"x")}]], ids=["none", "one"])
def test_unknown_key_is_told_of(service: Service, payloads: list[object]) -> None:
    answer = service.post("/codec/encode", {"payloads": payloads}, headers={"X-KMS-Key-Id": "payrol"})

    check_problem(answer, 404, "unknown_key")


@pytest.mark.parametrize("body", [{}, {"payloads": []}], ids=repr)
def test_no_payloads_are_answered_with_none(service: Service, body: object) -> None:
    assert service.post("/codec/encode", body).json() == {"payloads": []}


# -- a page of another site ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a site with an empty page; it has two origins, localhost and 127.0.0.1."""

    class Page(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 -- the library's name
            self.reply(200, b"<!doctype html><title>Temporal</title>", "text/html")

    with served(Page) as port:
        yield port


@pytest.fixture(scope="module")
def shared(site: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredService]:
    """An API whose codec server the page at localhost may call."""
    settings = f'{REQUIRED}[kms.server]\ncodec_origins = ["http://localhost:{site}"]\n'
    with SecuredService(tmp_path_factory.mktemp("shared"), settings, NO_REDIS) as running:
        yield running.start("api")


def fetched(browser: Chromium, url: str, body: object, headers: dict[str, str], **options: str) -> Any:  # noqa: ANN401 -- JSON
    """Status and JSON of a POST by the page; the name of the error if it may not read the answer."""
    sent = {"method": "POST", "headers": headers, "body": json.dumps(body), **options}
    browser.evaluate(
        f"window.said = null; fetch({json.dumps(url)}, {json.dumps(sent)})"
        ".then(async (answer) => { window.said = [answer.status, await answer.json()]; })"
        ".catch((error) => { window.said = error.name; }); 0"
    )
    until(lambda: browser.evaluate("window.said") is not None, "the page has an answer")
    return browser.evaluate("window.said")


def of_the_page(shared: SecuredService, *scopes: str) -> dict[str, str]:
    """The headers of Temporal's page that passes the user's tokens on: temporalio/ui, data-encoder.ts."""
    more = {"Content-Type": "application/json", "Authorization-Extras": "an.id.token"}
    return NAMESPACE | more | shared.token_header(*scopes)


def test_page_of_another_site_seals_and_opens(shared: SecuredService, site: int, browser: Chromium) -> None:
    payload = {"metadata": {"encoding": b64(b"json/plain")}, "data": b64(b'"salary"')}
    headers = of_the_page(shared, "encrypt,decrypt")
    codec = f"{shared.url}{PREFIX}/codec"
    browser.open(f"http://localhost:{site}/")

    status, sealed = fetched(browser, f"{codec}/encode", {"payloads": [payload]}, headers)
    assert status == 200
    assert unb64(sealed["payloads"][0]["metadata"]["encoding"]) == b"binary/encrypted"
    opened = fetched(browser, f"{codec}/decode?preserveStorageRefs=true", sealed, headers)
    assert opened == [200, {"payloads": [payload]}]
    assert browser.complaints == []

    status, problem = fetched(browser, f"{codec}/decode", sealed, headers | {"X-Namespace": "other"})
    assert (status, problem["code"]) == (400, "decrypt_failed")
    status, problem = fetched(browser, f"{codec}/decode", sealed, NAMESPACE)
    assert (status, problem["code"]) == (401, "unauthenticated")


def test_page_of_another_site_reaches_nothing_else(
    shared: SecuredService, site: int, browser: Chromium
) -> None:
    headers, payloads = of_the_page(shared, "*"), {"payloads": [{"data": b64(b"x")}]}
    codec = f"{shared.url}{PREFIX}/codec/encode"
    browser.open(f"http://localhost:{site}/")
    assert fetched(browser, codec, payloads, headers)[0] == 200

    assert fetched(browser, codec, payloads, headers, credentials="include") == "TypeError"
    assert fetched(browser, codec, payloads, headers, method="PUT") == "TypeError"
    assert fetched(browser, codec, payloads, headers | {"X-API-Key": "x"}) == "TypeError"
    plaintext = {"plaintext": b64(b"x"), "context": "a=b"}
    assert fetched(browser, f"{shared.url}{PREFIX}/encrypt", plaintext, headers) == "TypeError"
    browser.open(f"http://127.0.0.1:{site}/")  # the same page at an origin that is not named
    assert fetched(browser, codec, payloads, headers) == "TypeError"
