"""ASGI middleware that authenticates every request, except those to public paths.

``Authorization: Bearer``, ``X-API-Key`` and ``X-Vault-Token`` carry tokens and JWTs; the other method is a
client certificate. The pages for people also have sessions, which begin with a token and are valid for these
pages only. Requests are counted here, and items of batches and jobs by their routes (``Service.requests``).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Final, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api.deps import ANONYMOUS, LOCAL_CALLER, PRINCIPAL, Service
from kms_api.routing import METRICS, is_ui
from kms_api.ui.sessions import COOKIE, SESSION, Sessions, cookies, is_id
from kms_core import audit
from kms_core.audit import AuditWriter
from kms_core.auth.authenticator import Authenticator, MetricsAccess
from kms_core.auth.jwks import KeysPending
from kms_core.auth.policy import Principal
from kms_core.auth.rate_limit import Failures, source_of
from kms_core.auth.tokens import UnknownToken
from kms_core.http_protocol import CERTIFICATE
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from kms_protocol.errors import Forbidden, RateLimited, Unauthenticated

T = TypeVar("T")
_KEYS: Final = frozenset({b"x-api-key", b"x-vault-token"})
_COOKIES: Final = 8  # sessions of one request that are looked up
_LOOK_UPS: Final = 16  # at once: while Redis, a store or an issuer hangs, they wait for each other only
_log = structlog.get_logger(__name__)


class LookUps:
    """Look-ups of credentials in threads, 16 at once at each source, 4 of them for one address.

    So a flood of one address delays no other: behind it wait those of the same address.
    """

    def __init__(self) -> None:
        self._at = defaultdict[object, anyio.CapacityLimiter](partial(anyio.CapacityLimiter, _LOOK_UPS))
        self._of = WeakValueDictionary[tuple[object, str], anyio.CapacityLimiter]()

    async def run(self, scope: Scope, source: object, look_up: Callable[[], T]) -> T:
        """Call ``look_up``, which blocks and asks ``source``, for the request of this scope."""
        of = source, source_of(scope["client"][0] if scope.get("client") else "local")
        turns = self._of.setdefault(of, anyio.CapacityLimiter(4))  # kept while a look-up waits or runs
        async with turns:
            return await anyio.to_thread.run_sync(look_up, limiter=self._at[source])


class RequestAuthenticator:
    """Authenticates requests. Failed attempts are counted by source, logged and recorded, within limits."""

    def __init__(self, authenticator: Authenticator, audit_log: AuditWriter, failures: Failures) -> None:
        self._authenticator = authenticator
        self._audit_log = audit_log
        self._failures = failures
        self._look_ups = LookUps()

    async def authenticate(self, scope: Scope, token: str | None = None) -> Principal:
        """The principal of a token, by default that of the request's headers, or of its client certificate.

        Raises as ``verified``.
        """

        def verify() -> Principal:
            shown = token_of(scope["headers"]) if token is None else token
            return self._authenticator.authenticate(shown, scope.get("state", {}).get(CERTIFICATE))

        return await self.verified(scope, verify)

    async def verified(self, scope: Scope, verify: Callable[[], T]) -> T:
        """Return what ``verify`` does, which raises as ``Authenticator.authenticate``, after one look-up.

        The credential is verified first, so a valid one is never refused for the failures of others. Those
        that are known wait for no look-up. Raises Unauthenticated; RateLimited for an invalid one of a source
        that failed too often; Unavailable if the credential cannot be verified now.
        """
        try:
            try:
                return verify()
            except (UnknownToken, KeysPending) as exc:
                await self._look_ups.run(scope, exc.source, exc.look_up)
            return verify()
        except Unauthenticated as exc:
            self._count_failure(exc, scope)
            raise

    def is_valid(self, who: Principal) -> bool:
        """Return whether the credential is neither revoked nor expired. Raises Unavailable.

        The time for which jobs may outlast a JWT does not count.
        """
        try:
            self._authenticator.scopes_of(who)
        except Forbidden:
            return False
        until = self._authenticator.until(who)
        return until is None or time.time() < until

    def _count_failure(self, exc: Unauthenticated, scope: Scope) -> None:
        """Count a failed attempt. Raises RateLimited if its source failed too often; AuditUnavailable."""
        metrics.AUTH_FAILURES.labels(exc.reason).inc()
        if exc.reason == "missing":  # a browser, a probe: no token was guessed
            return
        source = scope["client"][0] if scope["client"] else "local"
        wait_s = self._failures.wait_s(source)
        if wait_s:
            metrics.AUTH_FAILURES.labels("limited").inc()
            raise RateLimited("Too many failed attempts to authenticate from here", retry_after_s=wait_s)
        if self._failures.failed(source):
            _log.warning("auth.refused", reason=exc.reason, source=source)
            audit.denied(self._audit_log, None, "", exc.code)


class AuthenticationLayer:
    """Wraps the application. Without an ``authenticator`` every request is of the local caller.

    Raises as ``RequestAuthenticator.authenticate``, and Forbidden.
    Requests of a tenant count in those of ``service``, whose settings say who may read the metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: RequestAuthenticator | None,
        sessions: Sessions,
        service: Service,
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._authenticator = authenticator
        self._sessions = sessions
        self._requests = service.requests
        self._metrics = MetricsAccess(
            service.settings.kms.server.metrics,
            service.authenticator,
            service.kms.policy,
            Proxies(service.settings.kms.server.trusted_proxies),
        )
        self._look_ups = LookUps()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[PRINCIPAL] = await self._caller(scope)
        await self._app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Principal:
        path = scope["path"]
        if path in self._open_paths or (path == METRICS and self._may_scrape(scope)):
            return ANONYMOUS
        who = LOCAL_CALLER
        if self._authenticator is not None:
            in_session = await self._of_session(scope, self._authenticator) if is_ui(path) else None
            who = in_session or await self._authenticator.authenticate(scope)
        elif path == METRICS:
            raise Forbidden("Metrics are for callers on this machine: see [kms.server] metrics")
        self._requests.take(who.tenant)
        return who

    async def _of_session(self, scope: Scope, authenticator: RequestAuthenticator) -> Principal | None:
        """The principal of a session, which is valid only for pages. Raises Unavailable."""
        given = filter(is_id, cookies(scope["headers"], COOKIE))
        if not (ids := list(islice(given, _COOKIES))):
            return None
        found = await self._look_ups.run(scope, self._sessions, partial(self._valid, ids, authenticator))
        if found is None:
            return None
        scope[SESSION], who = found
        return who

    def _valid(self, ids: Sequence[str], authenticator: RequestAuthenticator) -> tuple[str, Principal] | None:
        """The first of these sessions whose credential is valid. Ends those whose credential is not."""
        for session in ids:
            who = self._sessions.find(session)
            if who is not None and authenticator.is_valid(who):
                return session, who
            if who is not None:
                self._sessions.end(session, who)
        return None

    def _may_scrape(self, scope: Scope) -> bool:
        address = scope["client"][0] if scope["client"] else None
        return self._metrics.is_open_to(address, (name.decode("latin-1") for name, _ in scope["headers"]))


def token_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The token of a request, empty if there is none. Raises Unauthenticated if there are several."""
    found = b""
    for name, value in headers:
        token = value if name in _KEYS else b""
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() != b"bearer":
                raise Unauthenticated("Send the token as Authorization: Bearer", reason="malformed")
        if token and token.strip() not in {b"", found}:
            if found:
                raise Unauthenticated("Several credentials were sent: send one", reason="malformed")
            found = token.strip()
    return found.decode("latin-1")
