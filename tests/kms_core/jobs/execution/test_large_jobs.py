"""Large jobs leave a share of the workers to others, and sources are bounded in size and in holes."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import httpx2 as httpx
import msgspec
import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution.lease import FoundLarge, Lease
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import Attempt, part_id
from kms_core.jobs.spec import FILES, QUEUES
from kms_core.jobs.storage import locations
from kms_core.jobs.storage.local import Roots
from kms_core.jobs.storage.locations import check_holes
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.errors import SpoolFull, TooLarge
from kms_protocol.wire import ENDED, PRIORITIES
from support.credentials import REQUIRED, Guarded
from support.job_stores import COMMIT, accepted, store_of, with_jobs
from support.object_jobs import Bench
from support.service import check_problem, core_of
from support.waiting import until

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
ONE: Final[dict[str, object]] = {"kind": "encrypt", "items": [{"plaintext": ""}]}
SMALL: Final = 10
LARGE: Final = 1_000
WHO: Final = Principal("local")


def sparse(path: Path, size_bytes: int) -> Path:
    """A file of nothing but a hole."""
    with path.open("ab") as file:
        file.truncate(size_bytes)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filing(install: Guarded, tenant: str = "default") -> dict[str, str]:
    """The header of a token that may do everything with the files of the install."""
    here = f"{install.files.as_uri()}/"
    return install.token(f"jobs:read,jobs:write,encrypt read={here} write={here}", tenant=tenant)


def call(install: Guarded, who: dict[str, str], job: dict[str, object]) -> httpx.Response:
    return install.post("/jobs", job, headers=who)


def submitted(install: Guarded, who: dict[str, str], job: dict[str, object]) -> str:
    answer = call(install, who, job)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


def state(install: Guarded, who: dict[str, str], job_id: str) -> str:
    return str(install.get(f"/jobs/{job_id}", headers=who).json()["state"])


def encrypting(source: Path) -> dict[str, object]:
    return {"kind": "encrypt", "source": source.as_uri(), "target": f"{source.as_uri()}.age"}


def told(install: Guarded) -> list[tuple[str, str]]:
    """Every transition of every job, in order: its state and the job's id."""
    stream = core_of(install).worker_context.store.redis.xrange("kms:events")
    events = cast("list[tuple[bytes, dict[bytes, bytes]]]", stream)
    return [
        (fields[b"type"].decode().removeprefix("kms.job."), fields[b"subject"].decode())
        for _, fields in events
    ]


# -- a share for others, with real processes ----------------------------------------------------------------


def test_jobs_of_another_tenant_end_while_large_files_run(tmp_path: Path) -> None:
    with Guarded(tmp_path, f"{REQUIRED}[kms.jobs]\nconcurrency = 2\n") as install:
        install.start()
        bulk, other = filing(install, "bulk"), filing(install, "other")
        files = [sparse(install.files / name, GIB) for name in ("a", "b")]

        large = [submitted(install, bulk, encrypting(file)) for file in files]
        until(lambda: any(state(install, bulk, job) == "running" for job in large), "a large job runs")
        small = [submitted(install, other, ONE) for _ in range(5)]
        until(lambda: all(state(install, bulk, job) in ENDED for job in large), "the large jobs end")
        until(lambda: all(state(install, other, job) in ENDED for job in small), "the small jobs end")

        events = told(install)
        first_large_end = min(events.index(("succeeded", job)) for job in large)
        assert max(events.index(("succeeded", job)) for job in small) < first_large_end
        order = [word for word, job in events if job in large and word in {"running", "succeeded"}]
        assert order == ["running", "succeeded", "running", "succeeded"]  # either may be the first
        assert {Path(f"{file}.age").stat().st_size > GIB for file in files} == {True}


def test_one_tenant_alone_has_all_processes(tmp_path: Path) -> None:
    with Guarded(tmp_path, f"{REQUIRED}[kms.jobs]\nconcurrency = 2\n") as install:
        install.start()
        only = filing(install)
        files = [sparse(install.files / name, GIB) for name in ("a", "b")]

        large = [submitted(install, only, encrypting(file)) for file in files]
        until(lambda: all(state(install, only, job) in ENDED for job in large), "the large jobs end")

        order = [word for word, job in told(install) if job in large and word in {"running", "succeeded"}]
        assert order == ["running", "running", "succeeded", "succeeded"]


# -- a share for others, claim by claim ---------------------------------------------------------------------


def sharing(core: Core, *, several: bool = True, **changes: object) -> JobStore:
    """A store in which one of two processes of a worker is left to jobs that are not large."""
    store = store_of(core, with_jobs(attempts=5, **changes), [], several=several)
    store.large_job_bytes = LARGE
    return store


@pytest.fixture
def store(core: Core) -> JobStore:
    return sharing(core)


def made(store: JobStore, size_bytes: int = LARGE, tenant: str = "a", **more: object) -> str:
    fields = {"source": "file:///in", "target": "file:///out", **more}
    return store.submit(accepted(tenant=tenant, size_bytes=size_bytes, **fields)).job_id


def is_ready(store: JobStore, job_id: str) -> bool:
    return any(store.redis.zscore(f"kms:waiting:kms.files:{one}", job_id) for one in PRIORITIES)


def held(store: JobStore, job_id: str, worker: str = "w/1") -> Attempt:
    claim = store.claim(job_id, worker)
    assert claim
    return claim


def test_large_job_waits_while_another_holds_what_large_ones_may(store: JobStore) -> None:
    first, second, small = made(store), made(store, tenant="b"), made(store, SMALL)
    claim = held(store, first)

    assert store.claim(second, "w/2") is None
    waiting = store.get(second, "b")
    assert (waiting.state, waiting.attempt, waiting.fence) == ("queued", 0, 0)
    assert is_ready(store, second)
    assert store.claim(small, "w/2")

    store.finish(claim, "succeeded")
    assert held(store, second, "w/2").attempt == 1


@pytest.mark.parametrize("end", ["finish", "defer", "reap"])
def test_process_of_a_large_job_is_free_when_its_lease_ends(core: Core, end: str) -> None:
    store = sharing(core)
    first, second = made(store), made(store)
    claim = held(store, first)
    if end == "finish":
        store.finish(claim, "failed", "path_refused")
    elif end == "defer":
        store.defer(claim, 600, counts=False)
    else:
        core.worker_context.store.redis.hset(f"kms:job:{first}", "lease_until", "0")
        assert store.reap_all([first]) == ["requeued"]

    assert store.claim(second, "w/2")


def test_large_lease_of_a_killed_worker_counts_no_longer_than_it_lasts(core: Core) -> None:
    store = sharing(core, lease_s=0.2)
    first, second = made(store), made(store)
    held(store, first)
    time.sleep(0.3)

    assert store.claim(second, "w/2")


def test_renewed_large_lease_counts_on(core: Core) -> None:
    store = sharing(core, lease_s=2)
    first, second = made(store), made(store)
    claim = held(store, first)
    for _ in range(3):
        time.sleep(1)
        store.renew(claim, {})

    assert store.claim(second, "w/2") is None


def test_another_worker_has_processes_of_its_own(store: JobStore) -> None:
    first, second = made(store), made(store)
    held(store, first, "w:1/1")

    assert store.claim(second, "w:2/1")


def test_one_tenant_alone_and_processes_that_are_not_reserved(core: Core) -> None:
    alone, two = sharing(core, several=False), sharing(core, concurrency=3)
    jobs = [made(alone) for _ in range(3)]

    assert [bool(two.claim(job, "w/1")) for job in jobs] == [True, True, False]
    assert alone.claim(jobs[2], "w/1")


def test_tenants_take_turns_with_large_jobs(store: JobStore) -> None:
    of_a = [made(store) for _ in range(4)]
    claim = held(store, of_a[0])
    of_b = made(store, tenant="b")
    assert store.next("w/2", FILES, QUEUES, woken=False) is None
    time.sleep(0.1)  # the lease that tenant a pays for
    store.finish(claim, "succeeded")

    following = store.next("w/2", FILES, QUEUES, woken=False)
    assert isinstance(following, Attempt)
    assert following.accepted.job_id == of_b


def test_large_jobs_that_wait_delay_no_small_one(store: JobStore) -> None:
    first, *_ = [made(store) for _ in range(50)]
    held(store, first)
    small = made(store, SMALL)

    following = store.next("w/2", FILES, QUEUES, woken=False)
    assert isinstance(following, Attempt)
    assert following.accepted.job_id == small


@pytest.mark.parametrize(
    ("changes", "large"),
    [
        ({"source": "file:///a"}, True),
        ({"source": "file:///a", "kind": "rewrap"}, True),
        ({"source": "upload"}, False),
        ({"source": "upload", "kind": "decrypt"}, True),
        ({"source": "items", "items": 3, "starts": (0,)}, True),
        ({"source": "items", "items": 600, "starts": (0, 500)}, False),
        ({"source": "items", "items": 500, "starts": (0, 500), "parent": part_id("a", 1)}, True),
        ({"source": "file:///a/**"}, False),
        ({"source": "file:///a/**", "parent": part_id("a", 1)}, True),
        ({"source": "file:///a/**", "parent": part_id("a", 1), "kind": "rewrap", "dry_run": True}, False),
    ],
    ids=str,
)
def test_job_is_as_large_as_what_it_reads(changes: dict[str, object], *, large: bool) -> None:
    assert accepted(size_bytes=LARGE, **changes).work_bytes == (LARGE if large else 0)


def test_large_parts_wait_and_small_ones_do_not(store: JobStore) -> None:
    whole = made(store, 0, source="file:///in/**", target="file:///out/")
    claim = held(store, whole)
    parts = [
        accepted(
            job_id=part_id(whole, number),
            parent=whole,
            part=number,
            source="file:///in/**",
            size_bytes=size,
            tenant="a",
        )
        for number, size in enumerate((LARGE, LARGE, SMALL))
    ]
    store.split(claim, parts)

    assert [bool(store.claim(part.job_id, "w/1")) for part in parts] == [True, False, True]


def test_large_job_that_dies_again_and_again_is_no_exception(core: Core) -> None:
    short, store = sharing(core, lease_s=0.2), sharing(core)
    first, second = made(store), made(store)
    assert short.claim(first, "w/1")
    time.sleep(0.3)  # its worker died
    assert short.reap_all([first]) == ["requeued"]
    held(store, second, "w/2")

    assert store.claim(first, "w/1") is None

    waiting = store.get(first, "a")
    assert (waiting.state, waiting.attempt) == ("queued", 1)


@pytest.mark.parametrize(
    ("settings", "processes"), [("concurrency = 1", 1), ("concurrency = 4", 3), ("reserved_processes = 9", 1)]
)
def test_large_jobs_always_have_one_process(
    tmp_path: Path, redis_url: str, settings: str, processes: int
) -> None:
    install = Guarded(tmp_path, f"{REQUIRED}[kms.jobs]\n{settings}\n", redis_url)
    install.make("*", tenant="a")
    install.make("*", tenant="b")

    assert core_of(install).worker_context.store.large_leases() == processes


def test_nothing_is_reserved_where_the_settings_say_so(tmp_path: Path, redis_url: str) -> None:
    none = "[kms.jobs]\nreserved_processes = 0\n[kms.tenants.a]\n[kms.tenants.b]\n"

    store = core_of(Guarded(tmp_path, f"{REQUIRED}{none}", redis_url)).worker_context.store

    assert store.large_leases() == 0


def test_commit_is_finished_whatever_the_size_of_its_source(store: JobStore) -> None:
    claim = held(store, made(store, SMALL))

    Lease(store, replace(claim, commit=COMMIT)).admit(LARGE)
    with pytest.raises(FoundLarge):
        Lease(store, claim).admit(LARGE)


# -- leases of a tenant, large or not -----------------------------------------------------------------------


def test_leases_of_a_dead_worker_do_not_count_for_a_tenant(core: Core) -> None:
    store = store_of(core, with_jobs(lease_s=0.2, tenant_leases=1), [])
    first, second = made(store, SMALL), made(store, SMALL)
    held(store, first)
    assert store.claim(second, "w/2") is None
    time.sleep(0.3)

    assert store.claim(second, "w/2")


def test_deferred_job_has_no_lease(core: Core) -> None:
    store = sharing(core, tenant_leases=1)
    first, second = made(store, SMALL), made(store, SMALL)
    store.defer(held(store, first), 600, counts=False)

    assert store.claim(second, "w/2")


# -- sources that grow ---------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The root of file jobs of ``core``."""
    return tmp_path / "state" / "files"


def submit(core: Core, source: Path) -> str:
    terms = SubmissionOptions(WHO, "encrypt", Context.parse("a=1"))
    return core.submitter.files(
        terms, Reference(source.as_uri(), f"{source.as_uri()}.age", overwrite=False)
    ).job_id


def now(core: Core, job_id: str) -> tuple[str, str]:
    job = core.worker_context.store.get(job_id, WHO.tenant)
    return job.state, job.error


def test_file_that_has_grown_large_is_claimed_again_as_a_large_job(core: Core, files: Path) -> None:
    core = replace(core, worker_context=replace(core.worker_context, store=sharing(core)))
    (files / "in").write_bytes(bytes(SMALL))
    job_id = submit(core, files / "in")
    (files / "in").write_bytes(bytes(LARGE))
    other = made(core.worker_context.store)
    claim = held(core.worker_context.store, other)

    run_job(job_id, core.worker_context, "w/2")
    assert names(files) == ["in"]
    assert core.worker_context.store.get(job_id, WHO.tenant).attempt == 0
    assert core.worker_context.store.claim(job_id, "w/2") is None
    core.worker_context.store.finish(claim, "succeeded")
    assert is_ready(core.worker_context.store, job_id)
    run_job(job_id, core.worker_context, "w/2")

    assert now(core, job_id) == ("succeeded", "")


def test_job_that_turned_out_large_waits_among_large_ones(store: JobStore) -> None:
    held(store, made(store))
    grown = held(store, made(store, SMALL), "w/2")

    store.defer(grown, 0, counts=False, away=False, work_bytes=LARGE)

    assert store.next("w/2", FILES, QUEUES, woken=False) is None


def test_files_of_a_part_that_have_grown_make_it_large(core: Core, files: Path) -> None:
    core = replace(core, worker_context=replace(core.worker_context, store=sharing(core)))
    (files / "in").mkdir()
    for number in range(4):
        (files / "in" / str(number)).write_bytes(b"x")
    (files / "out").mkdir()
    tree = Reference(f"{(files / 'in').as_uri()}/*", f"{(files / 'out').as_uri()}/")
    whole = core.submitter.files(SubmissionOptions(WHO, "encrypt", Context.parse("a=1")), tree).job_id
    run_job(whole, core.worker_context, "w/1")
    for number in range(4):
        (files / "in" / str(number)).write_bytes(bytes(LARGE // 2 - 1))

    run_job(part_id(whole, 0), core.worker_context, "w/1")

    part = core.worker_context.store.part(part_id(whole, 0)).job
    assert (part.state, names(files / "out")) == ("queued", ["0.age", "1.age"])
    assert is_ready(core.worker_context.store, part.job_id)
    claim = held(core.worker_context.store, made(core.worker_context.store))
    assert core.worker_context.store.claim(part.job_id, "w/2") is None
    core.worker_context.store.finish(claim, "succeeded")
    assert is_ready(core.worker_context.store, part.job_id)
    run_job(part.job_id, core.worker_context, "w/2")
    assert now(core, whole) == ("succeeded", "")


def test_file_that_grows_above_the_bound_after_it_was_accepted(core: Core, files: Path) -> None:
    (files / "in").write_bytes(b"x")
    job_id = submit(core, files / "in")
    sparse(files / "in", 1025 * GIB)

    run_job(job_id, core.worker_context, "w/1")

    assert now(core, job_id) == ("failed", "too_large")
    assert names(files) == ["in"]


# -- how large a source may be -------------------------------------------------------------------------------


def test_source_above_the_bounds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    limits = f"[kms.jobs]\nsource_max_bytes = {6 * GIB}\n"
    with Guarded(tmp_path, f"{REQUIRED}{limits}") as install:
        install.start("api")
        who = filing(install)
        sparse(install.files / "large", 6 * GIB + 1)
        sparse(install.files / "sparse", 5 * GIB)
        (install.files / "fits").write_bytes(os.urandom(10_000_000))

        for name, text in (("large", b"source_max_bytes"), ("sparse", b"cp --sparse=never")):
            answer = call(install, who, encrypting(install.files / name))
            check_problem(answer, 413, "too_large")
            assert text in answer.content
        assert call(install, who, encrypting(install.files / "fits")).status_code == 202
        assert names(install.files) == ["fits", "large", "sparse"]


def test_object_above_the_bound_is_refused(bench: Bench) -> None:
    places = bench.core.worker_context.places
    places = replace(places, limits=msgspec.structs.replace(places.limits, source_max_bytes=10))
    fits, large = bench.bucket.put("fits", bytes(10)), bench.bucket.put("large", bytes(11))

    with places.open_source(fits) as source:
        assert source.reader.size == 10
    with pytest.raises(TooLarge), places.open_source(large):
        pass


def test_target_without_room_is_refused_when_the_job_is_accepted_and_when_it_runs(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "MOST_HOLE_BYTES", 1024**5)
    install = Guarded(tmp_path, f"[kms.jobs]\nsource_max_bytes = {1024**5}\n", redis_url)
    core, files = core_of(install), install.files
    free = os.statvfs(files)
    (files / "in").write_bytes(b"x")
    job_id = submit(core, files / "in")
    sparse(files / "in", free.f_bavail * free.f_frsize + 64 * GIB)

    with pytest.raises(SpoolFull):
        submit(core, files / "in")
    run_job(job_id, core.worker_context, "w/1")
    assert is_ready(core.worker_context.store, job_id)
    run_job(job_id, core.worker_context, "w/1")

    assert now(core, job_id) == ("failed", "spool_full")
    assert names(files) == ["in"]
    audit = b"".join(path.read_bytes() for path in (install.state / "audit").iterdir())
    assert b'"operation":"job.submit"' in audit
    assert b'"operation":"encrypt"' not in audit  # no key was used for it


@pytest.mark.parametrize("kind", ["data", "hole at the end", "hole at the start", "holes"])
def test_holes_are_what_the_disk_does_not_hold(tmp_path: Path, kind: str) -> None:
    path, fd_size = tmp_path / "file", 4 * MIB
    with path.open("wb") as file:
        if kind == "data":
            file.write(os.urandom(fd_size))
        elif kind == "hole at the end":
            file.write(os.urandom(MIB))
            file.truncate(fd_size)
        elif kind == "hole at the start":
            file.seek(3 * MIB)
            file.write(os.urandom(MIB))
        else:
            for at in (1, 3):
                file.seek(at * MIB)
                file.write(os.urandom(MIB))
    expected = {"hole at the end": 3, "hole at the start": 3, "holes": 2}.get(kind, 0) * MIB
    fd = os.open(path, os.O_RDONLY)
    try:
        check_holes(fd, expected)
        if expected:
            with pytest.raises(TooLarge):
                check_holes(fd, expected - 1)
    finally:
        os.close(fd)


def test_target_without_room_is_refused_before_the_work(tmp_path: Path) -> None:
    files = tmp_path / "root"
    files.mkdir()
    free = os.statvfs(files)
    size = free.f_bavail * free.f_frsize + 64 * GIB
    roots = Roots([files])
    target = (files / "out").as_uri()

    with pytest.raises(SpoolFull):
        roots.check_room(target, size)
    with pytest.raises(SpoolFull), roots.prepare(target, "job-1", overwrite=False, room_bytes=size):
        pass
    assert names(files) == []
    roots.check_room(target, MIB)
