"""The verdict on a storm: what was promised of every job, and what may be left of none."""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, cast

import httpx2 as httpx

from kms_core.jobs.model import Job
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import UnknownJob
from kms_protocol.wire import ENDED
from support.canary.secrets import forms
from support.chaos.cluster import SupervisedByTest
from support.chaos.load import AcceptedJob, Load
from support.job_stores import events
from support.service import CANARY, core_of
from support.waiting import until

TENANT: Final = "default"
TRANSITIONS: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset({"queued"}),
    "queued": frozenset({"queued", "running", "failed", "cancelled"}),  # ended by the one who would begin
    "running": frozenset({"queued", "running", "committing", *ENDED}),
    "committing": frozenset({"succeeded", "failed"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""Which state may follow which in the stream of events; nothing is retried by hand here."""


class JobChecks:
    """Collects ``violations``. ``creations`` says how often each name of a target was put in place."""

    def __init__(
        self,
        cluster: SupervisedByTest,
        load: Load,
        creations: Callable[[], Mapping[str, int]],
    ) -> None:
        self.violations: list[str] = [*load.troubles]
        self.states: Counter[str] = Counter()
        self.losses = 0
        self._cluster = cluster
        self._load = load
        self._creations = creations
        self._store: JobStore = core_of(cluster).worker_context.store

    def wait(self, patience_s: float) -> None:
        """Until every job has ended; those that have not after so long are lost."""
        deadline = time.monotonic() + patience_s
        for accepted in self._load.accepted_jobs:
            while not (job := self._job(accepted)).ended and time.monotonic() < deadline:
                self._cluster.restart_dead()
                time.sleep(0.05)
            self.losses += not job.ended
            if not job.ended:
                self.violations.append(f"LOST: {self._told(accepted)}")

    def check_results(self) -> None:
        """Everything that can be said while the results are there."""
        for accepted in self._load.accepted_jobs:
            self.states[self._job(accepted).state] += 1
            try:
                self._check_one(accepted)
            except (AssertionError, KeyError, ValueError) as exc:
                self.violations.append(f"{self._told(accepted)}: {type(exc).__name__} {exc}")
        self.violations += self._strays()
        self.violations += self._events()
        self.violations += self._partial_reads()
        self.violations += self._put_in_place_twice()

    def _check_one(self, accepted: AcceptedJob) -> None:
        request, job = accepted.request, self._job(accepted)
        assert len(accepted.ids) == 1, f"asked under one key, told {accepted.ids}"
        if job.state == "cancelled":
            assert request.manner == "cancel", "cancelled by nobody"
            self._nothing_of(accepted)
        elif job.error == "items_failed" and request.failing_items:
            request.check(self._cluster.result(accepted.job_id))
        else:
            assert (job.state, request.failing_items) == ("succeeded", 0), "it ended otherwise than it should"
            request.check(
                request.target.read_bytes() if request.target else self._cluster.result(accepted.job_id)
            )

    def _nothing_of(self, accepted: AcceptedJob) -> None:
        target = accepted.request.target
        gone = target is None or not target.exists() or target.read_bytes() == b"old"
        assert gone, "a job that did not succeed has a target"

        def left() -> list[str]:
            return [path for path in self._cluster.spooled() if accepted.job_id in path]

        until(lambda: not left(), lambda: f"nothing in the spool: {left()}")

    def _strays(self) -> Iterator[str]:
        """A job that nobody was told of would be one that was accepted twice."""
        known = {job_id for accepted in self._load.accepted_jobs for job_id in accepted.ids}
        raw = cast("list[bytes]", self._store.redis.zrange(f"kms:tenant:{TENANT}", 0, -1))
        yield from (
            f"job {job_id.decode()} was asked for by nobody" for job_id in raw if job_id.decode() not in known
        )

    def _events(self) -> Iterator[str]:
        seen: defaultdict[str, list[str]] = defaultdict(list)
        for event in events(self._store):
            seen[event["subject"]].append(event["type"].removeprefix("kms.job."))
        for job_id, states in seen.items():
            steps = zip(["", *states], states, strict=False)
            if any(after not in TRANSITIONS[before] for before, after in steps):
                yield f"job {job_id} went through {' '.join(states)}"
        for accepted in self._load.accepted_jobs:
            if seen[accepted.job_id][-1:] != [self._job(accepted).state]:
                yield f"{self._told(accepted)}: the stream's last word is {seen[accepted.job_id][-1:]}"

    def _partial_reads(self) -> Iterator[str]:
        """What was read while work went on is what is there in the end."""
        wanted = defaultdict(list)
        for glimpse in self._load.glimpses:
            wanted[glimpse.job_id].append(glimpse)
        for job_id, glimpses in wanted.items():
            answer = self._cluster.get(f"/jobs/{job_id}/result")
            whole = answer.content if answer.status_code == httpx.codes.OK else b""
            for one in glimpses:
                if hashlib.sha256(whole[one.start : one.start + one.size]).digest() != one.digest:
                    yield f"job {job_id}: bytes {one.start} to {one.start + one.size} were others before"

    def _put_in_place_twice(self) -> Iterator[str]:
        """A target gets its name once, however many attempts there were."""
        creations = self._creations()
        for accepted in self._load.accepted_jobs:
            target = accepted.request.target
            expected = accepted.request.replaces + (self._job(accepted).state == "succeeded")
            if target and (count := creations.get(target.name, 0)) != expected:
                yield f"{self._told(accepted)}: its target was put in place {count} times"

    # -- afterwards ----------------------------------------------------------------------------------

    def expire(self) -> None:
        """Nothing is in anybody's hands; then time passes, and nothing is left of any job but its record."""
        redis, files = self._store.redis, self._cluster.files
        self._await("no lease is left", lambda: not redis.zcard(f"kms:running:{TENANT}"))
        self._await("nothing is open", lambda: not redis.zcard("kms:open"))
        self.violations += [
            f"open: {self._record(raw.decode())}"
            for raw in cast("list[bytes]", redis.zrange("kms:open", 0, 9))
        ]
        ended = cast("list[bytes]", redis.zrange("kms:ended", 0, -1))
        if ended:
            redis.zadd("kms:ended", dict.fromkeys(ended, 1.0))
        self._await("the results are deleted", lambda: not redis.zcard("kms:ended"))
        self._await("no temporary file is left", lambda: not list(files.glob(".kms-*")))

    def _await(self, what: str, fact: Callable[[], object]) -> None:
        try:
            until(fact, what)
        except AssertionError as exc:
            self.violations.append(str(exc))

    def spool_is_empty(self) -> None:
        """After the sweep of orphans: uploads that an API took with it into the grave."""
        self._await("the spool is empty", lambda: self._cluster.spooled() == [])
        if left := self._cluster.spooled():
            self.violations.append(f"left in the spool: {left[:10]}")

    def search(self, folder: Path) -> None:
        """The canary is nowhere but where the user pointed."""
        wanted = list(forms(CANARY))
        for path in folder.rglob("*"):
            if not path.is_file() or self._cluster.files in path.parents:
                continue
            data = path.read_bytes()
            if any(form in data for form in wanted):
                self.violations.append(f"the canary sings in {path}")

    # -- words ---------------------------------------------------------------------------------------

    def _job(self, accepted: AcceptedJob) -> Job:
        try:
            return self._store.get(accepted.job_id, TENANT)
        except UnknownJob:
            return Job(
                job_id=accepted.job_id, tenant=TENANT, kind="encrypt", state="queued", error="no record"
            )

    def _record(self, job_id: str) -> str:
        fields = cast("dict[bytes, bytes]", self._store.redis.hgetall(f"kms:job:{job_id}"))
        return f"{job_id} { ({name: value for name, value in fields.items() if name != b'sealed'}) }"

    def _told(self, accepted: AcceptedJob) -> str:
        job = self._job(accepted)
        request = accepted.request
        return (
            f"{request.name} ({request.manner}) {job.job_id} {job.state} {job.error} "
            f"attempt {job.attempt} fence {job.fence} parts {job.parts}"
        )
