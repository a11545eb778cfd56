"""A host's copy of a signed document, kept fresh by its processes and read by a stat.

Each process that polls finds out by the age of the copy whether another one has just asked, so that a host
asks once a second, however many processes it has and whichever of them dies.
"""

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from kms_core import secure_files
from kms_core.documents.document import SignedDocument, Version
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_core.reload import reason_of, stamp_of_stat
from kms_protocol import small_files
from kms_protocol.errors import KmsError, Unavailable

POLL_S: Final = 1.0
LATE_S: Final = 10.0
"""Seconds without an answer after which the service is degraded: ten polls in a row have failed."""
_JUST_S: Final = POLL_S * 0.6
_PACE_S: Final = 0.5
_AHEAD_S: Final = 2.0  # by which a clock may have been set back
_log = structlog.get_logger(__name__)


class LocalCopy:
    """The copy in ``<folder>/<name>.copy``: the tag of its storage (JSON), then the stored document.

    Its time of change says when the storage answered last. Safe in several threads and processes.
    """

    def __init__(
        self,
        document: SignedDocument,
        folder: Path,
        max_stale_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``max_stale_s``: seconds without an answer for which the copy is used; infinity: without bound."""
        self.gauge = metrics.DOCUMENT_AGE.labels(document.name)
        self._document, self._max_stale_s, self._clock = document, max_stale_s, clock
        self._path, self._lock_path = folder / f"{document.name}.copy", folder / f"{document.name}.lock"
        self._name = str(self._path)
        self._loaded: tuple[tuple[int, ...], Version] = ((), Version())
        self._reading = threading.Lock()
        self._begun = 0.0
        self._failure: Unavailable | None = None

    def current(self) -> Version:
        """The document as this host has it. Raises Unavailable if it is missing or too old; a stat if not."""
        try:
            found = os.stat(self._name)  # noqa: PTH116 -- for each call: a Path takes half as long again
            age_s = self._clock() - found.st_mtime
            if self._max_stale_s < math.inf and not -_AHEAD_S <= age_s <= self._max_stale_s:
                raise Unavailable(f"The document {self._document.name} could not be read for too long")
            return self._load(found)
        except (OSError, ValueError) as exc:
            raise Unavailable(f"The document {self._document.name} was not read yet") from exc

    @property
    def is_late(self) -> bool:
        """True if the storage has not answered for ten seconds, or ``max_stale_s`` if that is less."""
        return self._age_s() >= min(LATE_S, self._max_stale_s)

    @property
    def age_s(self) -> float:
        """Seconds since the storage answered last; if it never did, the longest use of a copy."""
        return max(0.0, self._age_s())

    def poll(self) -> None:
        """Ask the storage, unless a process of this host just did or is doing so. Raises as ``reread``."""
        if self._age_s() >= _JUST_S:
            with suppress(BlockingIOError), self._locked(wait=False):
                if self._age_s() >= _JUST_S:
                    self._update()

    def reread(self) -> None:
        """Ask the storage after this call has begun; threads that wait share an answer, two a second at most.

        Raises Unavailable if it cannot be read, or what it holds is refused; the log says why.
        """
        called = time.monotonic()
        with self._reading:
            if self._begun <= called:
                time.sleep(max(0.0, self._begun + _PACE_S - time.monotonic()))
                self._begun, self._failure = time.monotonic(), None
                try:
                    with self._locked():
                        self._update()
                except Unavailable as exc:
                    self._failure = exc
            if self._failure:
                raise self._failure

    def _locked(self, *, wait: bool = True) -> AbstractContextManager[int]:
        secure_files.make_folders(self._lock_path.parent)
        return secure_files.lock(self._lock_path, wait=wait)

    def _update(self) -> None:
        try:
            known = self._load(self._path.stat())
        except (OSError, ValueError):  # none yet, or damaged
            known = None
        asked = self._clock()
        try:
            found = self._document.read(known)
            if found is not known:
                tag = msgspec.json.encode(found.tag)
                content = self._document.encode(found) if found.generation else b""
                secure_files.write(self._path, tag + b"\n" + content, locked=True)
                _log.info("document.read", document=self._document.name, generation=found.generation)
            os.utime(self._path, (asked, asked))
        except (OSError, KmsError) as exc:
            _log.error("document.not_read", document=self._document.name, reason=reason_of(exc))
            raise Unavailable(
                f"The document {self._document.name} cannot be read; the service's log says why"
            ) from exc

    def _load(self, found: os.stat_result) -> Version:
        """The copy. A process reads and verifies it again when another one has replaced it.

        A new copy may have size and inode of the one before. Its times also change with each answer of the
        storage: then the tag says whether it is another one.
        """
        stamp, held = self._loaded
        now = stamp_of_stat(found)
        if stamp != now:
            with open(self._path, "rb", opener=small_files.at_once) as file:
                try:
                    tag = msgspec.json.decode(file.readline(), type=str)
                    if stamp[:3] != now[:3] or tag != held.tag:
                        held = self._document.open(file.read(), tag)
                except (msgspec.MsgspecError, KmsError) as exc:
                    raise ValueError("a damaged copy") from exc
            self._loaded = now, held
        return held

    def _age_s(self) -> float:
        with suppress(OSError):
            age_s = self._clock() - self._path.stat().st_mtime
            return age_s if age_s >= -_AHEAD_S else self._max_stale_s
        return self._max_stale_s


class CopyPoll(PeriodicThread):
    """Polls for the processes of this host."""

    def __init__(self, copy: LocalCopy) -> None:
        super().__init__("documents", POLL_S, failed="document.poll_failed")
        self._copy = copy
        self.wake()

    def round(self) -> None:
        try:
            self._copy.poll()
        finally:
            self._copy.gauge.set(self._copy.age_s)
