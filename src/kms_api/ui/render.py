"""What the routes of the page share: rendering, refusals as pages, and forms that were not forged."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode

import jinja2
import msgspec
from fastapi import Request, Response
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import Receive, Scope, Send

from kms_api import json_body
from kms_api.deps import WHO, service
from kms_api.errors import problems
from kms_api.routing import UI, UI_RULES, ScopedRoute
from kms_api.transport.authentication import RequestAuthenticator
from kms_api.transport.sessions import SESSION, VISITOR, Sessions, cookie
from kms_api.ui.runbooks import Runbook
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_protocol import __version__, wire
from kms_protocol.errors import Forbidden, InvalidRequest, KmsError

STAMP: Final = "stamp"
_FORM_BYTES: Final = 16 * 1024
_KEPT: Final = ("retry-after", "www-authenticate")
_ENDED: Final = "The session has ended: log in again"
_FORGED: Final = "The form is not one of this page, or has been open for too long: load the page again"


@dataclass(frozen=True, slots=True)
class Screen:
    """Built once by ``app.build``. ``entry`` None: callers are not authenticated."""

    templates: jinja2.Environment
    files: Mapping[str, bytes]
    runbooks: Sequence[Runbook]
    sessions: Sessions
    entry: RequestAuthenticator | None


class PageRoute(ScopedRoute):
    """A route of the page: in the table of the page's routes, and refusing with a page."""

    table: ClassVar = UI_RULES

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except KmsError as exc:
                return refusal(request, exc)

        return answer

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().handle(scope, receive, send)
        except Forbidden as exc:  # of the table
            await refusal(Request(scope), exc)(scope, receive, send)


def screen(request: Request) -> Screen:
    found: Screen = request.app.state.screen
    return found


def render(request: Request, name: str, status: int = 200, /, **facts: object) -> Response:
    """A page from a template, which gets these facts and what the frame around every page shows."""
    built, who = service(request), request.scope[WHO]
    frame = {
        "who": who,
        "has_session": SESSION in request.scope,
        "stamp": stamp_of(request, _holder(request)),
        "path": request.url.path,
        "environment": built.settings.environment,
        "version": __version__,
        "request_id": audit.request_id.get(),
    }
    return HTMLResponse(screen(request).templates.get_template(name).render(frame | facts), status)


def refusal(request: Request, error: KmsError) -> Response:
    """An error as the problem that it is at the API, on a page; the login, once the session has ended."""
    if _has_ended(request):
        return to("/login")
    made = problems.answer(error)
    problem = msgspec.json.decode(made.body, type=wire.Problem)
    page = render(request, "refused.html", made.status_code, problem=problem)
    page.headers.update({name: made.headers[name] for name in _KEPT if name in made.headers})
    return page


def _has_ended(request: Request) -> bool:
    """Whether the credential of this session expired or was revoked after the gate let the request in."""
    entry = screen(request).entry
    return SESSION in request.scope and entry is not None and not entry.is_worth(request.scope[WHO])


def to(path: str, **query: str) -> Response:
    """Where a form leads: a page that may be loaded again."""
    return RedirectResponse(f"{UI}{path}" + (f"?{urlencode(query)}" if query else ""), HTTPStatus.SEE_OTHER)


def stamp_of(request: Request, holder: str) -> str:
    """What a form for this holder carries."""
    return screen(request).sessions.stamp(holder)


async def form(request: Request) -> dict[str, str]:
    """The fields of a form of ours. Raises Forbidden if not stamped for the sender, or too late."""
    body = await json_body.read_bytes(request, _FORM_BYTES)
    if _has_ended(request):
        raise Forbidden(_ENDED)
    try:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        raise InvalidRequest("The form cannot be read") from None
    if not screen(request).sessions.is_stamp(_holder(request), fields.get(STAMP, "")):
        raise Forbidden(_FORGED)
    return fields


def _holder(request: Request) -> str:
    """Whom a form is stamped for: a session; before the login a cookie; else whoever the gate has let in."""
    if SESSION in request.scope:
        return f"session {request.scope[SESSION]}"
    who: Principal = request.scope[WHO]
    if who.name:
        return f"caller {who.tenant} {who.credential} {who.name}"
    return f"visitor {cookie(request.scope['headers'], VISITOR)}"
