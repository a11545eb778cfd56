"""Keys: their versions, the age and usage of each, and rotation."""

from datetime import datetime
from functools import partial
from typing import Final

from kms_api.deps import KEYS, Service
from kms_api.routing import CALLER, Call, Router, no_body
from kms_core import key_rotation
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.store import usage
from kms_core.keyring import Key, ask_all
from kms_core.observability import metrics
from kms_protocol import admin
from kms_protocol.errors import (
    BackendUnavailable,
    JobsUnavailable,
    RotationRefused,
    TooManyVersions,
    UnknownKey,
)
from kms_protocol.units import time_text

router: Final = Router("keys", prefix="/keys")


@router.read("", CALLER, KEYS, gives="Keys")
def list_keys(call: Call[None]) -> admin.KeysOut:
    """The keys that the caller may use and their versions, the version in use last.

    Counts are of all tenants, so only callers that may read the metrics get them.
    """
    return admin.KeysOut(keys=visible(call.service, call.caller))


@router.read("/{key_id}", CALLER, KEYS, gives="The key", refuses=(UnknownKey,))
def get_key(call: Call[None]) -> admin.KeyOut:
    """One key. Counts are of all processes, some seconds old; null if Redis does not answer."""
    service, key_id = call.service, call.path("key_id")
    if not service.kms.policy.sees(call.caller, key_id):
        raise UnknownKey
    return _shape(service, service.kms.keyring.named(key_id), _counts(service, call.caller))


@router.call(
    "POST",
    "/{key_id}/rotate",
    CALLER,
    no_body,
    lambda call: call.service.rotation_pool(call.path("key_id")),
    gives="The new version",
    refuses=(UnknownKey, BackendUnavailable, RotationRefused, TooManyVersions),
)
def rotate_key(call: Call[None]) -> admin.RotateOut:
    """Make a new version, which seals from now on; old ones decrypt. Rewrap or reseal moves files to it."""
    made = call.service.kms.rotate(call.caller, key_id=call.path("key_id"))
    return admin.RotateOut(key_id=made.key_id, key_version=made.version, backend=made.backend)


def visible(service: Service, who: Principal) -> list[admin.KeyOut]:
    """Return the keys that a principal may see. Their servers are asked at the same time."""
    counts, sees = _counts(service, who), service.kms.policy.sees
    keys = [key for key_id, key in sorted(service.kms.keyring.keys.items()) if sees(who, key_id)]
    return [asked.result() for asked in ask_all(partial(_shape, service, key, counts) for key in keys)]


def _counts(service: Service, who: Principal) -> dict[str, int] | None:
    if not allows(service.kms.policy, who, "metrics"):
        return None
    try:
        service.answering()
        return metrics.added_usage(
            usage.shared_usage(service.submitter.store.redis), service.kms.usage.peek()
        )
    except JobsUnavailable:
        return None


def _shape(service: Service, key: Key, counts: dict[str, int] | None) -> admin.KeyOut:
    try:
        versions = key.backend.versions()
        state = key_rotation.state_of(key, key.backend, counts or {}, service.settings.kms.rotation)
    except BackendUnavailable:
        versions, state = [], None
    return admin.KeyOut(
        id=key.key_id,
        backend=key.backend.name,
        current_version=state.current.version if state else None,
        versions=[_version(key, version.version, version.created_at, counts) for version in versions],
        default=key is service.kms.keyring.default,
        others=[backend.name for backend in key.others],
        rotate_at=_time(state.due_at) if state else None,
        budget=state.budget if state and counts is not None else None,
    )


def _version(
    key: Key, version: str, created_at: datetime | None, counts: dict[str, int] | None
) -> admin.KeyVersionOut:
    messages, size = None, None
    if counts is not None:
        messages, size = metrics.usage_of_version(counts, key.key_id, version, key.backend.name)
    return admin.KeyVersionOut(version=version, created_at=_time(created_at), operations=messages, bytes=size)


def _time(at: datetime | None) -> str | None:
    return None if at is None else time_text(at)
