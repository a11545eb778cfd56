"""Campaigns: many files moved to the newest version of their key. Finds those, and counts the outcomes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self, get_args

import msgspec

from kms_core.age import header
from kms_core.age.header import FILE_LIMITS
from kms_core.jobs.model import Job
from kms_core.jobs.spec import FileJob, JobSpec
from kms_core.jobs.storage.locations import Locations
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.errors import KmsError

DONE: Final = "done"
CHANGED: Final = "changed"
NEWEST: Final = "newest"
FOREIGN: Final = "foreign"
DUE: Final = "would_change"
_REFUSED: Final = "!"
_FOUND: Final = "found "
_LEFT: Final = "left "
_SHOWN: Final[tuple[wire.Outcome, ...]] = get_args(wire.Outcome)


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """The outcome of one file; ``version`` is ``<key id>/<key version>`` as it was found, if it was."""

    word: str
    version: str = ""
    code: str = ""

    @classmethod
    def refused(cls, code: str, version: str = "") -> Self:
        return cls(_REFUSED, version, code)

    @classmethod
    def parse(cls, text: str) -> Self:
        word, _, version = text.partition(" ")
        return cls.refused(word[1:], version) if word.startswith(_REFUSED) else cls(word, version)

    def __str__(self) -> str:
        return f"{self.word}{self.code} {self.version}".rstrip()

    def shown(self, job: JobSpec) -> wire.Outcome | msgspec.UnsetType:
        """As the result of a campaign has it."""
        if not job.campaign:
            return msgspec.UNSET
        return next((word for word in _SHOWN if word == self.word), msgspec.UNSET)


def look(kms: Kms, places: Locations, file: FileJob) -> FileOutcome:
    """True if a file is to be moved: ``would_change`` if so. Reads its header, and opens nothing with a key.

    A new context can be seen in no header, so with one every file is to be moved. Raises NotACiphertext,
    DecryptFailed, UnknownKey, and what opening the file raises.
    """
    with places.open_source(file.source) as source:
        try:
            head = header.read_by(source.reader.read_at, FILE_LIMITS)
        except KmsError as exc:
            kms.raise_recorded(file.who, file.kind, file.bound_context, exc)
    status = kms.key_version_status(file.who, head, file.key_id)
    if status is None:
        return FileOutcome(FOREIGN)
    if status.newest and file.new_context is None:
        return FileOutcome(NEWEST)
    older = status.key_version and not status.newest
    return FileOutcome(DUE, f"{status.key_id}/{status.key_version}" if older else "")


class OutcomeCounts:
    """Sums over the outcomes of a part, as fields of its record: the script that ends it adds them up."""

    def __init__(self, outcomes: Iterable[FileOutcome]) -> None:
        self.failed = self.done = 0
        self._words: Counter[str] = Counter()
        for outcome in outcomes:
            self.add(outcome)

    def add(self, outcome: FileOutcome) -> None:
        self.failed += bool(outcome.code)
        self.done += not outcome.code
        self._words[outcome.word] += 1
        if outcome.version:
            self._words[_FOUND + outcome.version] += 1
            self._words[_LEFT + outcome.version] += outcome.word != CHANGED

    def counts(self, job: JobSpec) -> dict[str, int]:
        """Counts of files by outcome, and by version found and left; empty for other jobs."""
        told = (*_SHOWN, *(name for name in self._words if name.startswith((_FOUND, _LEFT))))
        return {name: self._words[name] for name in told} if job.campaign else {}


def report(job: Job) -> wire.Report | msgspec.UnsetType:
    """Progress of a key migration over its ended parts; UNSET for other jobs."""
    if not job.campaign:
        return msgspec.UNSET
    tallies = job.tallies
    versions = sorted(name.removeprefix(_FOUND) for name in tallies if name.startswith(_FOUND))
    return wire.Report(
        dry_run=job.campaign == "dry",
        changed=tallies.get(DUE if job.campaign == "dry" else CHANGED, 0),
        newest=tallies.get(NEWEST, 0),
        foreign=tallies.get(FOREIGN, 0),
        failed=job.items_failed,
        older=[_older(version, tallies) for version in versions],
    )


def _older(version: str, tallies: dict[str, int]) -> wire.OlderVersion:
    key_id, _, key_version = version.partition("/")
    return wire.OlderVersion(
        key_id=key_id,
        key_version=key_version,
        found=tallies[_FOUND + version],
        left=tallies.get(_LEFT + version, 0),
    )
