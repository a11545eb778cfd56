"""Where workflows that have no HTTP learn whom to seal their messages to; serves no private key."""

from typing import Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from kms_api import bodies, described
from kms_api.deps import service
from kms_api.rules import Ruled
from kms_core import wire
from kms_core.envelope.native import version_of
from kms_core.errors import BackendUnavailable, UnknownKey
from kms_core.jobs import intake

router: Final = APIRouter(tags=["jobs"], route_class=Ruled)


@router.get(
    "/intake",
    **described.described(
        "intake",
        answers={200: described.gives(wire.IntakeOut, "Whom to seal messages to")},
        refuses=(UnknownKey, BackendUnavailable),
    ),
)
async def whom(request: Request) -> Response:
    """The age recipient of ``kms.submit`` messages (Celery); 404 where the service takes none."""
    path = service(request).settings.kms.jobs.intake_identity_path
    found = await anyio.to_thread.run_sync(intake.recipient, path)
    return bodies.answer(
        wire.IntakeOut(recipient=str(found), key_version=version_of(found), version=intake.VERSION)
    )
