"""Builds the audit log of a process, its maintenance, its monitor and the sinks, from settings."""

from contextlib import suppress

import redis

from kms_core.audit.keys import Concealer, OpenSealed, Signer
from kms_core.audit.log import AuditLog
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.monitor import AuditMonitor
from kms_core.settings.model import Settings


def build(
    settings: Settings, role: str, client: redis.Redis | None, *, open_sealed: OpenSealed | None = None
) -> tuple[AuditLog, AuditMaintenance]:
    """Create the keys and the directory of anchors if they do not exist. Raises ConfigurationError.

    ``client`` None: no sink in Redis. ``open_sealed`` opens sealed key files.
    """
    section, strict = settings.kms.audit, settings.is_prod
    concealer = Concealer.at(section.key_path, strict=strict, open_sealed=open_sealed)
    signer = Signer.at(section.signing_key_path, strict=strict, open_sealed=open_sealed)
    audit_log = AuditLog(section, role, concealer, signer)
    return audit_log, AuditMaintenance(audit_log, anchor_sinks(settings, client), section.keep_days)


def anchor_sinks(settings: Settings, client: redis.Redis | None) -> list[RedisSink | FolderSink]:
    """The sinks of anchors in the settings, with their directory. ``client`` None: none in Redis."""
    section = settings.kms.audit
    sinks: list[RedisSink | FolderSink] = []
    if client and section.anchor_redis:
        sinks.append(RedisSink(client))
    if section.anchor_dir is not None:
        folder = FolderSink(section.anchor_dir)
        with suppress(OSError):  # the maintenance retries, and logs the failure
            folder.make()
        sinks.append(folder)
    return sinks


def build_monitor(settings: Settings, client: redis.Redis | None) -> AuditMonitor:
    """The monitor of the log. It is not started."""
    section = settings.kms.audit
    return AuditMonitor(section.path, section.signing_key_path, anchor_sinks(settings, client))
