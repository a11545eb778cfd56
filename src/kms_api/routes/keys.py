"""Keys: which there are, how old their versions are and what those have sealed, and new versions."""

from datetime import UTC, datetime
from typing import Final

import anyio.to_thread
import msgspec
from fastapi import APIRouter, Request, Response

from kms_api import json_body
from kms_api.deps import Service, call, caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_core import key_rotation
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.store import usage_flush
from kms_core.keyring import Key
from kms_core.observability import usage
from kms_protocol import wire
from kms_protocol.errors import BackendUnavailable, JobsUnavailable, UnknownKey

router: Final = APIRouter(prefix="/keys", tags=["keys"], route_class=ScopedRoute)
_THREADS: Final = "keys"


@router.get("", **describe.described("list_keys", answers={200: describe.gives(wire.KeysOut, "Keys")}))
async def keys(request: Request) -> Response:
    """The keys that the caller may use and their versions, the one in use last.

    Counts are of all tenants together, so they are for those who may read the metrics.
    """
    built = service(request)
    found = await anyio.to_thread.run_sync(visible, built, caller(request), limiter=built.limiter(_THREADS))
    return json_body.answer(wire.KeysOut(keys=found))


@router.get(
    "/{key_id}",
    **describe.described(
        "get_key", answers={200: describe.gives(wire.KeyOut, "The key")}, refuses=(UnknownKey,)
    ),
)
async def key(request: Request, key_id: str) -> Response:
    """One key. Counts are of all processes, some seconds old; null while Redis does not answer."""
    built, who = service(request), caller(request)
    if not built.kms.policy.sees(who, key_id):
        raise UnknownKey
    found = built.kms.keyring.named(key_id)
    shape = await anyio.to_thread.run_sync(_one, built, who, found, limiter=built.limiter(_THREADS))
    return json_body.answer(shape)


@router.post(
    "/{key_id}/rotate",
    **describe.described(
        "rotate_key",
        answers={200: describe.gives(wire.RotateOut, "The new version")},
        refuses=(UnknownKey, BackendUnavailable),
    ),
)
async def rotate(request: Request, key_id: str) -> Response:
    """A new version, which seals from now on; old ones decrypt. Files move to it by rewrap or reseal."""
    built = service(request)
    made = await call(built, built.kms.rotate, caller(request), key_id=key_id)
    return json_body.answer(
        wire.RotateOut(key_id=made.key_id, key_version=made.version, backend=made.backend)
    )


def visible(built: Service, who: Principal) -> list[wire.KeyOut]:
    counts, sees = _counts(built, who), built.kms.policy.sees
    keys = sorted(built.kms.keyring.keys.items())
    return [_shape(built, key, counts) for key_id, key in keys if sees(who, key_id)]


def _one(built: Service, who: Principal, key: Key) -> wire.KeyOut:
    return _shape(built, key, _counts(built, who))


def _counts(built: Service, who: Principal) -> dict[str, int] | None:
    if not allows(built.kms.policy, who, "metrics"):
        return None
    try:
        return usage.together(usage_flush.shared(built.desk.store.redis), built.kms.tally.peek())
    except JobsUnavailable:
        return None


def _shape(built: Service, key: Key, counts: dict[str, int] | None) -> wire.KeyOut:
    plain = wire.KeyOut(
        id=key.key_id,
        backend=key.backend.name,
        current_version=None,
        versions=[],
        default=key is built.kms.keyring.default,
        others=[backend.name for backend in key.others],
    )
    try:
        versions = key.backend.versions()
        state = key_rotation.state_of(key, key.backend, counts or {}, key_rotation.rules_of(built.settings))
    except BackendUnavailable:
        return plain
    return msgspec.structs.replace(
        plain,
        current_version=state.current.version,
        versions=[_version(key, version.version, version.created_at, counts) for version in versions],
        rotate_at=_time(state.due_at),
        budget=None if counts is None else state.budget,
    )


def _version(
    key: Key, version: str, created_at: datetime | None, counts: dict[str, int] | None
) -> wire.KeyVersionOut:
    messages, size = None, None
    if counts is not None:
        messages, size = usage.of_version(counts, key.key_id, version, key.backend.name)
    return wire.KeyVersionOut(version=version, created_at=_time(created_at), operations=messages, bytes=size)


def _time(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
