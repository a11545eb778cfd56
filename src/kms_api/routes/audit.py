"""The audit log of the caller's tenant, in pages."""

from typing import Final

import msgspec
from msgspec import UNSET

from kms_api.deps import Pool, Service
from kms_api.openapi import describe
from kms_api.routing import Call, Router, Rule, of_tenant
from kms_core import audit as records
from kms_core.audit import query
from kms_core.audit.chain import text_of
from kms_core.audit.hosts import HostLogs, host_logs
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_protocol import admin
from kms_protocol.errors import AuditUnavailable, InvalidRequest
from kms_protocol.units import parse_time

router: Final = Router("audit")
SCOPE: Final = Rule("audit:read")
SEARCHES: Final = of_tenant(Pool("search", 4))
"""Threads for searches in the audit log, and for pages that list."""
FIELDS: Final = (
    "operation",
    "principal",
    "credential",
    "source",
    "key_id",
    "backend",
    "wrap_key",
    "file_id",
    "new_file_id",
    "stanzas",
    "request_id",
    "job_id",
    "effect",
)
_FILTERS: Final = frozenset({*FIELDS, "host", "result", "since", "until"})
_PARAMETERS: Final = _FILTERS | {"after", "limit"}
_REQUIRED: Final = frozenset(
    field.name for field in msgspec.structs.fields(admin.AuditEvent) if field.required
)
_ONE_HOST: Final = "This service reads its own log only: leave out `host` (docs/hosts.md)"
_PAGE: Final = (100, 1, 1000)
"""The events of a page: the default, and the bounds."""
_TIME: Final = {"type": "string", "format": "date-time"}
_QUERY: Final = (
    describe.query("after", describe.STRING, "`next` of the page before"),
    describe.query("limit", describe.whole(*_PAGE), "Events of this page at most"),
    describe.query("result", describe.STRING, "`ok`, `failed` for all others, or an error code"),
    describe.query(
        "host", describe.STRING, "Events of this host, where the service reads the logs of several"
    ),
    describe.query("since", _TIME, "RFC 3339, with an offset"),
    describe.query("until", _TIME, "RFC 3339, with an offset"),
    *(describe.query(name, describe.STRING, "Events whose field is exactly this") for name in FIELDS),
)


@router.read(
    "/audit", SCOPE, SEARCHES, parameters=_QUERY, gives="A page of events", refuses=(InvalidRequest,)
)
def audit(call: Call[None]) -> admin.AuditOut:
    """Operations of this tenant, oldest first.

    ``after`` is the ``next`` of the page before. Filters: operation, principal, credential, source, key_id,
    backend, wrap_key, file_id, new_file_id, stanzas, request_id, job_id, effect, result (``ok``, ``failed``
    for all others, or an error code), since and until (RFC 3339 with an offset), and host, where the service
    has copies of the logs of other hosts; ``unread`` then has those that it could not read. Each page read
    is recorded as ``audit.read``.
    """
    service, who, given = call.service, call.caller, call.query
    if given.keys() - _PARAMETERS:
        raise InvalidRequest(f"The parameters of this call are {', '.join(sorted(_PARAMETERS))}")
    wanted = EventFilter(
        equal=(("tenant", who.tenant), *((name, given[name]) for name in FIELDS if name in given)),
        result=given.get("result", ""),
        since=time_of("since", given.get("since")),
        until=time_of("until", given.get("until")),
    )
    logs, unread = logs_of(service, given.get("host", ""))
    try:
        page = query.page(logs, wanted, given.get("after"), call.number("limit", *_PAGE))
    except OSError as exc:
        raise AuditUnavailable("The audit log cannot be read") from exc
    filters = {name: value for name, value in given.items() if name in _FILTERS}
    records.read(service.kms.audit_log, who, filters, len(page.events))
    events = [shape(event) for event in page.events]
    unread = {**unread, **page.unread}
    return admin.AuditOut(events=events, next=page.following, more=page.more, unread=unread or UNSET)


def logs_of(service: Service, host: str = "") -> HostLogs:
    """The logs that the service reads, of one host if ``host`` names it. Raises InvalidRequest."""
    section = service.settings.kms.audit
    logs, unread = found = host_logs(section.path, section.copies)
    if not host:
        return found
    if host not in {*unread, *(each.host for each in logs)}:
        raise InvalidRequest(f"host is one of {', '.join(hosts(found))}" if hosts(found) else _ONE_HOST)
    return HostLogs(
        [each for each in logs if each.host == host],
        {name: why for name, why in unread.items() if name == host},
    )


def hosts(found: HostLogs) -> list[str]:
    """The names of the hosts; none where the service reads its own log only."""
    return [each.host for each in found.logs if each.host]


def shape(event: RecordedOperation) -> admin.AuditEvent:
    """Return the wire form of an operation, without the optional fields that are empty in its record."""
    fields = {"id": event.id, **msgspec.structs.asdict(event)}
    shown = {name: value for name, value in fields.items() if value or name in _REQUIRED}
    return msgspec.convert(shown, admin.AuditEvent)


def time_of(name: str, text: str | None) -> str:
    """A time in the form of audit records; empty for none. Raises InvalidRequest."""
    if text is None:
        return ""
    try:
        return text_of(parse_time(text))
    except ValueError as exc:
        raise InvalidRequest(f"{name} {exc}") from exc
