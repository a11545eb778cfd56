"""Declarations of the routes of the Vault API, and the checks that all of them make."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from fastapi import Request

from kms_api import json_body
from kms_api.deps import PRINCIPAL
from kms_api.routing import (
    CALLER,
    VAULT,
    Call,
    Endpoint,
    Reader,
    Route,
    Routes,
    Rule,
    Threads,
    endpoint_of,
    no_body,
    pattern_of,
)
from kms_api.vault_api import models
from kms_core.auth.policy import Principal
from kms_protocol.errors import Forbidden, InvalidRequest
from kms_protocol.wire import Body

B = TypeVar("B")
T = TypeVar("T", bound=Body)
R = TypeVar("R")
WRITES: Final = ("POST", "PUT")
LOGIN: Final = f"{VAULT}auth/{{mount}}/login"
_MOUNTS: Final = {LOGIN: "[^/]+", f"{VAULT}sys/internal/ui/mounts/{{mount}}": ".+"}
_MOUNT: Final = "(?!sys/|auth/|/|.*//).+"
"""A mount may have several segments, of which none is empty."""


class VaultRoutes(Routes):
    """Declares the routes of one part of the Vault API; paths are templates below ``/v1/``."""

    def read(
        self, path: str, threads: Threads[None], methods: Sequence[str] = ("GET",), rule: Rule = CALLER
    ) -> Callable[[Callable[[Call[None]], R]], Callable[[Call[None]], R]]:
        """Declare a function without a body, which returns the data of an answer, or a response."""
        return self._declared(methods, path, rule, no_body if rule.open else _no_body, threads)

    def write(
        self, path: str, shape: type[T], threads: Threads[T]
    ) -> Callable[[Callable[[Call[T]], R]], Callable[[Call[T]], R]]:
        """Declare a function with a body, of at most ``BODY_BYTES``. Clients send POST or PUT."""

        async def read(request: Request) -> T:
            check_headers(request.scope["headers"], request.scope[PRINCIPAL])
            body = await body_of(request, shape)
            name = getattr(body, "name", None)  # some clients repeat the parameters of the path
            if name is not None and name != request.path_params.get("name"):
                raise InvalidRequest("name: another than that of the key in the path; leave it out")
            return body

        return self._declared(WRITES, path, CALLER, read, threads)

    def add(self, methods: Sequence[str], path: str, rule: Rule, endpoint: Endpoint) -> None:
        """Declare a coroutine that takes a request."""
        template = VAULT + path
        pattern = pattern_of(template, mount=_MOUNTS.get(template, _MOUNT))
        if path == "{mount}/keys":
            pattern += "/?"  # see ``path_of``
        self.declared += [Route(method, template, pattern, rule, endpoint) for method in methods]

    def _declared(
        self, methods: Sequence[str], path: str, rule: Rule, read: Reader[B], threads: Threads[B]
    ) -> Callable[[Callable[[Call[B]], R]], Callable[[Call[B]], R]]:
        def declared(handler: Callable[[Call[B]], R]) -> Callable[[Call[B]], R]:
            self.add(methods, path, rule, endpoint_of(handler, read, threads, models.answer))
            return handler

        return declared


async def _no_body(request: Request) -> None:
    """The reader of a route without a body, for callers with a credential."""
    check_headers(request.scope["headers"], request.scope[PRINCIPAL])


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
