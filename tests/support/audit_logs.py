"""Audit trails in a temporary folder: their keys, their lines, and hands that damage them."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
from prometheus_client import REGISTRY

from kms_core.audit import AuditRecord, AuditWriter
from kms_core.audit.hosts import HostLog
from kms_core.audit.keys import Concealer, PublicKeys, Signer, public_path
from kms_core.audit.log import AuditLog
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import AuditMonitor, verify
from kms_core.settings.model import AuditSection

Line = dict[str, Any]
DAY_NS: Final = 24 * 3600 * 1_000_000_000
PROGRAM_PREAMBLE: Final = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.audit_logs import AuditFolder, record
place = AuditFolder(Path(sys.argv[1]))
"""
"""How a program begins that writes to a place, its first argument."""


def record(number: int = 0, **fields: Any) -> AuditRecord:  # noqa: ANN401 -- the fields of a record
    return AuditRecord(
        **(
            {
                "operation": "encrypt",
                "principal": f"ada-{number}",
                "tenant": "acme",
                "credential": "test",
                "result": "ok",
            }
            | fields
        )
    )


def hours_ago(hours: int) -> Callable[[], int]:
    """A clock of a trail that stands, so many hours ago."""
    return partial(int, time.time_ns() - hours * DAY_NS // 24)


def audit_section(path: Path = Path(), **values: Any) -> AuditSection:  # noqa: ANN401 -- of the settings
    return AuditSection(path=path, key_path=Path(), signing_key_path=Path(), **values)


@dataclass(frozen=True)
class AuditFolder:
    """A folder for a trail, and keys beside it. Of an install only lines are read: its keys are elsewhere."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "audit"

    @property
    def logs(self) -> list[HostLog]:
        return [HostLog("", self.folder)]

    @property
    def signing_key(self) -> Path:
        return self.root / "signing.key"

    def trail(
        self,
        section: AuditSection | None = None,
        *,
        role: str = "api",
        clock: Callable[[], int] = time.time_ns,
        rotate_bytes: int = AuditLog.rotate_bytes,
    ) -> AuditLog:
        concealer, signer = Concealer.at(self.root / "audit.key"), Signer.at(self.signing_key)
        section = msgspec.structs.replace(section or audit_section(), path=self.folder)
        trail = AuditLog(section, role, concealer, signer, clock=clock)
        trail.rotate_bytes = rotate_bytes
        return trail

    def written(
        self,
        count: int,
        section: AuditSection | None = None,
        *,
        close: bool = True,
        rotate_bytes: int = AuditLog.rotate_bytes,
    ) -> Path:
        """A trail of so many records; its (last) file."""
        trail = self.trail(section, rotate_bytes=rotate_bytes)
        for number in range(1, count + 1):
            trail.append(record(number))
        if close:
            trail.close()
        return self.files()[-1]

    def aged(self, *days: int) -> AuditLog:
        """A closed chain of so many days ago each; the last one."""
        trails: list[AuditLog] = []
        for ago in days:
            trails.append(self.trail(clock=hours_ago(24 * ago)))
            trails[-1].append(record(ago))
            trails[-1].close()
        return trails[-1]

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def lines(self) -> list[Line]:
        """Every line of every file, in order; fails on one that is not JSON."""
        return [json.loads(line) for file in self.files() for line in file.read_bytes().splitlines()]

    def operations(self) -> list[Line]:
        return [line for line in self.lines() if "operation" in line]

    def principals(self) -> list[str]:
        return [str(line["principal"]) for line in self.operations()]

    def keys(self) -> PublicKeys:
        return PublicKeys.read(public_path(self.signing_key))

    def verified(self, *anchors: bytes) -> VerificationReport:
        return verify(self.folder, self.keys(), {"here": anchors} if anchors else {})

    def monitor(self, *anchors: RedisSink | FolderSink) -> AuditMonitor:
        return AuditMonitor(self.folder, self.signing_key, anchors)


def audit_ok(what: str) -> float:
    """What the metric tells of the chain, or of a place of anchors."""
    value = REGISTRY.get_sample_value("kms_audit_ok", {"what": what})
    assert value is not None
    return value


def unresolved(state: Path) -> list[str]:
    """What the log of an install notes of effects without an outcome. Nothing else is wrong with it."""
    report = verify(state / "audit", PublicKeys.read(state / "audit-signing.pub"))
    assert report.problems == []
    return [note.text for note in report.notes if note.code == "no_outcome"]


class InterceptedLog:
    """A log in which something happens before the record of one stage of an effect."""

    def __init__(self, trail: AuditWriter, stage: str, happens: Callable[[], object]) -> None:
        self._trail, self._stage, self._happens = trail, stage, happens
        self.conceal, self.together, self.check = trail.conceal, trail.together, trail.check

    def append(self, record: AuditRecord) -> str:
        if record.stage == self._stage:
            self._happens()
        return self._trail.append(record)


def fail(error: BaseException) -> NoReturn:
    raise error


def chain_name(trail: AuditLog) -> str:
    """The name of the chain that a trail has begun."""
    return trail._chain  # noqa: SLF001


def problem_codes(report: VerificationReport) -> list[str]:
    return [problem.code for problem in report.problems]


def notes(report: VerificationReport) -> list[str]:
    return [note.code for note in report.notes]


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Change the lines of a file, in place."""
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond a size: how a full disk looks to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
