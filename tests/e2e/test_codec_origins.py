"""A page of another site that calls the codec server of a running service, whose errors it can read."""

from urllib.parse import urlencode

import httpx2 as httpx
import pytest

from support.credentials import Guarded
from support.service import b64, check_problem

PAGE = "https://temporal.example.com"
FROM_PAGE = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site", "X-Namespace": "payroll"}
BODY = {"payloads": [{"metadata": {"encoding": b64(b"json/plain")}, "data": b64(b'"x"')}]}
FORGED = {"payloads": [{"metadata": {"encoding": b64(b"binary/encrypted")}, "data": b64(b"x")}]}
ALLOW = "access-control-allow-origin"


def test_preflight_needs_no_credential_and_the_call_does(guarded: Guarded) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-namespace"}
    preflight = guarded.http.options("/api/v1/kms/codec/encode", headers=FROM_PAGE | asks)
    made = guarded.post("/codec/encode", BODY, headers=FROM_PAGE | guarded.token("encrypt,decrypt"))
    refused = guarded.post("/codec/encode", BODY, headers=FROM_PAGE)

    assert (preflight.status_code, preflight.headers[ALLOW]) == (204, PAGE)
    assert (made.status_code, made.headers[ALLOW]) == (200, PAGE)
    check_problem(refused, 401, "unauthenticated")
    assert refused.headers[ALLOW] == PAGE


@pytest.mark.parametrize(
    ("verb", "body", "headers", "told"),
    [
        ("decode", FORGED, {}, (422, "not_a_ciphertext")),
        ("encode", {"payload": []}, {}, (422, "invalid_request")),
        ("encode", BODY, {"X-KMS-Key-Id": "none"}, (404, "unknown_key")),
    ],
    ids=["ciphertext", "body", "key"],
)
def test_errors_can_be_read_by_the_page(
    guarded: Guarded, verb: str, body: object, headers: dict[str, str], told: tuple[int, str]
) -> None:
    sent = FROM_PAGE | guarded.token("encrypt,decrypt") | headers

    answer = guarded.post(f"/codec/{verb}", body, headers=sent)

    check_problem(answer, *told)
    assert (answer.headers[ALLOW], answer.headers["vary"]) == (PAGE, "Origin")


def test_a_session_of_the_pages_opens_no_codec(guarded: Guarded) -> None:
    with httpx.Client(base_url=guarded.url, trust_env=False, timeout=60) as browser:
        stamp = browser.get("/ui/login").text.partition('name="stamp" value="')[2].partition('"')[0]
        form = urlencode({"stamp": stamp, "token": guarded.make("*")[1]})
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        assert browser.post("/ui/login", content=form, headers=kind).status_code == 303
        assert browser.get("/ui").status_code == 200
        cookie = {"Cookie": f"kms_session={browser.cookies['kms_session']}"}

    for sender in ({}, FROM_PAGE):
        for verb in ("encode", "decode"):
            answer = guarded.post(f"/codec/{verb}", BODY, headers=cookie | sender)
            check_problem(answer, 401, "unauthenticated")
            assert "access-control-allow-credentials" not in answer.headers
