"""JSON bodies: read within bounds, decoded strictly, and encoded."""

import difflib
import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Generic, TypeVar

import anyio
import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from kms_api.deps import PRINCIPAL
from kms_api.transport.admission import Reservation, reservation_of
from kms_api.transport.bodies import refuse_encoding
from kms_protocol import wire
from kms_protocol.errors import BodyTimeout, InvalidRequest, TooLarge
from kms_protocol.units import MiB

T = TypeVar("T", bound=wire.Body)
BODY_BYTES: Final = 3 * MiB
"""The largest JSON body of most routes: the plaintext and the ciphertext of a call, or a batch, in base64."""
BODY_S: Final = 60.0
"""Seconds for a whole JSON body or form, which holds its bytes in memory until then."""
_MOMENT_S: Final = 1.0
_NEARLY: Final = 0.75
"""The ratio of ``difflib`` above which two names of fields are alike."""
_UNKNOWN_FIELD: Final = re.compile(r"Object contains unknown field `(?:([a-z_]{1,40})`)?")
_FIELDS: Final = sorted(
    {field for shape in wire.Body.__subclasses__() for field in shape.__struct_encode_fields__}
)
_PATH: Final = re.compile(rf" - at `(\$(?:\.(?:{'|'.join(_FIELDS)})|\[(?:\d{{1,9}}|\.\.\.)\])+)`\Z")


@dataclass(frozen=True, slots=True)
class JsonBody(Generic[T]):
    """Reads bodies of one shape, of at most ``limit_bytes``. The content type does not matter.

    Raises what ``read_bytes`` and ``decode`` raise.
    """

    shape: type[T]
    limit_bytes: int = BODY_BYTES

    async def __call__(self, request: Request) -> T:
        return decode(await read_bytes(request, self.limit_bytes), self.shape)


async def read_bytes(request: Request, limit_bytes: int) -> bytes:
    """The raw body, whose bytes count in the budget of JSON bodies until the request ends.

    Raises InvalidRequest for a compressed body, TooLarge as soon as the limit is exceeded, BodyTimeout if
    the body does not arrive in time, RateLimited or Unavailable while the budget has no room for it.
    """
    refuse_encoding(request)
    held = reservation_of(request.scope)
    if held.cycle is not None and not held.cycle.more_body:
        return await _whole(request, held, limit_bytes)
    declared = int(request.headers.get("content-length", 0))
    if declared > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    if not request.scope[PRINCIPAL].name:
        await _read_login(request, held, body, limit_bytes)
    else:
        if declared:
            held.take("json", declared)
        await _in_time(_read_into(body, request, limit_bytes, None if declared else held))
    return bytes(body)


async def _whole(request: Request, held: Reservation, limit_bytes: int) -> bytes:
    """A body that arrived together with its headers, as most do."""
    message = await request.receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    body: bytes = message["body"]
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    if body:
        held.take("json", len(body))
    return body


async def _read_login(request: Request, held: Reservation, body: bytearray, limit_bytes: int) -> None:
    """Read a form of a caller without a credential, which takes a login slot after one second.

    Browsers send headers and form apart, and other callers of their address may hold all its slots.
    """
    with anyio.move_on_after(_MOMENT_S) as moment:
        await _read_into(body, request, limit_bytes, None)
    if moment.cancelled_caught:
        held.take("logins")
        await _in_time(_read_into(body, request, limit_bytes, None))


async def _in_time(reading: Coroutine[None, None, None]) -> None:
    """Raise BodyTimeout if reading takes too long."""
    try:
        with anyio.fail_after(BODY_S):
            await reading
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {BODY_S:.0f} s") from None


async def _read_into(
    body: bytearray, request: Request, limit_bytes: int, counted: Reservation | None
) -> None:
    """Append the body. ``counted`` takes each chunk into the budget, if the size was not declared."""
    async for part in request.stream():
        if len(body) + len(part) > limit_bytes:
            raise _too_large(limit_bytes)
        if counted is not None and part:
            counted.take("json", len(part))
        body += part


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(
        f"The body exceeds {limit_bytes:,} bytes: use `kms encrypt-file` or `kms decrypt-file`, "
        "or stream items to POST /jobs?kind=…"
    )


def decode(body: bytes | msgspec.Raw, shape: type[T], *, is_lenient: bool = False) -> T:
    """Decode JSON; an empty body is an object without fields.

    ``is_lenient``: ``null`` is such an object too, and numbers and booleans may be strings. Raises
    InvalidRequest, which names the field and the reason, never a value.
    """
    try:
        decoded = _decoder(shape, is_lenient=is_lenient).decode(body or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(_reason(exc, shape)) from None
    return shape() if decoded is None else decoded


@cache
def _decoder(shape: type[T], *, is_lenient: bool) -> msgspec.json.Decoder[T | None]:
    return msgspec.json.Decoder(shape | None if is_lenient else shape, strict=not is_lenient)


def answer(shape: wire.Answer, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(wire.encode(shape), status, headers, media_type="application/json")


def _reason(exc: Exception, shape: type[wire.Body]) -> str:
    """The reason why a body is refused: msgspec names fields and types, never a value.

    The name of an unknown field is the caller's: it is repeated only if it is nearly a field of ours.
    """
    text = str(exc)
    path = _PATH.search(text)  # of our own field names: one of the caller's could be shaped like a path
    at = f" at {path[1]}" if path else ""
    unknown = _UNKNOWN_FIELD.match(text)
    if unknown:
        known = _FIELDS if path else shape.__struct_encode_fields__
        nearest = difflib.get_close_matches(unknown[1] or "", known, 1, _NEARLY)
        if nearest:
            return f"unknown field `{unknown[1]}`{at}; did you mean `{nearest[0]}`?"
        return f"unknown field{at}" if path else f"unknown field; the fields are {', '.join(known)}"
    if "Invalid enum value" in text:
        return f"Not one of the allowed values{at}"
    if isinstance(exc, UnicodeDecodeError | RecursionError):
        return "The body is not JSON"
    return text
