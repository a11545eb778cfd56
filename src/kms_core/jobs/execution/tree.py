"""Jobs over many files: listed once, cut into parts, each file committed once; knows no key and no script.

The whole lists its files into a manifest that is sealed in the spool, and becomes parts, which are jobs of
their own (docs/adr/0006). What appears later is not in it. A part takes its files one after another. Each
goes through the protocol of ``files`` as if it were a job, only that its commit record rests in the part's
log: whoever takes the part over knows which files are done, and finishes the one that was about to appear.
"""

import math
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from kms_core.jobs import bulk_lines
from kms_core.jobs.execution import bulk_items, key_migration, one_file
from kms_core.jobs.execution.key_migration import FileOutcome
from kms_core.jobs.execution.lease import Lease
from kms_core.jobs.file_patterns import Tree, target_of
from kms_core.jobs.model import Attempt, Checkpoint, Commit, Job, JobSpec, LeaseLost, part_id
from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import Label, Spool
from kms_core.jobs.storage.tree_walk import ListedFile
from kms_core.jobs.store.redis_keys import TALLY
from kms_core.jobs.store.store import JobStore
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.errors import JobCancelled, JobExpired, KmsError, TooLarge, Unavailable

MANIFEST: Final = "files"
PART_FILES: Final = 500
PART_BYTES: Final = 1024**3
BURST_S: Final = 5.0  # of files that a paced part takes at once
PATIENCE: Final = 8  # deferrals, some minutes, until a file that cannot be read is given up
_SHORT_S: Final = 0.5
_decode: Final = msgspec.json.Decoder(ListedFile).decode


class Paced(Unavailable):
    """The job may begin no further file for now."""

    code = "paced"
    summary = "The pace of the job allows no further file now"


# -- the whole -------------------------------------------------------------------------------------------


def plan(lease: Lease, spool: Spool, listed: Iterable[ListedFile], most: int) -> list[JobSpec]:
    """Write the manifest; the parts of some hundred files, or 1 GiB, that make up the job.

    Raises TooLarge for more than ``most`` files, SpoolFull, and what listing them raises.
    """
    job, fence = lease.claim.accepted, lease.claim.fence
    cuts = [_Cut()]
    with spool.writing(Label(job.tenant, job.job_id, MANIFEST, fence)) as out:
        for found in listed:
            lease.check()
            if cuts[-1].first + cuts[-1].files == most:
                raise TooLarge(f"The source names more than {most} files: see [kms.jobs] fanout_files")
            if cuts[-1].is_full(found.size_bytes):
                cuts.append(_Cut(cuts[-1].first + cuts[-1].files, begin=out.size))
            out.write(msgspec.json.encode(found) + b"\n")
            cuts[-1].files += 1
            cuts[-1].size_bytes += found.size_bytes
            cuts[-1].end = out.size
    job = msgspec.structs.replace(job, manifest=fence, input_ref=out.ref)
    return [_part(job, number, cut) for number, cut in enumerate(cuts) if cut.files]


@dataclass(slots=True)
class _Cut:
    """Files that follow one another: the first one's number, and where their lines lie in the manifest."""

    first: int = 0
    files: int = 0
    size_bytes: int = 0
    begin: int = 0
    end: int = 0

    def is_full(self, more_bytes: int) -> bool:
        return self.files == PART_FILES or (self.files > 0 and self.size_bytes + more_bytes > PART_BYTES)


def _part(job: JobSpec, number: int, cut: _Cut) -> JobSpec:
    return msgspec.structs.replace(
        job,
        job_id=part_id(job.job_id, number),
        parent=job.job_id,
        part=number,
        first=cut.first,
        items=cut.files,
        starts=(cut.begin, cut.end),
        size_bytes=cut.size_bytes,
        digest=b"",
    )


# -- a part ----------------------------------------------------------------------------------------------


def run(lease: Lease, kms: Kms, store: JobStore, spool: Spool, places: Locations) -> None:
    """Settle what the log leaves of a part's files, then write the result lines of all.

    Raises Paced and Unavailable, once the log is stored: the part is then taken up where it stopped.
    """
    job = lease.claim.accepted
    found = entries(job, spool)
    work = _Part(lease, kms.for_job(), store, places, found)
    work.settle_all()
    label = bulk_items.result_label(job.tenant, job.owner, job.part, lease.claim.fence)
    with spool.writing(label) as out:
        for line in lines(job, found, work.log):
            out.write(wire.encode(line) + b"\n")
    lease.tallies = work.tallies
    lease.result_digest = out.ref


class _Part:
    """One attempt at a part."""

    def __init__(
        self, lease: Lease, kms: Kms, store: JobStore, places: Locations, found: list[ListedFile]
    ) -> None:
        self._lease, self._kms, self.store, self._places = lease, kms, store, places
        self._job = lease.claim.accepted
        self._tree = Tree.parse(self._job.source)
        self._found = found
        self._granted = 0
        self._deferrals = lease.claim.deferrals
        self._made: set[str] = set()
        self.log = lease.claim.log
        self._tally = key_migration.OutcomeCounts(map(FileOutcome.parse, self.log.settled))
        lease.resume(
            items=len(self.log.outcomes),
            failed=self._tally.failed,
            size_bytes=sum(one.size_bytes for one in found[: len(self.log.outcomes)]),
        )

    @property
    def tallies(self) -> dict[str, int]:
        return self._tally.counts(self._job)

    def settle_all(self) -> None:
        if self.log.pending:
            self._settle(self._finish(self.log.pending, FileOutcome.parse(self.log.effect)))
            self._step(self.log)
        for index in range(len(self.log.outcomes), len(self._found)):
            self._lease.check()
            self._keep_pace(len(self._found) - index)
            self._settle(self._one(index))
        self._step(self.log)

    def _settle(self, outcome: FileOutcome) -> None:
        self.log = self.log.adding(str(outcome))
        self._tally.add(outcome)
        self._lease.item(failed=bool(outcome.code))

    def _step(self, log: Checkpoint) -> None:
        counts = {f"{TALLY}{name}": number for name, number in self.tallies.items()}
        self.store.step(self._lease.claim, log, {"settled": self._tally.done, **counts})

    def _keep_pace(self, left: int) -> None:
        if not self._job.rate_per_s:
            return
        while not self._granted:
            wanted = min(left, max(1, math.ceil(self._job.rate_per_s * BURST_S)))
            self._granted, wait_s = self.store.pace(self._job, wanted)
            if wait_s > _SHORT_S:
                self._step(self.log)
                raise Paced(retry_after_s=wait_s)
            time.sleep(wait_s)
        self._granted -= 1

    def _one(self, index: int) -> FileOutcome:
        found = self._found[index]
        if found.code:
            return FileOutcome.refused(found.code)
        version = ""
        try:
            file = self._file(index)
            if self._job.is_campaign:
                outcome = key_migration.look(self._kms, self._places, file)
                version = outcome.version
                if outcome.word != key_migration.DUE or self._job.dry_run:
                    return outcome
            self._make_room(file.target)
            effect = FileOutcome(
                key_migration.CHANGED if self._job.is_campaign else key_migration.DONE, version
            )
            one_file.run(
                _FileLease(self._lease, self._claim(file)), self._kms, _Commits(self, effect), self._places
            )
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
        claim = self._claim(self._file(len(self.log.outcomes)), commit)
        try:
            one_file.run(_FileLease(self._lease, claim), self._kms, _Commits(self, effect), self._places)
        except (LeaseLost, JobCancelled, JobExpired, Unavailable):
            raise
        except KmsError as exc:
            return FileOutcome.refused(exc.code, effect.version)
        return effect

    def _bear(self, exc: Unavailable) -> None:
        """What is away will come back. But one file that the disk cannot give must not hold up the others."""
        if type(exc) is not Unavailable or self._deferrals < PATIENCE:
            self._step(self.log)
            raise exc
        self._deferrals = 0

    def _file(self, index: int) -> JobSpec:
        return file_job(self._job, self._tree, self._found[index].path, index)

    def _claim(self, file: JobSpec, commit: Commit | None = None) -> Attempt:
        return replace(self._lease.claim, accepted=file, commit=commit)

    def _make_room(self, target: str) -> None:
        above = target.rpartition("/")[0]
        if not self._job.in_place and above not in self._made:
            self._places.make_parents(target)
            self._made.add(above)

    def record(self, commit: Commit, effect: FileOutcome) -> None:
        """From here on whoever has the part finishes this commit."""
        words = self.log
        self._step(Checkpoint(words=words.words, outcomes=words.outcomes, pending=commit, effect=str(effect)))


class _FileLease:
    """The part's lease, as work on one of its files sees it."""

    def __init__(self, lease: Lease, claim: Attempt) -> None:
        self.claim = claim
        self.admit = lease.admit
        self.check = lease.check
        self.advance = lease.advance


class _Commits:
    """Where the commit of one file is recorded: in the log of its part."""

    def __init__(self, part: _Part, effect: FileOutcome) -> None:
        self._part = part
        self._effect = effect
        self.now = part.store.now

    def committing(self, claim: Attempt, commit: Commit) -> None:
        claim.accepted.check_expiry(self.now)
        self._part.record(commit, self._effect)


def file_job(part: JobSpec, tree: Tree, path: str, index: int) -> JobSpec:
    """One file of a part as a job from file to file; its id makes the name of its temporary file its own."""
    return msgspec.structs.replace(
        part,
        job_id=str(uuid.uuid5(uuid.UUID(part.job_id), str(index))),
        parent=part.owner,
        source=tree.base + path,
        target=target_of(part.kind, part.source, part.target, tree, path),
        items=0,
        starts=(),
    )


def entries(part: JobSpec, spool: Spool) -> list[ListedFile]:
    """The files of a part, as they were listed. Raises ResultExpired once the job was cancelled."""
    label = Label(part.tenant, part.owner, MANIFEST, part.manifest, part.input_ref)
    with spool.opened(label) as reader:
        return [_decode(line) for line in bulk_lines.lines(reader.slabs(*part.starts))]


# -- afterwards ------------------------------------------------------------------------------------------


def lines(
    part: JobSpec, found: list[ListedFile], log: Checkpoint, code: str = ""
) -> Iterator[wire.ItemResult]:
    """A line for each file of a part; ``code`` is why those that the log does not settle have no outcome."""
    tree = Tree.parse(part.source)
    settled = [FileOutcome.parse(word) for word in log.settled]
    for index, one in enumerate(found):
        outcome = settled[index] if index < len(settled) else FileOutcome.refused(code)
        file = file_job(part, tree, one.path, index)
        yield wire.ItemResult(
            index=part.first + index,
            source=file.source,
            target=msgspec.UNSET if part.dry_run else file.target,
            outcome=outcome.shown(part),
            error=wire.ErrorCode(code=outcome.code) if outcome.code else msgspec.UNSET,
        )


def abandon(part: JobSpec, state: Job, spool: Spool, places: Locations, store: JobStore) -> None:
    """Remove the temporary files that killed attempts at a part left, if no attempt will follow."""
    if not state.ended or state.state == "succeeded" or state.error == "items_failed":
        return
    try:
        found, log = entries(part, spool), store.log_of(part.job_id)
    except KmsError:
        return
    tree = Tree.parse(part.source)
    for index in range(len(log.outcomes), len(found)):
        file = file_job(part, tree, found[index].path, index)
        one_file.sweep(file.job_id, file.target, state.fence + 1, places)
