"""Yesterday's version and today's in one install: each takes, runs, finishes and reads jobs of the other."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from kms_core.jobs.model import part_id
from support.embedded_valkey import unrestricted
from support.redis_regress import Snapshot
from support.service import PROGRAMS, Json, core_of
from support.versions.checks import check_jobs, check_log, check_output, history_of
from support.versions.install import TODAY, VERSIONS, YESTERDAY, Host, Install, install, number_of
from support.versions.kinds import ENDPOINT, JobKinds, SubmittedJob
from support.versions.yesterday import INSTALL_LIMIT_S
from support.waiting import until
from support.webhooks import Receiver, receiving, secret_file

pytestmark = pytest.mark.timeout(INSTALL_LIMIT_S + 300)
PROCESSES: Final = 5
SETTINGS: Final = f"""
[kms.audit]
checkpoint_s = 1
[kms.jobs]
lease_s = 3
stop_s = 2
concurrency = {PROCESSES}
[kms.jobs.endpoints.{ENDPOINT}]
url = "{{url}}"
secret_file = "{{secret}}"
"""
STEPS: Final = ("placed", "recorded", "tree")
"""Where ``held_worker.py`` holds a process over files; it holds another at ``items``, and one is left."""
OTHER: Final = {YESTERDAY: TODAY, TODAY: YESTERDAY}


@dataclass
class Both:
    """An API of each version, and the worker of either that runs now."""

    install: Install
    receiver: Receiver
    jobs: list[SubmittedJob] = field(default_factory=list)
    version: str = ""

    def api(self, version: str) -> Host:
        return self.install.hosts[version]

    def kinds(self, version: str) -> JobKinds:
        """Jobs for the API of a version; what they open is sealed by that of the other."""
        return JobKinds(self.api(version), self.api(OTHER[version]), self.jobs)

    def work(self, version: str, steps: Path | None = None) -> None:
        """Have a worker of this version run, and no other."""
        self.rest()
        host = self.install.hosts[version]
        host.steps = steps
        host.start("worker")
        self.version = version

    def rest(self) -> None:
        """Have no worker run."""
        if self.version:
            self.install.hosts[self.version].drain("worker")
        self.version = ""

    def end(self, how: str) -> None:
        """End the worker at once, or by SIGTERM: then it hands jobs back that do not end in ``stop_s``."""
        if how == "killed":
            self.install.hosts[self.version].kill("worker")
            self.version = ""
        self.rest()

    def is_seen(self) -> bool:
        """Whether both APIs see the worker, with its version, and that nothing is amiss."""
        seen = {"workers": 1, "worker_versions": {number_of(self.version): 1}, "degraded": []}
        return all(seen.items() <= self.status(version).items() for version in VERSIONS)

    def status(self, version: str) -> Json:
        """The status, as the API of a version has it."""
        found: Json = self.api(version).get("/status").json()
        return found

    def judge(self) -> None:
        """Wait for all jobs; both APIs must read what came of each."""
        for job in self.jobs:
            for version in VERSIONS:
                job.check(self.api(version))

    def targets(self) -> dict[Path, tuple[int, int]]:
        """Inode and mtime in ns of each target."""
        found = {target: target.stat() for job in self.jobs for target in job.targets}
        return {target: (stat.st_ino, stat.st_mtime_ns) for target, stat in found.items()}

    def close(self) -> None:
        """Judge all that happened, and the log that is left."""
        check_jobs(self.install, {job.job_id for job in self.jobs})
        expected = sorted(job.job_id for job in self.jobs if job.calls_back)
        until(lambda: len(self._delivered()) >= len(expected), "the webhooks of all ends")
        assert self._delivered() == expected
        self.install.stop()
        check_log(self.install, {job.job_id: len(job.targets) for job in self.jobs})
        check_output(self.install)

    def _delivered(self) -> list[str]:
        """The job of each event that the receiver has had, which may come more than once under one id."""
        bodies = [json.loads(request.body) for request in self.receiver.requests]
        subjects = {body["id"]: body["subject"] for body in bodies if body["type"] == "kms.job.succeeded"}
        return sorted(subjects.values())


@contextmanager
def two_apis(folder: Path, redis: str) -> Iterator[Both]:
    with receiving(None) as receiver:
        url = receiver.url("127.0.0.1", "http")
        settings = SETTINGS.format(url=url, secret=secret_file(folder))
        with install(folder, settings, redis, *VERSIONS) as made:
            for host in made.hosts.values():
                host.start("api")
            yield Both(made, receiver)


@pytest.fixture
def both(tmp_path: Path, redis_url: str) -> Iterator[Both]:
    with two_apis(tmp_path, redis_url) as found:
        yield found


@pytest.fixture
def forgetful(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """With a Redis that can be brought back to an earlier state."""
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url, two_apis(tmp_path, url) as found:
        yield found


def test_each_api_and_each_worker_do_every_kind_of_job(both: Both) -> None:
    for worker in VERSIONS:
        both.work(worker)
        for _ in range(2):
            for api in VERSIONS:
                both.kinds(api).every()
        both.judge()
        until(both.is_seen, f"the worker of {worker} is seen by both APIs")
    both.close()


def test_jobs_and_messages_that_wait_are_done_by_the_other_version(both: Both) -> None:
    for worker in VERSIONS:
        both.rest()
        for api in VERSIONS:
            both.kinds(api).every()
            both.kinds(api).message()
        both.work(worker)
        both.judge()
    both.close()


def reached(folder: Path) -> list[str]:
    """The steps at which ``held_worker.py`` holds a process."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("first", VERSIONS)
def test_jobs_of_a_worker_that_ends_are_finished_by_the_other_version(
    both: Both, tmp_path: Path, first: str, how: str
) -> None:
    """With a commit recorded, a target in place, some of many files and two of three parts of a job done."""
    folder, second = tmp_path / "steps", OTHER[first]
    folder.mkdir()
    both.work(first, folder)
    both.kinds(first).held(both.api(first).files / "held")
    recorded, placed, tree = (job.job_id for job in both.jobs)
    held, steps = [recorded, placed, part_id(tree, 0)], list(STEPS)
    if how == "killed":  # a worker that stops waits for a process that stores an end
        both.kinds(first).in_parts()
        in_parts = both.jobs[-1].job_id
        until(lambda: both.api(second).job(in_parts)["progress"]["items_done"] >= 2 * 500, "two parts")
        held, steps = [*held, part_id(in_parts, 2)], ["items", *steps]
    until(lambda: reached(folder) == steps, lambda: f"{steps}, not only {reached(folder)}")
    both.end(how)
    both.kinds(first).every()
    both.work(second)
    both.judge()
    store = core_of(both.install.any_host).worker_context.store
    claims = [store.part(job_id).job.fence for job_id in held]
    assert claims == [2] * len(held), "the first worker did not hold one of these"
    handed_back = {"handed_back" in history_of(store, job_id) for job_id in (recorded, placed, tree)}
    assert handed_back == {how == "stopped"}
    both.work(first)  # so that a chain of each names the ends of the first one
    both.close()


def test_what_redis_forgot_is_recognised_by_the_other_version(forgetful: Both) -> None:
    """A job whose end is forgotten ends again: what it has put in place has its mark, and stays as it is."""
    store = core_of(forgetful.install.any_host).worker_context.store
    for first in VERSIONS:
        forgetful.rest()
        forgetful.kinds(OTHER[first]).every()
        before = Snapshot.of(store.redis)
        forgetful.work(first)
        forgetful.judge()
        made = forgetful.targets()
        forgetful.rest()
        before.restore()
        forgetful.work(OTHER[first])
        forgetful.judge()
        assert forgetful.targets() == made
    forgetful.close()


def test_the_versions_that_run_are_reported_until_there_is_one(both: Both) -> None:
    """An API of 0.2 is on no list: its version is in its own status and metrics."""
    old, new = number_of(YESTERDAY), number_of(TODAY)
    before, after = both.api(YESTERDAY), both.api(TODAY)
    for host in both.install.hosts.values():
        host.start("worker")
    mixed: dict[str, Json] = {
        YESTERDAY: {"version": old, "worker_versions": {old: 1, new: 1}},
        TODAY: {"version": new, "worker_versions": {old: 1, new: 1}, "api_versions": {new: 1}},
    }
    until(
        lambda: all(seen.items() <= both.status(version).items() for version, seen in mixed.items()),
        lambda: str([both.status(version) for version in VERSIONS]),
    )
    for version, host in both.install.hosts.items():
        for name in PROGRAMS:
            assert f'kms_build_info{{version="{number_of(version)}"}} 1.0' in host.metrics(name)
        assert f"processes of it are {old}, {new}, " in host.doctor().at("version", "warn")
        shown = host.run_kms("--url", host.url, "status").stdout
        assert f"2: 1 of {old}, 1 of {new}" in shown
        page = host.http.get("/ui/workers").text
        assert all(f"<dt>Version</dt><dd>{number}</dd>" in page for number in (old, new))

    for name in PROGRAMS:
        before.drain(name)
    after_update = {"workers": 1, "worker_versions": {new: 1}, "api_versions": {new: 1}}
    until(lambda: after_update.items() <= both.status(TODAY).items(), lambda: str(both.status(TODAY)))
    assert after.doctor().all("version", "warn") == []
