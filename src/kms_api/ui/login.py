"""The login of the pages and the end of a session."""

from http import HTTPStatus
from typing import Final

from fastapi import Request, Response
from starlette.responses import RedirectResponse

from kms_api import problems
from kms_api.deps import service
from kms_api.routing import CALLER, OPEN, UI, Call, Router, is_ui
from kms_api.transport.authentication import RequestAuthenticator
from kms_api.ui.render import THREADS, Fields, form, render, screen, to
from kms_api.ui.sessions import COOKIE, LASTS_S, SESSION, VISITOR, new_id
from kms_core import audit as records
from kms_protocol.errors import KmsError, RateLimited, Unauthenticated

router: Final = Router("pages", prefix=UI)
_FORM_S: Final = 3600


@router.stream("GET", "/login", OPEN)
async def login_page(call: Call[None]) -> Response:
    """The form for a token; the overview if requests need no credentials."""
    if call.request.app.entry is None:
        return to("")
    return _login_page(call.request)


@router.stream("POST", "/login", OPEN)
async def login(call: Call[None]) -> Response:
    """Begin a session with a new id for the holder of a token."""
    request, entry = call.request, call.request.app.entry
    if entry is None:
        return to("")
    token = (await form(request)).get("token", "").strip()
    try:
        session = await _begin(request, entry, token)
    except (Unauthenticated, RateLimited) as exc:
        return _login_page(request, exc)
    answer: Response = RedirectResponse(_page_after(request), HTTPStatus.SEE_OTHER)
    _set_cookie(request, answer, COOKIE, session, LASTS_S)
    answer.delete_cookie(VISITOR, UI)
    return answer


@router.call("POST", "/logout", CALLER, form, THREADS)
def logout(call: Call[Fields]) -> Response:
    """End this session, and no other of the same principal."""
    if session := call.request.scope.get(SESSION):
        with records.recorded(call.service.kms.audit_log, call.caller, "session.end", ""):
            screen(call.request).sessions.end(session, call.caller)
    answer = to("/login")
    answer.delete_cookie(COOKIE, UI)
    return answer


async def _begin(request: Request, entry: RequestAuthenticator, token: str) -> str:
    who = await entry.authenticate(request.scope, token)
    service(request).requests.take(who.tenant)  # the tenant was not known before

    def begin() -> str:
        service(request).answering()
        with records.recorded(service(request).kms.audit_log, who, "session.begin", ""):
            return screen(request).sessions.begin(who)

    return await service(request).run(THREADS, begin)


def _login_page(request: Request, error: KmsError | None = None) -> Response:
    visitor = new_id()
    status = 200 if error is None else problems.answer_of(type(error)).status
    stamp = screen(request).sessions.stamp(f"visitor {visitor}")
    after = _page_after(request)
    answer = render(request, "login.html", status, error=error, stamp=stamp, after=after, overview=UI)
    if isinstance(error, RateLimited):
        answer.headers["Retry-After"] = problems.retry_after(error)
    _set_cookie(request, answer, VISITOR, visitor, _FORM_S)
    return answer


def _page_after(request: Request) -> str:
    """The page to show after a login: the one that led there, if it is ours, else the overview."""
    page = request.query_params.get("next", "")
    return page if is_ui(page.partition("?")[0]) and not page.startswith(f"{UI}/login") else UI


def _set_cookie(request: Request, answer: Response, name: str, value: str, lasts_s: int) -> None:
    """Set a cookie, for TLS only if the form came over TLS, also to a proxy that terminates it."""
    is_tls = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")
    answer.set_cookie(name, value, lasts_s, path=UI, secure=is_tls, httponly=True, samesite="strict")
