"""Upgrade from 0.1 under load, with API and worker of both versions side by side, and the way back.

Each host has files of its own; Redis, the spool, the roots and the keys are shared. A job counts as lost if
it does not succeed, and as doubled if it ran or ended more than once, as the stream of events tells.
The long form sends 1,000 jobs instead of 120.
"""

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, cast

import pytest

from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import part_id
from kms_protocol.wire import ENDED
from support.embedded_valkey import EmbeddedValkey
from support.job_stores import connect
from support.long_form import IS_LONG
from support.releases import Release, source_of_0_1
from support.service import CONTEXT, b64, core_of

JOBS: Final = 1000 if IS_LONG else 120
LIMIT_S: Final = 1800 if IS_LONG else 400
MANY: Final = 1000
"""Items, or files, of a job in two parts."""
KEYS: Final = ("age", "spool.key", "intake.key")
SETTINGS: Final = """
[kms.jobs]
lease_s = 10
concurrency = 1
spool_dir = "{spool}"
roots = ["{files}"]
"""


class Hosts:
    """One host of each version, over one Redis."""

    def __init__(self, folder: Path, url: str, source: Path) -> None:
        shared = folder / "shared"
        for made in (shared, shared / "spool", shared / "files"):
            made.mkdir(mode=0o700)
        self.files = shared / "files"
        settings = SETTINGS.format(spool=shared / "spool", files=self.files)
        self.old, self.new = (Release(folder / name, settings, url) for name in ("old", "new"))
        self.old.source = source
        for key in KEYS:
            if (made := self.old.state / key).exists():
                _copy(made, self.new.state / key)
        self.redis = connect(url)
        self._numbers = itertools.count()

    def submit(self, at: Release, count: int) -> list[str]:
        """Jobs of every kind in turn."""
        return [self._one(at, number) for number in itertools.islice(self._numbers, count)]

    def _one(self, at: Release, number: int) -> str:
        kind = number % 4
        if kind == 0:
            items = [{"plaintext": b64(b"%d" % number)}]
            return at.submit({"kind": "encrypt", "context": CONTEXT, "items": items})
        if kind == 1:
            return at.upload("encrypt", b"upload %d" % number, CONTEXT)
        folder = self.files / str(number)
        folder.mkdir(mode=0o700)
        for name in ("a", "b"):
            (folder / name).write_bytes(b"file %d" % number)
        source, target = (f"{folder.as_uri()}/{end}" for end in (("a", "a.age") if kind == 2 else ("*", "")))
        if kind == 3:
            target = f"{self.files.as_uri()}/out-{number}/"
        return at.submit({"kind": "encrypt", "context": CONTEXT, "source": source, "target": target})

    def large(self, at: Release, *, pattern: bool) -> str:
        """A job that is cut into two parts: of files, or of items."""
        if not pattern:
            items = [{"plaintext": b64(b"%d" % number)} for number in range(MANY)]
            return at.submit({"kind": "encrypt", "context": CONTEXT, "items": items})
        (folder := self.files / "many").mkdir(mode=0o700)
        for number in range(MANY):
            (folder / str(number)).write_bytes(b"file %d" % number)
        urls = {"source": f"{folder.as_uri()}/*", "target": f"{self.files.as_uri()}/out-many/"}
        return at.submit({"kind": "encrypt", "context": CONTEXT, **urls})

    def states(self, ids: Sequence[str]) -> Counter[str]:
        pipeline = self.redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hget(f"kms:job:{job_id}", "state")
        return Counter((raw or b"gone").decode() for raw in pipeline.execute())

    def ended(self, ids: Sequence[str]) -> None:
        """Wait until all have ended, then check that each ran once and succeeded."""
        deadline = time.monotonic() + LIMIT_S
        while not set(found := self.states(ids)) <= ENDED | {"gone"}:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        assert found == {"succeeded": len(ids)}
        seen: dict[str, Counter[str]] = {job_id: Counter() for job_id in ids}
        for _, event in cast("list[tuple[bytes, dict[bytes, bytes]]]", self.redis.xrange("kms:events")):
            subject = event[b"subject"].decode()
            if subject in seen:
                seen[subject][event[b"type"].decode().removeprefix("kms.job.")] += 1
        doubled = {
            job_id: found for job_id, found in seen.items() if found["succeeded"] != 1 or found["running"] > 1
        }
        assert not doubled

    def read(self, at: Release, ids: Sequence[str]) -> None:
        """The API of a host tells each as succeeded."""
        for job_id in ids:
            assert at.job(job_id)["state"] == "succeeded", at.job(job_id)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_of_0_1(tmp_path_factory.mktemp("release"))


@pytest.fixture
def hosts(tmp_path: Path, source: Path) -> Iterator[Hosts]:
    valkey = EmbeddedValkey(tmp_path / "redis")
    (tmp_path / "redis").mkdir(mode=0o700)
    url = valkey.start().url
    try:
        hosts = Hosts(tmp_path, url, source)
        with hosts.old, hosts.new:
            yield hosts
    finally:
        valkey.stop()


def version(at: Release) -> str:
    """The version that the API of a host tells."""
    return str(at.http.get("/openapi.json").json()["info"]["version"])


@pytest.mark.timeout(LIMIT_S + 120)
def test_jobs_that_0_1_queued_run_after_the_upgrade(hosts: Hosts) -> None:
    hosts.old.start("api")
    assert version(hosts.old).startswith("0.1.")
    ids = hosts.submit(hosts.old, JOBS)
    hosts.old.kill("api")

    hosts.new.start("api", "worker")

    hosts.ended(ids)
    hosts.read(hosts.new, ids)


@pytest.mark.timeout(LIMIT_S + 120)
def test_jobs_that_this_version_queued_run_after_the_way_back(hosts: Hosts) -> None:
    hosts.new.start("api")
    ids = hosts.submit(hosts.new, JOBS)
    hosts.new.kill("api")

    hosts.old.start("api", "worker")

    hosts.ended(ids)
    hosts.read(hosts.old, ids)


@pytest.mark.timeout(LIMIT_S + 120)
def test_parts_that_this_version_made_run_after_the_way_back(hosts: Hosts) -> None:
    """One part of each job has ended when the workers of 0.1 take over."""
    hosts.new.start("api")
    ids = [hosts.large(hosts.new, pattern=pattern) for pattern in (False, True)]
    core = core_of(hosts.new)
    for job_id in ids:
        run_job(job_id, core.worker_context, "new/1")  # it is cut into parts
        run_job(part_id(job_id, 0), core.worker_context, "new/1")
        assert core.worker_context.store.get(job_id, "default").items_done == MANY // 2
    hosts.new.kill("api")

    hosts.old.start("api", "worker")

    hosts.ended(ids)
    hosts.read(hosts.old, ids)


@pytest.mark.timeout(2 * LIMIT_S)
def test_both_versions_side_by_side_lose_and_double_nothing(hosts: Hosts) -> None:
    """The old host works alone, then both, then the new one alone, then both again, then the old one."""
    hosts.old.start()
    ids = hosts.submit(hosts.old, JOBS // 6)
    hosts.new.start()
    for _ in range(JOBS // 6):
        ids += hosts.submit(hosts.old, 1) + hosts.submit(hosts.new, 1)
    hosts.old.stop("worker")
    hosts.old.stop("api")
    ids += hosts.submit(hosts.new, JOBS // 6)
    hosts.old.start()
    for _ in range(JOBS // 6):
        ids += hosts.submit(hosts.old, 1) + hosts.submit(hosts.new, 1)
    hosts.new.stop("worker")

    hosts.ended(ids)
    hosts.read(hosts.new, ids)
