"""Logins: ``POST auth/<mount>/login`` verifies a JWT or a token of this service, for a short token."""

from functools import partial
from typing import Final

from fastapi import Request, Response

from kms_api import problems
from kms_api.deps import Pool, service
from kms_api.routing import OPEN, VAULT
from kms_api.transport.authentication import RequestAuthenticator
from kms_api.vault_api.models import LoginIn, VaultAnswer, VaultAuth, bare
from kms_api.vault_api.routing import LOGIN, NO_ROUTE, WRITES, Routes, body_of, check_headers
from kms_core import audit
from kms_core.auth.logins import Issued, Logins
from kms_protocol.errors import InvalidRequest

routes: Final = Routes()
_POOL: Final = Pool("login")


async def _login(request: Request) -> Response:
    """The short token, once the login is recorded. Failed attempts count as those of other credentials."""
    known, mount = service(request).authenticator, request.path_params["mount"]
    logins = known.logins if known else None
    if logins is None or mount not in logins.sections:
        return problems.vault_error(404, NO_ROUTE)
    body = await body_of(request, LoginIn)
    entry: RequestAuthenticator = request.app.state.entry
    issued = await entry.verified(request.scope, partial(_issue, logins, mount, body))
    check_headers(request.scope["headers"], issued.who)
    service(request).requests.take(issued.who.tenant)  # the tenant was not known before
    return await service(request).run(_POOL, _answer, request, issued)


def _issue(logins: Logins, mount: str, body: LoginIn) -> Issued:
    is_jwt = logins.sections[mount].method == "jwt"
    names = ("role", "jwt") if is_jwt else ("role_id", "secret_id")
    role, secret = (getattr(body, name) for name in names)
    for name, value in zip(names, (role, secret), strict=True):
        if not value:
            raise InvalidRequest(f"missing {name}")
    return (logins.by_jwt if is_jwt else logins.by_token)(mount, role, secret)


def _answer(request: Request, issued: Issued) -> Response:
    with audit.recorded(service(request).kms.audit_log, issued.who, "login", ""):
        metadata = {"role": issued.role, "tenant": issued.who.tenant}
        auth = VaultAuth(client_token=issued.text, lease_duration=issued.ttl_s, metadata=metadata)
    return bare(VaultAnswer(audit.request_id.get(), None, auth=auth))


routes.add(WRITES, LOGIN.removeprefix(VAULT), OPEN, _login)
