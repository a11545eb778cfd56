"""The audit trail of this machine: can a record be written, and does all that is there hold together."""

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from kms_cli.doctor.findings import Finding, Level
from kms_cli.local import anchors, state_redis
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.verification.report import ChainProblem, VerificationReport
from kms_core.audit.verification.verify import verify
from kms_core.audit_setup import build_watch
from kms_core.redis_client import connect
from kms_core.settings.model import Settings
from kms_protocol.errors import KmsError

MOST_BYTES: Final = 256 * 1024**2  # some seconds; of a larger trail the ends of its files are read
_RECORD_BYTES: Final = 4096
_KEEP: Final = "kms audit verify; keep the files as they are"


def trail(settings: Settings) -> Iterator[Finding]:
    folder = settings.kms.audit.path
    is_new = not folder.exists()
    try:
        if is_new:
            yield Finding("ok", "audit", f"{folder} is not there yet, the first record makes it")
        else:
            yield _writable(folder)
        if not is_new or public_path(settings.kms.audit.signing_key_path).exists():
            yield from _holds(settings)
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


def _holds(settings: Settings) -> Iterator[Finding]:
    section = settings.kms.audit
    size_bytes = sum(path.stat().st_size for path in section.path.glob("*.jsonl*"))
    if size_bytes > MOST_BYTES:
        yield from _ends_hold(settings)
        return
    own, found = public_path(section.signing_key_path), anchors.configured(settings)
    report = verify(
        section.path,
        PublicKeys.read(own) if own.exists() else None,
        found.lines,
        processes=os.cpu_count() or 1,
    )
    found.note_in(report)
    yield _chain(report)
    noted = next((note.text for note in report.notes if note.code == anchors.NOT_COMPARED), "")
    yield _compared(report.problems, report.not_compared, [*found.lines], noted)


def _chain(report: VerificationReport) -> Finding:
    problems = [each for each in report.problems if not each.anchor]
    if problems:
        first, others = problems[0], len(problems) - 1
        more = f", and {others} more" if others else ""
        text = f"{first.code} in {first.file or first.chain}: {first.text}{more}"
        return Finding("FAIL", "audit chain", text, _KEEP)
    unsigned = sum(each.last_seq - each.signed_seq for each in report.chains)
    text = f"{report.lines} lines hold, {unsigned} of them newer than the newest checkpoint"
    if report.has_open_end:
        ended = f"{text}; a chain has no end: its process was killed, or its end was cut"
        return Finding("warn", "audit chain", ended, "the next start of the service bears witness")
    return Finding("ok", "audit chain", text)


def _compared(
    problems: Sequence[ChainProblem], not_compared: Mapping[str, str], places: Sequence[str], noted: str = ""
) -> Finding:
    """An older copy of the log holds together as well: only anchors tell."""
    proven = [each for each in problems if each.anchor]
    if proven:
        more = f", and {len(proven) - 1} more" if len(proven) > 1 else ""
        text = f"{proven[0].code} in {proven[0].chain}: {proven[0].text}{more}"
        return Finding("FAIL", "audit anchors", text, _KEEP)
    if not_compared:
        why = "; ".join(f"{place}: {reason}" for place, reason in not_compared.items())
        text = f"an older copy of the trail would not be noticed: {why}"
        return Finding("warn", "audit anchors", text, "kms audit verify, once they can be read")
    if noted:
        return Finding("ok", "audit anchors", noted)
    if not places:
        text = "none are kept, so an older copy of the trail would not be noticed"
        return Finding("warn", "audit anchors", text, "set [kms.audit] anchor_dir, on another host")
    return Finding("ok", "audit anchors", f"the trail has what those in {', '.join(places)} name")


def _ends_hold(settings: Settings) -> Iterator[Finding]:
    watch = build_watch(settings, connect(state_redis.section_of(settings, os.environ)))
    watch.look()
    found = watch.condition
    if found.problems:
        text = f"{found.problems[0].code}: {found.problems[0].text}"
        yield Finding("FAIL", "audit chain", text, _KEEP)
    elif found.unread:
        yield Finding("FAIL", "audit chain", found.unread, "run as the user of the service")
    else:
        yield Finding("ok", "audit chain", "the end of each file holds; all of it: kms audit verify")
    yield _compared(found.anchors, found.not_compared, watch.places)
