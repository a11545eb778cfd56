"""Routes of the Vault API, and the ASGI layer that answers every path below ``/v1/``.

It does not use FastAPI: paths are matched from their end, since a mount may have several segments.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api import json_body, problems
from kms_api.deps import PRINCIPAL
from kms_api.routing import (
    CALLER,
    VAULT,
    Call,
    Endpoint,
    Reader,
    Rule,
    Threads,
    endpoint_of,
    is_vault,
    no_body,
)
from kms_api.vault_api import models
from kms_core.auth.policy import Principal
from kms_protocol.errors import Forbidden, InvalidRequest
from kms_protocol.wire import Body

B = TypeVar("B")
T = TypeVar("T", bound=Body)
R = TypeVar("R")
WRITES: Final = ("POST", "PUT")
_BELOW_MOUNT: Final = f"{VAULT}{{mount}}/"
LOGIN: Final = f"{VAULT}auth/{{mount}}/login"
_UI_MOUNTS: Final = f"{VAULT}sys/internal/ui/mounts"
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})  # as Go reads booleans (strconv.ParseBool)
NO_ROUTE: Final = (
    "no handler for route: below a mount there are encrypt, decrypt, rewrap, datakey and keys, and below sys "
    "and auth what docs/vault-api.md lists; keys do not leave this service"
)


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` is a template below ``/v1/``, by which requests are counted and denials recorded."""

    path: str
    rule: Rule
    endpoint: Endpoint


class Routes:
    """Routes by method and path, and paths by their end below a mount."""

    def __init__(self, parts: Iterable["Routes"] = ()) -> None:
        """``parts`` are included."""
        self.declared: dict[tuple[str, str], Route] = {}
        for part in parts:
            self.declared |= part.declared
        self.paths = {route.path: route for route in self.declared.values()}
        self._ends = {tuple(path.removeprefix(_BELOW_MOUNT).split("/")): path for path in self.paths}

    def read(
        self, path: str, threads: Threads[None], methods: Sequence[str] = ("GET",), rule: Rule = CALLER
    ) -> Callable[[Callable[[Call[None]], R]], Callable[[Call[None]], R]]:
        """Declare a function without a body, which returns the data of an answer, or a response."""
        return self._declared(methods, path, rule, no_body, threads)

    def write(
        self, path: str, shape: type[T], threads: Threads[T]
    ) -> Callable[[Callable[[Call[T]], R]], Callable[[Call[T]], R]]:
        """Declare a function with a body, of at most ``BODY_BYTES``. Clients send POST or PUT."""

        async def read(request: Request) -> T:
            body = await body_of(request, shape)
            name = getattr(body, "name", None)  # some clients repeat the parameters of the path
            if name is not None and name != request.path_params.get("name"):
                raise InvalidRequest("name: another than that of the key in the path; leave it out")
            return body

        return self._declared(WRITES, path, CALLER, read, threads)

    def add(self, methods: Sequence[str], path: str, rule: Rule, endpoint: Endpoint) -> None:
        """Declare a coroutine that takes a request."""
        for method in methods:
            self.declared[method, VAULT + path] = Route(VAULT + path, rule, endpoint)

    def _declared(
        self, methods: Sequence[str], path: str, rule: Rule, read: Reader[B], threads: Threads[B]
    ) -> Callable[[Callable[[Call[B]], R]], Callable[[Call[B]], R]]:
        def declared(handler: Callable[[Call[B]], R]) -> Callable[[Call[B]], R]:
            self.add(methods, path, rule, endpoint_of(handler, read, threads, models.answer))
            return handler

        return declared

    def find(self, path: str, *, lists: bool = False) -> tuple[str, Mapping[str, str]]:
        """The template that a path is of, and its parameters; empty for none.

        ``lists``: for the method LIST, which may be written as GET with ``list=true`` or ``list=1``.
        """
        parts = path.removeprefix(VAULT).split("/")
        if parts[0] in {"sys", "auth"}:  # outside mounts
            below = path.removeprefix(f"{_UI_MOUNTS}/")
            if below != path and below:
                return f"{_UI_MOUNTS}/{{mount}}", {"mount": below}
            match parts:
                case ["auth", mount, "login"] if mount:
                    return LOGIN, {"mount": mount}
            return (path, {}) if path in self.paths else ("", {})
        if parts[-2:] == ["keys", ""]:  # a list may end in a slash
            del parts[-1]
        return ("", {}) if "" in parts else self._below_mount(parts, lists=lists)

    def _below_mount(self, parts: list[str], *, lists: bool) -> tuple[str, Mapping[str, str]]:
        third, second, last = ["", "", *parts][-3:]
        of_a_key = (
            (second, third, "{name}", last),
            (last, third, second, "{name}"),
            (last, second, "{name}"),
        )
        for name, *end in (*(() if lists else of_a_key), ("", last)):
            template = self._ends.get(tuple(end))
            if template and len(parts) > len(end):
                return template, {"name": name} if name else {}
        return "", {}


class VaultApi:
    """Wraps ``inner``, and passes on requests to other paths. ``app`` holds the service."""

    def __init__(self, inner: ASGIApp, app: FastAPI, routes: Routes) -> None:
        self._inner = inner
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_vault(scope["path"]):
            await self._inner(scope, receive, send)
            return
        scope["app"] = self._app
        try:
            response = await self._answered(scope, Request(scope, receive))
        except problems.EXPECTED as exc:
            response = problems.vault_answer(exc)
        await response(scope, receive, send)

    async def _answered(self, scope: Scope, request: Request) -> Response:
        method = scope["method"]
        lists = method == "LIST" or (method == "GET" and request.query_params.get("list") in _TRUE)
        path, scope["path_params"] = self._routes.find(scope["path"], lists=lists)
        if not path:
            return problems.vault_error(404, NO_ROUTE)
        scope["route"] = self._routes.paths[path]
        declared = self._routes.declared
        route = declared.get((method, path))
        if route is None and method == "HEAD":  # RFC 9110 §9.3.2
            route = declared.get(("GET", path))
        if route is None:
            return problems.vault_error(405, "unsupported operation")
        if not route.rule.open:
            check_headers(scope["headers"], scope[PRINCIPAL])
        return await route.endpoint(request)


async def body_of(request: Request, shape: type[T]) -> T:
    """The decoded body, of at most ``BODY_BYTES``. Raises InvalidRequest, and as ``read_bytes``."""
    body = await json_body.read_bytes(request, json_body.BODY_BYTES)
    return json_body.decode(body, shape, is_lenient=True)


def check_headers(headers: Iterable[tuple[bytes, bytes]], who: Principal) -> None:
    """Refuse headers that would be ignored: namespaces are tenants, and a credential has one."""
    for name, value in headers:
        if name == b"x-vault-namespace" and value.strip(b"/") not in {b"", who.tenant.encode()}:
            raise Forbidden("X-Vault-Namespace names another tenant than the credential's: leave it out")
        if name == b"x-vault-wrap-ttl" and value.strip(b"0hms"):
            raise InvalidRequest("X-Vault-Wrap-TTL: answers are not wrapped here; leave -wrap-ttl out")
