"""Keys as the façade shows them: those that settings name. It makes none, and hands none out."""

from typing import Final

import anyio.to_thread
from starlette.responses import Response

from kms_api.deps import call
from kms_api.errors import vault
from kms_api.vault_api import models
from kms_api.vault_api.models import KeyIn, Nothing
from kms_api.vault_api.request import VaultRequest, answer, bare
from kms_api.vault_api.transit import TYPES
from kms_core.keyring import Key
from kms_protocol.errors import InvalidRequest, UnknownKey

_THREADS: Final = "keys"
_DIGITS: Final = 9  # of a number of keys, which settings write one by one
_NEVER: Final = (
    "derived",
    "convergent_encryption",
    "exportable",
    "allow_plaintext_backup",
    "deletion_allowed",
)


async def listed(asked: VaultRequest) -> Response:
    """Names of the keys that the caller may use; ``after`` and ``limit`` as OpenBao has them."""
    after, limit = asked.query.get("after", ""), asked.query.get("limit", "")
    sees, keys = asked.built.kms.policy.sees, asked.built.kms.keyring.keys
    found = [name for name in sorted(keys) if name > after and sees(asked.who, name)]
    if limit.isdecimal():
        most = int(limit[:_DIGITS])
        found = found[:most] if most else found
    return answer({"keys": found}) if found else bare({"errors": []}, 404)


async def one(asked: VaultRequest) -> Response:
    """The record of a key; with ``list=true`` the mount ends in ``keys``, and this is a list."""
    if asked.query.get("list") == "true":
        return await listed(asked)
    try:
        return await _record(asked)
    except UnknownKey as exc:
        return vault.answer(exc, 404)


async def made(asked: VaultRequest) -> Response:
    """A key that is there stays as it is, if that is what was asked for. Others are not made."""
    body = await asked.body(KeyIn)
    if body.type is not None and body.type not in TYPES:
        raise InvalidRequest(f"type: keys here are of type {' or '.join(sorted(TYPES))}")
    _check_settings(body)
    return await _record(asked)


async def configured(asked: VaultRequest) -> Response:
    """What may be asked for is what is so; everything else is the operator's."""
    _check_settings(await asked.body(KeyIn))
    return await _record(asked)


async def rotated(asked: VaultRequest) -> Response:
    """A new version, which seals from now on; old ones decrypt."""
    await asked.body(Nothing)
    await call(asked.built, asked.built.kms.rotate, asked.who, key_id=asked.key_id)
    return await _record(asked)


async def deleted(asked: VaultRequest) -> Response:
    """Never."""
    _seen(asked)
    raise InvalidRequest("deletion is not allowed for this key: whoever runs the service retires it")


def _check_settings(body: KeyIn) -> None:
    for name in _NEVER:
        if getattr(body, name):
            raise InvalidRequest(f"{name}: keys stay in this service, and none is derived from another")
    if (body.min_decryption_version or 0) > 1 or body.min_encryption_version or body.key_size:
        raise InvalidRequest("versions are retired by whoever runs the service, in the key's backend")
    if str(body.auto_rotate_period or "0").strip("0hms"):
        raise InvalidRequest("auto_rotate_period: the service rotates by [kms.rotation] every_days")


def _seen(asked: VaultRequest) -> Key:
    if not asked.built.kms.policy.sees(asked.who, asked.key_id):
        raise UnknownKey
    return asked.built.kms.keyring.named(asked.key_id)


async def _record(asked: VaultRequest) -> Response:
    key = _seen(asked)
    if not key.blocks:
        return answer(shape(key))
    return answer(await anyio.to_thread.run_sync(shape, key, limiter=asked.built.limiter(_THREADS)))


def shape(key: Key) -> models.VaultKey:
    """Where nobody knows when a version was made, its number stands for that: it changes by a rotation.

    One that others make meanwhile is the latest next time.
    """
    numbers = key.numbers()
    made_at = {version.version: version.created_at for version in key.backend.versions()}
    times = {
        str(number): int(at.timestamp()) if (at := made_at.get(version)) else number
        for version, number in sorted(numbers.items(), key=lambda pair: pair[1])
    }
    latest = numbers.get(key.backend.current_version(), max(numbers.values()))
    return models.VaultKey(name=key.key_id, keys=times, latest_version=latest)
