"""Webhooks that were given up: list them, and send one again."""

from collections.abc import Iterator
from typing import Final

from kms_api.deps import STORE, Service
from kms_api.openapi import describe
from kms_api.routing import READ, WRITE, Call, Router, no_body
from kms_core.jobs.events.outbox import Delivery, Outbox
from kms_core.jobs.store.redis_keys import redis_errors
from kms_protocol import admin
from kms_protocol.errors import Missing, UnknownJob
from kms_protocol.units import time_text

router: Final = Router("jobs", prefix="/webhooks")


@router.call(
    "GET",
    "/dead",
    READ,
    no_body,
    STORE,
    gives="Deliveries given up",
    refuses=describe.JOBS,
)
def dead_deliveries(call: Call[None]) -> admin.DeliveryList:
    """Deliveries given up after 20 attempts or a day, newest first; the last 1,000 are kept."""
    return admin.DeliveryList(deliveries=[_shape(each) for each in _given_up(call, _outbox(call.service))])


@router.call(
    "POST",
    "/dead/{delivery_id}/resend",
    WRITE,
    no_body,
    STORE,
    answers={202: describe.gives(admin.DeliveryOut, "The delivery, which is sent again")},
    refuses=(*describe.JOBS, Missing),
)
def resend_delivery(call: Call[None]) -> admin.DeliveryOut:
    """Send a delivery again, with all its attempts and the same ``X-KMS-Delivery``."""
    outbox = _outbox(call.service)
    for delivery in _given_up(call, outbox):
        if delivery.delivery_id == call.path("delivery_id"):
            with redis_errors():
                if outbox.resend(delivery):
                    return _shape(delivery)
    raise Missing("No delivery of this id was given up; GET /webhooks/dead lists them")


def _outbox(service: Service) -> Outbox:
    return Outbox(service.submitter.store, {})


def _given_up(call: Call[None], outbox: Outbox) -> Iterator[Delivery]:
    """Those of the caller's tenant."""
    tenant = call.caller.tenant
    with redis_errors():
        found = outbox.dead()
    for delivery in found:
        if delivery.tenant == tenant or (not delivery.tenant and _is_job_of(call, delivery.job_id)):
            yield delivery


def _is_job_of(call: Call[None], job_id: str) -> bool:
    """Tell if a job is the caller's tenant's: an entry of 0.1 names no tenant, the record of its job does."""
    try:
        call.service.submitter.store.get(job_id, call.caller.tenant)
    except UnknownJob:
        return False
    return True


def _shape(delivery: Delivery) -> admin.DeliveryOut:
    return admin.DeliveryOut(
        delivery_id=delivery.delivery_id,
        job_id=delivery.job_id,
        endpoint=delivery.endpoint,
        state=delivery.state,
        attempts=delivery.attempts,
        created_at=time_text(delivery.created_at, "milliseconds"),
    )
