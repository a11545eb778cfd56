"""What goes wrong between hosts, by name: lines are cut, hosts restarted, tokens made and revoked."""

import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from support.chaos.fleet import APIS, BUCKETS, LEASE_S, LINES, REDIS, WORKERS, Fleet
from support.chaos.job_mix import JobRequest, ObjectJobMix
from support.chaos.load import Load
from support.credentials import bearer
from support.service import CONTEXT, b64
from support.waiting import until

REVOKED_S: Final = 5.0
_LARGE: Final = 96 * 1024 * 1024  # bytes; a worker takes a second or more for them
_SECRET: Final = {"plaintext": b64(b"x"), "context": CONTEXT}


class FleetFaults:
    """Faults by name, each by ``inject``; what they find wrong by themselves is in ``violations``."""

    def __init__(self, fleet: Fleet, mix: ObjectJobMix, load: Load, seed: int) -> None:
        self.fleet = fleet
        self.mix = mix
        self.load = load
        self.cut_jobs: list[str] = []
        self.violations: list[str] = []
        self.revoked_s: list[float] = []
        self.took: dict[str, float] = {}
        self._rng = random.Random(seed)  # noqa: S311 -- repeatable, no secret
        self._tokens = 0
        self.faults_by_name: dict[str, Callable[[], None]] = {
            "tokens": self._new_and_revoked,
            "worker alone": lambda: self._worker(LINES),
            "worker without Redis": lambda: self._worker([REDIS]),
            "worker without buckets": lambda: self._worker([BUCKETS]),
            "api alone": lambda: self._api(LINES),
            "api without Redis": lambda: self._api([REDIS]),
            "api without buckets": lambda: self._api([BUCKETS]),
            "roll": self._roll,
            "tokens again": self._new_and_revoked,
        }

    def inject(self, name: str) -> None:
        """Let it happen, and wait until all hosts are well again."""
        begun = time.monotonic()
        try:
            self.faults_by_name[name]()
            self.fleet.settle()
        except AssertionError as exc:
            self.violations.append(f"{name}: {exc}")
        self.took[name] = round(time.monotonic() - begun, 1)
        with (self.fleet.folder / "faults").open("a") as log:
            log.write(f"{datetime.now(UTC):%H:%M:%S} {name} for {self.took[name]} s\n")

    def _worker(self, lines: Sequence[str]) -> None:
        """A worker in the middle of a large job, until others have that job."""
        name, job_id = None, ""
        while name is None:  # a job may have ended before it was seen
            job_id = self.load.submit_one_more(lambda: self.mix.large(_LARGE))
            name = self._holder(job_id)
        self._cut(name, lines, lambda: self.fleet.worker_of(job_id) != name)
        self.cut_jobs.append(job_id)

    def _holder(self, job_id: str) -> str | None:
        """The worker that runs a job; None if it has ended."""
        seen: list[str | None] = []

        def is_known() -> bool:
            name = self.fleet.worker_of(job_id)
            if name or self.fleet.has_ended(job_id):
                seen.append(name)
            return bool(seen)

        until(is_known, "it runs", poll_s=0.01)
        return seen[0]

    def _api(self, lines: Sequence[str]) -> None:
        """An API, until the other one has taken some jobs, or there are none to take."""
        before = len(self.load.accepted_jobs)
        enough = min(before + 5, self.load.request_limit, self.load.count)
        self._cut(
            self._rng.choice(APIS),
            lines,
            lambda: len(self.load.accepted_jobs) >= enough or not self.load.busy,
        )

    def _cut(self, name: str, lines: Sequence[str], fact: Callable[[], object]) -> None:
        """Cut lines until a fact, and for longer than a lease."""
        own = [self.fleet.machines[name].host.lines[line] for line in lines]
        begun = time.monotonic()
        for line in own:
            line.cut()
        try:
            until(lambda: time.monotonic() - begun > LEASE_S + 1, "a lease is over", poll_s=0.2)
            until(fact, f"others go on without {name}", poll_s=0.2)
        finally:
            for line in own:
                line.mend()

    def _roll(self) -> None:
        """A new release: every host is restarted, one after the other."""
        for machine in self.fleet.machines.values():
            machine.roll()

    def _new_and_revoked(self) -> None:
        """A token made on one host, used on all, and revoked on another."""
        fleet, self._tokens = self.fleet, self._tokens + 1
        fleet.settle()
        name = f"passing-{self._tokens}"
        maker, revoker = self._rng.sample([*APIS, *WORKERS], 2)
        text = fleet.new_token(name, "*", on=maker)
        assert self._answers(text) == [200, 200], f"a token of {maker} is refused"
        headers = bearer(text)
        body = {"kind": "encrypt", "items": [_SECRET]}
        request = JobRequest(
            "of a new token", lambda _: fleet.post("/jobs", body, headers=headers), _is_sealed
        )
        fleet.wait(self.load.submit_one_more(lambda: request), "succeeded")
        done = fleet.machines[revoker].kms("token", "revoke", name)
        begun = time.monotonic()
        assert done.returncode == 0, done.stderr
        until(lambda: self._answers(text) == [401, 401], f"{name} is refused by all")
        self.revoked_s.append(time.monotonic() - begun)
        assert self.revoked_s[-1] < REVOKED_S, f"revoked after {self.revoked_s[-1]:.1f} s"

    def _answers(self, text: str) -> list[int]:
        machines = [self.fleet.machines[name] for name in APIS]
        return [machine.post("/encrypt", _SECRET, headers=bearer(text)).status_code for machine in machines]


def _is_sealed(result: bytes) -> None:
    assert b'"ciphertext"' in result
