"""The protocol of the job store in plain Python: what each call answers, and what the jobs are afterwards.

A job that was accepted is run by one attempt at a time, and ends once:

    queued → running → committing → succeeded | failed | cancelled

``JobModel`` has a method for each call. Where the store may choose (a claim takes any job that is ready), the
method is given what it chose, and raises ``AssertionError`` if it may not. Answers are ``ok`` or the code of an
error. All times are seconds of one clock, and a time has come as soon as the clock shows it.

Outside, and held by other tests of ``tests/kms_core/jobs``:

- which ready job comes first, of which tenant; resources, large jobs: ``store/test_pull.py``,
  ``test_priority.py``, ``test_resources.py``
- memory, shares of tenants, small blobs: ``store/test_shares.py``, ``test_small_blobs.py``
- wake-ups, workers, their roots that stall: ``store/test_pull.py``, ``test_workers.py``
- jobs that need a newer worker: ``store/test_newer_records.py``
- counts of items, notes of past attempts, labels: ``store/test_store.py``, ``test_past_attempts.py``
- forged records: ``store/test_unreadable_records.py``; replicas: ``store/test_replicas.py``
- sessions, webhooks, operations; how files and the spool follow a job: ``events``, ``execution``, ``recovery``
- what an attempt asks for after it has split its job, but to renew and to split again: the runner asks no more
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

OK: Final = "ok"
DEAD: Final = ("attempts_exhausted", "record_refused")
"""Errors of jobs that may be retried."""
PAST_RUN_BY_S: Final = 3.0  # a lease lasts at most so long after ``run_by``: its worker ends the job itself
LEEWAY_S: Final = 60.0  # by which the clock of a worker may be wrong
FETCHED_S: Final = 60.0  # a result that is deleted after its fetch stays so long
LOOK_AGAIN_S: Final = 5.0  # at a job whose parts have ended, until a worker has ended it
GROUP_S: Final = 3600.0


@dataclass(frozen=True)
class Rules:
    """Settings: seconds, most attempts at a job, and per tenant most leases, open jobs and bytes of inputs."""

    lease_s: float
    attempts: int
    open_jobs: int
    tenant_leases: int
    tenant_jobs: int
    tenant_bytes: int
    kept_s: float
    input_grace_s: float
    retry_within_s: float


@dataclass
class ModelJob:
    """A job or a part of one, first as it was accepted. A time of 0 has not come; None is never."""

    job_id: str
    tenant: str
    queue: str
    start_by: float
    run_by: float
    expires_at: float
    keep_for_s: float = 0.0
    counted_bytes: int = 0  # of its input, then of its result, for the quota of its tenant
    group: str = ""
    group_jobs: int = 0
    parent: str = ""
    # What is shown of it:
    state: str = "queued"
    error: str = ""
    attempt: int = 0
    generation: int = 0
    holder: str = ""  # the id of the attempt that holds it, while it runs or commits
    not_before: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    released: float = 0.0
    is_cancelling: bool = False
    is_purged: bool = False
    is_dead: bool = False
    parts: list[str] = field(default_factory=list)
    parts_left: int = 0
    # What decides:
    lease_until: float = 0.0
    claims: int = 0  # and ends by others than its attempt: from two on somebody may have left files
    commit: str = ""
    log: str = ""
    fetched: int = 0
    is_spooled: bool = False
    ready: Literal["yes", "maybe", "no"] = "yes"  # whether a worker that asks for any job may get this one
    slot_until: float | None = None  # until when it counts among the leases of its tenant
    leased_at: float | None = None  # the times at which the reaper looks at it
    delayed_at: float | None = None
    expiring_at: float | None = None
    gone_at: float | None = None  # when its record expires

    @property
    def is_open(self) -> bool:
        return self.state in {"queued", "running", "committing"}

    @property
    def have_parts_ended(self) -> bool:
        return bool(self.parts) and self.parts_left <= 0

    @property
    def waits_until(self) -> float:
        return self.run_by if self.started_at else min(self.start_by, self.run_by)


@dataclass(frozen=True)
class Held:
    """What a claim gives: the right to run a job, until another attempt has it. It has its job's ``run_by``."""

    job_id: str
    attempt_id: str
    number: int
    run_by: float
    parent: str = ""


@dataclass
class Group:
    """Jobs that were submitted for one group, those of them that are open, and when it is forgotten."""

    members: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    until: float = 0.0


class JobModel:
    """All jobs, and ``at``, the time. ``events`` has one (subject, state, code) for each that is reported."""

    def __init__(self, rules: Rules, at: float) -> None:
        self.rules, self.at = rules, at
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[str, tuple[str, str, float]] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.chores: set[str] = set()
        self.inputs: dict[str, float] = {}
        self.results: dict[str, float] = {}
        self.events: list[tuple[str, str, str]] = []

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and forget what has expired."""
        self.at += seconds
        self.jobs = {
            name: job for name, job in self.jobs.items() if job.gone_at is None or job.gone_at > self.at
        }
        self.groups = {name: group for name, group in self.groups.items() if group.until > self.at}
        self.keys = {name: used for name, used in self.keys.items() if used[2] > self.at}

    # -- callers -----------------------------------------------------------------------------------------

    def submit(self, job: ModelJob, key: str = "", digest: str = "") -> str:
        """Answers the id of the job that is there then: an earlier one with this Idempotency-Key."""
        if key in self.keys:
            before, same, _ = self.keys[key]
            found = self.jobs.get(before)
            is_that = found and same == digest and self.at <= found.expires_at + LEEWAY_S
            return before if is_that else "idempotency_conflict"
        if job.job_id in self.jobs:
            return job.job_id
        refusal = self._refusal(job)
        if refusal:
            return refusal
        if key:
            self.keys[key] = job.job_id, digest, job.expires_at
        self.jobs[job.job_id] = job
        job.is_spooled = job.counted_bytes > 0
        self._open(job)
        self._report(job, "queued")
        return job.job_id

    def _refusal(self, job: ModelJob) -> str:
        mine = [each for each in self.jobs.values() if each.tenant == job.tenant and not each.parent]
        if sum(each.is_open for each in self.jobs.values()) >= self.rules.open_jobs:
            return "rate_limited"
        if sum(each.is_open and each.run_by > self.at for each in mine) >= self.rules.tenant_jobs:
            return "rate_limited"
        if job.group and len(self._group(job).members) >= job.group_jobs:
            return "group_complete"
        if job.counted_bytes:
            used = sum(each.counted_bytes for each in mine)
            if used + job.counted_bytes > self.rules.tenant_bytes:
                return "spool_quota"
        return ""

    def _open(self, job: ModelJob) -> None:
        job.ready, job.expiring_at = "yes", job.waits_until
        if job.group:
            group = self._group(job)
            group.members.add(job.job_id)
            group.open.add(job.job_id)
            group.until = max(group.until, job.expires_at + GROUP_S)

    def _group(self, job: ModelJob) -> Group:
        return self.groups.setdefault((job.tenant, job.group), Group())

    def withdraw(self, job_id: str) -> str:
        """Take back a job that was not stored safely, as if it had not been submitted, unless it was claimed."""
        job = self.jobs.get(job_id)
        if job is None or job.state != "queued" or job.claims:
            return "started"
        del self.jobs[job_id]
        self._report(job, "cancelled", "durability_unconfirmed")
        if job.is_spooled:
            self.inputs[job_id] = self.at
        if job.group:
            self._group(job).members.discard(job_id)
            self._group(job).open.discard(job_id)
        self.keys = {name: used for name, used in self.keys.items() if used[0] != job_id}
        return "withdrawn"

    def cancel(self, job_id: str, tenant: str) -> str:
        """End a queued job, have a running one stop. A commit is not stopped, and an end stays."""
        job = self._own(job_id, tenant)
        if job is None:
            return "unknown_job"
        if job.state == "queued":
            job.claims += 1
            self._end(job, "cancelled", "cancelled")
            if job.claims > 1:
                self.chores.add(job_id)
        elif job.state == "running":
            job.is_cancelling = True
            for part in self._parts(job):
                if part.state == "queued" and part.not_before > self.at:
                    part.not_before = 0
                    self._offer(part)
        return "job_committing" if job.state == "committing" else OK

    def retry(self, job_id: str, tenant: str) -> str:
        """Give a dead job all its attempts and new deadlines. No bound of open jobs holds it up."""
        job = self._own(job_id, tenant)
        if job is None:
            return "unknown_job"
        if job.state != "failed" or job.error not in DEAD or job.released:
            return "job_not_dead"
        job.state, job.error, job.attempt, job.generation = "queued", "", 0, job.generation + 1
        job.is_cancelling = job.is_purged = job.is_dead = False
        job.holder, job.parts, job.parts_left = "", [], 0
        job.not_before = job.started_at = job.ended_at = 0
        job.start_by = job.run_by = self.at + self.rules.retry_within_s
        job.expires_at = job.run_by + job.keep_for_s
        job.claims, job.gone_at = job.claims + 1, None
        self.results.pop(job_id, None)
        self._open(job)
        self._report(job, "queued", "retried")
        return OK

    def release(self, job_id: str, tenant: str, delay_s: float = 0.0) -> str:
        """Give up the result of an ended job."""
        job = self._own(job_id, tenant)
        if job is None:
            return "unknown_job"
        if job.is_open:
            return "job_not_finished"
        at = self.at + delay_s
        if not job.released or job.released > at:
            job.released = self.results[job_id] = at
            job.is_dead = False
        return OK

    def fetched(self, job_id: str, tenant: str, sent: tuple[int, int], size: int) -> str:
        """Note that bytes of the result were sent; once all were, from the first one on, it is given up."""
        job = self._own(job_id, tenant)
        if job and not job.is_open:
            start, stop = sent
            if start <= job.fetched < stop:
                job.fetched = stop
            if job.fetched >= size:
                self.release(job_id, tenant, FETCHED_S)
        return OK if job else "unknown_job"

    def _own(self, job_id: str, tenant: str) -> ModelJob | None:
        job = self.jobs.get(job_id)
        return job if job and job.tenant == tenant and not job.parent else None

    # -- workers -----------------------------------------------------------------------------------------

    def claim(self, job_id: str, attempt_id: str, queues: Collection[str] = ()) -> Held | str:
        """Take a job: one that was named, or with ``queues`` one that the store chose.

        Answers ``closed`` if the job had to end instead, ``none`` if it is not to be had.
        """
        job = self.jobs.get(job_id)
        if job is None or not self._is_free(job):
            return "none"
        if queues:
            assert job.ready != "no", "the store chose a job that is not ready"
            assert job.queue in queues, "the store chose a job of a queue that its worker does not serve"
            assert not self._is_capped(job.tenant), "the store chose a job of a tenant that has its leases"
            assert not self.chores & self.jobs.keys(), "the store chose a job while there are chores"
        if job.state != "committing":
            end = self._end_before_work(job)
            if end:
                job.claims += 1
                self._end(job, *end)
                return "closed"
            if not queues and self._is_capped(job.tenant):
                return "none"
            job.attempt += 1
            job.state = "running"
            job.started_at = job.started_at or self.at
            self._report(job, "running")
        job.holder, job.claims, job.ready, job.expiring_at = attempt_id, job.claims + 1, "no", None
        self._lease(job)
        return Held(job_id, attempt_id, job.attempt, job.run_by, job.parent)

    def _is_free(self, job: ModelJob) -> bool:
        if not job.is_open or job.have_parts_ended:
            return False
        return (job.not_before if job.state == "queued" else job.lease_until) <= self.at

    def _end_before_work(self, job: ModelJob) -> tuple[str, str] | None:
        if self._is_to_stop(job):
            return "cancelled", "cancelled"
        if self._overdue(job):
            return "failed", self._overdue(job)
        return ("failed", DEAD[0]) if job.attempt >= self.rules.attempts else None

    def _overdue(self, job: ModelJob) -> str:
        if job.run_by <= self.at:
            return "expired"
        return "not_started" if not job.started_at and job.start_by <= self.at else ""

    def _is_to_stop(self, job: ModelJob) -> bool:
        parent = self.jobs.get(job.parent)
        has_none = bool(job.parent) and (not parent or parent.state != "running" or parent.is_cancelling)
        return job.is_cancelling or has_none

    def _is_capped(self, tenant: str) -> bool:
        return self._slots(tenant, self.at) >= self.rules.tenant_leases

    def _slots(self, tenant: str, since: float) -> int:
        untils = [job.slot_until for job in self.jobs.values() if job.tenant == tenant]
        return sum(until is not None and until > since for until in untils)

    def _lease(self, job: ModelJob) -> None:
        until = self.at + self.rules.lease_s
        if job.state == "running":
            until = min(until, max(self.at, job.run_by) + PAST_RUN_BY_S)
        job.lease_until = job.leased_at = job.slot_until = until

    def take_chore(self, job_id: str) -> bool:
        """Take a job that wants a hand only: to be tidied, or to be ended after its parts."""
        is_one = job_id in self.chores and job_id in self.jobs
        self.chores.discard(job_id)
        return is_one

    def find_nothing(self, queues: Collection[str]) -> None:
        """Nothing is ready. A tenant that had all its leases waits for one to end, or to be reaped."""
        assert not self.chores & self.jobs.keys(), "a chore was not given"
        for job in self.jobs.values():
            is_sought = job.ready == "yes" and job.queue in queues and self._is_free(job)
            has_lease = self._slots(job.tenant, 0) < self.rules.tenant_leases
            assert not (is_sought and has_lease), f"{job.job_id} is ready and was not given"

    def renew(self, held: Held) -> str:
        job = self._held(held)
        if job is None:
            return "lease_lost"
        if job.parts:
            return OK
        if job.state == "running" and job.run_by <= self.at:
            return "expired"
        self._lease(job)
        job.ready = "no" if job.ready == "no" else "maybe"
        return "cancelled" if self._is_to_stop(job) else OK

    def _held(self, held: Held) -> ModelJob | None:
        """The job of an attempt that holds it: even after the end of its lease, until somebody takes it over."""
        job = self.jobs.get(held.job_id)
        is_held = job and job.state in {"running", "committing"} and job.holder == held.attempt_id
        return job if is_held else None

    def begin_commit(self, held: Held, commit: str) -> str:
        """From now on the job cannot be cancelled, and whoever has it next finishes this commit."""
        job = self._held(held)
        if self.at > held.run_by + LEEWAY_S:
            return "expired"
        if job is None or (job.state == "committing" and job.commit != commit):
            return "lease_lost"
        if job.state == "running":
            if self._is_to_stop(job):
                return "cancelled"
            if job.run_by <= self.at:
                return "expired"
            job.state, job.commit = "committing", commit
            self._report(job, "committing")
        return OK

    def take_back_commit(self, held: Held) -> str:
        job = self._held(held)
        if job and job.state == "committing":
            job.state, job.commit = "running", ""
        return OK if job else "lease_lost"

    def finish(self, held: Held, state: str, code: str) -> str:
        job = self._held(held)
        if job is None:
            return "lease_lost"
        if state == "succeeded" or code == "items_failed":
            job.attempt = held.number  # as its signed end says
        self._end(job, state, code)
        return OK

    def defer(self, held: Held, delay_s: float) -> str:
        """Give a job back, to be run later; the attempt does not count."""
        job = self._held(held)
        if job is None:
            return "lease_lost"
        is_commit = job.state == "committing"
        self._give_back(job, delay_s)
        if delay_s <= 0:
            self._offer(job)
        elif is_commit:
            job.lease_until = job.leased_at = self.at + delay_s
        else:
            job.delayed_at = job.not_before
        if not is_commit:
            job.attempt -= 1
            self._report(job, "queued", "deferred")
        return OK

    def stall(self, held: Held) -> str:
        """Take a job from an attempt that advances nothing, if it holds one; the attempt counts."""
        job = self._held(held)
        if job is None or job.parts:
            return OK
        job.holder = ""
        if job.state == "running" and self._is_to_stop(job):
            self._end_unheld(job, "cancelled", "cancelled")
            return OK
        self._give_back(job, 0)
        self._offer(job)
        if job.state == "queued":
            self._report(job, "queued", "stalled")
        return OK

    def _give_back(self, job: ModelJob, delay_s: float) -> None:
        """A commit that has begun stays one. Whatever the attempt asks for now changes nothing."""
        job.holder, job.lease_until, job.leased_at, job.slot_until = "", 0, None, None
        job.ready = "no" if job.ready == "no" else "maybe"
        if job.state == "running":
            job.state, job.not_before = "queued", self.at + delay_s
            job.expiring_at = job.waits_until

    def _offer(self, job: ModelJob) -> None:
        job.ready, job.leased_at, job.delayed_at = "yes", None, None

    def step(self, held: Held, log: str) -> str:
        """Note how far a part has come: attempts count anew. Saying it again changes nothing."""
        job = self._held(held)
        if job is None or job.state != "running":
            return "lease_lost"
        if self._is_to_stop(job):
            return "cancelled"
        if job.log != log:
            if job.run_by <= self.at:
                return "expired"
            job.log, job.attempt = log, 1
        return OK

    def split(self, held: Held, parts: Sequence[str]) -> str:
        """Turn a job into the parent of parts: it runs without a lease until the last one ends."""
        job = self._held(held)
        if job is None or job.state != "running":
            return "lease_lost"
        if job.parts:
            return OK
        if self._is_to_stop(job):
            return "cancelled"
        times = {"start_by": job.run_by, "run_by": job.run_by, "expires_at": job.expires_at}
        for name in parts:
            part = ModelJob(
                name, job.tenant, job.queue, **times, keep_for_s=job.keep_for_s, parent=job.job_id
            )
            self.jobs[name] = part
            self._open(part)
        job.parts, job.parts_left = list(parts), len(parts)
        job.lease_until = job.leased_at = job.run_by
        job.slot_until = None
        job.ready = "no" if job.ready == "no" else "maybe"
        return OK

    def _parts(self, job: ModelJob) -> list[ModelJob]:
        return [self.jobs[name] for name in job.parts if name in self.jobs]

    def end_parent(self, job_id: str) -> None:
        """End a job whose parts have all ended; before that, and after it, nothing happens."""
        job = self.jobs[job_id]
        if not job.is_open or not job.have_parts_ended:
            return
        if job.is_cancelling:
            self._end(job, "cancelled", "cancelled")
        elif all(part.state == "succeeded" for part in self._parts(job)):
            self._end(job, "succeeded", "")
        else:
            self._end(job, "failed", "items_failed")

    # -- ends --------------------------------------------------------------------------------------------

    def _end(self, job: ModelJob, state: str, code: str) -> None:
        job.state, job.error, job.ended_at, job.lease_until, job.ready = state, code, self.at, 0, "no"
        job.slot_until = job.leased_at = job.delayed_at = job.expiring_at = None
        job.is_dead = code in DEAD and not job.parent
        if job.is_spooled and code not in DEAD:  # a retry needs its input
            self.inputs[job.job_id] = self.at
        if state == "cancelled":
            job.counted_bytes = 0
        until = min(job.expires_at, self.at + job.keep_for_s) if job.keep_for_s else job.expires_at
        self.results[job.job_id], job.gone_at = until, until + self.rules.kept_s
        self._report(job, state, code)
        if job.group:
            group = self._group(job)
            group.open.discard(job.job_id)
            group.until = max(group.until, job.gone_at)
            if not group.open and len(group.members) >= job.group_jobs:
                self._report(job, "group.ended")
        parent = self.jobs.get(job.parent)
        if parent and parent.state == "running":
            parent.parts_left -= 1
            if parent.parts_left <= 0:
                parent.lease_until = parent.leased_at = self.at + LOOK_AGAIN_S

    def _end_unheld(self, job: ModelJob, state: str, code: str) -> None:
        job.claims += 1
        self._end(job, state, code)
        self.chores.add(job.job_id)

    def _report(self, job: ModelJob, state: str, code: str = "") -> None:
        if not job.parent:
            self.events.append((job.job_id, state, code))

    # -- the reaper and the cleanup ----------------------------------------------------------------------

    def times(self) -> list[float]:
        """The times at which the reaper looks at a job."""
        return [at for job in self.jobs.values() for at in _times(job)]

    def due(self) -> set[str]:
        """Jobs that the reaper looks at: leases and delays that are over, queued jobs that have expired."""
        return {name for name, job in self.jobs.items() if any(at <= self.at for at in _times(job))}

    def reap(self, job_id: str) -> None:
        """Look at one of those."""
        job = self.jobs.get(job_id)
        if job is None or not job.is_open or (job.state != "queued" and job.lease_until > self.at):
            return
        if job.have_parts_ended:
            job.leased_at = self.at + LOOK_AGAIN_S
            self.chores.add(job_id)
        elif job.state == "committing":  # for any worker to finish
            job.slot_until = None
            self._offer(job)
        elif job.state == "running" and self._is_to_stop(job):
            self._end_unheld(job, "cancelled", "cancelled")
        elif self._overdue(job):
            self._end_unheld(job, "failed", self._overdue(job))
        elif job.state == "running":
            self._give_back(job, 0)
            self._offer(job)
            self._report(job, "queued", "lease_lost")
        elif job.not_before > self.at:
            job.delayed_at = job.not_before
        else:
            self._offer(job)

    def due_inputs(self) -> set[str]:
        return {name for name, at in self.inputs.items() if at <= self.at - self.rules.input_grace_s}

    def remove_input(self, job_id: str) -> None:
        """The input is deleted. Where there is a result, that counts for the quota as if it were as large."""
        self.inputs.pop(job_id)
        job = self.jobs.get(job_id)
        if job and job.error not in {"", "items_failed"}:
            job.counted_bytes = 0

    def due_results(self) -> set[str]:
        return {name for name, at in self.results.items() if at <= self.at}

    def purge(self, job_id: str) -> None:
        """The result is deleted, and whatever is left in the spool; the record stays for late readers."""
        self.results.pop(job_id)
        self.inputs.pop(job_id, None)
        job = self.jobs.get(job_id)
        if job:
            job.is_purged, job.counted_bytes = True, 0
            if job.claims > 1:
                self.chores.add(job_id)


def _times(job: ModelJob) -> list[float]:
    return [at for at in (job.leased_at, job.delayed_at, job.expiring_at) if at is not None]
