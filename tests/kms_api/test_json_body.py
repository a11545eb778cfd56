import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import anyio
import pytest
from fastapi import Request
from starlette.types import Message

from kms_api import json_body
from kms_api.deps import ANONYMOUS, PRINCIPAL
from kms_api.transport.admission import RESERVATION, Reservation, budgets_of
from kms_core.auth.policy import Principal
from kms_core.http_protocol import BODY
from kms_core.settings.model import ServerSection
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, TooLarge

CANARY = "Kanarienvogel"
LIMIT = 100
CALLER = Principal("ada", "default", "token:1")
pytestmark = pytest.mark.anyio


def request_of(pieces: Sequence[bytes], headers: Mapping[str, str] | None = None) -> Request:
    """A request whose body arrives in these pieces; reading beyond them fails the test."""
    waiting = [
        {"type": "http.request", "body": piece, "more_body": index < len(pieces) - 1}
        for index, piece in enumerate(pieces)
    ]

    async def receive() -> Message:
        return waiting.pop(0)

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw, PRINCIPAL: CALLER}
    scope[RESERVATION] = Reservation(budgets_of(ServerSection(docs=False)), scope)
    return Request(scope, receive)


@pytest.mark.parametrize(
    "body",
    [
        b'{"plaintext": "SGVsbG8="}',
        b'{"plaintext": "SGVsbG8=", "context": null, "key_id": null}',
        b' {"key_id": null, "plaintext": "SGVsbG8="}\n',
    ],
    ids=["bare", "nulls", "spaces"],
)
async def test_null_is_the_same_as_absent(body: bytes) -> None:
    assert json_body.decode(body, wire.EncryptIn) == wire.EncryptIn(plaintext=b"Hello")


async def test_no_body_is_an_object_without_fields() -> None:
    assert json_body.decode(b"", wire.GenerateKeyIn) == wire.GenerateKeyIn()


BAD_BASE64 = {
    "unpadded": "SGVsbG8",
    "space-after": "SGVsbG8= ",
    "space-before": " SGVsbG8=",
    "newline": "SGVs\nbG8=",
    "url-safe": "-_-_",
    "padded-twice": "SGVsbG8==",
    "one-letter": "S",
    "pad-only": "=",
    "no-alphabet": "%%%%",
    "two-in-one": "SGVsbG8=SGVsbG8=",
}


@pytest.mark.parametrize("text", BAD_BASE64.values(), ids=BAD_BASE64)
async def test_bytes_are_standard_base64_and_padded(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(json.dumps({"plaintext": text}).encode(), wire.EncryptIn)

    assert "$.plaintext" in caught.value.detail


UNKNOWN = "unknown field; the fields are plaintext"
REFUSED = {
    "not-base64": (f'{{"plaintext": "{CANARY}"}}', "at `$.plaintext`"),
    "wrong-type": (f'{{"plaintext": 5, "context": "{CANARY}"}}', "at `$.plaintext`"),
    "key-id": (f'{{"plaintext": "", "key_id": "{CANARY}!"}}', "at `$.key_id`"),
    "context-type": (f'{{"plaintext": "", "context": ["{CANARY}"]}}', "at `$.context`"),
    "context-value": (f'{{"plaintext": "", "context": {{"{CANARY}": 1}}}}', "at `$.context"),
    "unknown-field": (f'{{"plaintext": "", "{CANARY}": 1}}', UNKNOWN),
    "long-unknown-field": (f'{{"plaintext": "", "{CANARY * 20}": 1}}', UNKNOWN),
    "unknown-field-with-newline": (f'{{"plaintext": "", "a\\n{CANARY}": 1}}', UNKNOWN),
    "unknown-field-like-a-place": (f'{{"plaintext": "", "x - at `$.{CANARY}": 1}}', UNKNOWN),
    "unknown-field-with-backtick": (f'{{"plaintext": "", "x` - at `$.{CANARY}": 1}}', UNKNOWN),
    "not-an-object": (f'"{CANARY}"', "object"),
    "not-json": (f'{{"plaintext": {CANARY}', "malformed"),
    "word": (f"{CANARY}", "malformed"),
    "cut": (f'{{"plaintext": "{CANARY}', "truncated"),
    "missing-field": (f'{{"context": "{CANARY}"}}', "plaintext"),
}


@pytest.mark.parametrize(("body", "says"), REFUSED.values(), ids=REFUSED)
async def test_refusal_says_where_and_why_and_never_the_value(body: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(body.encode(), wire.EncryptIn)

    assert says in caught.value.detail
    assert CANARY not in caught.value.detail
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


async def test_unknown_field_of_an_item_is_found_by_its_place() -> None:
    body = {"kind": "encrypt", "items": [{"plaintext": ""}, {"plaintext": "", CANARY: 1}]}

    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(json.dumps(body).encode(), wire.JobIn)

    assert caught.value.detail == "unknown field at $.items[1]"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"kind": "encrypt", "targt": ""}', "unknown field `targt`; did you mean `target`?"),
        (b'{"kind": "encrypt", "items": [{"plain_text": ""}]}', "at $.items[0]; did you mean `plaintext`?"),
    ],
)
async def test_misspelt_field_is_named_with_the_nearest_one(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(body, wire.JobIn)

    assert says in caught.value.detail


async def test_choice_that_is_none_is_not_echoed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(json.dumps({"key_spec": CANARY}).encode(), wire.GenerateKeyIn)

    assert "$.key_spec" in caught.value.detail
    assert CANARY not in caught.value.detail


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"plaintext": ' + b"[" * 100_000,
        b'{"context": ' + b'{"a":' * 100_000,
        b'{"unknown": ' + b"[" * 100_000,
        b"\xff\xfe",
        b'{"plaintext": "\xff"}',
        b'{"plaintext": "\\ud800"}',
        b"\x00" * 50,
        b"null",
        b"5",
        b"{'plaintext': ''}",
        b'{"plaintext": ""} {}',
        b'\xef\xbb\xbf{"plaintext": ""}',
    ],
    ids=lambda body: ascii(body[:40]),
)
async def test_hostile_json_is_an_ordinary_refusal(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        json_body.decode(body, wire.EncryptIn)


async def test_body_at_its_limit_is_read_whole() -> None:
    request = request_of([b"a" * 60, b"", b"b" * 40])

    assert await json_body.read_bytes(request, LIMIT) == b"a" * 60 + b"b" * 40


async def test_declared_length_is_believed_before_a_byte_is_read() -> None:
    request = request_of([], {"Content-Length": str(LIMIT + 1)})

    with pytest.raises(TooLarge):
        await json_body.read_bytes(request, LIMIT)


async def test_undeclared_body_stops_at_the_limit() -> None:
    request = request_of([b"a" * 60, b"b" * 60, b"never read"])

    with pytest.raises(TooLarge):
        await json_body.read_bytes(request, LIMIT)


@pytest.mark.parametrize("headers", [{}, {"Content-Length": str(LIMIT)}], ids=["undeclared", "declared"])
async def test_a_body_counts_once(headers: dict[str, str]) -> None:
    request = request_of([b"a" * 60, b"b" * 40], headers)

    await json_body.read_bytes(request, LIMIT)

    assert request.scope[RESERVATION].budgets["json"].held == LIMIT


async def test_a_body_that_came_with_its_head_has_the_same_limit() -> None:
    there = {BODY: (None, SimpleNamespace(more_body=False))}
    whole, larger = request_of([b"a" * LIMIT]), request_of([b"a" * (LIMIT + 1)])
    whole.scope["state"] = larger.scope["state"] = there

    assert len(await json_body.read_bytes(whole, LIMIT)) == LIMIT
    with pytest.raises(TooLarge):
        await json_body.read_bytes(larger, LIMIT)


@pytest.mark.parametrize("delay_s", [0.0, 0.2], ids=["at once", "later"])
async def test_a_slow_form_of_a_stranger_takes_a_slot(
    monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    monkeypatch.setattr(json_body, "_MOMENT_S", 0.1)
    at_once = request_of([b"form"])

    async def receive() -> Message:
        await anyio.sleep(delay_s)
        return await at_once.receive()

    request = Request({**at_once.scope, PRINCIPAL: ANONYMOUS}, receive)

    assert await json_body.read_bytes(request, LIMIT) == b"form"
    assert request.scope[RESERVATION].budgets["logins"].held == (1 if delay_s else 0)


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x"])
async def test_compressed_body_is_refused(encoding: str) -> None:
    request = request_of([b"{}"], {"Content-Encoding": encoding})

    with pytest.raises(InvalidRequest):
        await json_body.read_bytes(request, LIMIT)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "text/plain", ""])
async def test_content_type_does_not_matter(content_type: str) -> None:
    request = request_of([b'{"plaintext": ""}'], {"Content-Type": content_type})

    assert json_body.decode(await json_body.read_bytes(request, LIMIT), wire.EncryptIn) == wire.EncryptIn(
        plaintext=b""
    )


async def test_answer_is_json_with_the_given_status() -> None:
    answer = json_body.answer(wire.ErrorCode(code="x"), 202, {"Location": "/there"})

    assert (answer.status_code, answer.body) == (202, b'{"code":"x"}')
    assert answer.headers["location"] == "/there"
    assert answer.headers["content-type"] == "application/json"
