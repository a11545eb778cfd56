"""Builds the audit log of a process, its maintenance, its monitor and the sinks, from settings."""

from contextlib import AbstractContextManager, suppress
from typing import Final

import redis

from kms_core.audit.keys import Concealer, OpenSealed, Signer
from kms_core.audit.log import AuditLog, AuditLogRules
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.sinks import ANCHORS, COPIES, AuditSink, FolderSink, RedisSink, StdoutSink
from kms_core.audit.verification.monitor import AuditMonitor
from kms_core.periodic import NO_LOCK
from kms_core.settings.model import Settings

_STDOUT: Final = "stdout"
_REDIS: Final = "redis"


def build(
    settings: Settings,
    role: str,
    client: redis.Redis | None,
    *,
    stdout: bool = True,
    open_sealed: OpenSealed | None = None,
) -> tuple[AuditLog, AuditMaintenance]:
    """Create the keys and the directory of anchors if they do not exist. Raises ConfigurationError.

    ``client`` None: no sink in Redis. ``stdout`` False: standard output is not a sink, since the program
    prints results there. ``open_sealed`` opens sealed key files.
    """
    section, strict = settings.kms.audit, settings.is_prod
    rules = AuditLogRules(
        fsync=section.durability == "fsync",
        rotate_bytes=section.rotate_bytes,
        checkpoint_lines=section.checkpoint_lines,
        checkpoint_s=section.checkpoint_s,
    )
    concealer = Concealer.at(section.key_path, strict=strict, open_sealed=open_sealed)
    signer = Signer.at(section.signing_key_path, strict=strict, open_sealed=open_sealed)
    audit_log = AuditLog(section.path, role, concealer, signer, rules)
    anchors = anchor_sinks(settings, client)
    for sink in anchors:
        if isinstance(sink, FolderSink):
            with suppress(OSError):  # the maintenance retries, and logs the failure
                sink.make()
    sinks: list[AuditSink] = []
    if stdout and _STDOUT in section.sinks:
        sinks.append(StdoutSink())
    if client and _REDIS in section.sinks:
        sinks.append(RedisSink(client, COPIES))
    return audit_log, AuditMaintenance(audit_log, anchors, sinks, section.keep_days)


def anchor_sinks(settings: Settings, client: redis.Redis | None) -> list[RedisSink | FolderSink]:
    """The sinks of anchors in the settings. ``client`` None: none in Redis."""
    section = settings.kms.audit
    sinks: list[RedisSink | FolderSink] = []
    if client and section.anchor_redis:
        sinks.append(RedisSink(client, ANCHORS))
    if section.anchor_dir is not None:
        sinks.append(FolderSink(section.anchor_dir))
    return sinks


def build_monitor(
    settings: Settings, client: redis.Redis | None, *, fork_lock: AbstractContextManager[object] = NO_LOCK
) -> AuditMonitor:
    """The monitor of the log. It is not started."""
    section = settings.kms.audit
    sinks = anchor_sinks(settings, client)
    return AuditMonitor(section.path, section.signing_key_path, sinks, fork_lock=fork_lock)
