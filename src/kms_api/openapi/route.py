"""The page at ``/docs``: every call of the API, made once of the OpenAPI document."""

from functools import lru_cache
from typing import Final

import jinja2
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import HTMLResponse

from kms_api.openapi import reference_page
from kms_api.routing import DOCS
from kms_api.ui.render import PageRoute, screen

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get(DOCS, response_model=None)
async def api(request: Request) -> HTMLResponse:
    """Operations, shapes and commands to try. The same for everybody."""
    return HTMLResponse(_page(request.app, screen(request).templates))


@lru_cache(maxsize=1)
def _page(app: FastAPI, templates: jinja2.Environment) -> str:
    document = app.openapi()
    return templates.get_template("reference.html").render(
        document=document, groups=reference_page.groups(document), shapes=reference_page.shapes(document)
    )
