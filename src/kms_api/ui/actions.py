"""Forms of the pages: login, logout, cancel and retry of a job, rotation of a key. Each has a CSRF token."""

from typing import Final

from fastapi import Request, Response

from kms_api import problems
from kms_api.deps import service
from kms_api.routes import jobs
from kms_api.routing import CALLER, OPEN, UI, WRITE, Call, Router
from kms_api.transport.authentication import RequestAuthenticator
from kms_api.transport.sessions import COOKIE, LASTS_S, SESSION, VISITOR, new_id
from kms_api.ui.render import Fields, PageRoute, form, render, screen, stamp_of, to
from kms_api.ui.views import THREADS
from kms_core import audit
from kms_protocol.errors import KmsError, RateLimited, Unauthenticated

router: Final = Router("pages", prefix=UI, kind=PageRoute)
_FORM_S: Final = 3600


# -- sessions ------------------------------------------------------------------------------------------


@router.endpoint("GET", "/login", OPEN)
async def login_page(request: Request) -> Response:
    """The form for a token; the overview if requests need no credentials."""
    if screen(request).entry is None:
        return to("")
    return _login_page(request)


@router.endpoint("POST", "/login", OPEN)
async def login(request: Request) -> Response:
    """Begin a session with a new id for the holder of a token."""
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


@router.call("POST", "/logout", CALLER, form, THREADS)
def logout(call: Call[Fields]) -> Response:
    """End this session, and no other of the same principal."""
    if session := call.request.scope.get(SESSION):
        with audit.recorded(call.service.kms.audit_log, call.caller, "session.end", ""):
            screen(call.request).sessions.end(session, call.caller)
    answer = to("/login")
    answer.delete_cookie(COOKIE, UI)
    return answer


async def _begin(request: Request, entry: RequestAuthenticator, token: str) -> str:
    who = await entry.authenticate(request.scope, token)
    service(request).requests.take(who.tenant)  # the tenant was not known before

    def begin() -> str:
        with audit.recorded(service(request).kms.audit_log, who, "session.begin", ""):
            return screen(request).sessions.begin(who)

    return await service(request).run(THREADS, begin)


def _login_page(request: Request, error: KmsError | None = None) -> Response:
    visitor = new_id()
    status = 200 if error is None else problems.answer_of(type(error)).status
    stamp = stamp_of(request, f"visitor {visitor}")
    answer = render(request, "login.html", status, error=error, stamp=stamp)
    if isinstance(error, RateLimited):
        answer.headers["Retry-After"] = problems.retry_after(error)
    _set_cookie(request, answer, VISITOR, visitor, _FORM_S)
    return answer


def _set_cookie(request: Request, answer: Response, name: str, value: str, lasts_s: int) -> None:
    """Set a cookie, for TLS only if the form came over TLS, also to a proxy that terminates it."""
    is_tls = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")
    answer.set_cookie(name, value, lasts_s, path=UI, secure=is_tls, httponly=True, samesite="strict")


# -- jobs and keys ---------------------------------------------------------------------------------------


@router.call("POST", "/jobs/{job_id}/cancel", WRITE, form, THREADS)
def cancel(call: Call[Fields]) -> Response:
    """Cancel a job: ``POST /jobs/{id}/cancel`` for the page."""
    job = jobs.withdraw(call.service, call.caller, call.path("job_id"))
    return to(f"/jobs/{job.job_id}", done="cancelled")


@router.call("POST", "/jobs/{job_id}/retry", WRITE, form, THREADS)
def retry(call: Call[Fields]) -> Response:
    """Retry a job: ``POST /jobs/{id}/retry`` for the page."""
    job = jobs.revive(call.service, call.caller, call.path("job_id"))
    return to(f"/jobs/{job.job_id}", done="retried")


@router.call(
    "POST",
    "/keys/{key_id}/rotate",
    CALLER,
    form,
    lambda call: call.service.rotation_pool(call.path("key_id")),
)
def rotate(call: Call[Fields]) -> Response:
    """Rotate a key: ``POST /keys/{id}/rotate`` for the page."""
    call.service.kms.rotate(call.caller, key_id=call.path("key_id"))
    return to("/keys", done="rotated")
