"""The route table: what each route asks of a caller. A route without a rule cannot be built.

What depends on a key, a context or a path is asked in the core, where these are known: such routes are for
any ``CALLER``. ``authentication.py`` has found out who calls.
"""

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute, APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kms_api.deps import LET_IN, WHO, Service
from kms_core import audit
from kms_protocol.errors import Forbidden
from kms_protocol.wire import PREFIX


@dataclass(frozen=True, slots=True)
class Rule:
    """``operation`` must be in a scope of the caller; a route that is ``open`` asks for no credential."""

    operation: str | None = None
    open: bool = False


OPEN: Final = Rule(open=True)
CALLER: Final = Rule()
READ: Final = Rule("jobs:read")
WRITE: Final = Rule("jobs:write")

RULES: Final[Mapping[tuple[str, str], Rule]] = {
    ("POST", "/encrypt"): CALLER,
    ("POST", "/decrypt"): CALLER,
    ("POST", "/generate-key"): CALLER,
    ("POST", "/rewrap"): CALLER,
    ("POST", "/wrap"): CALLER,
    ("POST", "/unwrap"): CALLER,
    ("POST", "/batch"): CALLER,
    ("POST", "/codec/encode"): CALLER,
    ("POST", "/codec/decode"): CALLER,
    ("GET", "/keys"): CALLER,
    ("GET", "/keys/{key_id}"): CALLER,
    ("POST", "/keys/{key_id}/rotate"): CALLER,
    ("POST", "/jobs"): WRITE,
    ("GET", "/jobs"): READ,
    ("GET", "/jobs/dead"): READ,
    ("GET", "/jobs/{job_id}"): READ,
    ("GET", "/jobs/{job_id}/events"): READ,
    ("GET", "/jobs/{job_id}/result"): READ,
    ("DELETE", "/jobs/{job_id}"): WRITE,
    ("POST", "/jobs/{job_id}/cancel"): WRITE,
    ("POST", "/jobs/{job_id}/retry"): WRITE,
    ("POST", "/files/encrypt"): WRITE,
    ("POST", "/files/decrypt"): WRITE,
    ("GET", "/webhooks/dead"): READ,
    ("POST", "/webhooks/dead/{delivery_id}/resend"): WRITE,
    ("GET", "/intake"): WRITE,
    ("GET", "/audit"): Rule("audit:read"),
    ("GET", "/status"): Rule("status"),
    ("GET", "/health"): OPEN,
    ("GET", "/livez"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/metrics"): Rule("metrics"),
}
UI: Final = "/ui"
UI_RULES: Final[Mapping[tuple[str, str], Rule]] = {
    ("GET", "/ui"): CALLER,
    ("GET", "/ui/jobs"): READ,
    ("GET", "/ui/jobs/{job_id}"): READ,
    ("GET", "/ui/jobs/{job_id}/events"): READ,
    ("POST", "/ui/jobs/{job_id}/cancel"): WRITE,
    ("POST", "/ui/jobs/{job_id}/retry"): WRITE,
    ("GET", "/ui/audit"): Rule("audit:read"),
    ("GET", "/ui/audit/{audit_id}/receipt"): Rule("audit:read"),
    ("GET", "/ui/keys"): CALLER,
    ("GET", "/ui/keys/{key_id}/rotate"): CALLER,
    ("POST", "/ui/keys/{key_id}/rotate"): CALLER,
    ("GET", "/ui/runbooks"): CALLER,
    ("GET", "/ui/login"): OPEN,
    ("POST", "/ui/login"): OPEN,
    ("POST", "/ui/logout"): CALLER,
    ("GET", "/ui/static/{name}"): OPEN,
    ("GET", "/docs"): OPEN,
}
"""Pages for people, which are no part of the API: the whole paths, since they have no prefix."""
_STATIC: Final = ("page.css", "page.js", "icon.svg")
UI_OPEN: Final = frozenset(
    path.replace("{name}", name) for (_, path), rule in UI_RULES.items() if rule.open for name in _STATIC
)
VAULT: Final = "/v1/"
_WRITES: Final = ("POST", "PUT")
VAULT_RULES: Final[Mapping[tuple[str, str], Rule]] = {
    **{
        (method, f"{VAULT}{path}"): CALLER
        for method in _WRITES
        for path in (
            "{mount}/encrypt/{name}",
            "{mount}/decrypt/{name}",
            "{mount}/rewrap/{name}",
            "{mount}/datakey/plaintext/{name}",
            "{mount}/datakey/wrapped/{name}",
            "{mount}/keys/{name}",
            "{mount}/keys/{name}/rotate",
            "{mount}/keys/{name}/config",
            "auth/token/renew-self",
            "sys/capabilities-self",
        )
    },
    ("GET", "/v1/{mount}/keys"): CALLER,
    ("LIST", "/v1/{mount}/keys"): CALLER,
    ("GET", "/v1/{mount}/keys/{name}"): CALLER,
    ("DELETE", "/v1/{mount}/keys/{name}"): CALLER,
    ("GET", "/v1/auth/token/lookup-self"): CALLER,
    ("GET", "/v1/sys/mounts"): CALLER,
    ("GET", "/v1/sys/internal/ui/mounts"): CALLER,
    ("GET", "/v1/sys/internal/ui/mounts/{mount}"): CALLER,
    ("GET", "/v1/sys/health"): OPEN,
    ("HEAD", "/v1/sys/health"): OPEN,
    ("GET", "/v1/sys/seal-status"): OPEN,
    ("GET", "/v1/sys/init"): OPEN,
    ("GET", "/v1/sys/leader"): OPEN,
}
"""The façade (docs/facade.md), where it is enabled: the whole paths; a mount may have several segments."""
VAULT_OPEN: Final = frozenset(path for (_, path), rule in VAULT_RULES.items() if rule.open)
METRICS: Final = "/metrics"
DOCS: Final = "/docs"
PAGES: Final = frozenset({DOCS, "/openapi.json"})
"""The shapes of this API, which are public. ``[kms.server] docs`` says whether there are any."""
_UNPREFIXED: Final = frozenset({"/livez", "/readyz", METRICS})
OPEN_PATHS: Final = PAGES | {
    path if path in _UNPREFIXED else f"{PREFIX}{path}" for (_, path), rule in RULES.items() if rule.open
}


class ScopedRoute(APIRoute):
    """A route that is held to the table, before any of its body is read."""

    table: ClassVar = RULES

    def __init__(self, path: str, *args: Any, **more: Any) -> None:  # noqa: ANN401 -- FastAPI's own
        super().__init__(path, *args, **more)
        documented = (method for method in self.methods or () if method != "HEAD")
        self.rules = {method: self.table[method, path] for method in documented}
        self.methods = _with_head(self.rules)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, of whose streams a HEAD gets the headers only."""
        handler = super().get_route_handler()

        async def answered(request: Request) -> Response:
            response = await handler(request)
            if request.method == "HEAD" and isinstance(response, StreamingResponse):
                return await _headers_of(response)
            return response

        return answered

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in _with_head(self.rules):
            allowed = sorted(_with_head(method for method, path in self.table if path == self.path))
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": ", ".join(allowed)})
        self.admit(scope)
        await super().handle(scope, receive, send)

    def admit(self, scope: Scope) -> None:
        """Raises Forbidden for a caller to whom the table does not give this route."""
        rule = self.rules["GET" if scope["method"] == "HEAD" else scope["method"]]
        if rule.operation is not None and scope[WHO] is not LET_IN:
            self._require(scope, rule.operation)

    def _require(self, scope: Scope, operation: str) -> None:
        built: Service = scope["app"].state.service
        try:
            built.kms.policy.require(scope[WHO], operation)
        except Forbidden as exc:
            audit.denied(built.kms.trail, scope[WHO], self.path, exc.code)
            raise


def _with_head(methods: Iterable[str]) -> set[str]:
    """The methods, and HEAD wherever there is GET (RFC 9110 §9.3.2)."""
    found = set(methods)
    return found | {"HEAD"} if "GET" in found else found


async def _headers_of(streamed: StreamingResponse) -> Response:
    """A response with the status and headers of a stream, which is closed unread."""
    if isinstance(streamed.body_iterator, AsyncGenerator):
        await streamed.body_iterator.aclose()
    response = Response(status_code=streamed.status_code)
    response.raw_headers = streamed.raw_headers
    return response


def is_ui(path: str) -> bool:
    """Whether a path is a page for people."""
    return path in {UI, DOCS} or path.startswith(f"{UI}/")


def is_vault(path: str) -> bool:
    """Whether a path is one of the façade, whose callers read another shape of errors."""
    return path.startswith(VAULT)


def include(app: FastAPI, router: APIRouter, prefix: str = "") -> None:
    """Add the routes of a router. Raises TypeError for one that the table does not hold."""
    for route in router.routes:
        if not isinstance(route, ScopedRoute):
            raise TypeError(f"{route}: make its router with route_class=Ruled")
    app.include_router(router, prefix=prefix)
