"""The trail of a process, its keeper, its watch and the places of its anchors, from settings."""

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final

import redis

from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import AuditLog, AuditLogRules
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.sinks import ANCHORS, COPIES, AuditSink, FolderSink, RedisSink, StdoutSink
from kms_core.audit.verification.monitor import AuditMonitor
from kms_core.settings.model import Settings

_STDOUT: Final = "stdout"
_REDIS: Final = "redis"
_NOTHING: Final = nullcontext()


def build(
    settings: Settings, role: str, client: redis.Redis | None, *, stdout: bool = True
) -> tuple[AuditLog, AuditMaintenance]:
    """Makes the two keys and the directory of anchors if there are none. Raises ConfigurationError.

    ``client`` None: no second place is in Redis. ``stdout`` False: it is for something else, and no sink.
    """
    section, strict = settings.kms.audit, settings.is_prod
    rules = AuditLogRules(
        fsync=section.durability == "fsync",
        rotate_bytes=section.rotate_bytes,
        checkpoint_lines=section.checkpoint_lines,
        checkpoint_s=section.checkpoint_s,
    )
    concealer = Concealer.at(section.key_path, strict=strict)
    signer = Signer.at(section.signing_key_path, strict=strict)
    trail = AuditLog(section.path, role, concealer, signer, rules)
    anchors = anchor_places(settings, client)
    for place in anchors:
        if isinstance(place, FolderSink):
            with suppress(OSError):  # a second place that is away holds up nothing, and is told
                place.make()
    sinks: list[AuditSink] = []
    if stdout and _STDOUT in section.sinks:
        sinks.append(StdoutSink())
    if client and _REDIS in section.sinks:
        sinks.append(RedisSink(client, COPIES))
    return trail, AuditMaintenance(trail, anchors, sinks, section.keep_days)


def anchor_places(settings: Settings, client: redis.Redis | None) -> list[RedisSink | FolderSink]:
    """Where settings say that anchors are, to write and to read them. ``client`` None: not in Redis."""
    section = settings.kms.audit
    places: list[RedisSink | FolderSink] = []
    if client and section.anchor_redis:
        places.append(RedisSink(client, ANCHORS))
    if section.anchor_dir is not None:
        places.append(FolderSink(section.anchor_dir))
    return places


def build_watch(
    settings: Settings, client: redis.Redis | None, *, working: AbstractContextManager[object] = _NOTHING
) -> AuditMonitor:
    """What reads the log back and compares it with its anchors. ``working`` as for ``AuditMonitor``."""
    section = settings.kms.audit
    places = anchor_places(settings, client)
    return AuditMonitor(section.path, section.signing_key_path, places, working=working)
