"""Who calls: the ASGI layer before every route. Nobody passes without a credential, except to what is open.

``Authorization: Bearer``, ``X-API-Key`` and ``X-Vault-Token`` are one door, for tokens and JWTs alike; a
client certificate is the other. The page has sessions besides, which begin with a token and open nothing but
the page. Requests are counted here too; their items, where they are known (``Service.requests``).
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import structlog
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api.deps import LET_IN, LOCAL_CALLER, WHO
from kms_api.errors import problems, vault
from kms_api.routing import METRICS, OPEN_PATHS, UI, UI_OPEN, VAULT_OPEN, is_ui, is_vault
from kms_api.transport.sessions import COOKIE, SESSION, Sessions, cookies
from kms_core import audit
from kms_core.audit import AuditWriter
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.certificates import PresentedCertificate
from kms_core.auth.jwks import WAIT_S, KeysPending
from kms_core.auth.metrics_access import MetricsAccess
from kms_core.auth.policy import Principal
from kms_core.auth.rate_limit import Failures, Requests
from kms_core.http_server.protocol import CERTIFICATE
from kms_core.observability import metrics
from kms_protocol.errors import Forbidden, KmsError, RateLimited, Unauthenticated

_KEYS: Final = frozenset({b"x-api-key", b"x-vault-token"})
_NO_CREDENTIAL: Final = OPEN_PATHS | UI_OPEN | VAULT_OPEN
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AuthLimits:
    """How often sources may fail and tenants may ask, and who reads the metrics without a credential."""

    failures: Failures
    requests: Requests
    scraping: MetricsAccess


class RequestAuthenticator:
    """Authenticates requests. Failed attempts are counted by source, logged and recorded, within bounds."""

    def __init__(self, doors: Authenticator, trail: AuditWriter, failures: Failures) -> None:
        self._doors = doors
        self._trail = trail
        self._failures = failures

    async def let_in(self, scope: Scope, token: str | None = None) -> Principal:
        """The principal of this token, by default that of the request's headers; else of its certificate.

        The credential is verified first, so that a good one is never refused for another's failures; only a
        failed one of a source that failed too often is answered with RateLimited. Raises Unauthenticated,
        RateLimited; Unavailable if the credential cannot be verified now.
        """
        try:
            token = shown(scope["headers"]) if token is None else token
            return await self._authenticated(token, scope.get("state", {}).get(CERTIFICATE))
        except Unauthenticated as exc:
            metrics.AUTH_FAILURES.labels(exc.reason).inc()
            if exc.reason != "missing":  # a browser, a probe: nothing was guessed
                self._failed(exc, scope["client"][0] if scope["client"] else "local")
            raise

    def is_worth(self, who: Principal) -> bool:
        """Whether the credential was neither revoked nor has expired. Raises Unavailable."""
        try:
            self._doors.scopes_of(who)
        except Forbidden:
            return False
        return True

    async def _authenticated(self, token: str, certificate: PresentedCertificate | None) -> Principal:
        """Wait for an issuer's keys as a coroutine, which holds no thread. Raises as ``let_in``."""
        try:
            return self._doors.authenticate(token, certificate)
        except KeysPending as pending:
            refresh = pending.refresh
        metrics.AUTH_JWT_WORK.labels("key_wait").inc()
        with refresh.joined() as done:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(done)), WAIT_S)
        return self._doors.authenticate(token, certificate)

    def _failed(self, exc: Unauthenticated, source: str) -> None:
        """Count a failed attempt. Raises RateLimited if its source has failed too often; AuditUnavailable."""
        wait_s = self._failures.wait_s(source)
        if wait_s:
            metrics.AUTH_FAILURES.labels("limited").inc()
            raise RateLimited("Too many failed attempts to authenticate from here", retry_after_s=wait_s)
        if self._failures.failed(source):
            _log.warning("auth.refused", reason=exc.reason, source=source)
            audit.denied(self._trail, None, "", exc.code)


class AuthenticationLayer:
    """Wraps the application. ``entry`` None: callers are not authenticated."""

    def __init__(
        self, app: ASGIApp, entry: RequestAuthenticator | None, sessions: Sessions, limits: AuthLimits
    ) -> None:
        self._app = app
        self._entry = entry
        self._sessions = sessions
        self._requests = limits.requests
        self._scraping = limits.scraping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope[WHO] = await self._who(scope)
            except KmsError as exc:
                await _refusal(scope, exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _who(self, scope: Scope) -> Principal:
        path = scope["path"]
        if path in _NO_CREDENTIAL or (path == METRICS and self._may_scrape(scope)):
            return LET_IN
        who = LOCAL_CALLER
        if self._entry is not None:
            who = self._of_session(scope, self._entry) or await self._entry.let_in(scope)
        elif scope["path"] == METRICS:
            raise Forbidden("Metrics are for callers on this machine: see [kms.server] metrics")
        self._requests.take(who.tenant)
        return who

    def _of_session(self, scope: Scope, entry: RequestAuthenticator) -> Principal | None:
        """Who has logged in, if this is the page: a session opens nothing else."""
        if not is_ui(scope["path"]):
            return None
        for session in cookies(scope["headers"], COOKIE):
            who = self._sessions.find(session)
            if who is not None and entry.is_worth(who):
                scope[SESSION] = session
                return who
            if who is not None:
                self._sessions.end(session)
        return None

    def _may_scrape(self, scope: Scope) -> bool:
        address = scope["client"][0] if scope["client"] else None
        return self._scraping.is_open_to(address, (name.decode("latin-1") for name, _ in scope["headers"]))


def _refusal(scope: Scope, error: KmsError) -> Response:
    """A browser that has no session is led to where it gets one; everybody else gets a problem."""
    if isinstance(error, Unauthenticated) and error.reason == "missing" and is_ui(scope["path"]):
        return RedirectResponse(f"{UI}/login", HTTPStatus.SEE_OTHER)
    answer = vault.answer(error) if is_vault(scope["path"]) else problems.answer(error)
    if isinstance(error, Unauthenticated) and error.ends_connection:
        answer.headers["Connection"] = "close"
    return answer


def shown(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The token of a request, empty if there is none. Raises Unauthenticated if there are several."""
    found = set()
    for name, value in headers:
        if name == b"authorization":
            scheme, _, text = value.partition(b" ")
            if scheme.lower() != b"bearer":
                raise Unauthenticated("Send the token as Authorization: Bearer", reason="malformed")
            found.add(text.strip())
        elif name in _KEYS:
            found.add(value.strip())
    found.discard(b"")
    if len(found) > 1:
        raise Unauthenticated("Several credentials were sent: send one", reason="malformed")
    return found.pop().decode("latin-1") if found else ""
