"""Keys, health, mounts, logins and the caller's token, as clients of Vault use them.

The keys are those that the settings name. This API makes none and exports none.
"""

import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

from kms_api import problems
from kms_api.deps import KEYS, Pool, service
from kms_api.routing import OPEN, VAULT, Call
from kms_api.transport.authentication import RequestAuthenticator, token_of
from kms_api.vault_api import models
from kms_api.vault_api.models import (
    EmptyIn,
    KeyIn,
    LoginIn,
    PathsIn,
    VaultAnswer,
    VaultAuth,
    VaultKey,
    answer,
    bare,
)
from kms_api.vault_api.routing import LOGIN, WRITES, VaultRoutes, body_of, check_headers
from kms_api.vault_api.transit import TYPES
from kms_core import audit
from kms_core.auth.logins import PREFIX, Issued, Logins
from kms_core.auth.policy import allows
from kms_core.keyring import Key
from kms_protocol import __version__
from kms_protocol.errors import InvalidRequest, UnknownKey
from kms_protocol.units import time_text

routes: Final = VaultRoutes()
_DIGITS: Final = 9  # of a number of keys
_ALWAYS_FALSE: Final = (
    "derived",
    "convergent_encryption",
    "exportable",
    "allow_plaintext_backup",
    "deletion_allowed",
)
_LAST: Final = 253402300799  # 9999-12-31T23:59:59Z: an issuer of JWTs may say any number
_NEVER: Final = "0001-01-01T00:00:00Z"  # no time, as Go writes it
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
_TRANSIT_PATHS: Final = frozenset({"keys", "datakey", "encrypt", "decrypt", "rewrap", "rotate"})
_DATA_KEYS: Final = frozenset({"plaintext", "wrapped"})
_MAX_PATHS: Final = 100
_POOL: Final = Pool("login")


@routes.read("{mount}/keys", None, methods=("GET", "LIST"))
def list_keys(call: Call[None]) -> Response:
    """Names of the keys that the caller may use; ``after`` and ``limit`` as OpenBao has them."""
    after, limit = call.query.get("after", ""), call.query.get("limit", "")
    sees, keys = call.service.kms.policy.sees, call.service.kms.keyring.keys
    found = [name for name in sorted(keys) if name > after and sees(call.caller, name)]
    if limit.isdecimal():
        most = int(limit[:_DIGITS])
        found = found[:most] if most else found
    return answer({"keys": found}) if found else bare({"errors": []}, 404)


@routes.read("{mount}/keys/{name}", KEYS)
def get_key(call: Call[None]) -> Response | VaultKey:
    """The record of a key."""
    try:
        return shape(_seen(call))
    except UnknownKey as exc:
        return problems.vault_answer(exc, 404)


@routes.write("{mount}/keys/{name}", KeyIn, KEYS)
@routes.write("{mount}/keys/{name}/config", KeyIn, KEYS)
def create_key(call: Call[KeyIn]) -> VaultKey:
    """The record of an existing key with exactly these settings. No key is made, and none is changed."""
    body = call.body
    if body.type is not None and body.type not in TYPES:
        raise InvalidRequest(f"type: keys here are of type {' or '.join(sorted(TYPES))}")
    for name in _ALWAYS_FALSE:
        if getattr(body, name):
            raise InvalidRequest(f"{name}: keys stay in this service, and none is derived from another")
    if (body.min_decryption_version or 0) > 1 or body.min_encryption_version or body.key_size:
        raise InvalidRequest("versions are retired by the operator of the service, in the key's backend")
    if str(body.auto_rotate_period or "0").strip("0hms"):
        raise InvalidRequest("auto_rotate_period: the service rotates by [kms.rotation] every_days")
    return shape(_seen(call))


@routes.write(
    "{mount}/keys/{name}/rotate", EmptyIn, lambda call: call.service.rotation_pool(call.path("name"))
)
def rotate_key(call: Call[EmptyIn]) -> VaultKey:
    """A new version, which seals from now on; old ones decrypt."""
    call.service.kms.rotate(call.caller, key_id=call.path("name"))
    return shape(_seen(call))


@routes.read("{mount}/keys/{name}", None, methods=("DELETE",))
def delete_key(call: Call[None]) -> Response:
    """Refuse: keys are not deleted here."""
    _seen(call)
    raise InvalidRequest("deletion is not allowed for this key: the operator of the service retires it")


def _seen(call: Call[object]) -> Key:
    key_id = call.path("name")
    if not call.service.kms.policy.sees(call.caller, key_id):
        raise UnknownKey
    return call.service.kms.keyring.named(key_id)


def shape(key: Key) -> VaultKey:
    """The record of a key. A version of unknown age has its number as time, which a rotation changes.

    A version that another process makes during this call is the latest one from the next call on.
    """
    numbers, versions = key.numbers(), key.backend.versions()
    made_at = {version.version: version.created_at for version in versions}
    times = {
        str(number): int(at.timestamp()) if (at := made_at.get(version)) else number
        for version, number in sorted(numbers.items(), key=lambda pair: pair[1])
    }
    latest = numbers.get(versions[-1].version, max(numbers.values()))
    return VaultKey(name=key.key_id, keys=times, latest_version=latest)


@routes.read("sys/health", lambda call: call.key_pool(None), rule=OPEN)
def health(call: Call[None]) -> Response:
    """Tell if the default key works and records can be written: 200, or 503, which clients call sealed."""
    ready = _ready(call)
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


@routes.read("sys/seal-status", lambda call: call.key_pool(None), rule=OPEN)
def seal_status(call: Call[None]) -> Response:
    """Return ``health`` with status 200 whatever the state is."""
    return bare(
        {
            "type": "kms-service",
            "initialized": True,
            "sealed": not _ready(call),
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


@routes.read("sys/init", None, rule=OPEN)
def init(call: Call[None]) -> Response:
    """Always initialized."""
    del call
    return bare({"initialized": True})


@routes.read("sys/leader", None, rule=OPEN)
def leader(call: Call[None]) -> Response:
    """No leader: all processes are alike."""
    del call
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


@routes.read("sys/mounts", None)
def mounts(call: Call[None]) -> Response:
    """One mount, by the name that most clients expect; the API answers under any other name, too."""
    del call
    return _doubled({f"{DEFAULT_MOUNT}/": _MOUNT})


@routes.read("sys/internal/ui/mounts", None)
def visible_mounts(call: Call[None]) -> Response:
    """List the mounts, in the format of the web page of OpenBao."""
    del call
    return answer({"secret": {f"{DEFAULT_MOUNT}/": _MOUNT}, "auth": {}})


@routes.read("sys/internal/ui/mounts/{mount}", None)
def mount_of(call: Call[None]) -> Response:
    """The mount of a path: everything before a path of transit."""
    parts = call.path("mount").strip("/").split("/")
    ends = [at for at, part in enumerate(parts) if part in _TRANSIT_PATHS and at]
    mount = "/".join(parts[: ends[0]] if ends else parts)
    return answer({**_MOUNT, "path": f"{mount}/"})


@routes.read("auth/token/lookup-self", None)
def lookup_self(call: Call[None]) -> Response:
    """The caller. The id is the token itself, which the ``bao`` command stores at its login."""
    who, authenticator = call.caller, call.service.authenticator
    until = authenticator.until(who) if authenticator else None
    made = authenticator.made_at(who) if authenticator else None
    until = None if until is None else min(until, _LAST)
    now, token = int(time.time()), token_of(call.headers.raw)
    return answer(
        {
            "id": token or who.credential,
            "accessor": who.credential,
            "display_name": who.name,
            "entity_id": "",
            "meta": {"tenant": who.tenant},
            "policies": ["kms-service"],
            "path": "auth/token/create",
            "type": "batch" if token.startswith(PREFIX) else "service",
            "creation_time": int(made or 0),
            "issue_time": _NEVER if made is None else time_text(made),
            "creation_ttl": int(until - made) if made and until else 0,
            "explicit_max_ttl": 0,
            "num_uses": 0,
            "orphan": True,
            "renewable": False,
            "expire_time": None if until is None else time_text(until),
            "ttl": 0 if until is None else max(1, int(until) - now),
        }
    )


@routes.write("auth/token/renew-self", EmptyIn, None)
def renew_self(call: Call[EmptyIn]) -> Response:
    """Refuse: credentials of this service cannot be renewed."""
    del call
    raise InvalidRequest("lease is not renewable: make a new token, or rotate this one, with kms token")


@routes.write("auth/token/revoke-self", EmptyIn, None)
def revoke_self(call: Call[EmptyIn]) -> Response:
    """Refuse: the tokens of logins expire soon, the others are revoked by the operator."""
    del call
    raise InvalidRequest("batch tokens cannot be revoked: they expire soon; others are, by kms token revoke")


@routes.write("sys/capabilities-self", PathsIn, None)
def capabilities_self(call: Call[PathsIn]) -> Response:
    """The operations that the caller may do under each path."""
    body = call.body
    paths = body.paths or ([body.path] if body.path else [])
    if not 0 < len(paths) <= _MAX_PATHS:
        raise InvalidRequest(f"paths: expected 1 to {_MAX_PATHS}")
    found = {path: _capabilities(call, path.strip("/").split("/")) for path in paths}
    return _doubled({"capabilities": found[paths[0]], **found})


def _capabilities(call: Call[PathsIn], parts: list[str]) -> list[str]:
    kms, who = call.service.kms, call.caller
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
    # of every name: unseen and absent ones take equal times
    allowed = allows(kms.policy, who, operation, name)
    return [can] if allowed and name in kms.keyring.keys else ["deny"]


def _doubled(data: Mapping[str, object]) -> Response:
    """An answer of Vault that has its data at the top as well."""
    whole = msgspec.structs.asdict(models.VaultAnswer(audit.request_id.get(), data))
    return bare({**whole, **data})


def _ready(call: Call[None]) -> bool:
    return call.service.can_record() and call.service.kms.health_check().healthy


async def _login(request: Request) -> Response:
    """The short token, once the login is recorded. Failed attempts count as those of other credentials."""
    known, mount = service(request).authenticator, request.path_params["mount"]
    logins = known.logins if known else None
    if logins is None or mount not in logins.sections:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    body = await body_of(request, LoginIn)
    entry: RequestAuthenticator = request.app.entry
    issued = await entry.verified(request.scope, partial(_issue, logins, mount, body))
    check_headers(request.scope["headers"], issued.who)
    service(request).requests.take(issued.who.tenant)  # the tenant was not known before
    return await service(request).run(_POOL, _answer, request, issued)


def _issue(logins: Logins, mount: str, body: LoginIn) -> Issued:
    is_jwt = logins.sections[mount].method == "jwt"
    names = ("role", "jwt") if is_jwt else ("role_id", "secret_id")
    role, secret = (getattr(body, name) for name in names)
    for name, value in zip(names, (role, secret), strict=True):
        if not value:
            raise InvalidRequest(f"missing {name}")
    return (logins.by_jwt if is_jwt else logins.by_token)(mount, role, secret)


def _answer(request: Request, issued: Issued) -> Response:
    with audit.recorded(service(request).kms.audit_log, issued.who, "login", ""):
        metadata = {"role": issued.role, "tenant": issued.who.tenant}
        auth = VaultAuth(client_token=issued.text, lease_duration=issued.ttl_s, metadata=metadata)
    return bare(VaultAnswer(audit.request_id.get(), None, auth=auth))


routes.add(WRITES, LOGIN.removeprefix(VAULT), OPEN, _login)
