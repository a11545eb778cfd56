"""Webhooks that were given up: look at them, and have one sent again."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from kms_api import json_body
from kms_api.deps import Service, caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_core.jobs.events.outbox import Delivery, Outbox
from kms_core.jobs.store.redis_keys import redis_errors
from kms_protocol import wire
from kms_protocol.errors import Missing, UnknownJob

router: Final = APIRouter(prefix="/webhooks", tags=["jobs"], route_class=ScopedRoute)


@router.get(
    "/dead",
    **describe.described(
        "dead_deliveries",
        answers={200: describe.gives(wire.DeliveryList, "Deliveries that were given up")},
        refuses=describe.JOBS,
    ),
)
async def dead(request: Request) -> Response:
    """Deliveries that were given up after 20 attempts or a day, newest first; the last 1,000 are kept."""
    found = await anyio.to_thread.run_sync(_dead, service(request), caller(request).tenant)
    return json_body.answer(wire.DeliveryList(deliveries=[_shape(delivery) for delivery in found]))


@router.post(
    "/dead/{delivery_id}/resend",
    **describe.described(
        "resend_delivery",
        answers={202: describe.gives(wire.DeliveryOut, "It is sent again")},
        refuses=(*describe.JOBS, Missing),
    ),
)
async def resend(request: Request, delivery_id: str) -> Response:
    """Send one of them again, with all its attempts and the same ``X-KMS-Delivery``."""
    found = await anyio.to_thread.run_sync(_resend, service(request), caller(request).tenant, delivery_id)
    return json_body.answer(_shape(found), 202)


def _dead(built: Service, tenant: str) -> list[Delivery]:
    return list(_of_tenant(built, _outbox(built), tenant))


def _resend(built: Service, tenant: str, delivery_id: str) -> Delivery:
    outbox = _outbox(built)
    for delivery in _of_tenant(built, outbox, tenant):
        if delivery.delivery_id == delivery_id:
            with redis_errors():
                if outbox.resend(delivery):
                    return delivery
    raise Missing("No delivery of this id was given up; GET /webhooks/dead lists those that were")


def _outbox(built: Service) -> Outbox:
    return Outbox(built.desk.store, {})


def _of_tenant(built: Service, outbox: Outbox, tenant: str) -> Iterator[Delivery]:
    with redis_errors():
        given_up = outbox.dead()
    for delivery in given_up:
        if delivery.tenant == tenant or (not delivery.tenant and _is_of(built, delivery.job_id, tenant)):
            yield delivery


def _is_of(built: Service, job_id: str, tenant: str) -> bool:
    """Of an entry of 0.1, which does not say whose it is, the record of its job does while it is kept."""
    try:
        built.desk.store.get(job_id, tenant)
    except UnknownJob:
        return False
    return True


def _shape(delivery: Delivery) -> wire.DeliveryOut:
    at = datetime.fromtimestamp(delivery.created_at, UTC).isoformat(timespec="milliseconds")
    return wire.DeliveryOut(
        delivery_id=delivery.delivery_id,
        job_id=delivery.job_id,
        endpoint=delivery.endpoint,
        state=delivery.state,
        attempts=delivery.attempts,
        created_at=at.replace("+00:00", "Z"),
    )
