"""Bytes to shapes and back: bounded bodies, strict decoding."""

import re
from collections.abc import Coroutine, Mapping
from typing import Any, Final, TypeVar

import anyio
import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from kms_api.deps import WHO
from kms_api.transport.admission import Budget, Reservation, reservation_of
from kms_api.transport.unread_body import cycle_of
from kms_protocol import wire
from kms_protocol.errors import BodyTimeout, InvalidRequest, TooLarge

T = TypeVar("T", bound=wire.Body)
_MOMENT_S: Final = 1.0
_UNKNOWN_FIELD: Final = "unknown field `"
_FIELDS: Final = "|".join(
    sorted({field for shape in wire.Body.__subclasses__() for field in shape.__struct_encode_fields__})
)
_PLACE: Final = re.compile(rf" - at `(\$(?:\.(?:{_FIELDS})|\[(?:\d{{1,9}}|\.\.\.)\])+)`\Z")
_decoders: Final[dict[type[wire.Body], msgspec.json.Decoder[Any]]] = {}


async def read(request: Request, shape: type[T], limit_bytes: int) -> T:
    """The body as ``shape``. The content type does not matter; a compressed body is refused.

    Raises TooLarge above ``limit_bytes``, InvalidRequest saying where and why, never with a value.
    """
    return decode(await read_bytes(request, limit_bytes), shape)


async def read_bytes(request: Request, limit_bytes: int) -> bytes:
    """The raw body, whose bytes count in the budget of JSON bodies until the request ends.

    Raises TooLarge as soon as the body is seen to be above the limit, BodyTimeout if it is not there in
    time, RateLimited or Unavailable while there is no room for it.
    """
    refuse_encoding(request)
    held, cycle = reservation_of(request.scope), cycle_of(request.scope)
    if cycle is not None and not cycle.more_body:
        return await _whole(request, held, limit_bytes)
    declared = int(request.headers.get("content-length", 0))
    if declared > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    if not request.scope[WHO].name:
        await _read_login(request, held, body, limit_bytes)
        return bytes(body)
    if declared:
        await held.wait(held.admission.json, declared)
    counted = None if declared else held
    await _in_time(
        held.admission.json, held.admission.body_s, _read_into(body, request, limit_bytes, counted)
    )
    return bytes(body)


async def _whole(request: Request, held: Reservation, limit_bytes: int) -> bytes:
    """A body that has come with its head, as most do."""
    message = await request.receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    body: bytes = message["body"]
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    if body:
        held.take(held.admission.json, len(body))
    return body


async def _read_login(request: Request, held: Reservation, body: bytearray, limit_bytes: int) -> None:
    """A form of a caller without a credential: it takes a slot unless it is there in a moment.

    Browsers send head and form apart, and others of their address may hold all its slots.
    """
    with anyio.move_on_after(_MOMENT_S) as moment:
        await _read_into(body, request, limit_bytes, None)
    if moment.cancelled_caught:
        held.take(held.admission.logins)
        rest = _read_into(body, request, limit_bytes, None)
        await _in_time(held.admission.logins, held.admission.body_s, rest)


async def _in_time(budget: Budget, seconds: float, reading: Coroutine[None, None, None]) -> None:
    """Raises BodyTimeout if that takes longer."""
    try:
        with anyio.fail_after(seconds):
            await reading
    except TimeoutError:
        budget.too_slow()
        raise BodyTimeout(f"The body was not there after {seconds:.0f} s") from None


async def _read_into(
    body: bytearray, request: Request, limit_bytes: int, counted: Reservation | None
) -> None:
    """Append what comes. ``counted`` holds each piece, where the size of all was not told before."""
    async for part in request.stream():
        if len(body) + len(part) > limit_bytes:
            raise _too_large(limit_bytes)
        if counted is not None and part:
            counted.take(counted.admission.json, len(part))
        body += part


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"The body is above {limit_bytes} bytes: use the job API")


def refuse_encoding(request: Request) -> None:
    """A compressed body would make size limits meaningless."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequest("Content-Encoding is not accepted: send the bytes as they are")


def decode(body: bytes, shape: type[T]) -> T:
    """Decode JSON strictly; an empty body means an object with no fields."""
    decoder = _decoders.get(shape)
    if decoder is None:
        decoder = _decoders[shape] = msgspec.json.Decoder(shape)
    try:
        decoded: T = decoder.decode(body or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(why(exc, shape)) from None
    return decoded


def answer(shape: wire.Answer, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(wire.encode(shape), status, headers, media_type="application/json")


def why(exc: Exception, shape: type[wire.Body]) -> str:
    """The decoder's text names places and types; an unknown field is the caller's and not repeated."""
    text = str(exc)
    if _UNKNOWN_FIELD in text:
        place = _place(text)
        known = (
            ""
            if place
            else f": the fields of {shape.__name__} are {', '.join(shape.__struct_encode_fields__)}"
        )
        return f"Unknown field{place}{known}"
    if "Invalid enum value" in text:
        return f"Not one of the allowed values{_place(text)}"
    if isinstance(exc, UnicodeDecodeError | RecursionError):
        return "The body is not JSON"
    return text


def _place(text: str) -> str:
    """Where in the body, if that is made of our own field names: a caller's could be shaped like a place."""
    found = _PLACE.search(text)
    return f" at {found[1]}" if found else ""
