"""The job store beside the model of its protocol: the same calls to both, and the same jobs after each.

Several workers, two tenants, parts, groups, and one clock that steps. An attempt asks at any time, long after
it has lost its job too.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import msgspec
import redis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kms_core.jobs.execution.runner import end_parent
from kms_core.jobs.model import Attempt, Checkpoint, Following, Job, part_id
from kms_core.jobs.recovery.reaper import due, past, reap_all
from kms_core.jobs.recovery.spool_cleanup import expired
from kms_core.jobs.spec import (
    CLOCK_LEEWAY_S,
    NOT_OF_PARTS,
    AnyJob,
    ItemsJob,
    WorkResult,
)
from kms_core.jobs.store.keys import job_key
from kms_protocol.errors import KmsError
from kms_protocol.wire import JobState
from support import job_model
from support.clock import Clock
from support.clocked_store import START, ClockedStore
from support.job_model import OK, JobModel, ModelJob
from support.job_stores import COMMIT, accepted
from support.job_walks import ENDS, FORMS, SECTION, SERVED, STEPS, TENANTS, TERMS, WALKS

PICKS: Final = st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3, 5))
OWNERS: Final = st.sampled_from(("own", "own", "own", "own", "own", "other"))
GROUPS: Final = st.sampled_from(("", "", "g"))
WORKERS: Final = st.sampled_from(("w1/1", "w2/1", "w2/2"))


def model_job(spec: AnyJob) -> ModelJob:
    """A job as the model has it when it is accepted."""
    times = (spec.start_by, spec.run_by, spec.expires_at, spec.keep_for_s)
    return ModelJob(
        spec.job_id, spec.tenant, spec.queue, *times, spec.spooled_bytes, spec.group, spec.group_jobs
    )


def may_be_split(attempt: Attempt) -> bool:
    return isinstance(attempt.accepted, ItemsJob) and not attempt.accepted.parent


def shown_by_store(job: Job) -> dict[str, object]:
    """What callers and workers see of a job."""
    return {
        "state": (job.state, job.error),
        "holder": job.attempt_id if job.state in {"running", "committing"} else "",
        "attempt": (job.generation, job.attempt),
        "times": (job.start_by, job.run_by, job.started_at, job.ended_at if job.ended else 0),
        "not_before": job.not_before if job.state == "queued" else 0,
        "released": (job.released, bool(job.purged)),
        "is_cancelling": bool(job.cancel),
        "parts": (job.parts, job.parts_left),
    }


def shown_by_model(job: ModelJob) -> dict[str, object]:
    return {
        "state": (job.state, job.error),
        "holder": job.holder if job.state in {"running", "committing"} else "",
        "attempt": (job.generation, job.attempt),
        "times": (job.start_by, job.run_by, job.started_at, job.ended_at),
        "not_before": job.not_before if job.state == "queued" else 0,
        "released": (job.released, job.is_purged),
        "is_cancelling": job.is_cancelling,
        "parts": (len(job.parts), job.parts_left),
    }


class StoreMachine(RuleBasedStateMachine):
    """Asks the store and the model for the same, and compares what both answer and show."""

    def __init__(
        self, client: redis.Redis, clock: Clock, reached: Counter[str], called: Counter[str]
    ) -> None:
        super().__init__()
        self.store = ClockedStore(client, SECTION, clock, called)
        self.model = JobModel(START)
        self.reached = reached
        self.specs: dict[str, tuple[AnyJob, str]] = {}
        self.stored: list[str] = []
        self.attempts: list[Attempt] = []
        self.split_by: set[str] = set()
        self.reported, self.last_event = 0, "-"
        self.touched: set[str] = set()

    @initialize(walk=st.sampled_from(WALKS), words=st.integers(1, 6), group=GROUPS)
    def begin(self, walk: tuple[tuple[int, int, int], str], words: int, group: str) -> None:
        terms, text = walk
        self.follow(terms, text.split()[:words], group)

    def follow(self, terms: tuple[int, int, int], words: Sequence[str], group: str = "") -> None:
        """Do what the words of a walk say."""
        for number, word in enumerate(words):
            name, given = ("submit", (word, "a", terms, "", group)) if word in FORMS else STEPS[word]
            try:
                getattr(self, name)(*given)
                self.all_is_the_same()
            except AssertionError as exc:
                exc.add_note(f"{terms} {' '.join(words[: number + 1])}")
                raise

    def name_of(self, pick: int, *likely: str) -> str:
        """The id of a job that was stored: for 0 the newest in a likely state. It may be there no more."""
        names = sorted(self.stored, key=lambda name: self.label(name) in likely)
        return names[-1 - pick % len(names)]

    def has(self, *states: str) -> bool:
        return any(self.label(name) in states for name in self.stored)

    def label(self, job_id: str) -> str:
        """The state of a job, for people who read what was reached."""
        job = self.model.jobs.get(job_id)
        if job is None:
            return "nothing"
        if not job.is_open:
            return "dead" if job.is_dead else job.state
        state = "in parts" if job.parts else job.state
        return f"{state} to cancel" if job.is_cancelling else state

    @contextmanager
    def noted(self, call: str, job_id: str) -> Iterator[None]:
        """Count what changes of a job within the block."""
        before, job = self.label(job_id), self.model.jobs.get(job_id)
        copy = dataclasses.replace(job) if job else None
        yield
        if self.model.jobs.get(job_id) != copy:
            self.reached[f"{call}: {before} > {self.label(job_id)}"] += 1
        self.touched |= {self.specs[job_id][0].tenant} if job_id in self.specs else set(TENANTS)

    def compare(self, call: str, job_id: str, real: Callable[[], object], expected: Callable[[], str]) -> str:
        """Have store and model do something with a job, which answer the same."""
        with self.noted(call, job_id):
            try:
                answer = real()
            except KmsError as exc:
                answer = exc.code
            said = answer if isinstance(answer, str) else OK
            wanted = expected()
            assert said == wanted, f"{call} answered {said}, and not {wanted}"
        if said not in {OK, job_id, "withdrawn"}:
            self.reached[f"{call}: {'an earlier job' if said in self.specs else said}"] += 1
        return said

    # -- callers -----------------------------------------------------------------------------------------

    @rule(
        form=st.sampled_from(("items", "file", "upload")),
        tenant=st.sampled_from(TENANTS),
        terms=st.sampled_from(TERMS),
        key=st.sampled_from(("", "", "k")),
        group=GROUPS,
    )
    def submit(self, form: str, tenant: str, terms: tuple[int, int, int], key: str, group: str) -> None:
        at, (start_s, run_s, keep_s) = self.model.at, terms
        times = {"start_by": at + start_s, "run_by": at + run_s, "expires_at": at + run_s + (keep_s or 100)}
        fields = {"tenant": tenant, "created_at": at, **times, "keep_for_s": keep_s, **FORMS[form]}
        fields |= {"group": f"{group} {keep_s}", "group_jobs": 2} if group else {}
        name = f"{len(self.specs):08x}-0000-4000-8000-000000000000"
        spec = accepted(job_id=name, digest=form.encode(), **fields)
        self.specs[name] = spec, f"{tenant} {key}" if key else ""
        if self.submit_to_both(*self.specs[name]) == name:
            self.stored.append(name)

    def submit_to_both(self, spec: AnyJob, key: str) -> str:
        return self.compare(
            "submit",
            spec.job_id,
            lambda: self.store.submit(spec, key).job_id,
            lambda: self.model.submit(model_job(spec), key, spec.digest.decode()),
        )

    @precondition(lambda self: self.stored)
    @rule(pick=PICKS)
    def submit_again(self, pick: int) -> None:
        """As a client does that got no answer."""
        name = self.name_of(pick)
        if name in self.model.jobs:
            self.submit_to_both(*self.specs[name])

    @precondition(lambda self: self.has("queued"))
    @rule(pick=PICKS)
    def withdraw(self, pick: int) -> None:
        """As a submission does that replicas do not acknowledge."""
        name = self.name_of(pick, "queued")
        spec, key = self.specs[name]
        if key and self.model.keys.get(key, (name,))[0] != name:
            return
        keys = [job_key(name), f"kms:tenant:{spec.tenant}"]
        keys += [f"kms:idem:{self.store.record_key.digest(key.encode()).hex()}"] if key else []
        sealed = cast("bytes | None", self.store.redis.hget(job_key(name), "sealed")) or b""

        def real() -> str:
            return self.store.scripts["withdraw"](keys, [name, sealed])[0].decode()

        self.compare("withdraw", name, real, lambda: self.model.withdraw(name))

    @precondition(lambda self: self.stored)
    @rule(pick=PICKS, owner=OWNERS)
    def cancel(self, pick: int, owner: str) -> None:
        name, tenant = self.owned(self.name_of(pick, "queued", "running", "committing", "in parts"), owner)
        self.compare(
            "cancel",
            name,
            lambda: self.store.cancel(name, tenant),
            lambda: self.model.by_owner(name, tenant, self.model.cancel),
        )

    @precondition(lambda self: self.has("dead"))
    @rule(pick=PICKS, owner=OWNERS)
    def retry(self, pick: int, owner: str) -> None:
        name, tenant = self.owned(self.name_of(pick, "dead"), owner)
        self.compare(
            "retry",
            name,
            lambda: self.store.retry(name, tenant),
            lambda: self.model.by_owner(name, tenant, self.model.retry),
        )

    @precondition(lambda self: self.has("succeeded", "failed", "dead", "cancelled"))
    @rule(pick=PICKS, owner=OWNERS)
    def release(self, pick: int, owner: str) -> None:
        name, tenant = self.owned(self.name_of(pick, "succeeded", "failed", "dead", "cancelled"), owner)
        self.compare(
            "release",
            name,
            lambda: self.store.release(self.store.get(name, tenant)),
            lambda: self.model.by_owner(name, tenant, self.model.release),
        )

    def owned(self, name: str, owner: str) -> tuple[str, str]:
        """A job, and its own tenant or the other one."""
        tenant = self.specs[name][0].tenant
        return name, tenant if owner == "own" else next(each for each in TENANTS if each != tenant)

    # -- workers -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.stored)
    @rule(pick=PICKS, worker=WORKERS)
    def claim(self, pick: int, worker: str) -> None:
        """Take a job or a part by its name."""
        jobs = sorted(self.model.jobs.values(), key=self.model.is_free)
        name = jobs[-1 - pick % len(jobs)].job_id if jobs else self.stored[0]
        self.took(name, self.store.claim(name, worker), ())

    @rule(worker=WORKERS, queues=st.sampled_from(SERVED))
    def take_next(self, worker: str, queues: tuple[str, ...]) -> None:
        chores = self.chores()
        self.given(self.store.next(worker, queues, woken=False), queues, chores)

    @rule(worker=WORKERS)
    def take_any(self, worker: str) -> None:
        self.take_next(worker, SERVED[0])

    def chores(self) -> set[str]:
        """Jobs that want a hand, which any worker is given first."""
        return self.store.members("chores") & self.model.jobs.keys()

    def given(self, found: Attempt | str | None, queues: tuple[str, ...], chores: set[str]) -> None:
        """What a worker was given that asked for any job, and the chores that there were."""
        if chores:
            assert found in chores
            self.reached["claim: a chore"] += 1
        elif found is None:
            self.model.find_nothing(queues)
        elif isinstance(found, Attempt):
            self.took(found.accepted.job_id, found, queues)
        else:
            assert self.took(found, None, queues) == "closed"

    def took(self, job_id: str, found: Attempt | None, queues: tuple[str, ...]) -> str:
        with self.noted("claim", job_id):
            said = self.model.claim(job_id, found.attempt_id if found else "", queues)
        assert (found is not None) == (said == OK), f"the store gave {found} of {job_id}, which was {said}"
        if found:
            job = self.model.jobs[job_id]
            commit = str(found.commit.size_bytes) if found.commit else ""
            assert (found.attempt, commit) == (job.attempt, job.commit)
            self.attempts.append(found)
        else:
            self.reached[f"claim: {said}"] += 1
        return said

    def ask(
        self,
        call: str,
        attempt: Attempt | None,
        real: Callable[[Attempt], object],
        expected: Callable[..., str],
        *given: object,
    ) -> str:
        """A call of an attempt, which may hold its job no more."""
        if attempt is None:
            return ""
        name = attempt.accepted.job_id
        return self.compare(
            call,
            name,
            lambda: real(attempt),
            lambda: self.model.by_holder(name, attempt.attempt_id, expected, *given),
        )

    def holds(self, attempt: Attempt) -> bool:
        job = self.model.jobs.get(attempt.accepted.job_id)
        return job is not None and job.is_open and job.holder == attempt.attempt_id

    def an_attempt(self, pick: int, among: Sequence[Attempt] = ()) -> Attempt:
        """An attempt, for 0 the last one that holds its job."""
        attempts = sorted(among or self.attempts, key=self.holds)
        return attempts[-1 - pick % len(attempts)]

    def not_split(self, pick: int) -> Attempt | None:
        """An attempt that may ask for anything: one that split its job asks for nothing more."""
        able = [each for each in self.attempts if each.attempt_id not in self.split_by]
        return self.an_attempt(pick, able) if able else None

    @precondition(lambda self: any(map(self.holds, self.attempts)))
    @rule(pick=PICKS)
    def renew(self, pick: int) -> None:
        self.ask("renew", self.an_attempt(pick), lambda it: self.store.renew(it, {}), self.model.renew)

    @precondition(lambda self: any(map(self.holds, self.attempts)))
    @rule(pick=PICKS, size=st.sampled_from((1, 1, 2)))
    def commit(self, pick: int, size: int) -> None:
        attempt = self.not_split(pick)
        is_late = attempt and attempt.accepted.run_by + CLOCK_LEEWAY_S < self.model.at
        if not is_late:  # else its worker does not ask
            commit = msgspec.structs.replace(COMMIT, size_bytes=size)
            self.ask(
                "commit",
                attempt,
                lambda it: self.store.committing(it, commit),
                self.model.begin_commit,
                str(size),
            )

    @precondition(lambda self: any(map(self.holds, self.attempts)))
    @rule(pick=PICKS)
    def take_back_commit(self, pick: int) -> None:
        self.ask(
            "take back",
            self.not_split(pick),
            lambda it: self.store.committing(it, None),
            self.model.take_back_commit,
        )

    @precondition(lambda self: self.attempts)
    @rule(pick=PICKS, end=st.sampled_from(ENDS), queues=st.sampled_from(((), (), *SERVED)))
    def finish(self, pick: int, end: tuple[JobState, str], queues: tuple[str, ...]) -> None:
        """End a job, and with ``queues`` take the next one together with that."""
        attempt = self.not_split(pick)
        if attempt is None:
            return
        result = WorkResult(items_done=1, items_failed=int(end[1] == "items_failed"))
        following = Following(attempt.worker, queues, lambda: bool(queues))
        attempt = dataclasses.replace(attempt, following=following)
        chores = self.chores()
        self.ask("finish", attempt, lambda it: self.store.finish(it, *end, result), self.model.finish, *end)
        for claimed in following.claimed:
            self.given(self.store.found_by(attempt.worker, *claimed), queues, chores)

    @precondition(lambda self: any(map(self.holds, self.attempts)))
    @rule(pick=PICKS, delay_s=st.sampled_from((0, 1, 15)))
    def defer(self, pick: int, delay_s: int) -> None:
        self.ask(
            "defer",
            self.not_split(pick),
            lambda it: self.store.defer(it, delay_s),
            self.model.defer,
            delay_s,
        )

    @precondition(lambda self: any(map(self.holds, self.attempts)))
    @rule(pick=PICKS)
    def stall(self, pick: int) -> None:
        attempt = self.an_attempt(pick)
        is_held = self.holds(attempt)

        def real(attempt: Attempt) -> str:
            self.store.stalled(attempt)
            return OK if is_held else "lease_lost"  # it does not say

        self.ask("stall", attempt, real, self.model.stall)

    @precondition(lambda self: any(each.accepted.parent and self.holds(each) for each in self.attempts))
    @rule(pick=PICKS, word=st.sampled_from(("x", "y")))
    def step(self, pick: int, word: str) -> None:
        of_parts = [each for each in self.attempts if each.accepted.parent]
        attempt = self.an_attempt(pick, of_parts)
        self.ask(
            "step",
            attempt,
            lambda it: self.store.step(it, Checkpoint(effect=word), {}),
            self.model.step,
            word,
        )

    @precondition(lambda self: any(may_be_split(each) and self.holds(each) for each in self.attempts))
    @rule(pick=PICKS)
    def split(self, pick: int) -> None:
        able = [each for each in self.attempts if may_be_split(each)]
        attempt = self.an_attempt(pick, able)
        spec = attempt.accepted
        changes = {"parent": spec.job_id, "items": 1, "starts": (0,), "size_bytes": 20, **NOT_OF_PARTS}
        changes |= {"start_by": spec.run_by}
        parts = [
            msgspec.structs.replace(spec, job_id=part_id(spec.job_id, number), part=number, **changes)
            for number in range(2)
        ]
        names = [part.job_id for part in parts]
        said = self.ask("split", attempt, lambda it: self.store.split(it, parts), self.model.split, names)
        if said == OK:
            self.split_by.add(attempt.attempt_id)

    @precondition(lambda self: any(job.parts for job in self.model.jobs.values()))
    @rule(pick=PICKS)
    def end_parent(self, pick: int) -> None:
        names = [name for name, job in self.model.jobs.items() if job.parts]
        name = names[-1 - pick % len(names)]
        job = self.store.get(name, self.specs[name][0].tenant)

        def expected() -> str:
            self.model.end_parent(name)
            return OK

        self.compare("end parent", name, lambda: end_parent(job, self.store), expected)

    # -- time, the reaper and the cleanup ----------------------------------------------------------------

    @rule(seconds=st.sampled_from((1, 5, 10, 15, 50)))
    def pass_time(self, seconds: int) -> None:
        self.store.pass_time(seconds)
        before = {name: self.label(name) for name in self.model.jobs}
        self.model.pass_time(seconds)
        for name in before.keys() - self.model.jobs.keys():
            self.reached[f"pass time: {before[name]} > nothing"] += 1
            self.touched = set(TENANTS)

    @rule(rounds=st.sampled_from((("reap",), ("reap",), ("clean",), ("reap", "clean"), ())))
    def go_on(self, rounds: tuple[str, ...]) -> None:
        """Wait until something happens next, and have the reaper or the cleanup look."""
        jobs = [job for job in self.model.jobs.values() if job.is_open]
        times = {at for job in jobs for at in (job.lease_until, job.not_before, job.start_by, job.run_by)}
        coming = [at - self.model.at for at in times if at > self.model.at]
        coming += [at - self.model.at for at in self.model.results.values() if at > self.model.at]
        self.pass_time(int(min(coming, default=1)))
        for each in rounds:
            getattr(self, each)()

    @rule()
    def reap(self) -> None:
        names = due(self.store)
        missed = {name for name, job in self.model.jobs.items() if self.model.is_due(job)} - set(names)
        assert not missed
        self.touched |= set(TENANTS if names else ())
        for name, word in zip(names, reap_all(self.store, names), strict=True):
            assert word != "unreadable"
            job = self.model.jobs.get(name)
            if job and self.model.is_due(job):
                with self.noted("reap", name):
                    self.model.reap(job)

    @rule()
    def clean(self) -> None:
        """Delete what the cleanup of the spool does, which is empty here."""
        self.touched = set(TENANTS)
        before = self.model.at - job_model.INPUT_GRACE_S
        inputs = past(self.store, "inputs", 100, job_model.INPUT_GRACE_S)
        assert set(inputs) == {name for name, since in self.model.inputs.items() if since <= before}
        self.store.call_each("input_removed", inputs)
        for name in inputs:
            with self.noted("remove input", name):
                self.model.remove_input(name)
        results = expired(self.store)
        assert set(results) == {name for name, at in self.model.results.items() if at <= self.model.at}
        self.store.purged(*results)
        for name in results:
            with self.noted("purge", name):
                self.model.purge(name)

    # -- what is compared after each step ----------------------------------------------------------------

    @invariant()
    def all_is_the_same(self) -> None:
        """All of the tenants that something was done for."""
        if self.touched:
            for tenant in self.touched:
                self.jobs_are_the_same(tenant)
            self.parts_are_the_same()
            self.groups_are_the_same()
            self.reports_are_the_same()
            self.touched.clear()

    def jobs_are_the_same(self, tenant: str) -> None:
        expected = [job for job in self.model.jobs.values() if job.tenant == tenant and not job.parent]
        expected.sort(key=lambda job: job.job_id, reverse=True)
        listed, _ = self.store.page(tenant, state=None, limit=50, before=None)
        assert [job.job_id for job in listed] == [job.job_id for job in expected]
        for real, job in zip(listed, expected, strict=True):
            assert shown_by_store(real) == shown_by_model(job), job.job_id
        counts = Counter(job.state for job in expected)
        counts["dead"] = sum(job.is_dead for job in expected)
        assert Counter(self.store.states(tenant)) == counts
        assert self.store.spooled_bytes(tenant) == sum(job.counted_bytes for job in expected)

    def parts_are_the_same(self) -> None:
        for name, job in self.model.jobs.items():
            if job.parent and job.tenant in self.touched:
                assert shown_by_store(self.store.part(name).job) == shown_by_model(job), name

    def groups_are_the_same(self) -> None:
        for (tenant, name), group in self.model.groups.items():
            assert self.store.group_counts(tenant, name) == (len(group), sum(group.values()))

    def reports_are_the_same(self) -> None:
        found = cast(
            "list[Any]",
            self.store.redis.xrange("kms:events", f"({self.last_event}" if self.reported else "-"),
        )
        for number, fields in found:
            self.last_event = number.decode()
            kind = fields[b"type"].decode().removeprefix("kms.").removeprefix("job.")
            said = fields[b"subject"].decode(), kind, fields[b"code"].decode()
            assert said == self.model.events[self.reported]
            self.reported += 1
        assert self.reported == len(self.model.events)
