"""The protocol of the job store in plain Python: what each call answers, and what the jobs are afterwards.

A job that was accepted is run by one attempt at a time, and ends once:

    queued → running → committing → succeeded | failed | cancelled

``JobModel`` has a method for each call, which answers ``ok`` or the code of an error. A claim takes any job
that is ready: it is given the one that the store chose, and fails if that may not be. Times are seconds of
one clock, and have come as soon as it shows them.

Outside, and held by other tests, most of them in ``tests/kms_core/jobs``: fairness, priorities, resources and
large jobs; wake-ups, workers, and jobs that need a newer one; sessions and webhooks; counters, memory, labels
and notes of past attempts; bytes that were fetched; files, and what a worker tidies after a job; forged data.
Outside too: when a group is forgotten, and what an attempt asks for after it split its job, but to renew and
to split again.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

# Settings of the store, small enough to be reached. Bounds are of a tenant, but for OPEN_JOBS.
LEASE_S: Final = 10
ATTEMPTS: Final = 2
OPEN_JOBS: Final = 7
TENANT_LEASES: Final = 2
TENANT_JOBS: Final = 4
TENANT_BYTES: Final = 100
KEPT_S: Final = 40  # a record, after its result was deleted
INPUT_GRACE_S: Final = 5
RETRY_WITHIN_S: Final = 60
# Set by the store itself:
PAST_RUN_BY_S: Final = 3  # a lease lasts at most so long after ``run_by``: its worker ends the job itself
LOOK_AGAIN_S: Final = 5  # at a job whose parts have ended, until a worker has ended it

OK: Final = "ok"
DEAD: Final = ("attempts_exhausted", "record_refused")  # errors of jobs that may be retried


@dataclass
class ModelJob:
    """A job or a part of one. A time of 0 has not come."""

    # As it was accepted:
    job_id: str
    tenant: str
    queue: str
    start_by: float
    run_by: float
    expires_at: float
    keep_for_s: float = 0
    input_bytes: int = 0
    group: str = ""
    group_jobs: int = 0
    parent: str = ""
    # What is shown of it:
    state: str = "queued"
    error: str = ""
    attempt: int = 0
    generation: int = 0
    holder: str = ""  # the id of the attempt that holds it
    not_before: float = 0
    started_at: float = 0
    ended_at: float = 0
    released: float = 0
    is_cancelling: bool = False
    is_purged: bool = False
    parts: list[str] = field(default_factory=list)
    parts_left: int = 0
    counted_bytes: int = 0  # of its input, then of its result, for the quota of its tenant
    # What decides:
    is_offered: bool = True  # to workers that ask for any job
    lease_until: float = 0  # from then on others may take it
    claimed_as: int = 0
    commit: str = ""
    checkpoint: str = ""
    gone_at: float = inf  # when its record expires

    @property
    def is_open(self) -> bool:
        return self.state in {"queued", "running", "committing"}

    @property
    def is_dead(self) -> bool:
        return self.state == "failed" and self.error in DEAD and not self.parent and not self.released

    @property
    def have_parts_ended(self) -> bool:
        return bool(self.parts) and self.parts_left <= 0


class JobModel:
    """All jobs, and ``at``, the time. ``events`` has one (subject, state, code) for each that is reported."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[str, tuple[str, str, float]] = {}  # Idempotency-Keys: job, digest, expiry
        self.groups: dict[tuple[str, str], dict[str, bool]] = {}  # by tenant and name: which jobs are open
        self.inputs: dict[str, float] = {}  # that are not needed any more, and since when
        self.results: dict[str, float] = {}  # and when each is to be deleted
        self.events: list[tuple[str, str, str]] = []

    def pass_time(self, seconds: float) -> None:
        self.at += seconds
        self.jobs = {name: job for name, job in self.jobs.items() if job.gone_at > self.at}
        self.keys = {name: used for name, used in self.keys.items() if used[2] > self.at}

    # -- callers -----------------------------------------------------------------------------------------

    def submit(self, job: ModelJob, key: str = "", digest: str = "") -> str:
        """Accept a job. Answers its id, or that of an earlier one with this Idempotency-Key."""
        if key in self.keys:
            before, same, _ = self.keys[key]
            return before if before in self.jobs and digest == same else "idempotency_conflict"
        if job.job_id in self.jobs:
            return job.job_id
        refusal = self._refusal(job)
        if refusal:
            return refusal
        if key:
            self.keys[key] = job.job_id, digest, job.expires_at
        job.counted_bytes = job.input_bytes
        self._accept(job, "")
        return job.job_id

    def _refusal(self, job: ModelJob) -> str:
        mine = [each for each in self.jobs.values() if each.tenant == job.tenant and not each.parent]
        is_full = sum(each.is_open for each in self.jobs.values()) >= OPEN_JOBS
        if is_full or sum(each.is_open and each.run_by > self.at for each in mine) >= TENANT_JOBS:
            return "rate_limited"
        if job.group and len(self.groups.get((job.tenant, job.group), ())) >= job.group_jobs:
            return "group_complete"
        used = sum(each.counted_bytes for each in mine)
        return "spool_quota" if job.input_bytes and used + job.input_bytes > TENANT_BYTES else ""

    def _accept(self, job: ModelJob, code: str) -> None:
        self.jobs[job.job_id] = job
        if job.group:
            self.groups.setdefault((job.tenant, job.group), {})[job.job_id] = True
        self._report(job, "queued", code)

    def withdraw(self, job_id: str) -> str:
        """Take back a job that was not stored safely and never claimed, as if it had not been submitted."""
        job = self.jobs.get(job_id)
        if job is None or job.state != "queued" or job.started_at or job.generation:
            return "started"
        del self.jobs[job_id]
        self._report(job, "cancelled", "durability_unconfirmed")
        if job.input_bytes:
            self.inputs[job_id] = self.at
        if job.group:
            del self.groups[job.tenant, job.group][job_id]
        self.keys = {name: used for name, used in self.keys.items() if used[0] != job_id}
        return "withdrawn"

    def by_owner(self, job_id: str, tenant: str, call: Callable[..., str]) -> str:
        """A call of a tenant for a job of its own. Parts are not."""
        job = self.jobs.get(job_id)
        return call(job) if job and job.tenant == tenant and not job.parent else "unknown_job"

    def cancel(self, job: ModelJob) -> str:
        """End a queued job, have a running one stop. A commit is not stopped, and an end stays."""
        if job.state == "queued":
            self._end(job, "cancelled", "cancelled")
        elif job.state == "running":
            job.is_cancelling = True
            for part in map(self.jobs.get, job.parts):  # the worker that is given one ends it
                if part and part.state == "queued" and part.not_before > self.at:
                    part.not_before, part.is_offered = 0, True
        return "job_committing" if job.state == "committing" else OK

    def retry(self, job: ModelJob) -> str:
        """Give a dead job all its attempts and new deadlines. No bound of open jobs holds it up."""
        if not job.is_dead:
            return "job_not_dead"
        run_by = self.at + RETRY_WITHIN_S
        times = run_by, run_by, run_by + job.keep_for_s, job.keep_for_s
        others = job.input_bytes, job.group, job.group_jobs
        again = ModelJob(job.job_id, job.tenant, job.queue, *times, *others)
        again.generation, again.counted_bytes = job.generation + 1, job.counted_bytes
        self.results.pop(job.job_id, None)
        self._accept(again, "retried")
        return OK

    def release(self, job: ModelJob) -> str:
        """Give up the result of an ended job."""
        if job.is_open:
            return "job_not_finished"
        if not job.released:
            job.released = self.results[job.job_id] = self.at
        return OK

    # -- workers -----------------------------------------------------------------------------------------

    def claim(self, job_id: str, attempt_id: str, queues: Collection[str] = ()) -> str:
        """Take a job: one that was named, or with ``queues`` one that the store chose.

        Answers ``closed`` if the job had to end instead, ``none`` if it is not to be had.
        """
        job = self.jobs.get(job_id)
        if job is None or not self.is_free(job) or job.have_parts_ended:
            return "none"
        is_capped = self._leases(job.tenant, self.at) >= TENANT_LEASES
        assert not queues or (job.queue in queues and not is_capped), "the store chose a job that may not run"
        if job.state != "committing":
            end = self._end_before_work(job)
            if end:
                self._end(job, *end)
                return "closed"
            if is_capped:
                return "none"
            job.state, job.started_at = "running", job.started_at or self.at
            job.attempt = job.claimed_as = job.attempt + 1
            self._report(job, "running")
        job.holder = attempt_id
        self._lease(job)
        return OK

    def find_nothing(self, queues: Collection[str]) -> None:
        """Nothing is ready. A tenant that had all its leases waits for one to end, or to be reaped."""
        for job in self.jobs.values():
            is_ready = job.is_offered and job.queue in queues and self.is_free(job)
            assert not is_ready or self._leases(job.tenant, 0) >= TENANT_LEASES, f"{job.job_id} was not given"

    def is_free(self, job: ModelJob) -> bool:
        return job.is_open and (job.not_before if job.state == "queued" else job.lease_until) <= self.at

    def _leases(self, tenant: str, since: float) -> int:
        held = [job for job in self.jobs.values() if job.tenant == tenant and job.holder and not job.parts]
        return sum(job.lease_until > since for job in held)

    def _end_before_work(self, job: ModelJob) -> tuple[str, str] | None:
        if self._is_to_stop(job):
            return "cancelled", "cancelled"
        if self._overdue(job):
            return "failed", self._overdue(job)
        return ("failed", DEAD[0]) if job.attempt >= ATTEMPTS else None

    def _overdue(self, job: ModelJob) -> str:
        if job.run_by <= self.at:
            return "expired"
        return "not_started" if not job.started_at and job.start_by <= self.at else ""

    def _is_to_stop(self, job: ModelJob) -> bool:
        parent = self.jobs.get(job.parent)
        is_orphan = bool(job.parent) and (not parent or parent.state != "running" or parent.is_cancelling)
        return job.is_cancelling or is_orphan

    def _lease(self, job: ModelJob) -> None:
        longest = max(self.at, job.run_by) + PAST_RUN_BY_S if job.state == "running" else inf
        job.lease_until, job.is_offered = min(self.at + LEASE_S, longest), False

    def by_holder(self, job_id: str, attempt_id: str, call: Callable[..., str], *given: object) -> str:
        """A call of an attempt, which holds its job until it gives it back or another one takes it."""
        job = self.jobs.get(job_id)
        return call(job, *given) if job and job.is_open and job.holder == attempt_id else "lease_lost"

    def renew(self, job: ModelJob) -> str:
        """Hold a job for longer. One that has parts needs no lease."""
        if job.parts:
            return OK
        if job.state == "running" and job.run_by <= self.at:
            return "expired"
        self._lease(job)
        return "cancelled" if self._is_to_stop(job) else OK

    def begin_commit(self, job: ModelJob, commit: str) -> str:
        """From now on the job cannot be cancelled, and whoever has it next finishes this commit."""
        if job.state == "committing":
            return OK if job.commit == commit else "lease_lost"
        if self._is_to_stop(job):
            return "cancelled"
        if job.run_by <= self.at:
            return "expired"
        job.state, job.commit = "committing", commit
        self._report(job, "committing")
        return OK

    def take_back_commit(self, job: ModelJob) -> str:
        job.state, job.commit = "running", ""
        return OK

    def finish(self, job: ModelJob, state: str, code: str) -> str:
        if state == "succeeded" or code == "items_failed":
            job.attempt = job.claimed_as  # as its signed end says
        self._end(job, state, code)
        return OK

    def defer(self, job: ModelJob, delay_s: float) -> str:
        """Give a job back, to be run later; the attempt does not count."""
        job.attempt -= job.state == "running"
        self._give_back(job, delay_s, "deferred")
        return OK

    def stall(self, job: ModelJob) -> str:
        """Take a job from an attempt that advances nothing; the attempt counts."""
        if job.state == "running" and self._is_to_stop(job) and not job.parts:
            self._end(job, "cancelled", "cancelled")
        elif not job.parts:
            self._give_back(job, 0, "stalled")
        return OK

    def _give_back(self, job: ModelJob, delay_s: float, code: str) -> None:
        """A commit that has begun stays one. Whatever the attempt asks for now changes nothing."""
        job.holder, job.is_offered = "", delay_s <= 0
        job.lease_until = job.not_before = self.at + delay_s
        if job.state == "running":
            job.state = "queued"
            self._report(job, "queued", code)

    def step(self, job: ModelJob, checkpoint: str) -> str:
        """Note how far a part has come: attempts count anew. Saying it again changes nothing."""
        if job.state != "running" or self._is_to_stop(job):
            return "lease_lost" if job.state != "running" else "cancelled"
        if job.checkpoint != checkpoint and job.run_by <= self.at:
            return "expired"
        if job.checkpoint != checkpoint:
            job.checkpoint, job.attempt = checkpoint, 1
        return OK

    def split(self, job: ModelJob, parts: Sequence[str]) -> str:
        """Turn a job into the parent of parts: it runs without a lease until the last one ends."""
        if job.state != "running" or job.parts:
            return OK if job.parts else "lease_lost"
        if self._is_to_stop(job):
            return "cancelled"
        same = job.tenant, job.queue, job.run_by, job.run_by, job.expires_at, job.keep_for_s
        self.jobs |= {name: ModelJob(name, *same, parent=job.job_id) for name in parts}
        job.parts, job.parts_left = list(parts), len(parts)
        job.lease_until, job.is_offered = job.run_by, False
        return OK

    def end_parent(self, job_id: str) -> None:
        """End a job whose parts have all ended; before that, and after it, nothing happens."""
        job = self.jobs[job_id]
        if job.is_open and job.have_parts_ended:
            states = {self.jobs[name].state for name in job.parts if name in self.jobs}
            end = ("succeeded", "") if states <= {"succeeded"} else ("failed", "items_failed")
            self._end(job, *(("cancelled", "cancelled") if job.is_cancelling else end))

    # -- ends, the reaper and the cleanup ----------------------------------------------------------------

    def _end(self, job: ModelJob, state: str, code: str) -> None:
        job.state, job.error, job.ended_at = state, code, self.at
        job.holder, job.is_offered = "", False
        if job.input_bytes and code not in DEAD:  # a retry needs its input
            self.inputs[job.job_id] = self.at
        if state == "cancelled":
            job.counted_bytes = 0
        until = min(job.expires_at, self.at + (job.keep_for_s or inf))
        self.results[job.job_id], job.gone_at = until, until + KEPT_S
        self._report(job, state, code)
        if job.group:
            group = self.groups[job.tenant, job.group]
            group[job.job_id] = False
            if len(group) >= job.group_jobs and not any(group.values()):
                self._report(job, "group.ended", "")
        parent = self.jobs.get(job.parent)
        if parent and parent.state == "running":
            parent.parts_left -= 1
            if parent.parts_left <= 0:
                parent.lease_until = self.at + LOOK_AGAIN_S

    def _report(self, job: ModelJob, state: str, code: str = "") -> None:
        if not job.parent:
            self.events.append((job.job_id, state, code))

    def is_due(self, job: ModelJob) -> bool:
        """Whether the reaper looks at a job: its lease or delay is over, or it has waited for too long."""
        is_late = job.state == "queued" and bool(self._overdue(job))
        return is_late or (self.is_free(job) and not job.is_offered)

    def reap(self, job: ModelJob) -> None:
        if job.have_parts_ended:
            job.lease_until = self.at + LOOK_AGAIN_S
        elif job.state == "running" and self._is_to_stop(job):
            self._end(job, "cancelled", "cancelled")
        elif job.state != "committing" and self._overdue(job):
            self._end(job, "failed", self._overdue(job))
        elif job.state == "running":
            self._give_back(job, 0, "lease_lost")
        else:
            job.is_offered = True

    def remove_input(self, job_id: str) -> None:
        """The input is deleted. Where there is a result, that counts for the quota as if it were as large."""
        self.inputs.pop(job_id)
        job = self.jobs.get(job_id)
        if job and job.error not in {"", "items_failed"}:
            job.counted_bytes = 0

    def purge(self, job_id: str) -> None:
        """The result is deleted, and whatever is left in the spool; the record stays for late readers."""
        self.results.pop(job_id)
        self.inputs.pop(job_id, None)
        job = self.jobs.get(job_id)
        if job:
            job.is_purged, job.counted_bytes = True, 0
