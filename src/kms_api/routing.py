"""Routes: what each declares, how it is called, and the fast path to those with a fixed path (ADR 12).

A route states its path, scope, body and threads once, beside its handler. The scope check, the fast path, the
public paths and the OpenAPI document derive from that. Permissions that depend on a key, a context or a path
are checked in the core, where these are known: such routes are for any ``CALLER``.

FastAPI answers what the fast path does not hold: a path with parameters, another method, an unknown path.
"""

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Generic, TypeAlias, TypeVar, get_type_hints
from urllib.parse import quote, urlencode

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute, APIRouter
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from kms_api import json_body, problems
from kms_api.deps import ANONYMOUS, INLINE_BYTES, PRINCIPAL, Pool, Service, has_many_stanzas, service
from kms_api.openapi import describe
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_protocol import wire
from kms_protocol.errors import Forbidden, InvalidRequest, KmsError

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)
A = TypeVar("A")
E = TypeVar("E", bound=Callable[..., Awaitable[Response]])
R = TypeVar("R", bound=wire.Answer | Response)
UI: Final = "/ui"
DOCS: Final = "/docs"
METRICS: Final = "/metrics"
VAULT: Final = "/v1/"
_DIGITS: Final = 16  # of a number in a query string


@dataclass(frozen=True, slots=True)
class Rule:
    """``operation`` must be in a scope of the caller; an ``open`` route needs no credential."""

    operation: str | None = None
    open: bool = False


OPEN: Final = Rule(open=True)
CALLER: Final = Rule()
READ: Final = Rule("jobs:read")
WRITE: Final = Rule("jobs:write")


@dataclass(frozen=True, slots=True)
class Call(Generic[B_co]):
    """A request to a route and its decoded body, which is None for a route without one."""

    request: Request
    body: B_co

    @property
    def service(self) -> Service:
        return service(self.request)

    @property
    def caller(self) -> Principal:
        found: Principal = self.request.scope[PRINCIPAL]
        return found

    @property
    def headers(self) -> Headers:
        return self.request.headers

    @property
    def query(self) -> QueryParams:
        return self.request.query_params

    def key_pool(
        self, key_id: str | None, *, size_bytes: int = 0, file: bytes = b"", seals: bool = False
    ) -> Pool | None:
        """The threads for a call on a key; None if it takes microseconds and may run on the event loop.

        A ciphertext names its key in its header: ``file`` is all of it, or its first 32 KiB. ``seals`` says
        whether the call makes one.
        """
        is_large = max(size_bytes, len(file)) > INLINE_BYTES
        waits_for_disk = self.service.settings.kms.audit.durability == "fsync"
        keyring = self.service.kms.keyring
        if not (is_large or waits_for_disk or has_many_stanzas(file)) and (
            not keyring.blocks or keyring.is_ready(self.caller.tenant, key_id, file, seals=seals)
        ):
            return None
        own = [] if file and key_id is None else [key_id]  # a file names its key
        return Pool(keyring.waits_on(own, [file]) or "local")

    def path(self, name: str) -> str:
        """The value of a parameter of the path."""
        found: str = self.request.path_params[name]
        return found

    def number(self, name: str, default: int, minimum: int, maximum: int) -> int:
        """An integer of the query string. Raises InvalidRequest for one outside the bounds."""
        text = self.query.get(name, str(default))
        number = int(text) if text.isascii() and text.isdigit() and len(text) < _DIGITS else -1
        if not minimum <= number <= maximum:
            raise InvalidRequest(f"{name} is a number from {minimum} to {maximum}")
        return number


Endpoint: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]
Reader: TypeAlias = Callable[[Request], Awaitable[B]]
"""Reads and decodes the body of a request."""
Stream: TypeAlias = Callable[[Call[None]], Awaitable[Response]]
Threads: TypeAlias = Pool | Callable[[Call[B]], Pool | None] | None
"""The pool of a handler, or a function that chooses it by key; None for the event loop."""


async def no_body(request: Request) -> None:
    """The reader of a route without a body."""
    del request


def of_tenant(pool: Pool) -> Callable[[Call[object]], Pool]:
    """Threads for a handler whose work grows with what its caller asks for: see ``Pool.of``."""
    return lambda call: pool.of(call.caller.tenant)


LISTS: Final = of_tenant(Pool("lists", 2))
"""Threads for reads of many records, which compute for most of their time: see ``LOCAL_BATCHES``."""


def endpoint_of(
    handler: Callable[[Call[B]], A | Response],
    read: Reader[B],
    threads: Threads[B],
    encode: Callable[[A], Response],
) -> Endpoint:
    """A coroutine that reads the body, runs ``handler`` in its threads, and encodes what it returns."""

    async def endpoint(request: Request) -> Response:
        call = Call(request, await read(request))
        pool = threads(call) if callable(threads) else threads
        made = await call.service.run(pool, handler, call)
        return made if isinstance(made, Response) else encode(made)

    return endpoint


class ScopedRoute(APIRoute):
    """A route that checks the caller's scope before it reads the body."""

    def __init__(self, method: str, path: str, endpoint: Callable[..., Any], rule: Rule, **more: Any) -> None:  # noqa: ANN401 -- FastAPI's
        super().__init__(path, endpoint, methods=[method], response_model=None, **more)
        self.method, self.rule = method, rule
        self.methods = {method, "HEAD"} if method == "GET" else {method}  # RFC 9110 §9.3.2

    def get_route_handler(self) -> Endpoint:
        """FastAPI's handler, behind the check of the scope; of a stream only the headers for HEAD."""
        handler = super().get_route_handler()

        async def answered(request: Request) -> Response:
            self.check_scope(request.scope)
            return await _without_stream(request, await handler(request))

        return answered

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            allowed = ", ".join(sorted(scope["app"].state.methods[self.path]))
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": allowed})
        await super().handle(scope, receive, send)

    def check_scope(self, scope: Scope) -> None:
        """Raise Forbidden, which is recorded, for a caller without a scope for this route."""
        who: Principal = scope[PRINCIPAL]
        if self.rule.operation is None or who is ANONYMOUS:
            return
        kms = scope["app"].state.service.kms
        try:
            kms.policy.require(who, self.rule.operation)
        except Forbidden as exc:
            audit.denied(kms.audit_log, who, self.path, exc.code)
            raise


class Router(APIRouter):
    """The routes of one part of the API; ``tag`` names its section of the OpenAPI document."""

    def __init__(self, tag: str, *, prefix: str = "", is_described: bool = True) -> None:
        """``is_described``: the OpenAPI document has the routes."""
        super().__init__(prefix=prefix, tags=[tag], include_in_schema=is_described)

    def endpoint(self, method: str, path: str, rule: Rule, **described: Any) -> Callable[[E], E]:  # noqa: ANN401 -- FastAPI's
        """Declare a coroutine that takes a request, and parameters as FastAPI reads them."""

        def declared(endpoint: E) -> E:
            shown = {"tags": self.tags, "include_in_schema": self.include_in_schema, **described}
            self.routes.append(ScopedRoute(method, self.prefix + path, endpoint, rule, **shown))
            return endpoint

        return declared

    def stream(self, method: str, path: str, rule: Rule, **described: Any) -> Callable[[Stream], Stream]:  # noqa: ANN401 -- FastAPI's
        """Declare a coroutine that reads or writes a stream, in threads of its choice.

        ``described`` has arguments of ``_description``.
        """

        def declared(handler: Stream) -> Stream:
            async def endpoint(request: Request) -> Response:
                return await handler(Call(request, None))

            shown = _description(handler, **described) if self.include_in_schema else {}
            self.endpoint(method, path, rule, **shown)(endpoint)
            return handler

        return declared

    def read(
        self,
        path: str,
        rule: Rule,
        threads: Threads[None],
        **described: Any,  # noqa: ANN401 -- FastAPI's
    ) -> Callable[[Callable[[Call[None]], R]], Callable[[Call[None]], R]]:
        """As ``call``, for a GET, which has no body."""
        return self.call("GET", path, rule, no_body, threads, **described)

    def call(
        self,
        method: str,
        path: str,
        rule: Rule,
        read: Reader[B],
        threads: Threads[B],
        **described: Any,  # noqa: ANN401 -- FastAPI's
    ) -> Callable[[Callable[[Call[B]], R]], Callable[[Call[B]], R]]:
        """Declare a function that takes a call and returns an answer, encoded under the first status.

        ``described`` has arguments of ``_description``.
        """

        def declared(handler: Callable[[Call[B]], R]) -> Callable[[Call[B]], R]:
            shown = _description(handler, read, **described) if self.include_in_schema else {}
            encode = partial(json_body.answer, status=shown.get("status_code", 200))
            self.endpoint(method, path, rule, **shown)(endpoint_of(handler, read, threads, encode))
            return handler

        return declared


def _description(  # noqa: PLR0913 -- the parts of an operation
    handler: Callable[..., object],
    read: object = no_body,
    *,
    body: describe.Json | None = None,
    gives: str = "",
    answers: Mapping[int, describe.Json] | None = None,
    parameters: Iterable[describe.Json] = (),
    refuses: Iterable[type[KmsError]] = (),
) -> dict[str, Any]:
    """Arguments of a FastAPI route, of which ``document.page`` makes an operation of the handler's name.

    A JSON ``body`` is that of ``read``. ``answers`` are by status, success first; ``gives`` describes one of
    status 200 whose shape is the return annotation. ``refuses`` are the errors of this route only.
    """
    if isinstance(read, json_body.JsonBody):
        required = any(field.required for field in msgspec.structs.fields(read.shape))
        body = describe.takes(read.shape, required=required)
        refuses = (*describe.BODY, *refuses)
    if answers is None:
        answers = {200: describe.gives(get_type_hints(handler)["return"], gives)}
    extra = {
        "responses": {str(status): answer for status, answer in answers.items()},
        "parameters": list(parameters),
        "requestBody": body,
        "x-kms-refuses": sorted({*refuses}, key=lambda kind: kind.code),
    }
    return {
        "openapi_extra": extra,
        "operation_id": handler.__name__,
        "status_code": next(iter(answers)),
        "description": inspect.getdoc(handler),
    }


async def _without_stream(request: Request, response: Response) -> Response:
    """The response; to HEAD one with the status and headers of a stream, which is closed unread.

    A stream need not end, and until it does its connection serves no other request.
    """
    if request.method != "HEAD" or not isinstance(response, StreamingResponse):
        return response
    if isinstance(response.body_iterator, AsyncGenerator):
        await response.body_iterator.aclose()
    headers = Response(status_code=response.status_code)
    headers.raw_headers = response.raw_headers
    return headers


def is_ui(path: str) -> bool:
    """Return whether a path is a page for people."""
    return path in {UI, DOCS} or path.startswith(f"{UI}/")


def to_login(scope: Scope) -> Response:
    """A redirect to the login, which leads back to the page that this request asks for."""
    query, page = scope["query_string"].decode("latin-1"), quote(scope["path"])
    then = {"next": f"{page}?{query}" if query else page}
    is_plain = page == UI or scope["method"] not in {"GET", "HEAD"}  # the overview, or a form that was sent
    return RedirectResponse(f"{UI}/login" + ("" if is_plain else f"?{urlencode(then)}"), HTTPStatus.SEE_OTHER)


def is_vault(path: str) -> bool:
    """Return whether a path is of the Vault API, whose clients read errors in Vault's form."""
    return path.startswith(VAULT)


def routes_of(routers: Iterable[APIRouter]) -> list[ScopedRoute]:
    """Their routes. Raises TypeError for one that states no rule."""
    found = []
    for route in (route for router in routers for route in router.routes):
        if not isinstance(route, ScopedRoute):
            raise TypeError(f"{route}: declare it by a method of routing.Router")
        found.append(route)
    return found


def rules_of(routers: Iterable[APIRouter]) -> dict[tuple[str, str], Rule]:
    """The rule of each method and path."""
    return {(route.method, route.path): route.rule for route in routes_of(routers)}


def include(app: FastAPI, routers: Sequence[APIRouter], prefix: str = "") -> None:
    """Add the routes of routers. Raises TypeError for one that states no rule."""
    methods: dict[str, set[str]] = app.state.methods
    for route in routes_of(routers):
        methods.setdefault(route.path, set()).update(route.methods or ())
    for router in routers:
        app.include_router(router, prefix=prefix)


class FastPath:
    """Wraps the application: calls the handlers of routes with a fixed path below ``prefix`` directly."""

    def __init__(self, app: FastAPI, routers: Iterable[APIRouter], prefix: str) -> None:
        self._app = app
        self._routes = {
            (method, prefix + route.path): route
            for route in routes_of(routers)
            if "{" not in route.path
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, route
        try:
            route.check_scope(scope)
            request = Request(scope, receive, send)
            answer: Response = await _without_stream(request, await route.endpoint(request))
        except problems.EXPECTED as exc:
            answer = problems.answer(exc)
        await answer(scope, receive, send)
