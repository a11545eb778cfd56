"""The façade as an ASGI layer before the application: every path below ``/v1/`` is its own.

It has no FastAPI: paths are read from their end, since a mount may have several segments, and one lookup in
the route table finds the handler. ``authentication.py`` has found out who calls.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api.deps import WHO, Service
from kms_api.errors import vault
from kms_api.routing import VAULT, VAULT_RULES, is_vault
from kms_api.vault_api import keys, sys, transit
from kms_api.vault_api.request import VaultRequest
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import Principal
from kms_protocol.errors import Forbidden, InvalidRequest, KmsError

Handler = Callable[[VaultRequest], Awaitable[Response]]
Names = Mapping[str, str]

_EXPECTED: Final = (KmsError, HTTPException, ClientDisconnect)
_ON_KEY: Final = frozenset({"encrypt", "decrypt", "rewrap", "keys"})
_OF_KEY: Final = frozenset({"rotate", "config"})
_DATA_KEYS: Final = frozenset({"plaintext", "wrapped"})
_OWN: Final = frozenset({"sys", "auth"})
_UI_MOUNTS: Final = f"{VAULT}sys/internal/ui/mounts"

HANDLERS: Final[Mapping[str, Handler | Mapping[str, Handler]]] = {
    "{mount}/encrypt/{name}": transit.encrypt,
    "{mount}/decrypt/{name}": transit.decrypt,
    "{mount}/rewrap/{name}": transit.rewrap,
    "{mount}/datakey/plaintext/{name}": transit.data_key,
    "{mount}/datakey/wrapped/{name}": transit.wrapped_data_key,
    "{mount}/keys": keys.listed,
    "{mount}/keys/{name}": {
        "GET": keys.one,
        "POST": keys.made,
        "PUT": keys.made,
        "DELETE": keys.deleted,
    },
    "{mount}/keys/{name}/rotate": keys.rotated,
    "{mount}/keys/{name}/config": keys.configured,
    "auth/token/lookup-self": sys.lookup_self,
    "auth/token/renew-self": sys.renew_self,
    "sys/capabilities-self": sys.capabilities_self,
    "sys/mounts": sys.mounts,
    "sys/internal/ui/mounts": sys.visible_mounts,
    "sys/internal/ui/mounts/{mount}": sys.mount_of,
    "sys/health": sys.health,
    "sys/seal-status": sys.seal_status,
    "sys/init": sys.init,
    "sys/leader": sys.leader,
}


@dataclass(frozen=True, slots=True)
class Route:
    """Its template, by which requests are counted and denials recorded."""

    path: str


class VaultApi:
    """Wraps the application, and passes on what is not its own."""

    def __init__(self, app: ASGIApp, built: Service, doors: Authenticator | None) -> None:
        self._app = app
        self._built = built
        self._doors = doors
        self._handlers = {route: _handler(*route) for route in VAULT_RULES}
        self._routes = {path: Route(path) for _, path in VAULT_RULES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_vault(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            response = await self._answered(scope, Request(scope, receive))
        except _EXPECTED as exc:
            response = vault.expected(exc)
        await response(scope, receive, send)

    async def _answered(self, scope: Scope, request: Request) -> Response:
        path, names = find(scope["path"])
        if path not in self._routes:
            return vault.turned_away(404, "not_found", _NO_HANDLER)
        scope["route"] = self._routes[path]
        asked = scope["method"], path
        if asked[0] == "HEAD" and asked not in self._handlers:  # RFC 9110 §9.3.2
            asked = "GET", path
        handler = self._handlers.get(asked)
        if handler is None:
            return vault.turned_away(405, "method_not_allowed", "unsupported operation")
        who: Principal = scope[WHO]
        if not VAULT_RULES[asked].open:
            _check_headers(scope["headers"], who)
        return await handler(VaultRequest(request, self._built, self._doors, who, names))


def before(app: ASGIApp, built: Service, doors: Authenticator | None) -> ASGIApp:
    """An application with the façade before it, if settings enable one."""
    return VaultApi(app, built, doors) if built.settings.kms.facade.enabled else app


def find(path: str) -> tuple[str, Names]:
    """The template of a path, and what stands in it for the template's names."""
    parts = path.removeprefix(VAULT).split("/")
    if parts[0] in _OWN:
        below = path.removeprefix(f"{_UI_MOUNTS}/")
        if below != path and below:
            return f"{_UI_MOUNTS}/{{mount}}", {"mount": below}
        return path, {}
    if parts[-2:] == ["keys", ""]:  # a list may end in a slash
        del parts[-1]
    return ("", {}) if "" in parts else _below_mount(parts)


def _below_mount(parts: list[str]) -> tuple[str, Names]:
    match parts:
        case [first, *_, "keys", name, what] if what in _OF_KEY and first != "keys":
            return f"{VAULT}{{mount}}/keys/{{name}}/{what}", {"name": name}
        case [_, *_, "datakey", kind, name] if kind in _DATA_KEYS:
            return f"{VAULT}{{mount}}/datakey/{kind}/{{name}}", {"name": name}
        case [_, *_, what, name] if what in _ON_KEY:
            return f"{VAULT}{{mount}}/{what}/{{name}}", {"name": name}
        case [_, *_, "keys"]:
            return f"{VAULT}{{mount}}/keys", {}
    return "", {}


def _handler(method: str, path: str) -> Handler:
    """Raises KeyError for a rule without a handler."""
    found = HANDLERS[path.removeprefix(VAULT)]
    return found[method] if isinstance(found, Mapping) else found


def _check_headers(headers: Iterable[tuple[bytes, bytes]], who: Principal) -> None:
    """A namespace is a tenant here, and nobody has two; what would be passed over is refused."""
    for name, value in headers:
        if name == b"x-vault-namespace" and value.strip(b"/") not in {b"", who.tenant.encode()}:
            raise Forbidden("X-Vault-Namespace names another tenant than the credential's: leave it out")
        if name == b"x-vault-wrap-ttl" and value:
            raise InvalidRequest("X-Vault-Wrap-TTL: answers are not wrapped here; leave -wrap-ttl out")


_NO_HANDLER: Final = (
    "no handler for route: below a mount there are encrypt, decrypt, rewrap, datakey and keys; keys do not "
    "leave this service"
)
