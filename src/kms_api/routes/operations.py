"""Health, status, probes, metrics, and webhooks that were given up. None of them holds a secret."""

import time
from collections import Counter
from contextlib import suppress
from typing import Final, Literal

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST

from kms_api import json_body
from kms_api.deps import PROBES, Service
from kms_api.openapi import describe
from kms_api.routing import LISTS, METRICS, OPEN, READ, WRITE, Call, Router, Rule, no_body
from kms_core.auth.policy import Principal, allows
from kms_core.backend_watch import ROOT
from kms_core.jobs.events.outbox import Delivery, Outbox
from kms_core.jobs.store import gauges, processes, usage
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.gauges import QueueStats
from kms_core.observability.metrics import REDIS_OK, STORAGE_USED, added_usage, exposition, operations_used
from kms_protocol import __version__, admin
from kms_protocol.errors import JobsUnavailable, Missing
from kms_protocol.units import time_text

router: Final = Router("operations")
probes: Final = Router("probes")
webhooks: Final = Router("jobs", prefix="/webhooks")
NEARLY_FULL: Final = 0.9
"""The used part of the spool from which on it is degraded, as for the alert KmsSpoolNearlyFull."""
_TEXT: Final = {"text/plain": {"schema": describe.STRING}}


@router.read(
    "/health",
    OPEN,
    lambda call: call.key_pool(None),
    answers={
        200: describe.gives(admin.HealthOut, "The key works"),
        503: describe.gives(admin.HealthOut, "The key does not work"),
    },
)
def health(call: Call[None]) -> Response:
    """Tell if the default key can wrap and unwrap now: 200 or 503. Needs no credential."""
    kms = call.service.kms
    found = kms.health_check()
    shape = admin.HealthOut(
        status="healthy" if found.healthy else "unhealthy",
        backend=kms.keyring.default.backend.name,
        checked_at=time_text(found.checked_at),
    )
    return json_body.answer(shape, 200 if found.healthy else 503)


@router.read("/status", Rule("status"), PROBES, gives="The state of the service")
def status(call: Call[None]) -> admin.StatusOut:
    """Backend, environment, version, degraded parts, and counts of operations and jobs.

    Counts are of the caller's tenant, or of all tenants for callers that may read the metrics.
    """
    return condition(call.service, call.caller)


@probes.read("/livez", OPEN, None, answers={200: describe.raw("`ok` and a line end", _TEXT)})
def livez(call: Call[None]) -> Response:
    """Tell if the process answers. Depends on nothing else."""
    del call
    return Response(b"ok\n", media_type="text/plain")


@probes.read(
    "/readyz",
    OPEN,
    PROBES,
    answers={
        200: describe.gives(admin.ReadyOut, "Ready"),
        503: describe.gives(admin.ReadyOut, "Not ready"),
    },
)
def readyz(call: Call[None]) -> Response:
    """Tell if single calls can be answered: 503 if no audit record can be written, 200 also without Redis."""
    service = call.service
    can_record = service.can_record()
    ready = service.kms.health_check().healthy and can_record
    shape = admin.ReadyOut(
        status="ready" if ready else "not ready",
        jobs=service.store_probe.condition(),
        audit="available" if can_record else "unavailable",
        keys="unavailable" if service.kms.keyring.unusable_key_ids() else "available",
        spool=_spool_state(service),
    )
    return json_body.answer(shape, 200 if ready else 503)


@probes.read(METRICS, Rule("metrics"), PROBES, answers={200: describe.raw("Metrics", _TEXT)})
def metrics(call: Call[None]) -> Response:
    """Prometheus text format. The state of jobs is read from Redis at each request."""
    service, store = call.service, call.service.submitter.store
    try:
        REDIS_OK.labels("writes").set(service.answering() == "available")
        gauges.set_queue_gauges(gauges.survey_queues(store), service.settings.kms.tenants)
        REDIS_OK.labels("answers").set(1)
    except JobsUnavailable:
        REDIS_OK.labels("answers").set(0)
        gauges.clear_queue_gauges()
    STORAGE_USED.labels("spool").set(service.submitter.spool.use().ratio)
    return Response(exposition(service.watch.export), media_type=CONTENT_TYPE_LATEST)


def condition(service: Service, who: Principal) -> admin.StatusOut:
    """Return the status of the service, limited to the tenant of a principal without ``metrics``."""
    tenant = None if allows(service.kms.policy, who, "metrics") else who.tenant
    jobs, depth, workers, versions, apis, found, spooled = None, None, None, None, None, None, None
    counts, store = service.kms.usage.peek(), service.submitter.store
    with suppress(JobsUnavailable):
        service.answering()
        counts = added_usage(usage.shared_usage(store.redis), counts)
        spooled = store.spooled_bytes(tenant) if tenant else None
        found = gauges.survey_queues(store, tenant)
        jobs, workers = found.jobs, found.workers
        versions = dict(found.versions) if workers else {}
        apis = Counter(each.version for each in processes.listed(store) if each.role == "api")
        depth = found.jobs["queued"] if tenant else sum(found.depths.values())
    return admin.StatusOut(
        backend=service.kms.keyring.default.backend.name,
        environment=service.settings.environment,
        version=__version__,
        uptime_s=round(time.monotonic() - service.started, 3),
        operations=_operations(operations_used(counts, tenant)),
        jobs=jobs,
        queue_depth=depth,
        workers=workers,
        worker_versions=versions,
        api_versions=apis,
        spool=_spool(service, tenant, spooled),
        install=service.install.condition.install_id or None if tenant is None else None,
        degraded=[name for name, is_so in parts(service, found).items() if is_so],
        backends_down=_backends_down(service, who, sees_roots=tenant is None),
    )


def _backends_down(service: Service, who: Principal, *, sees_roots: bool) -> list[admin.BackendDown]:
    """The backends that do not work, of the keys that a principal may know of."""
    sees, down = service.kms.policy.sees, service.watch.down()
    return [
        admin.BackendDown(key_id=key_id, backend=backend, root=use == ROOT, since=time_text(each.since))
        for each in down
        for key_id, backend, use in (each.backend,)
        if (sees_roots if use == ROOT else sees(who, key_id))
    ]


def parts(service: Service, queues: QueueStats | None) -> dict[str, bool]:
    """Return whether each part is degraded. ``queues`` is None while Redis does not answer."""
    keyring, audit = service.kms.keyring, service.audit_monitor.condition
    store, use = service.store_probe.condition(), service.submitter.spool.use()
    authenticator = service.authenticator
    revocations = authenticator.revocations if authenticator else None
    return {
        "redis": queues is None,
        **service.install.condition.states,
        "workers": queues is not None and queues.workers == 0,
        "worker_processes": queues is not None and queues.stuck > 0,
        "redis_full": store == "full",
        "redis_read_only": store == "read_only",
        "spool": use.is_away or use.ratio >= NEARLY_FULL,
        "backend": not service.kms.health_check().healthy,
        "keys": bool(keyring.unusable_key_ids()),
        "key_documents": keyring.is_late,
        "audit": not service.can_record(),
        "audit_chain": bool(audit.problems),
        "audit_anchors": bool(audit.anchors),
        "audit_anchors_away": bool(audit.not_compared),
        "audit_unread": bool(audit.unread),
        "client_crl": revocations is not None and not revocations.is_current(),
        "tokens": authenticator is not None and not authenticator.tokens.is_current(),
    }


def _spool_state(
    service: Service,
) -> Literal["available", "nearly_full", "full", "unavailable", "not_shared"]:
    use = service.submitter.spool.use()
    if use.is_away:
        return "unavailable"
    if not service.install.condition.is_shared:
        return "not_shared"
    if use.ratio >= 1.0:
        return "full"
    return "nearly_full" if use.ratio >= NEARLY_FULL else "available"


def _spool(service: Service, tenant: str | None, spooled: int | None) -> admin.SpoolOut:
    use, store = service.submitter.spool.use(), service.submitter.store
    full = round(use.ratio, 3)
    if tenant is None:
        return admin.SpoolOut(full=full, used_bytes=use.used_bytes, limit_bytes=use.limit_bytes)
    return admin.SpoolOut(full=full, used_bytes=spooled, limit_bytes=store.spool_quota(tenant) or None)


def _operations(by: dict[str, list[int]]) -> admin.Operations:
    shapes = {
        operation: admin.OperationCount(ok=ok, failed=failed)
        for operation, (ok, failed) in sorted(by.items())
    }
    return admin.Operations(total=sum(map(sum, by.values())), by=shapes)


# -- webhooks ---------------------------------------------------------------------------------------


@webhooks.read("/dead", READ, LISTS, gives="Deliveries given up", refuses=describe.JOBS)
def dead_deliveries(call: Call[None]) -> admin.DeliveryList:
    """Deliveries given up after 20 attempts or a day, newest first; the last 1,000 are kept."""
    _, found = _given_up(call)
    return admin.DeliveryList(deliveries=[_shape(each) for each in found])


@webhooks.call(
    "POST",
    "/dead/{delivery_id}/resend",
    WRITE,
    no_body,
    LISTS,
    answers={202: describe.gives(admin.DeliveryOut, "The delivery, which is sent again")},
    refuses=(*describe.JOBS, Missing),
)
def resend_delivery(call: Call[None]) -> admin.DeliveryOut:
    """Send a delivery again, with all its attempts and the same ``webhook-id``."""
    outbox, found = _given_up(call)
    for delivery in found:
        if delivery.delivery_id == call.path("delivery_id"):
            with redis_errors():
                if outbox.resend(delivery):
                    return _shape(delivery)
    raise Missing("No delivery of this id was given up; GET /webhooks/dead lists them")


def _given_up(call: Call[None]) -> tuple[Outbox, list[Delivery]]:
    """The outbox, and the deliveries of the caller's tenant that were given up."""
    outbox = Outbox(call.service.submitter.store, {})
    with redis_errors():
        return outbox, [each for each in outbox.dead() if each.tenant == call.caller.tenant]


def _shape(delivery: Delivery) -> admin.DeliveryOut:
    return admin.DeliveryOut(
        delivery_id=delivery.delivery_id,
        job_id=delivery.job_id,
        endpoint=delivery.endpoint,
        state=delivery.state,
        attempts=delivery.attempts,
        created_at=time_text(delivery.created_at, "milliseconds"),
    )
