"""Writes an audit log as that of ``v1/``: two chains, every kind of line, a first segment that is retired."""

import json
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Final

from kms_core import audit
from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import AuditLog
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import audit_section, room_for
from support.golden import expected_service as expected

BEGIN_NS: Final = 1_790_000_000 * 10**9


def audit_log(folder: Path, state: Path) -> None:
    """The log, in ``folder/log``; ``state`` holds the two keys."""
    folder.mkdir()
    ticks = count(BEGIN_NS, 1_234_567_000)
    section = audit_section(folder / "log", checkpoint_lines=4)
    concealer, signer = Concealer.at(state / "audit.key"), Signer.at(state / "audit-signing.key")

    def trail(role: str) -> AuditLog:
        made = AuditLog(section, role, concealer, signer, clock=lambda: next(ticks))
        made.rotate_bytes = 2500
        return made

    api = trail("api")
    for number in range(expected.API_RECORDS):
        _append(api, number)
    api.close()
    _retiring(trail("worker"))


def _retiring(worker: AuditLog) -> None:
    """A second chain: a record is refused by a full disk, and the oldest segment of the folder retired."""
    first = min(worker.folder.iterdir())
    for number in range(2):
        _append(worker, number)
    file = max(worker.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with suppress(AuditUnavailable), room_for(file.stat().st_size):
        _append(worker, 2)
    _append(worker, 3)
    worker.record_removal(json.loads(first.read_bytes().split(b"\n")[0])["time"], 1)
    first.unlink()
    worker.close()


def _append(trail: AuditLog, number: int) -> None:
    hidden = trail.conceal("acme", Context.parse(expected.CONTEXT))
    trail.append(audit.AuditRecord(**expected.RECORD, principal=f"ada-{number}", context=hidden))
