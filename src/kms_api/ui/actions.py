"""What the page does: log in and out, cancel and retry a job, rotate a key. Every form is stamped."""

from typing import Final

from fastapi import APIRouter, Request, Response

from kms_api.deps import call, caller, service
from kms_api.errors import problems
from kms_api.routes import jobs
from kms_api.routing import UI
from kms_api.transport.authentication import RequestAuthenticator
from kms_api.transport.sessions import COOKIE, LASTS_S, SESSION, VISITOR, new_id
from kms_api.ui.render import PageRoute, form, render, screen, stamp_of, to
from kms_api.ui.views import in_thread
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_protocol.errors import KmsError, RateLimited, Unauthenticated

router: Final = APIRouter(prefix=UI, route_class=PageRoute, include_in_schema=False)
_FORM_S: Final = 3600


# -- sessions ------------------------------------------------------------------------------------------


@router.get("/login", response_model=None)
async def login_page(request: Request) -> Response:
    """A field for a token; where nobody is asked for one, straight to the page."""
    if screen(request).entry is None:
        return to("")
    return _login_page(request)


@router.post("/login", response_model=None)
async def login(request: Request) -> Response:
    """A session for whoever the token is. It has a new id: one that somebody else knew is worth nothing."""
    entry = screen(request).entry
    if entry is None:
        return to("")
    token = (await form(request)).get("token", "").strip()
    try:
        session = await _begin(request, entry, token)
    except (Unauthenticated, RateLimited) as exc:
        return _login_page(request, exc)
    answer = to("")
    _set_cookie(request, answer, COOKIE, session, LASTS_S)
    answer.delete_cookie(VISITOR, UI)
    return answer


@router.post("/logout", response_model=None)
async def logout(request: Request) -> Response:
    """The end of this session; others of the same person go on."""
    await form(request)
    if SESSION in request.scope:
        with audit.recorded(service(request).kms.trail, caller(request), "session.end", ""):
            screen(request).sessions.end(request.scope[SESSION])
    answer = to("/login")
    answer.delete_cookie(COOKIE, UI)
    return answer


async def _begin(request: Request, entry: RequestAuthenticator, token: str) -> str:
    who = await entry.let_in(request.scope, token)
    service(request).requests.take(who.tenant)  # the gate knew no tenant yet
    return await in_thread(request, _begun, request, who)


def _begun(request: Request, who: Principal) -> str:
    with audit.recorded(service(request).kms.trail, who, "session.begin", ""):
        return screen(request).sessions.begin(who)


def _login_page(request: Request, error: KmsError | None = None) -> Response:
    visitor = new_id()
    status = 200 if error is None else problems.status_of(error)
    stamp = stamp_of(request, f"visitor {visitor}")
    answer = render(request, "login.html", status, error=error, stamp=stamp)
    if isinstance(error, RateLimited):
        answer.headers["Retry-After"] = problems.retry_after(error)
    _set_cookie(request, answer, VISITOR, visitor, _FORM_S)
    return answer


def _set_cookie(request: Request, answer: Response, name: str, value: str, lasts_s: int) -> None:
    """Never over a connection in clear, if that is how the form came: also where a proxy ends TLS."""
    is_tls = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")
    answer.set_cookie(name, value, lasts_s, path=UI, secure=is_tls, httponly=True, samesite="strict")


# -- jobs and keys ---------------------------------------------------------------------------------------


@router.post("/jobs/{job_id}/cancel", response_model=None)
async def cancel(request: Request, job_id: str) -> Response:
    """As ``POST /jobs/{id}/cancel``."""
    await form(request)
    await in_thread(request, jobs.withdraw, service(request), caller(request), job_id)
    return to(f"/jobs/{job_id}", done="cancelled")


@router.post("/jobs/{job_id}/retry", response_model=None)
async def retry(request: Request, job_id: str) -> Response:
    """As ``POST /jobs/{id}/retry``."""
    await form(request)
    await in_thread(request, jobs.revive, service(request), caller(request), job_id)
    return to(f"/jobs/{job_id}", done="retried")


@router.post("/keys/{key_id}/rotate", response_model=None)
async def rotate(request: Request, key_id: str) -> Response:
    """As ``POST /keys/{id}/rotate``."""
    built = service(request)
    await form(request)
    await call(built, built.kms.rotate, caller(request), key_id=key_id)
    return to("/keys", done="rotated")
