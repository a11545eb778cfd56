"""The audit trail of this machine: can a record be written, and does all that is there hold together."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kms_cli.checks.findings import Finding, Level
from kms_core.audit import places
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.report import Report
from kms_core.audit.verify import verify
from kms_core.audit.watch import Watch
from kms_core.errors import KmsError
from kms_core.settings import Settings

MOST_BYTES: Final = 256 * 1024**2  # some seconds; of a larger trail the ends of its files are read
_RECORD_BYTES: Final = 4096


def trail(settings: Settings) -> Iterator[Finding]:
    folder = settings.kms.audit.path
    if not folder.exists():
        yield Finding("ok", "audit", f"{folder} is not there yet, the first record makes it")
        return
    try:
        yield _writable(folder)
        yield _holds(settings)
    except (OSError, KmsError) as exc:
        why = exc.detail if isinstance(exc, KmsError) else exc.strerror
        yield Finding("FAIL", "audit", f"{folder} cannot be read: {why}", "run as the user of the service")


def _writable(folder: Path) -> Finding:
    """By doing: a file without a name, of the size of a record, which is gone when it is closed."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_RECORD_BYTES))
    except OSError as exc:
        full = exc.errno in {errno.ENOSPC, errno.EDQUOT}
        then = "make room: without a record no call is answered" if full else "run as the user of the service"
        level: Level = "FAIL" if full or os.geteuid() == 0 else "warn"
        return Finding(level, "audit", f"{folder} takes no record: {exc.strerror}", then)
    return Finding("ok", "audit", f"{folder} takes records")


def _holds(settings: Settings) -> Finding:
    section = settings.kms.audit
    size_bytes = sum(path.stat().st_size for path in section.path.glob("*.jsonl*"))
    if size_bytes > MOST_BYTES:
        return _ends_hold(settings)
    own = public_path(section.signing_key_path)
    anchors = section.anchor_dir
    lines = places.read_lines(anchors) if anchors is not None and anchors.is_dir() else []
    report = verify(
        section.path, PublicKeys.read(own) if own.exists() else None, lines, processes=os.cpu_count() or 1
    )
    return _told(report)


def _told(report: Report) -> Finding:
    if report.problems:
        first, others = report.problems[0], len(report.problems) - 1
        more = f", and {others} more" if others else ""
        text = f"{first.code} in {first.file or first.chain}: {first.text}{more}"
        return Finding("FAIL", "audit chain", text, "kms audit verify; keep the files as they are")
    unsigned = sum(each.last_seq - each.signed_seq for each in report.chains)
    text = f"{report.lines} lines hold, {unsigned} of them newer than the newest checkpoint"
    if report.verdict == "open end":
        ended = f"{text}; a chain has no end: its process was killed, or its end was cut"
        return Finding("warn", "audit chain", ended, "the next start of the service bears witness")
    return Finding("ok", "audit chain", text)


def _ends_hold(settings: Settings) -> Finding:
    watch = Watch.of(settings)
    watch.look()
    problems = watch.condition.problems
    if problems:
        text = f"{problems[0].code}: {problems[0].text}"
        return Finding("FAIL", "audit chain", text, "kms audit verify; keep the files as they are")
    return Finding("ok", "audit chain", "the end of each file holds; all of it: kms audit verify")
