"""The encryption context in all its forms: ``k=v,…``, a JSON object, and percent-encoded in a header.

What one form says, the others can say, and the canonical bytes say exactly that.
"""

import json
from collections.abc import Iterable
from typing import Final, cast

from starlette.requests import Request

from kms_api.deps import LOCAL_CALLER, Service
from kms_api.json_body import decode
from kms_api.routes.job_options import submission_options
from kms_api.routing import Call
from kms_client.requests import json_header
from kms_protocol.context import MAX_BYTES, MAX_PAIRS, Context
from kms_protocol.errors import InvalidContext, InvalidRequest
from kms_protocol.wire import EncryptIn

MOST_BYTES: Final = 1024
WORDS: Final = (
    b"=",
    b",",
    b"kms:",
    b"not_after",
    b"%2C",
    b'{"',
    b'":"',
    b'","',
    b'"}',
    b"\\u0000",
    b"\\ud800",
)


def seeds() -> Iterable[bytes]:
    yield b""
    yield b"env=prod,service=api"
    yield b" env = prod , b="
    yield b'{"env":"a,b","=":"="}'
    yield b"env%3Dprod"
    yield b"not_after=2027-01-31T12:00:00Z"
    yield "ключ=ü,\u2028=\U0001f511".encode()
    yield ",".join(f"k{number}=v" for number in range(MAX_PAIRS + 1)).encode()
    yield b"a=" + b"v" * MAX_BYTES


def check(data: bytes) -> None:
    _text(data.decode("utf-8", "surrogateescape"))
    _body(data)
    _header(data)


def _text(text: str) -> None:
    try:
        context = Context.parse(text)
    except InvalidContext as exc:
        _says_nothing(exc, text)
        return
    _holds(context)


def _body(data: bytes) -> None:
    """As a value in a body: an object, a string, or null."""
    try:
        body = decode(b'{"plaintext":"","context":' + data + b"}", EncryptIn)
        context = Context.parse(body.context)
    except (InvalidRequest, InvalidContext):
        return
    _holds(context)


def _header(data: bytes) -> None:
    """Bytes that a server takes as a header's value."""
    try:
        context = _of_header(data)
    except (InvalidRequest, InvalidContext):
        return
    _holds(context)


def _of_header(value: bytes) -> Context:
    request = Request({"type": "http", "headers": [(b"x-kms-context", value)]})
    call = Call(request, None, cast("Service", None), LOCAL_CALLER)
    return submission_options(call, "encrypt").context


def _holds(context: Context) -> None:
    """All that a context promises."""
    pairs = context.pairs
    assert len(pairs) <= MAX_PAIRS
    assert sum(len(text.encode()) for pair in pairs for text in pair) <= MAX_BYTES
    assert pairs == tuple(sorted(pairs, key=lambda pair: pair[0].encode()))
    assert _pairs_of(context.canonical()) == pairs
    assert Context.parse(dict(reversed(pairs))) == context
    assert Context.parse(json.loads(json.dumps(dict(pairs)))) == context
    if all(_is_plain(text) and "=" not in key for key, value in pairs for text in (key, value)):
        assert Context.parse(",".join(f"{key}={value}" for key, value in pairs)) == context
    value = json_header(dict(pairs)).encode("ascii")
    assert _of_header(value) == context
    try:
        limit = context.not_after()
    except InvalidContext:
        return
    assert limit is None or limit.tzinfo is not None


def _is_plain(text: str) -> bool:
    return "," not in text and text == text.strip(" ")


def _pairs_of(canonical: bytes) -> tuple[tuple[str, str], ...]:
    """The pairs behind canonical bytes, read without the code that wrote them."""
    texts: list[str] = []
    while canonical:
        size = int.from_bytes(canonical[:4], "big")
        texts.append(canonical[4 : 4 + size].decode())
        canonical = canonical[4 + size :]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _says_nothing(exc: InvalidContext, text: str) -> None:
    """Values are the caller's secret: whatever an error says, it says of every context alike."""
    for pair in text.split(","):
        value = pair.partition("=")[2].strip(" ")
        assert len(value) < len("secret") or value not in exc.detail
