"""Yesterday's version and today's in one install: each takes, runs, finishes and reads what the other began."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.service import Service
from support.versions import held_worker
from support.versions.checks import check_jobs, check_log, check_output
from support.versions.install import TODAY, VERSIONS, YESTERDAY, Install, install
from support.versions.kinds import ENDPOINT, JobKinds, SubmittedJob
from support.versions.yesterday import INSTALL_LIMIT_S
from support.waiting import until
from support.webhooks import Receiver, receiving, secret_file

pytestmark = pytest.mark.timeout(INSTALL_LIMIT_S + 300)
SETTINGS = """
[kms.audit]
checkpoint_s = 1
[kms.jobs]
lease_s = 3
concurrency = 5
[kms.jobs.endpoints.{name}]
url = "{url}"
secret_file = "{secret}"
"""
STEPS = ("recorded", "placed", "tree", "items")
"""At which ``held_worker.py`` holds a process, one each; the fifth has the rest."""


@dataclass
class Both:
    """An API of each version, and the worker of either that runs now."""

    install: Install
    receiver: Receiver
    jobs: list[SubmittedJob] = field(default_factory=list)
    version: str = ""

    def other(self, version: str) -> Service:
        return self.install.hosts[TODAY if version == YESTERDAY else YESTERDAY]

    def kinds(self, version: str) -> JobKinds:
        """Jobs for the API of a version; the other one makes what they open."""
        return JobKinds(self.install.hosts[version], self.other(version), self.jobs)

    def work(self, version: str, held: Path | None = None) -> None:
        """Have a worker of this version run instead of the one that does."""
        self.rest()
        host = self.install.hosts[version]
        host.held = held
        host.start("worker")
        self.version = version

    def rest(self) -> None:
        """Have no worker run."""
        if self.version:
            host = self.install.hosts[self.version]
            assert host.stop("worker") == 0, host.output("worker")
        self.version = ""

    def kill(self) -> None:
        self.install.hosts[self.version].kill("worker")
        self.version = ""

    def settle(self) -> None:
        """Wait for every job that was not judged yet, and have the API that did not take it judge it."""
        while self.jobs:
            job = self.jobs.pop()
            job.check(self.install.hosts[TODAY])
