"""Anchors of the audit log, read from the sources that the settings or the user name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kms_cli.local.valkey import is_named, redis_section
from kms_core.audit import segments
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.scan import Note, VerificationReport
from kms_core.redis_client import connect
from kms_core.settings.model import Settings
from kms_protocol.errors import AuditUnavailable, ConfigurationError

REDIS: Final = "redis"
_REDIS: Final = "Redis"
_NO_SERVER: Final = "kms up does not run on this machine, and [kms.redis] url names no other server"


@dataclass(slots=True)
class AnchorLines:
    """Anchors by source, and the sources that could not be read, with the reason.

    ``unnamed`` is the source that no setting names: the embedded Redis of ``kms up``, which need not run.
    """

    lines: dict[str, list[bytes]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unnamed: str = ""

    def note_in(self, report: VerificationReport) -> None:
        """Add the sources that could not be compared; the unnamed one only as a note."""
        report.not_compared |= self.failed
        why = report.not_compared.pop(self.unnamed, None)
        if why:
            text = f"not compared with the anchors in {self.unnamed}, so an older copy would pass: {why}"
            report.notes.append(Note("not_compared", text))


def configured_anchors(settings: Settings) -> AnchorLines:
    """Read the anchors of all sources that the settings name."""
    found, section = AnchorLines(), settings.kms.audit
    if section.anchor_redis:
        found.unnamed = "" if is_named(settings.kms.redis) else _REDIS
        _from_redis(found, settings)
    if section.anchor_dir is not None:
        _from_folder(found, section.anchor_dir)
    return found


def named_anchors(settings: Settings, sources: Sequence[str]) -> AnchorLines:
    """Read the anchors of sources that the user names: files, directories, or ``redis``."""
    found = AnchorLines()
    for source in sources:
        if source == REDIS:
            _from_redis(found, settings)
        elif Path(source).is_dir():
            _from_folder(found, Path(source))
        else:
            try:
                found.lines[source] = list(segments.lines_of(Path(source)))
            except OSError as exc:
                found.failed[source] = f"it cannot be read ({exc.strerror})"
    return found


def _from_folder(found: AnchorLines, path: Path) -> None:
    """Read the anchors of a directory. Those that can be read are compared even if others cannot."""
    folder = FolderSink(path)
    try:
        found.lines[str(path)] = folder.lines()
    except AuditUnavailable as exc:
        found.failed[str(path)] = exc.detail
    if folder.unread:
        found.failed[str(path)] = folder.unread


def _from_redis(found: AnchorLines, settings: Settings) -> None:
    section = redis_section(settings, os.environ)
    try:
        found.lines[_REDIS] = RedisSink(connect(section)).lines()
    except (AuditUnavailable, ConfigurationError) as exc:
        found.failed[_REDIS] = exc.detail if is_named(section) else f"{exc.detail}; {_NO_SERVER}"
