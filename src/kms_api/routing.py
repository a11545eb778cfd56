"""Routes: what each declares, how it is found, and how it is called (ADR 78).

A route states its path, scope, body and threads once, beside its handler. The scope check, the public paths
and the OpenAPI document derive from that. Permissions that depend on a key, a context or a path are checked
in the core, where these are known: such routes are for any ``CALLER``.
"""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Generic, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

from fastapi import FastAPI, Request, Response
from msgspec import Struct
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from kms_api import json_body
from kms_api.deps import ANONYMOUS, INLINE_BYTES, PRINCIPAL, Pool, Service, has_many_stanzas, service
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_protocol import wire
from kms_protocol.errors import Forbidden, InvalidRequest

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)
A = TypeVar("A")
R = TypeVar("R", bound=wire.Answer | Response)
Endpoint: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]
Reader: TypeAlias = Callable[[Request], Awaitable[B]]
"""Reads and decodes the body of a request."""
UI: Final = "/ui"
DOCS: Final = "/docs"
METRICS: Final = "/metrics"
VAULT: Final = "/v1/"
_NO_MOUNTS: Final = (f"{VAULT}sys/", f"{VAULT}auth/")
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})  # as Go reads booleans (strconv.ParseBool)
_DIGITS: Final = 16  # of a number in a query string
_PARAMETER: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """``operation`` must be in a scope of the caller; an ``open`` route needs no credential."""

    operation: str | None = None
    open: bool = False


OPEN: Final = Rule(open=True)
CALLER: Final = Rule()
READ: Final = Rule("jobs:read")
WRITE: Final = Rule("jobs:write")


class Call(Struct, Generic[B_co], frozen=True):
    """A request to a route and its decoded body, which is None for a route without one.

    A struct of msgspec, which is made without a call of Python.
    """

    request: Request
    body: B_co
    service: Service
    caller: Principal

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
        is_large = size_bytes > INLINE_BYTES or len(file) > INLINE_BYTES
        waits_for_disk = self.service.settings.kms.audit.durability == "fsync"
        keyring = self.service.kms.keyring
        if not (is_large or waits_for_disk or (file and has_many_stanzas(file))) and (
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
        scope, body = request.scope, await read(request)
        call = Call(request, body, scope["app"].service, scope[PRINCIPAL])
        pool = threads(call) if callable(threads) else threads
        made = handler(call) if pool is None else await call.service.run(pool, handler, call)
        return made if isinstance(made, Response) else encode(made)

    return endpoint


@dataclass(frozen=True, slots=True)
class RouteSource:
    """The source of a route's description; ``more`` are arguments of ``described`` in openapi_document.py."""

    tag: str
    handler: Callable[..., object]
    read: object
    more: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` is a template below a prefix, by which requests are counted and denials recorded.

    ``pattern`` is a regular expression of the paths that it stands for, with a group for each parameter.
    """

    method: str
    path: str
    pattern: str
    rule: Rule
    endpoint: Endpoint
    source: RouteSource | None = None

    def check_scope(self, scope: Scope) -> None:
        """Raise Forbidden, which is recorded, for a caller without a scope for this route."""
        who: Principal = scope[PRINCIPAL]
        if who is ANONYMOUS:
            return
        kms = scope["app"].service.kms
        try:
            kms.policy.require(who, self.rule.operation)
        except Forbidden as exc:
            audit.denied(kms.audit_log, who, self.path, exc.code)
            raise


Methods: TypeAlias = dict[str, Route]
"""The routes of one template, by method."""
_NONE: Final[Methods] = {}


class Routes:
    """List of the routes that one part of the service declares."""

    def __init__(self) -> None:
        self.declared: list[Route] = []


class Router(Routes):
    """Declares the routes of one part of the API; ``tag`` names its section of the OpenAPI document."""

    def __init__(self, tag: str, *, prefix: str = "") -> None:
        super().__init__()
        self._tag, self._prefix = tag, prefix

    def _add(self, method: str, path: str, rule: Rule, endpoint: Endpoint, source: RouteSource) -> None:
        template = self._prefix + path
        self.declared.append(Route(method, template, pattern_of(template), rule, endpoint, source))

    def stream(self, method: str, path: str, rule: Rule, **described: Any) -> Callable[[Stream], Stream]:  # noqa: ANN401 -- of ``RouteSource``
        """Declare a coroutine that reads or writes a stream, in threads of its choice.

        ``described`` is of ``RouteSource``.
        """

        def declared(handler: Stream) -> Stream:
            async def endpoint(request: Request) -> Response:
                return await handler(Call(request, None, service(request), request.scope[PRINCIPAL]))

            self._add(method, path, rule, endpoint, RouteSource(self._tag, handler, no_body, described))
            return handler

        return declared

    def read(
        self,
        path: str,
        rule: Rule,
        threads: Threads[None],
        **described: Any,  # noqa: ANN401 -- of ``RouteSource``
    ) -> Callable[[Callable[[Call[None]], R]], Callable[[Call[None]], R]]:
        """Declare a function for GET requests, which have no body. Otherwise as ``call``."""
        return self.call("GET", path, rule, no_body, threads, **described)

    def call(
        self,
        method: str,
        path: str,
        rule: Rule,
        read: Reader[B],
        threads: Threads[B],
        **described: Any,  # noqa: ANN401 -- of ``RouteSource``
    ) -> Callable[[Callable[[Call[B]], R]], Callable[[Call[B]], R]]:
        """Declare a function that takes a call and returns an answer, encoded under the first status.

        ``described`` is of ``RouteSource``.
        """
        status = next(iter(described.get("answers", ())), 200)
        encode = partial(json_body.answer, status=status)

        def declared(handler: Callable[[Call[B]], R]) -> Callable[[Call[B]], R]:
            endpoint = endpoint_of(handler, read, threads, encode)
            self._add(method, path, rule, endpoint, RouteSource(self._tag, handler, read, described))
            return handler

        return declared


async def _without_stream(response: Response) -> Response:
    """The answer to HEAD: of a stream only the status and the headers, and it is closed unread.

    A stream need not end, and until it does its connection serves no other request.
    """
    if not isinstance(response, StreamingResponse):
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


def path_of(scope: Scope) -> str:
    """The path by which a route is found. A list of the Vault API ends in a slash, and nothing else does.

    Clients may write the method LIST as GET with ``list=true``.
    """
    path: str = scope["path"]
    if not is_vault(path) or path.startswith(_NO_MOUNTS):
        return path
    below = path.removesuffix("/") if path.endswith("/keys/") else path
    method, query = scope["method"], scope["query_string"]
    lists = method == "LIST" or (method == "GET" and QueryParams(query).get("list") in _TRUE)
    return f"{below}/" if lists else below


def pattern_of(template: str, **parameters: str) -> str:
    """A regular expression of the paths of a template, with a named group for each of its parameters.

    A group matches one segment, or the expression that ``parameters`` has for its name.
    """
    return _PARAMETER.sub(lambda found: f"(?P<{found[1]}>{parameters.get(found[1], '[^/]+')})", template)


class Dispatcher:
    """Finds the route of a request, checks its rule and calls it. FastAPI answers what is not in a route.

    Raises what the routes raise, and HTTPException: 404, or 405 with ``Allow``.
    """

    def __init__(self, app: FastAPI, parts: Mapping[str, Iterable[Routes]]) -> None:
        """``parts`` are by the prefix of their paths."""
        self._app = app
        self._fixed: dict[str, Methods] = {}
        templates: dict[str, tuple[int, Methods]] = {}
        for prefix, routes in parts.items():
            for route in (route for part in routes for route in part.declared):
                _, methods = templates.setdefault(prefix + route.pattern, (route.path.count("/"), {}))
                methods[route.method] = route
                if route.method == "GET":
                    methods.setdefault("HEAD", route)  # RFC 9110 §9.3.2
                if "{" not in route.path:
                    self._fixed[prefix + route.path] = methods
        compiled = [(size, re.compile(text, re.DOTALL), each) for text, (size, each) in templates.items()]
        self._sizes = [
            [(pattern, methods) for each, pattern, methods in compiled if each == size]
            for size in sorted({size for size, *_ in compiled}, reverse=True)
        ]

    def find(self, method: str, path: str) -> tuple[Methods, Mapping[str, str]]:
        """The routes of a template by method, and the parameters of the path; nothing for an unknown path.

        Of the templates that fit, those with the most segments count, and of these the first with the method.
        """
        for templates in self._sizes:
            fit = [(each, found) for pattern, each in templates if (found := pattern.fullmatch(path))]
            if fit:
                methods, found = next((pair for pair in fit if method in pair[0]), fit[0])
                return methods, found.groupdict()
        return _NONE, {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        methods = self._fixed.get(scope["path"], _NONE)
        if method not in methods:
            methods, scope["path_params"] = self.find(method, path_of(scope))
        if not methods:
            await self._app.router(scope, receive, send)
            return
        route = methods.get(method)
        scope["route"] = route or next(iter(methods.values()))
        if route is None:
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": ", ".join(sorted(methods))})
        if route.rule.operation is not None:
            route.check_scope(scope)
        response = await route.endpoint(Request(scope, receive, send))
        await (response if method != "HEAD" else await _without_stream(response))(scope, receive, send)
