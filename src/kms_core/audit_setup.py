"""The trail of a process, its keeper, its watch and the places of its anchors, from settings."""

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final

import redis

from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import Rules, Trail
from kms_core.audit.maintenance import Keeper
from kms_core.audit.sinks import ANCHORS, COPIES, Folder, Place, RedisStream, Stdout
from kms_core.audit.verification.monitor import Watch
from kms_core.settings.model import Settings

_STDOUT: Final = "stdout"
_REDIS: Final = "redis"
_NOTHING: Final = nullcontext()


def build(
    settings: Settings, role: str, client: redis.Redis | None, *, stdout: bool = True
) -> tuple[Trail, Keeper]:
    """Makes the two keys and the directory of anchors if there are none. Raises ConfigurationError.

    ``client`` None: no second place is in Redis. ``stdout`` False: it is for something else, and no sink.
    """
    section, strict = settings.kms.audit, settings.is_prod
    rules = Rules(
        fsync=section.durability == "fsync",
        rotate_bytes=section.rotate_bytes,
        checkpoint_lines=section.checkpoint_lines,
        checkpoint_s=section.checkpoint_s,
    )
    concealer = Concealer.at(section.key_path, strict=strict)
    signer = Signer.at(section.signing_key_path, strict=strict)
    trail = Trail(section.path, role, concealer, signer, rules)
    anchors = anchor_places(settings, client)
    for place in anchors:
        if isinstance(place, Folder):
            with suppress(OSError):  # a second place that is away holds up nothing, and is told
                place.make()
    sinks: list[Place] = []
    if stdout and _STDOUT in section.sinks:
        sinks.append(Stdout())
    if client and _REDIS in section.sinks:
        sinks.append(RedisStream(client, COPIES))
    return trail, Keeper(trail, anchors, sinks, section.keep_days)


def anchor_places(settings: Settings, client: redis.Redis | None) -> list[RedisStream | Folder]:
    """Where settings say that anchors are, to write and to read them. ``client`` None: not in Redis."""
    section = settings.kms.audit
    places: list[RedisStream | Folder] = []
    if client and section.anchor_redis:
        places.append(RedisStream(client, ANCHORS))
    if section.anchor_dir is not None:
        places.append(Folder(section.anchor_dir))
    return places


def build_watch(
    settings: Settings, client: redis.Redis | None, *, working: AbstractContextManager[object] = _NOTHING
) -> Watch:
    """What reads the log back and compares it with its anchors. ``working`` as for ``Watch``."""
    section = settings.kms.audit
    places = anchor_places(settings, client)
    return Watch(section.path, section.signing_key_path, places, working=working)
