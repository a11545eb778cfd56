"""Reads the anchors of the audit log that settings name, for commands that verify it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kms_cli.local import state_redis
from kms_core.audit.sinks import ANCHORS, FolderSink, RedisSink, read_lines
from kms_core.audit.verification.report import Note, VerificationReport
from kms_core.redis_client import connect
from kms_core.settings.model import Settings
from kms_protocol.errors import AuditUnavailable, ConfigurationError

REDIS: Final = "redis"
_REDIS: Final = "Redis"
NOT_COMPARED: Final = "not_compared"
_NO_SERVER: Final = "kms up does not run here, and [kms.redis] url names no other server"


@dataclass(slots=True)
class Read:
    """Anchors by place, and the places that could not be read, with the reason.

    ``unnamed`` is the place that no setting names: the embedded Redis of ``kms up``, which need not run.
    """

    lines: dict[str, list[bytes]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unnamed: str = ""

    def note_in(self, report: VerificationReport) -> None:
        """Add the places that could not be compared; the unnamed one only as a note."""
        report.not_compared |= self.failed
        why = report.not_compared.pop(self.unnamed, None)
        if why:
            text = f"not compared with anchors in {self.unnamed}, so an older copy would look the same: {why}"
            report.notes.append(Note(NOT_COMPARED, text))


def configured(settings: Settings) -> Read:
    """The anchors of every place that settings name."""
    found, section = Read(), settings.kms.audit
    if section.anchor_redis:
        found.unnamed = "" if state_redis.is_named(settings.kms.redis) else _REDIS
        _from_redis(found, settings)
    if section.anchor_dir is not None:
        _from_folder(found, section.anchor_dir)
    return found


def named(settings: Settings, places: Sequence[str]) -> Read:
    """The anchors of places that the user names: files, directories, or ``redis``."""
    found = Read()
    for place in places:
        if place == REDIS:
            _from_redis(found, settings)
            continue
        if Path(place).is_dir():
            _from_folder(found, Path(place))
            continue
        try:
            found.lines[place] = read_lines(Path(place))
        except OSError as exc:
            found.failed[place] = f"it cannot be read ({exc.strerror})"
    return found


def _from_folder(found: Read, path: Path) -> None:
    """What can be read there is compared all the same where a file cannot."""
    folder = FolderSink(path)
    with _noting(found, str(path)):
        found.lines[str(path)] = folder.lines()
        if folder.unread:
            found.failed[str(path)] = folder.unread


def _from_redis(found: Read, settings: Settings) -> None:
    section = state_redis.section_of(settings, os.environ)
    with _noting(found, _REDIS, "" if state_redis.is_named(section) else _NO_SERVER):
        found.lines[_REDIS] = RedisSink(connect(section), ANCHORS).lines()


@contextmanager
def _noting(found: Read, place: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except (AuditUnavailable, ConfigurationError) as exc:
        found.failed[place] = f"{exc.detail}; {hint}" if hint else exc.detail
