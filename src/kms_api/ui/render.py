"""Rendering of pages: templates and their filters, errors as pages, forms with CSRF tokens, and runbooks.

``runbooks.md`` is Markdown with sections, paragraphs, inline code and strong text only.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final, Self, TypeAlias
from urllib.parse import parse_qsl, urlencode

import jinja2
from fastapi import Request, Response
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import Scope

from kms_api import json_body, problems
from kms_api.deps import ANONYMOUS, PRINCIPAL, Pool, service
from kms_api.routing import UI, to_login
from kms_api.transport.authentication import RequestAuthenticator
from kms_api.ui.sessions import SESSION, VISITOR, Sessions, cookies
from kms_core import audit
from kms_core.auth.policy import Principal, allows
from kms_core.observability.degraded import DEGRADED
from kms_protocol import __version__, wire
from kms_protocol.errors import Forbidden, InvalidRequest, JobsUnavailable, KmsError, Unauthenticated
from kms_protocol.units import age_s, duration_text, parse_time, size_text, time_text

Fields: TypeAlias = dict[str, str]
_FORM_BYTES: Final = 16 * 1024
THREADS: Final = Pool("page")
_ENDED: Final = "The session has expired: log in again"
_FORGED: Final = "The form is not from this page or was open for too long: load the page again"
STATIC_FILES: Final[Mapping[str, str]] = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "docs.css": "text/css",
    "docs.js": "text/javascript",
    "swagger-ui.css.gz": "text/css",
    "swagger-ui-bundle.js.gz": "text/javascript",
}
"""Media types of the files at ``/ui/static/{name}``."""
STATIC: Final = Path(__file__).with_name("static")
RUNBOOKS: Final = Path(__file__).with_name("runbooks.md")
_SECTION: Final = re.compile(r"^## (\w+)$", re.MULTILINE)
_TOKEN: Final = re.compile(r"`([^`]+)`|\b(Kms[A-Z]\w+)\b|\*\*([^*]+)\*\*")


def when(text: str) -> str:
    """Format an RFC 3339 time to the second, in UTC."""
    return f"{parse_time(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(text: str) -> str:
    """Format the time between an RFC 3339 time and now."""
    seconds = age_s(text)
    return f"{duration_text(seconds)} ago" if seconds >= 0 else f"in {duration_text(-seconds)}"


def number(count: int) -> str:
    """Format a count with thousands separators."""
    return f"{count:,}"


def percent(part: float) -> str:
    """Format a part of 1.0; a part below one percent is "< 1 %"."""
    return "< 1 %" if 0 < part < 0.01 else f"{part:.0%}".replace("%", " %")  # noqa: PLR2004 -- one in a hundred


def took(seconds: float) -> str:
    """Format how long a job took, which is often less than a second."""
    return duration_text(seconds) if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def amount(progress: wire.JobProgress) -> str:
    """Format the progress of a job, as ``page.js`` does while it runs."""
    if not progress.items:
        return f"{size_text(progress.bytes_done)} of {size_text(progress.bytes)}"
    failed = f", {number(progress.items_failed)} refused" if progress.items_failed else ""
    return f"{number(progress.items_done)} of {number(progress.items)} items{failed}"


FILTERS: Final[Mapping[str, Callable[..., str]]] = {
    **{made.__name__: made for made in (when, ago, number, percent, took, amount)},
    "span": duration_text,
    "size": size_text,
    "utc": time_text,
}


@dataclass(frozen=True, slots=True)
class Runbook:
    """An alert and its paragraphs as HTML. The anchor of its section is the alert in lower case."""

    alert: str
    paragraphs: tuple[Markup, ...]


def load_runbooks() -> tuple[Runbook, ...]:
    """Read ``runbooks.md``. Names of alerts become links."""
    _, *parts = _SECTION.split(RUNBOOKS.read_text("utf-8"))
    alerts = parts[::2]
    return tuple(
        Runbook(alert, tuple(prose(each, alerts) for each in body.split("\n\n") if each.strip()))
        for alert, body in zip(alerts, parts[1::2], strict=True)
    )


def prose(text: str, alerts: Sequence[str] = ()) -> Markup:
    """Format a paragraph: inline code, strong text, and links to these alerts."""

    def html(found: re.Match[str]) -> str:
        code, alert, strong = found.groups()
        if code:
            return f"<code>{code}</code>"
        if strong:
            return f"<strong>{strong}</strong>"
        return f'<a href="#{alert.lower()}">{alert}</a>' if alert in alerts else str(alert)

    return Markup(_TOKEN.sub(html, escape(" ".join(text.split()))))  # noqa: S704 -- escaped before


@dataclass(frozen=True, slots=True)
class Screen:
    """Templates, runbooks and sessions of an application."""

    templates: jinja2.Environment
    runbooks: Sequence[Runbook]
    sessions: Sessions

    @classmethod
    def load(cls, sessions: Sessions) -> Self:
        """Read the templates, which escape all values and fail on unknown names, and the runbooks."""
        templates = jinja2.Environment(
            loader=jinja2.PackageLoader(__package__ or ""),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.filters |= {**FILTERS, "prose": prose}
        return cls(templates, load_runbooks(), sessions)


def refused(scope: Scope, error: Exception) -> Response:
    """The page of an error; a redirect to the login if there is no session, or if it has ended."""
    if isinstance(error, Unauthenticated) and error.reason == "missing":
        return to_login(scope)
    reply = problems.reply_to(error)
    request = Request({**scope, PRINCIPAL: scope.get(PRINCIPAL, ANONYMOUS)})
    if _has_ended(request):
        return to_login(scope)
    problem, texts = problems.body_of(reply), screen(request).runbooks
    part = DEGRADED["redis"] if reply.code == JobsUnavailable.code else None
    page = render(request, "refused.html", problem.status, problem=problem, part=part, runbooks=texts)
    page.headers.update(reply.headers)
    return page


def screen(request: Request) -> Screen:
    """Return the templates and texts of the pages."""
    found: Screen = request.app.screen
    return found


def render(request: Request, name: str, status: int = 200, /, **facts: object) -> Response:
    """A page from a template with the values ``facts`` and those of the frame."""
    frame = {
        "who": request.scope[PRINCIPAL],
        "may": partial(_may, request),
        "has_session": SESSION in request.scope,
        "stamp": screen(request).sessions.stamp(_holder(request)),
        "path": request.url.path,
        "method": request.method,
        "as_of": time_text(time.time()),
        "environment": service(request).settings.environment,
        "version": __version__,
        "request_id": audit.request_id.get(),
    }
    return HTMLResponse(screen(request).templates.get_template(name).render(frame | facts), status)


def _may(request: Request, operation: str) -> bool:
    """Return whether policy allows the caller this operation.

    True also while the credential cannot be verified: a request for the operation answers with that error.
    """
    try:
        return allows(service(request).kms.policy, request.scope[PRINCIPAL], operation)
    except KmsError:
        return True


def _has_ended(request: Request) -> bool:
    """Return whether the credential of this session expired or was revoked after authentication."""
    entry: RequestAuthenticator | None = request.app.entry
    return SESSION in request.scope and entry is not None and not entry.is_valid(request.scope[PRINCIPAL])


def to(path: str, **query: str) -> Response:
    """Redirect a form to a page, which can be reloaded."""
    return RedirectResponse(f"{UI}{path}" + (f"?{urlencode(query)}" if query else ""), HTTPStatus.SEE_OTHER)


async def form(request: Request) -> Fields:
    """Fields of a form. Raises Forbidden without a valid CSRF token, InvalidRequest."""
    body = await json_body.read_bytes(request, _FORM_BYTES)
    if _has_ended(request):
        raise Forbidden(_ENDED)
    try:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        raise InvalidRequest("The form cannot be read") from None
    if not screen(request).sessions.is_stamp(_holder(request), fields.get("stamp", "")):
        raise Forbidden(_FORGED)
    return fields


def _holder(request: Request) -> str:
    """The holder of a form: a session, an authenticated principal, or before the login a cookie."""
    if SESSION in request.scope:
        return f"session {request.scope[SESSION]}"
    who: Principal = request.scope[PRINCIPAL]
    if who.name:
        return f"caller {who.tenant} {who.credential} {who.name}"
    return f"visitor {next(cookies(request.scope['headers'], VISITOR), '')}"
