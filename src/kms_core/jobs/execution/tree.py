"""Jobs over many files: listed once, cut into parts, each file committed once.

The parent job lists its files into a manifest that is sealed in the spool, and becomes parts, which are jobs
of their own (docs/adr/0006). Files that appear later are not in it. A part takes its files one by one.
Each goes through the protocol of ``one_file`` as if it were a job, but its commit record is stored in the
checkpoint of the part: the next attempt knows which files are done, and finishes a recorded commit.
"""

import secrets
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Self, get_args

import msgspec

from kms_core.age import header
from kms_core.age.header import FILE_LIMITS
from kms_core.jobs import bulk_lines
from kms_core.jobs.execution import one_file
from kms_core.jobs.execution.lease import Lease, WorkerContext
from kms_core.jobs.file_patterns import Tree, base_of, target_of
from kms_core.jobs.model import Checkpoint, Commit, Job, LeaseLost, part_id
from kms_core.jobs.spec import NOT_OF_PARTS, FileJob, JobSpec, TreeJob, TreePart, WorkResult, needs_proof
from kms_core.jobs.storage.local import ListedFile
from kms_core.jobs.storage.locations import JobTarget
from kms_core.jobs.storage.spool import Label, Spool, result_label
from kms_core.jobs.store.reader import PartRecord
from kms_core.jobs.store.records import TALLY
from kms_protocol import wire
from kms_protocol.errors import JobCancelled, JobExpired, KmsError, TooLarge, Unavailable

DONE: Final = "done"
CHANGED: Final = "changed"
NEWEST: Final = "newest"
FOREIGN: Final = "foreign"
DUE: Final = "would_change"
_REFUSED: Final = "!"
_FOUND: Final = "found "
_LEFT: Final = "left "
_SHOWN: Final[tuple[wire.Outcome, ...]] = get_args(wire.Outcome)
MANIFEST: Final = "files"
PART_FILES: Final = 500
PART_BYTES: Final = 1024**3
MOST_BY_BYTES: Final = 100
"""Times ``PART_BYTES`` that the files of a job may have before its parts are larger."""
PATIENCE: Final = 8  # deferrals, some minutes, until a file that cannot be read is given up
_decode: Final = msgspec.json.Decoder(ListedFile).decode


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


def check_version(context: WorkerContext, file: FileJob) -> FileOutcome:
    """Return ``would_change`` for a file that is to be moved. Reads its header, and opens nothing with a key.

    No header shows a new context, so with one every file is to be moved. Raises NotACiphertext,
    DecryptFailed, UnknownKey, and what opening the file raises.
    """
    with context.places.open_source(file.source) as source:
        try:
            head = header.read_by(source.reader.read_at, FILE_LIMITS)
        except KmsError as exc:
            context.kms.raise_recorded(file.who, file.kind, file.bound_context, exc)
    status = context.kms.key_version_status(file.who, head, file.key_id)
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
        names = (*_SHOWN, *(name for name in self._words if name.startswith((_FOUND, _LEFT))))
        return {name: self._words[name] for name in names} if job.campaign else {}


def migration_report(job: Job) -> wire.Report | msgspec.UnsetType:
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


# -- the whole -------------------------------------------------------------------------------------------


def plan(lease: Lease, job: TreeJob, context: WorkerContext) -> list[TreePart]:
    """Write the manifest; the parts of some hundred files, or 1 GiB, that make up the job.

    Raises TooLarge for more files than ``[kms.jobs] fanout_files``, SpoolFull, and what listing them raises.
    """
    number, most = secrets.randbits(63), context.store.rules.fanout_files
    files: list[tuple[int, int]] = []
    with context.spool.writing(Label(job.tenant, job.job_id, MANIFEST, str(number))) as out:
        for found in context.places.files(Tree.parse(job.source)):
            lease.check()
            if len(files) == most:
                raise TooLarge(f"The source names more than {most} files: see [kms.jobs] fanout_files")
            out.write(msgspec.json.encode(found) + b"\n")
            files.append((found.size_bytes, out.size))
    listing = {"manifest": number, "input_ref": out.ref, "parent_spec": lease.claim.spec}
    return [_part(job, listing, number, cut) for number, cut in enumerate(cut_into_parts(files))]


@dataclass(slots=True)
class Cut:
    """Files that follow one another: the first one's number, and where their lines lie in the manifest."""

    first: int = 0
    files: int = 0
    size_bytes: int = 0
    begin: int = 0
    end: int = 0


def cut_into_parts(files: Sequence[tuple[int, int]]) -> list[Cut]:
    """Cut files, of which each has a size and the end of its line in the manifest (bytes), into parts.

    One script stores all parts: at most one for each 500 files and twice ``MOST_BY_BYTES``.
    """
    most_bytes = max(PART_BYTES, sum(size for size, _ in files) // MOST_BY_BYTES)
    cuts: list[Cut] = []
    for index, (size_bytes, end) in enumerate(files):
        cut = cuts[-1] if cuts else None
        if cut is None or cut.files == PART_FILES or cut.size_bytes + size_bytes > most_bytes:
            cut = Cut(first=index, begin=cut.end if cut else 0)
            cuts.append(cut)
        cut.files += 1
        cut.size_bytes += size_bytes
        cut.end = end
    return cuts


def _part(job: TreeJob, listing: Mapping[str, object], number: int, cut: Cut) -> TreePart:
    fields = msgspec.structs.asdict(job) | {
        **listing,
        "job_id": part_id(job.job_id, number),
        "parent": job.job_id,
        "part": number,
        "first": cut.first,
        "items": cut.files,
        "starts": (cut.begin, cut.end),
        "size_bytes": cut.size_bytes,
        **NOT_OF_PARTS,
    }
    return TreePart(**fields)


# -- a part ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartFiles:
    """The files of a part as they were listed, and each as a job from file to file."""

    part: TreePart
    listed: Sequence[ListedFile]

    @classmethod
    def read(cls, part: TreePart, spool: Spool) -> Self:
        """Raises ResultExpired once the job was cancelled, RecordRefused for another listing."""
        label = Label(part.tenant, part.owner, MANIFEST, str(part.manifest), part.input_ref)
        with spool.opened(label) as reader:
            listed = [_decode(line) for line in bulk_lines.lines(reader.slabs(*part.starts))]
        return cls(part, listed)

    def job(self, index: int) -> FileJob:
        """The file of this number; its id makes the name of its temporary file its own."""
        part, path = self.part, self.listed[index].path
        fields = {name: getattr(part, name) for name in FileJob.__struct_fields__}
        return FileJob(
            **fields
            | {
                "job_id": str(uuid.uuid5(uuid.UUID(part.job_id), str(index))),
                "source": base_of(part.source) + path,
                "target": target_of(part.kind, part.source, part.target, path),
            }
        )

    def unsettled(self, log: Checkpoint) -> dict[str, str]:
        """The targets of the files that the log does not settle, by the ids of their jobs."""
        files = map(self.job, range(len(log.outcomes), len(self.listed)))
        return {file.job_id: file.target for file in files}

    def lines(self, log: Checkpoint, code: str = "") -> Iterator[wire.ItemResult]:
        """A line for each file; ``code`` is why those that the log does not settle have no outcome."""
        settled = [FileOutcome.parse(word) for word in log.settled]
        for index in range(len(self.listed)):
            outcome = settled[index] if index < len(settled) else FileOutcome.refused(code)
            file = self.job(index)
            yield wire.ItemResult(
                index=self.part.first + index,
                source=file.source,
                target=msgspec.UNSET if self.part.dry_run else file.target,
                outcome=outcome.shown(self.part),
                error=wire.ErrorCode(code=outcome.code) if outcome.code else msgspec.UNSET,
            )


def run(lease: Lease, job: TreePart, context: WorkerContext) -> None:
    """Settle what the log leaves of a part's files, then write the result lines of all.

    Raises Unavailable, once the log is stored: the part is then taken up where it stopped.
    """
    files = PartFiles.read(job, context.spool)
    attempt = _Part(lease, files, context)
    attempt.sweep()
    attempt.settle_all()
    label = result_label(job.tenant, job.owner, job.part, lease.claim.attempt_id)
    with context.spool.writing(label) as out:
        for line in files.lines(attempt.log):
            out.write(wire.encode(line) + b"\n")
    for index, settled in enumerate(map(FileOutcome.parse, attempt.log.settled), start=job.first):
        if settled.code:
            lease.failures.add(index, settled.code)
    lease.made = WorkResult(tallies=attempt.tallies, result_digest=out.ref)


class _Part:
    """One attempt at a part."""

    def __init__(self, lease: Lease, files: PartFiles, context: WorkerContext) -> None:
        self._lease, self._job, self._files = lease, files.part, files
        self._context = replace(context, kms=context.kms.for_job())
        self._deferrals = lease.claim.deferrals
        self._made: set[str] = set()
        self.log = lease.claim.log
        self._tally = OutcomeCounts(map(FileOutcome.parse, self.log.settled))
        lease.resume(
            items=len(self.log.outcomes),
            failed=self._tally.failed,
            size_bytes=sum(one.size_bytes for one in files.listed[: len(self.log.outcomes)]),
        )

    @property
    def tallies(self) -> dict[str, int]:
        return self._tally.counts(self._job)

    def sweep(self) -> None:
        """Remove what other attempts have ready, or left when they were killed, beside the files to come."""
        if self._job.dry_run:
            return
        targets, own = self._files.unsettled(self.log), {self._lease.claim.attempt_id}
        self._lease.check()
        if self.log.pending:
            first = next(iter(targets))
            self._context.places.sweep({first: targets.pop(first)}, own | {self.log.pending.attempt_id})
        self._context.places.sweep(targets, own)

    def settle_all(self) -> None:
        if self.log.pending:
            self._settle(self._finish(self.log.pending, FileOutcome.parse(self.log.effect)))
            self._step(self.log)
        for index in range(len(self.log.outcomes), len(self._files.listed)):
            self._check()
            self._settle(self._one(index))
        self._step(self.log)

    def _check(self) -> None:
        """Raise if the work must stop; what is settled is stored first if the part goes back to the queue."""
        try:
            self._lease.check()
        except Unavailable:
            self._step(self.log)
            raise

    def _settle(self, outcome: FileOutcome) -> None:
        self.log = self.log.adding(str(outcome))
        self._tally.add(outcome)
        self._lease.item(failed=bool(outcome.code))

    def _step(self, log: Checkpoint) -> None:
        counts = {f"{TALLY}{name}": number for name, number in self.tallies.items()}
        self._context.store.step(self._lease.claim, log, {"settled": self._tally.done, **counts})

    def _one(self, index: int) -> FileOutcome:
        if code := self._files.listed[index].code:
            return FileOutcome.refused(code)
        version = ""
        try:
            file = self._files.job(index)
            effect = FileOutcome(CHANGED if self._job.campaign else DONE)
            target = self._target(file)
            if not self._job.dry_run and target.recognised():
                return effect
            if self._job.campaign:
                outcome = check_version(self._context, file)
                version = outcome.version
                if outcome.word != DUE or self._job.dry_run:
                    return outcome
            self._make_room(file.target)
            effect = replace(effect, version=version)
            self._run(file, target, effect)
        except (LeaseLost, JobCancelled, JobExpired):
            raise
        except Unavailable as exc:
            self._bear(exc)
            return FileOutcome.refused(exc.code, version)
        except KmsError as exc:
            return FileOutcome.refused(exc.code, version)
        return effect

    def _finish(self, commit: Commit, effect: FileOutcome) -> FileOutcome:
        """Put in place what a worker that died had ready."""
        try:
            file = self._files.job(len(self.log.outcomes))
            self._run(file, self._target(file), effect, commit)
        except (LeaseLost, JobCancelled, JobExpired, Unavailable):
            raise
        except KmsError as exc:
            return FileOutcome.refused(exc.code, effect.version)
        return effect

    def _bear(self, exc: Unavailable) -> None:
        """Retry what is unavailable; but one unreadable file must not hold up the others."""
        if type(exc) is not Unavailable or self._deferrals < PATIENCE:
            self._step(self.log)
            raise exc
        self._deferrals = 0

    def _target(self, file: FileJob) -> JobTarget:
        spec = self._job.parent_spec or self._lease.claim.spec
        return self._context.places.target(file, self._job.owner, spec)

    def _run(
        self, file: FileJob, target: JobTarget, effect: FileOutcome, commit: Commit | None = None
    ) -> None:
        record = partial(self._record, effect)
        one_file.FileWork(file, target, self._context, self._lease, record, commit, is_one_of_many=True).run()

    def _make_room(self, target: str) -> None:
        above = target.rpartition("/")[0]
        if not self._job.in_place and above not in self._made:
            self._context.places.make_parents(target)
            self._made.add(above)

    def _record(self, effect: FileOutcome, commit: Commit | None) -> None:
        """Record the commit of a file in the checkpoint. Any attempt at the part ends it as ``effect``."""
        if commit:
            self._job.check_expiry(self._context.store.now)
        self._step(msgspec.structs.replace(self.log, pending=commit, effect=str(effect)))


def abandon(part: TreePart, record: PartRecord, context: WorkerContext) -> None:
    """Remove the temporary files that killed attempts at a part left, if no attempt will follow."""
    if not record.job.ended or needs_proof(record.job.state, record.job.error):  # which settled all files
        return
    try:
        files = PartFiles.read(part, context.spool)
    except KmsError:
        return
    context.places.sweep(files.unsettled(record.log))
