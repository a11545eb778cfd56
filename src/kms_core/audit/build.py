"""The trail of a process and its keeper, from settings."""

from typing import Final

import redis

from kms_core.audit.keeper import Keeper
from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.places import ANCHORS, COPIES, Folder, Place, RedisStream, Stdout
from kms_core.audit.trail import Rules, Trail
from kms_core.settings import Settings

_STDOUT: Final = "stdout"
_REDIS: Final = "redis"


def build(
    settings: Settings, role: str, client: redis.Redis | None, *, stdout: bool = True
) -> tuple[Trail, Keeper]:
    """Makes the two keys if there are none, and opens no file. Raises ConfigurationError.

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
    anchors: list[Place] = [RedisStream(client, ANCHORS)] if client and section.anchor_redis else []
    if section.anchor_dir is not None:
        anchors.append(Folder(section.anchor_dir))
    sinks: list[Place] = []
    if stdout and _STDOUT in section.sinks:
        sinks.append(Stdout())
    if client and _REDIS in section.sinks:
        sinks.append(RedisStream(client, COPIES))
    return trail, Keeper(trail, anchors, sinks, section.keep_days)
