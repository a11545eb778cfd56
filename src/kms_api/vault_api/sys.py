"""What clients ask besides: whether the server is there and open, who they are, what is mounted."""

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.responses import Response

from kms_api.deps import call
from kms_api.vault_api import models
from kms_api.vault_api.models import Nothing, PathsIn
from kms_api.vault_api.request import VaultRequest, answer, bare
from kms_core import audit
from kms_core.auth.policy import allows
from kms_protocol import __version__
from kms_protocol.errors import AuditUnavailable, InvalidRequest

_LAST: Final = 253402300799  # 9999-12-31T23:59:59Z: an issuer of JWTs may say any number
_NEVER: Final = "0001-01-01T00:00:00Z"  # Go's word for no time
_MOUNT: Final[Mapping[str, Any]] = {
    "type": "transit",
    "description": "keys of kms-service",
    "accessor": "transit_kms",
    "config": {"default_lease_ttl": 0, "max_lease_ttl": 0, "force_no_cache": False},
    "local": False,
    "seal_wrap": False,
    "external_entropy_access": False,
    "options": None,
    "uuid": "",
    "plugin_version": "",
    "running_plugin_version": "",
    "running_sha256": "",
    "deprecation_status": "supported",
}
DEFAULT_MOUNT: Final = "transit"
_OPERATIONS: Final = {"encrypt": "encrypt", "decrypt": "decrypt", "rewrap": "rewrap", "rotate": "rotate"}
_DATA_KEYS: Final = frozenset({"plaintext", "wrapped"})
_MAX_PATHS: Final = 100


async def health(asked: VaultRequest) -> Response:
    """200 or 503, which these clients call sealed: whether the default key works and records can be kept."""
    ready = await _ready(asked)
    return bare(
        {
            "initialized": True,
            "sealed": not ready,
            "standby": False,
            "performance_standby": False,
            "replication_performance_mode": "disabled",
            "replication_dr_mode": "disabled",
            "server_time_utc": int(time.time()),
            "version": __version__,
            "cluster_name": "kms-service",
            "cluster_id": "kms-service",
        },
        200 if ready else 503,
    )


async def seal_status(asked: VaultRequest) -> Response:
    """The same in other words."""
    return bare(
        {
            "type": "kms-service",
            "initialized": True,
            "sealed": not await _ready(asked),
            "t": 1,
            "n": 1,
            "progress": 0,
            "nonce": "",
            "version": __version__,
            "build_date": "",
            "migration": False,
            "cluster_name": "kms-service",
            "cluster_id": "kms-service",
            "recovery_seal": False,
            "storage_type": "kms-service",
        }
    )


async def init(asked: VaultRequest) -> Response:
    """It always is."""
    del asked
    return bare({"initialized": True})


async def leader(asked: VaultRequest) -> Response:
    """Nobody leads: processes are alike."""
    del asked
    return bare(
        {
            "ha_enabled": False,
            "is_self": False,
            "active_time": _NEVER,
            "leader_address": "",
            "leader_cluster_address": "",
            "performance_standby": False,
            "performance_standby_last_remote_wal": 0,
        }
    )


async def mounts(asked: VaultRequest) -> Response:
    """One, by the name that most clients expect; the façade answers under any other name, too."""
    del asked
    return _doubled({f"{DEFAULT_MOUNT}/": _MOUNT})


async def visible_mounts(asked: VaultRequest) -> Response:
    """The same for a page."""
    del asked
    return answer({"secret": {f"{DEFAULT_MOUNT}/": _MOUNT}, "auth": {}})


async def mount_of(asked: VaultRequest) -> Response:
    """The mount of a path: everything before what is a path of transit."""
    parts = asked.names["mount"].strip("/").split("/")
    ends = [at for at, part in enumerate(parts) if part in {"keys", "datakey", *_OPERATIONS} and at]
    mount = "/".join(parts[: ends[0]] if ends else parts)
    return answer({**_MOUNT, "path": f"{mount}/"})


async def lookup_self(asked: VaultRequest) -> Response:
    """Who the caller is. The id is the credential's name in the audit trail, not its text."""
    until = asked.doors.until(asked.who) if asked.doors else None
    until = None if until is None else min(until, _LAST)
    now = int(time.time())
    return answer(
        {
            "id": asked.who.credential,
            "accessor": asked.who.credential,
            "display_name": asked.who.name,
            "entity_id": "",
            "meta": {"tenant": asked.who.tenant},
            "policies": ["kms-service"],
            "path": "auth/token/create",
            "type": "service",
            "creation_time": 0,
            "creation_ttl": 0,
            "explicit_max_ttl": 0,
            "num_uses": 0,
            "orphan": True,
            "renewable": False,
            "expire_time": None if until is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until)),
            "ttl": 0 if until is None else max(1, int(until) - now),
        }
    )


async def renew_self(asked: VaultRequest) -> Response:
    """Credentials of this service end when they end; clients take this answer for what it says."""
    await asked.body(Nothing)
    raise InvalidRequest("lease is not renewable: make a new token, or rotate this one, with kms token")


async def capabilities_self(asked: VaultRequest) -> Response:
    """What the caller may do under each path."""
    body = await asked.body(PathsIn)
    paths = body.paths or ([body.path] if body.path else [])
    if not 0 < len(paths) <= _MAX_PATHS:
        raise InvalidRequest(f"paths: expected 1 to {_MAX_PATHS}")
    found = {path: _capabilities(asked, path.strip("/").split("/")) for path in paths}
    return _doubled({"capabilities": found[paths[0]], **found})


def _capabilities(asked: VaultRequest, parts: list[str]) -> list[str]:
    kms, who = asked.built.kms, asked.who
    match parts:
        case [_, *_, "keys"]:
            return ["list"]
        case [_, *_, "keys", name, "rotate"]:
            operation, can = "rotate", "update"
        case [_, *_, "keys", name]:
            return ["read"] if kms.policy.sees(who, name) and name in kms.keyring.keys else ["deny"]
        case [_, *_, "datakey", kind, name] if kind in _DATA_KEYS:
            operation, can = "generate_data_key", "update"
        case [_, *_, ("encrypt" | "decrypt" | "rewrap") as operation, name]:
            can = "update"
        case _:
            return ["deny"]
    allowed = allows(
        kms.policy, who, operation, name
    )  # asked of every name: equal times for unseen and absent
    return [can] if allowed and name in kms.keyring.keys else ["deny"]


def _doubled(data: Mapping[str, object]) -> Response:
    """Some answers of Vault have their data at the top, too."""
    whole = msgspec.structs.asdict(models.VaultAnswer(audit.request_id.get(), data))
    return bare({**whole, **data})


async def _ready(asked: VaultRequest) -> bool:
    built = asked.built
    found = await call(built, built.kms.health_check)
    try:
        built.kms.trail.check()
    except AuditUnavailable:
        return False
    return found.healthy
