"""Where workflows that have no HTTP learn whom to seal their messages to; serves no private key."""

from typing import Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from kms_api import json_body
from kms_api.deps import service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_core.age.recipients import version_of
from kms_core.jobs.submission import celery_intake
from kms_protocol import wire
from kms_protocol.errors import BackendUnavailable, UnknownKey

router: Final = APIRouter(tags=["jobs"], route_class=ScopedRoute)


@router.get(
    "/intake",
    **describe.described(
        "intake",
        answers={200: describe.gives(wire.IntakeOut, "Whom to seal messages to")},
        refuses=(UnknownKey, BackendUnavailable),
    ),
)
async def whom(request: Request) -> Response:
    """The age recipient of ``kms.submit`` messages (Celery); 404 where the service takes none."""
    path = service(request).settings.kms.jobs.intake_identity_path
    found = await anyio.to_thread.run_sync(celery_intake.recipient, path)
    return json_body.answer(
        wire.IntakeOut(recipient=str(found), key_version=version_of(found), version=celery_intake.VERSION)
    )
