"""Large jobs leave a share of the workers to others, and sources are bounded in size and in holes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.execution.lease import FoundLarge, Lease
from kms_core.jobs.execution.tree import PATIENCE
from kms_core.jobs.model import part_id
from kms_core.jobs.recovery.reaper import reap_all
from kms_core.jobs.spec import FILES
from kms_core.jobs.storage import locations
from kms_core.jobs.storage.locations import check_holes
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import SpoolFull, TooLarge
from kms_protocol.wire import PRIORITIES
from support.core_jobs import end_of, now, run_job, split_into_parts, submit
from support.credentials import REQUIRED, SecuredService
from support.file_tree import names
from support.job_stores import (
    COMMIT,
    TENANT,
    accepted,
    expire_leases,
    forge,
    next_attempt,
    store_of,
    take,
    with_jobs,
)
from support.object_jobs import ObjectJobs
from support.service import Service, core_of

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
SMALL: Final = 10
LARGE: Final = 1_000


def sparse(path: Path, size_bytes: int) -> Path:
    """A file of nothing but a hole."""
    with path.open("ab") as file:
        file.truncate(size_bytes)
    return path


# -- a share for others -------------------------------------------------------------------------------------


def sharing(core: Core, *, several_tenants: bool = True, **changes: object) -> JobStore:
    """A store in which one of two processes of a worker is left to jobs that are not large."""
    store = store_of(core, with_jobs(attempts=5, **changes), several_tenants=several_tenants)
    store.large_job_bytes = LARGE
    return store


@pytest.fixture
def store(core: Core) -> JobStore:
    return sharing(core)


def made(store: JobStore, size_bytes: int = LARGE, tenant: str = "a", **more: object) -> str:
    fields = {"source": "file:///in", "target": "file:///out", **more}
    return store.submit(accepted(tenant=tenant, size_bytes=size_bytes, **fields)).job_id


def chosen(store: JobStore, worker: str = "w/2") -> str | None:
    """The job that a process is given; None if none is ready."""
    found = next_attempt(store, worker, FILES)
    return found.accepted.job_id if found else None


def is_ready(store: JobStore, job_id: str) -> bool:
    return any(store.redis.zscore(f"kms:waiting:kms.files:{one}", job_id) for one in PRIORITIES)


def test_large_job_waits_while_another_holds_what_large_ones_may(store: JobStore) -> None:
    first, second, small = made(store), made(store, tenant="b"), made(store, SMALL)
    claim = take(store, first)

    assert store.claim(second, "w/2") is None
    waiting = store.get(second, "b")
    assert (waiting.state, waiting.attempt, waiting.fence) == ("queued", 0, 0)
    assert is_ready(store, second)
    assert store.claim(small, "w/2")

    store.finish(claim, "succeeded")
    assert take(store, second, "w/2").attempt == 1


@pytest.mark.parametrize("end", ["finish", "defer", "reap", "run out"])
@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["of large jobs", "of a tenant"])
def test_share_of_a_job_is_free_when_its_lease_ends(core: Core, size: int, end: str) -> None:
    store = sharing(core, tenant_leases=1 if size == SMALL else 1_000)
    first, second = made(store, size), made(store, size)
    claim = take(store, first)
    assert store.claim(second, "w/2") is None
    if end == "finish":
        store.finish(claim, "failed", "path_refused")
    elif end == "defer":
        store.defer(claim, 600)
    elif end == "reap":
        forge(store, first, lease_until="0")
        assert reap_all(store, [first]) == ["requeued"]
    else:  # its worker was killed
        expire_leases(store)

    assert store.claim(second, "w/2")


def test_one_tenant_alone_and_processes_that_are_not_reserved(core: Core) -> None:
    alone, two = sharing(core, several_tenants=False), sharing(core, concurrency=3)
    jobs = [made(alone) for _ in range(3)]

    assert [bool(two.claim(job, "w/1")) for job in jobs] == [True, True, False]
    assert alone.claim(jobs[2], "w/1")


def test_tenants_take_turns_with_large_jobs(store: JobStore) -> None:
    of_a = [made(store) for _ in range(4)]
    claim = take(store, of_a[0])
    of_b = made(store, tenant="b")
    assert chosen(store) is None
    forge(store, of_a[0], paid_until=str(store.now() - 0.1))  # the lease that tenant a pays for
    store.finish(claim, "succeeded")

    assert chosen(store) == of_b


def test_large_jobs_that_wait_delay_no_small_one(store: JobStore) -> None:
    """Also of the same tenant. The bound is for each worker."""
    first, *large = [made(store) for _ in range(50)]
    assert chosen(store, "w/1") == first
    assert chosen(store) is None
    small = made(store, SMALL)

    assert chosen(store) == small
    assert chosen(store, "other/1") == large[0]


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
    claim = take(store, whole)
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


def test_large_job_that_dies_again_and_again_is_no_exception(store: JobStore) -> None:
    first, second = made(store), made(store)
    take(store, first)
    expire_leases(store)  # its worker died
    assert reap_all(store, [first]) == ["requeued"]
    take(store, second, "w/2")

    assert store.claim(first, "w/1") is None

    waiting = store.get(first, "a")
    assert (waiting.state, waiting.attempt) == ("queued", 1)


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ("concurrency = 1", 1),
        ("concurrency = 4", 3),
        ("reserved_processes = 9", 1),
        ("reserved_processes = 0", 0),  # nothing is reserved
    ],
)
def test_large_jobs_always_have_one_process(
    tmp_path: Path, redis_url: str, settings: str, processes: int
) -> None:
    several = "[kms.tenants.a]\n[kms.tenants.b]\n"
    install = SecuredService(tmp_path, f"{REQUIRED}[kms.jobs]\n{settings}\n{several}", redis_url)

    assert core_of(install).worker_context.store.large_leases() == processes


def test_commit_is_finished_whatever_the_size_of_its_source(store: JobStore) -> None:
    claim = take(store, made(store, SMALL))

    Lease(store, replace(claim, commit=COMMIT)).admit(LARGE)
    with pytest.raises(FoundLarge):
        Lease(store, claim).admit(LARGE)


# -- sources that grow ---------------------------------------------------------------------------------------


@pytest.fixture
def sharing_core(core: Core) -> Core:
    return replace(core, worker_context=replace(core.worker_context, store=sharing(core)))


def sealing(core: Core, source: Path) -> str:
    """The id of a job that seals a file."""
    return submit(core, "encrypt", source, f"{source.as_uri()}.age")


def test_file_that_has_grown_large_is_claimed_again_as_a_large_job(sharing_core: Core, files: Path) -> None:
    core, store = sharing_core, sharing_core.worker_context.store
    (files / "in").write_bytes(bytes(SMALL))
    job_id = sealing(core, files / "in")
    (files / "in").write_bytes(bytes(LARGE))
    claim = take(store, made(store))

    run_job(job_id, core.worker_context, "w/2")
    assert names(files) == ["in"]
    assert store.get(job_id, TENANT).attempt == 0
    assert store.claim(job_id, "w/2") is None
    store.finish(claim, "succeeded")
    assert is_ready(store, job_id)
    run_job(job_id, core.worker_context, "w/2")

    assert end_of(core, job_id) == ("succeeded", "")


def test_job_that_turned_out_large_waits_among_large_ones(store: JobStore) -> None:
    take(store, made(store))
    grown = take(store, made(store, SMALL), "w/2")

    store.defer(grown, 0, away=False, work_bytes=LARGE)

    assert chosen(store) is None


def test_files_of_a_part_that_have_grown_make_it_large(sharing_core: Core, files: Path) -> None:
    core, store = sharing_core, sharing_core.worker_context.store
    sources = [files / "in" / str(number) for number in range(4)]
    for folder in ("in", "out"):
        (files / folder).mkdir()
    for source in sources:
        source.write_bytes(b"x")
    whole = submit(core, "encrypt", f"file://{files}/in/*", f"file://{files}/out/")
    (part,) = split_into_parts(core, whole)
    for source in sources:
        source.write_bytes(bytes(LARGE // 2 - 1))

    run_job(part, core.worker_context, "w/1")

    assert (store.part(part).job.state, names(files / "out")) == ("queued", ["0.age", "1.age"])
    assert is_ready(store, part)
    claim = take(store, made(store))
    assert store.claim(part, "w/2") is None
    store.finish(claim, "succeeded")
    assert is_ready(store, part)
    run_job(part, core.worker_context, "w/2")
    assert end_of(core, whole) == ("succeeded", "")


def test_file_that_grows_above_the_bound_after_it_was_accepted(core: Core, files: Path) -> None:
    (files / "in").write_bytes(b"x")
    job_id = sealing(core, files / "in")
    sparse(files / "in", 1025 * GIB)

    run_job(job_id, core.worker_context, "w/1")

    assert end_of(core, job_id) == ("failed", "too_large")
    assert names(files) == ["in"]


# -- how large a source may be -------------------------------------------------------------------------------


def test_source_above_the_bounds_is_refused_before_anything_is_written(
    tmp_path: Path, redis_url: str
) -> None:
    install = Service(tmp_path, f"[kms.jobs]\nsource_max_bytes = {6 * GIB}\n", redis_url)
    core, files = core_of(install), install.files
    sparse(files / "large", 6 * GIB + 1)
    sparse(files / "sparse", 5 * GIB)
    (files / "fits").write_bytes(os.urandom(10_000_000))

    for name, text in (("large", "source_max_bytes"), ("sparse", "cp --sparse=never")):
        with pytest.raises(TooLarge, match=text):
            sealing(core, files / name)
    sealing(core, files / "fits")
    assert names(files) == ["fits", "large", "sparse"]


def test_object_above_the_bound_is_refused(object_jobs: ObjectJobs) -> None:
    places = object_jobs.core.worker_context.places
    places = replace(places, limits=msgspec.structs.replace(places.limits, source_max_bytes=10))
    fits, large = object_jobs.bucket.put("fits", bytes(10)), object_jobs.bucket.put("large", bytes(11))

    with places.open_source(fits) as source:
        assert source.reader.size == 10
    with pytest.raises(TooLarge), places.open_source(large):
        pass


@pytest.fixture
def roomy(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> SecuredService:
    """An install that takes a source of any size, allocated or not."""
    monkeypatch.setattr(locations, "MOST_HOLE_BYTES", 1024**5)
    return SecuredService(tmp_path, f"[kms.jobs]\nsource_max_bytes = {1024**5}\n", redis_url)


def too_large(path: Path) -> None:
    """Make a file larger than its file system has room."""
    free = os.statvfs(path.parent)
    sparse(path, free.f_bavail * free.f_frsize + 64 * GIB)


def test_target_without_room_is_refused_to_a_submitter_and_delays_an_accepted_job(
    roomy: SecuredService,
) -> None:
    core, files = core_of(roomy), roomy.files
    (files / "in").write_bytes(b"x")
    job_id = sealing(core, files / "in")
    too_large(files / "in")

    with pytest.raises(SpoolFull):
        sealing(core, files / "in")
    run_job(job_id, core.worker_context, "w/1")
    assert is_ready(core.worker_context.store, job_id)
    run_job(job_id, core.worker_context, "w/1")

    assert (end_of(core, job_id), now(core, job_id).attempt) == (("queued", ""), 0)
    assert names(files) == ["in"]
    audit = b"".join(path.read_bytes() for path in (roomy.state / "audit").iterdir())
    assert b'"operation":"job.submit"' in audit
    assert b'"operation":"encrypt"' not in audit  # no key was used for it

    os.truncate(files / "in", 10)
    forge(core.worker_context.store, job_id, not_before="0")
    run_job(job_id, core.worker_context, "w/1")
    assert end_of(core, job_id) == ("succeeded", "")


def test_file_without_room_delays_its_part_and_is_not_refused(roomy: SecuredService) -> None:
    core, files = core_of(roomy), roomy.files
    (files / "in").mkdir()
    for name in "ab":
        (files / "in" / name).write_bytes(b"x")
    job_id = submit(core, "encrypt", f"{(files / 'in').as_uri()}/*", f"{(files / 'out').as_uri()}/")
    (part,) = split_into_parts(core, job_id)
    too_large(files / "in" / "b")
    for _ in range(2 + PATIENCE):  # more than a file that cannot be read is given
        run_job(part, core.worker_context, "w/1")
        assert core.worker_context.store.part(part).job.state == "queued"
        forge(core.worker_context.store, part, not_before="0")

    os.truncate(files / "in" / "b", 10)
    run_job(part, core.worker_context, "w/1")
    assert end_of(core, job_id) == ("succeeded", "")
    assert names(files / "out") == ["a.age", "b.age"]


@pytest.mark.parametrize(
    ("data_at", "holes"),
    [((0, 1, 2, 3), 0), ((0,), 3), ((3,), 3), ((1, 3), 2)],
    ids=["data", "hole at the end", "hole at the start", "holes"],
)
def test_holes_are_what_the_disk_does_not_hold(tmp_path: Path, data_at: tuple[int, ...], holes: int) -> None:
    """Numbers are MiB of a file of four."""
    path = sparse(tmp_path / "file", 4 * MIB)
    with path.open("r+b") as file:
        for at in data_at:
            file.seek(at * MIB)
            file.write(os.urandom(MIB))
        file.flush()
        check_holes(file.fileno(), holes * MIB)
        if holes:
            with pytest.raises(TooLarge):
                check_holes(file.fileno(), holes * MIB - 1)
