"""The check that each integration test makes of each answer: it lets pass what is documented, and no more."""

import httpx2 as httpx
import pytest

from kms_protocol import wire
from kms_protocol.wire import PREFIX
from support import openapi_check

HEADERS = {"X-Request-Id": "r", "Cache-Control": "no-store", "Content-Type": "application/json"}
PROBLEM = {**HEADERS, "Content-Type": "application/problem+json"}
SEALED = wire.EncryptOut(ciphertext=b"x", key_id="default", key_version="1", backend="age")


def refused(code: str, status: int = 422) -> bytes:
    return wire.encode(
        wire.Problem(type="urn:x", title="t", status=status, detail="d", code=code, request_id="r")
    )


def answer(
    status: int, body: bytes, headers: dict[str, str], method: str = "POST", path: str = "/encrypt"
) -> httpx.Response:
    request = httpx.Request(method, f"http://localhost{PREFIX}{path}")
    return httpx.Response(status, headers=headers, content=body, request=request)


@pytest.mark.parametrize(
    "good",
    [
        answer(200, wire.encode(SEALED), HEADERS),
        answer(422, refused("invalid_context"), PROBLEM),
        answer(405, b"", {}, method="PATCH"),
        answer(404, b"", {}, path="/no-such-path"),
    ],
    ids=["answer", "problem", "other method", "other path"],
)
def test_what_is_documented_passes(good: httpx.Response) -> None:
    openapi_check.check(good)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (answer(418, wire.encode(SEALED), HEADERS), "not a documented status"),
        (answer(200, wire.encode(SEALED), PROBLEM), "not a documented media type"),
        (answer(200, wire.encode(SEALED), {"Content-Type": "application/json"}), "without X-Request-Id"),
        (answer(200, b'{"ciphertext": 1}', HEADERS), "is a required property"),
        (answer(422, refused("unknown_key"), PROBLEM), "not a documented code: unknown_key"),
    ],
    ids=["status", "media type", "header", "shape", "code"],
)
def test_what_is_not_documented_is_noticed(bad: httpx.Response, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        openapi_check.check(bad)


def test_path_without_parameters_is_found_before_one_with() -> None:
    assert openapi_check.template_of(f"{PREFIX}/jobs/dead") == f"{PREFIX}/jobs/dead"
    assert openapi_check.template_of(f"{PREFIX}/jobs/x") == f"{PREFIX}/jobs/{{job_id}}"
