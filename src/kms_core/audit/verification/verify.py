"""Whether a trail holds together: order, gaps, edits, cut ends, missing files, signatures, anchors. Offline.

Nobody is asked: the folder, the public key and, where there are any, the anchors are all it takes.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.keys import KEY_BYTES, PublicKeys
from kms_core.audit.segments import Segment
from kms_core.audit.verification.crosscheck import Anchors, judge
from kms_core.audit.verification.report import ChainProblem, VerificationReport
from kms_core.audit.verification.scan import ScannedSpan, Span, scan

STRETCH_BYTES: Final = 16 * 1024 * 1024
_ALONE_BYTES: Final = 2 * STRETCH_BYTES


def verify(
    folder: Path,
    keys: PublicKeys | None = None,
    anchors: Anchors = MappingProxyType({}),
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> VerificationReport:
    """Check every line of a folder. Without ``keys`` the trail's own are taken, which prove less.

    A folder that is not there is a log without chains: anchors tell what it had.

    ``anchors`` are signed lines by the place that keeps them. ``progress`` is told bytes, done and in all.

    Raises OSError.
    """
    started = time.perf_counter()
    files = list(_identified(folder))
    trusted = keys is not None
    keys = keys or PublicKeys.of(_own_keys(files))
    report = VerificationReport(trusted=trusted)
    report.size_bytes = sum(segment.path.stat().st_size for segment in files)
    parts = _scanned(files, keys, processes, lambda done: progress(done, report.size_bytes))
    found = {segment: _joined(parts[str(segment.path)]) for segment in files}
    judge(report, found, anchors, keys)
    report.lines = sum(each.lines for each in found.values())
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def _identified(folder: Path) -> Iterator[Segment]:
    """The segments, by what they say they are: a file under another name is still found."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if ".jsonl" not in path.name or not path.is_file():
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
        key = chain.octets(opening.public_key) if opening is not None else None
        if key and len(key) == KEY_BYTES:
            yield key


# -- reading -----------------------------------------------------------------------------------------


def _scanned(
    files: Sequence[Segment], keys: PublicKeys, processes: int, progress: Callable[[int], None]
) -> dict[str, list[ScannedSpan]]:
    """What each file holds, stretch by stretch."""
    spans = [span for segment in files for span in _spans(segment, keys.keys)]
    parts: dict[str, list[ScannedSpan]] = {str(segment.path): [] for segment in files}
    size, done = sum(span.end - span.begin for span in spans), 0
    with ExitStack() as stack:
        run: Callable[[Callable[[Span], ScannedSpan], Sequence[Span]], Iterable[ScannedSpan]] = map
        if processes > 1 and size > _ALONE_BYTES:
            run = stack.enter_context(ProcessPoolExecutor(processes)).map
        for span, found in zip(spans, run(scan, spans), strict=True):
            parts[span.path].append(found)
            done += span.end - span.begin
            progress(done)
    return parts


def _spans(segment: Segment, keys: Mapping[str, bytes]) -> Iterator[Span]:
    """Stretches of whole lines, of some megabytes."""
    with segment.path.open("rb") as file:
        size, begin = file.seek(0, os.SEEK_END), 0
        while begin < size:
            end = size
            if size - begin > STRETCH_BYTES:
                file.seek(begin + STRETCH_BYTES)
                file.readline()
                end = file.tell()
            yield Span(str(segment.path), begin, end, segment.chain, dict(keys))
            begin = end


def _joined(parts: Sequence[ScannedSpan]) -> ScannedSpan:
    """The stretches of one file as one, held against each other."""
    whole = ScannedSpan("", "")
    for part in parts:
        if not whole.lines:
            whole = part
            continue
        _follows(whole, part)
        whole.lines += part.lines
        whole.last_seq, whole.head, whole.last_time = part.last_seq, part.head, part.last_time
        whole.signed_seq = max(whole.signed_seq, part.signed_seq)
        whole.torn_bytes = part.torn_bytes
        whole.problems += part.problems
        whole.special += part.special
        whole.stages += part.stages
    return whole


def _follows(whole: ScannedSpan, part: ScannedSpan) -> None:
    """Two stretches of a file meet at a line's end. What is wrong there is no fault of the line after it."""
    expected = whole.last_seq + 1
    if part.first_seq in {expected, -1}:
        return
    code, text = "reordered", "a line stands again, or after a later one"
    if part.first_seq > expected:
        code, text = "gap", f"lines {expected} to {part.first_seq - 1} are missing"
    seq = min(expected, part.first_seq)
    part.problems = [each for each in part.problems if (each.code, each.seq) != ("edited", part.first_seq)]
    whole.problems.append(ChainProblem(code, text, part.chain, Path(part.path).name, seq))
