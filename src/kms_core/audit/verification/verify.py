"""Verification of an audit log: order, gaps, edits, cut ends, missing segments, signatures, anchors.

It works offline and needs only the folder, the public keys and the anchors, if there are any.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.keys import KEY_BYTES, PublicKeys
from kms_core.audit.segments import Segment
from kms_core.audit.verification.crosscheck import Anchors, crosscheck
from kms_core.audit.verification.scan import ChainProblem, ScannedSpan, Span, VerificationReport, scan

SPAN_BYTES: Final = 16 * 1024 * 1024
_ONE_PROCESS_BYTES: Final = 2 * SPAN_BYTES
_TOO_LONG: Final = segments.LONGEST_LINE_BYTES + 1
_UNFINISHED: Final = re.compile(rf"\.{segments.NAME.pattern}\.[A-Za-z0-9]{{6}}")
"""The name of a file that rsync receives."""


def verify(  # noqa: PLR0913 -- log, keys and anchors; and how
    folder: Path,
    keys: PublicKeys | None = None,
    anchors: Anchors = MappingProxyType({}),
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    max_late: timedelta | None = None,
) -> VerificationReport:
    """Check every line of a folder. Without ``keys`` those in the log are used, which prove less.

    A folder that does not exist is a log without chains, which anchors may contradict. ``anchors`` are signed
    lines by sink. ``progress`` is called with the bytes done and the bytes in all. ``max_late``: the folder
    is a copy of a log that is written. Lines that its end lacks are then notes, and the verdict is ``late``
    once the first of them was named so long ago. Raises OSError.
    """
    started = time.perf_counter()
    files = list(_identified(folder))
    trusted = keys is not None
    keys = keys or PublicKeys.of(_own_keys(files))
    report = VerificationReport(trusted=trusted)
    report.size_bytes = sum(segment.path.stat().st_size for segment in files)
    parts = _scanned(files, keys, processes, lambda done: progress(done, report.size_bytes))
    found = {segment: _joined(parts[str(segment.path)]) for segment in files}
    crosscheck(report, found, anchors, keys, is_copy=max_late is not None)
    if max_late is not None and report.late_since:
        report.is_late = report.late_since <= chain.text_of(datetime.now(UTC) - max_late)
    report.lines = sum(each.lines for each in found.values())
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def _identified(folder: Path) -> Iterator[Segment]:
    """The segments, by the chain and number in their first line: a renamed file is still found."""
    entries = os.scandir(folder) if folder.exists() else ()
    for path in sorted(folder / entry.name for entry in entries if segments.is_file(entry)):
        if ".jsonl" not in path.name or _UNFINISHED.fullmatch(path.name):
            continue
        named = segments.NAME.fullmatch(path.name)
        opening = Segment("", 0, path).opening()
        if opening is not None and opening.kind == chain.OPEN:
            yield Segment(opening.chain, opening.segment, path)
        elif named:
            yield Segment(named[1], int(named[2]), path)
        elif opening is not None and opening.head:
            yield Segment(opening.chain, 0, path)


def _own_keys(files: Iterable[Segment]) -> Iterator[bytes]:
    for segment in files:
        opening = segment.opening()
        key = chain.from_hex(opening.public_key) if opening is not None else None
        if key and len(key) == KEY_BYTES:
            yield key


# -- reading -----------------------------------------------------------------------------------------


def _scanned(
    files: Sequence[Segment], keys: PublicKeys, processes: int, progress: Callable[[int], None]
) -> dict[str, list[ScannedSpan]]:
    """The scanned spans of each segment, in order."""
    spans = [span for segment in files for span in _spans(segment, keys.keys)]
    parts: dict[str, list[ScannedSpan]] = {str(segment.path): [] for segment in files}
    size, done = sum(span.end - span.begin for span in spans), 0
    with ExitStack() as stack:
        run: Callable[[Callable[[Span], ScannedSpan], Sequence[Span]], Iterable[ScannedSpan]] = map
        if processes > 1 and size > _ONE_PROCESS_BYTES:
            run = stack.enter_context(ProcessPoolExecutor(processes)).map
        for span, found in zip(spans, run(scan, spans), strict=True):
            parts[span.path].append(found)
            done += span.end - span.begin
            progress(done)
    return parts


def _spans(segment: Segment, keys: Mapping[str, bytes]) -> Iterator[Span]:
    """The spans of a segment: whole lines of 16 MiB each. Of a hole 1 MiB is read: too long a line."""
    with segments.opened(segment.path) as file:
        size, begin = file.seek(0, os.SEEK_END), 0
        while begin < size:
            end, until = size, min(size, begin + SPAN_BYTES)
            found = segments.holes(file.fileno(), begin, until)
            hole, following = next((each for each in found if each[1] - each[0] > _TOO_LONG), (until, size))
            if hole < until:
                end = hole + _TOO_LONG
            elif until < size:
                file.seek(until)
                file.readline(_TOO_LONG)  # a longer line is reported by the scan
                end = following = file.tell()
            yield Span(str(segment.path), begin, end, segment.chain, dict(keys))
            begin = following


def _joined(parts: Sequence[ScannedSpan]) -> ScannedSpan:
    """The spans of one segment as one, after a check that they follow each other."""
    whole = ScannedSpan("", "")
    for part in parts:
        if not whole.lines:
            part.problems = [*whole.problems, *part.problems]
            whole = part
            continue
        _follows(whole, part)
        whole.lines += part.lines
        if part.lines:
            whole.last_seq, whole.head, whole.last_time = part.last_seq, part.head, part.last_time
        whole.signed_seq = max(whole.signed_seq, part.signed_seq)
        whole.torn_bytes = part.torn_bytes
        whole.problems += part.problems
        whole.special += part.special
        whole.stages += part.stages
    return whole


def _follows(whole: ScannedSpan, part: ScannedSpan) -> None:
    """Check the numbers where two spans meet. A gap there replaces the edit reported of the next line."""
    expected = whole.last_seq + 1
    if part.first_seq in {expected, -1}:
        return
    code, text = "reordered", "a line is repeated, or follows a later one"
    if part.first_seq > expected:
        code, text = "gap", f"lines {expected} to {part.first_seq - 1} are missing"
    seq = min(expected, part.first_seq)
    part.problems = [each for each in part.problems if (each.code, each.seq) != ("edited", part.first_seq)]
    whole.problems.append(ChainProblem(code, text, part.chain, Path(part.path).name, seq))
