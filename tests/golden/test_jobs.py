"""Jobs that an earlier version accepted, began, cut into parts, or ended: this one goes on with each."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.execution.runner import run_next
from kms_core.jobs.model import Following, Job
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.submission import submitter
from kms_protocol import wire
from kms_protocol.errors import IdempotencyConflict, ResultExpired
from support import core_jobs
from support.core_jobs import CONTEXT, NEW, WHO
from support.golden import install, jobs
from support.golden.jobs import Json
from support.job_options import job_options
from support.job_stores import TENANT
from support.service import core_of

FAR: Final = datetime(2120, 1, 1, tzinfo=UTC)
MOST_TURNS: Final = 100
BEFORE: Final = b"sealed before"
LARGE_ITEMS: Final = [b"%d" % number + b"." * 900 for number in range(20)]
LARGE: Final = bytes(range(256)) * 68
ITEMS: Final[dict[str, list[bytes]]] = {
    "queued items": [b"0", b"1", b"2"],
    "queued items on disk": LARGE_ITEMS,
    "claimed items": [b"0", b"1", b"2"],
    "split items": [b"0", b"1", b"2", b"3"],
    "ended items": [b"0", b"1", b"2", b"3"],
    "ended items on disk": LARGE_ITEMS,
}
"""By the name of the job: the plaintexts of its items."""
UPLOADS: Final[dict[str, bytes]] = {
    "queued upload": b"upload",
    "queued upload on disk": LARGE,
    "queued upload to rewrap": BEFORE,
    "ended upload": b"upload",
    "ended upload on disk": LARGE,
    "ended rewrapped upload": BEFORE,
}
"""The plaintexts of the results."""
DECRYPTED: Final = ("queued upload to decrypt", "ended decrypted upload")
FILES: Final[dict[str, dict[str, bytes]]] = {
    "queued file": {"one/plain.age": b"one file"},
    "queued file in place": {"place/a.age": BEFORE},
    "queued tree": {f"sealed/{number}/f.txt.age": b"tree %d" % number for number in range(3)},
    "ended file": {"four/plain.age": b"fourth"},
    "ended tree": {f"five-sealed/{number}.txt.age": b"five %d" % number for number in range(3)},
    "ended migration": {f"six/{number}.age": BEFORE for number in range(2)},
}
"""The plaintexts of the files that a job writes."""
# A file that an attempt had ready is known by its inode, which no copy has: what it was to become is refused.
OTHER_ENDS: Final = {
    "ended items with failures": ("failed", "items_failed"),
    "failed upload": ("failed", "decrypt_failed"),
    "cancelled items": ("cancelled", "cancelled"),
    "committing file": ("failed", "path_refused"),
    "placed file": ("failed", "path_refused"),
    "split tree": ("failed", "items_failed"),
    "dead items": ("failed", "attempts_exhausted"),
}


@dataclass(frozen=True)
class Install:
    """The install as it was taken down, with this version's core."""

    core: Core
    found: Json

    def id(self, name: str) -> str:
        return str(self.found["jobs"][name])

    def work(self) -> None:
        """Run what there is to run; the leases of the workers that died ran out long ago."""
        Reaper(self.core.worker_context.store, "r").step()
        following = Following("w/1", list(QUEUES), lambda: True)
        for _ in range(MOST_TURNS):
            if not run_next(self.core.worker_context, following, woken=False):
                return
        raise AssertionError("jobs run for ever")


@pytest.fixture
def earlier(redis_url: str) -> Iterator[Install]:
    found = jobs.taken_down()
    with jobs.own_folder(jobs.folder(found)) as folder:
        service = install.service(folder, redis_url, "[kms.jobs]\nlease_s = 600\nattempts = 2\n")
        jobs.put_files(service.files, found["files"])
        jobs.put_files(service.spool, found["spool"])
        core = core_of(service)
        jobs.put_keys(core.worker_context.store.redis, found["redis"])
        yield Install(core, found)


def test_each_job_ends_as_it_would_have(earlier: Install) -> None:
    earlier.work()

    ends = {name: core_jobs.end_of(earlier.core, earlier.id(name)) for name in earlier.found["jobs"]}
    well = dict.fromkeys((*ITEMS, *UPLOADS, *DECRYPTED, *FILES), ("succeeded", ""))
    assert ends == well | OTHER_ENDS


def test_results_open(earlier: Install) -> None:
    core = earlier.core
    earlier.work()

    for name, items in ITEMS.items():
        lines = [
            msgspec.json.decode(line, type=wire.ItemResult) for line in _result(earlier, name).splitlines()
        ]
        assert [_opened(core, line.ciphertext) for line in lines] == items, name
    for name, plaintext in UPLOADS.items():
        assert _opened(core, _result(earlier, name)) == plaintext, name
    for name in DECRYPTED:
        assert _result(earlier, name) == BEFORE, name
    for name in ("failed upload", "cancelled items", "dead items"):
        with pytest.raises(ResultExpired):
            _result(earlier, name)


def test_files_are_in_place(earlier: Install) -> None:
    core, root = earlier.core, jobs.folder(earlier.found) / "state/files"
    earlier.work()

    for name, files in FILES.items():
        for path, plaintext in files.items():
            assert core_jobs.opened(core, root / path) == plaintext, (name, path)
    contexts = [CONTEXT, NEW, NEW, NEW]  # of the first one a commit was begun
    assert [core_jobs.opened(core, root / f"moved/{at}.age", each) for at, each in enumerate(contexts)] == [
        BEFORE
    ] * 4
    assert list(root.rglob("*.tmp")) == []


def test_a_dead_job_is_retried_and_an_idempotency_key_finds_its_job(
    earlier: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = earlier.core
    core.worker_context.store.retry(earlier.id("dead items"), TENANT)
    earlier.work()
    assert core_jobs.end_of(core, earlier.id("dead items")) == ("succeeded", "")

    monkeypatch.setattr(submitter, "_MOST_S", (FAR - datetime.now(UTC)).total_seconds() + 60)
    assert _again(core, b"2").job_id == earlier.id("queued items")
    with pytest.raises(IdempotencyConflict):
        _again(core, b"3")


def _again(core: Core, last: bytes) -> Job:
    items = [wire.JobItem(plaintext=each) for each in (b"0", b"1", last)]
    given: dict[str, Any] = {"labels": {"team": "pay"}, "metadata": {"run": "7"}, "priority": "high"}
    times: dict[str, Any] = {"start_by": FAR, "run_by": FAR, "keep_for": 50 * 366 * 86_400}
    asked = job_options(WHO, "encrypt", CONTEXT, items=items, idempotency="golden-key", **times, **given)
    return core.submitter.submit(asked)


def _result(earlier: Install, name: str) -> bytes:
    return core_jobs.result(earlier.core, earlier.id(name))


def _opened(core: Core, ciphertext: bytes | msgspec.UnsetType) -> bytes:
    assert isinstance(ciphertext, bytes)
    return core.kms.decrypt(WHO, ciphertext, CONTEXT).plaintext
