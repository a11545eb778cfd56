"""Jobs over many files: what is named, where it goes, what sinks no other, and each way to die in between."""

import os
from itertools import accumulate, count
from pathlib import Path

import pytest

from kms_core.container import Core
from kms_core.jobs.execution.tree import PART_BYTES, PART_FILES, cut_into_parts
from kms_core.jobs.model import part_id
from kms_core.jobs.submission.submitter import urls_of
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, JobsUnavailable, PathRefused
from support.core_jobs import WHO, done, lines, now, opened, run, run_after_lease_expiry, run_job, submit
from support.failing_store import Killed, run_until_killed, worker_calling_at_each_step
from support.file_tree import names
from support.job_stores import (
    LASTING_LEASES,
    TENANT,
    expire_leases,
    forge,
    record,
    remove_inputs,
    spool_folder,
    store_of,
    with_jobs,
)


def fill(folder: Path, **named: bytes) -> None:
    for name, data in named.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def url(path: Path, pattern: str = "") -> str:
    return f"file://{path}/{pattern}"


def split_into_parts(core: Core, files: Path, **named: bytes) -> tuple[str, str]:
    """The ids of a job that seals these files of ``in`` into ``out``, and of its part, which has not run."""
    fill(files / "in", **named)
    job_id = submit(core, "encrypt", url(files / "in", "**"), url(files / "out"))
    run_job(job_id, core.worker_context, "w")
    return job_id, part_id(job_id, 0)


def ended(core: Core, job_id: str) -> tuple[str, str, int, int]:
    job = now(core, job_id)
    return job.state, job.error, job.items_done, job.items_failed


def refused(core: Core, job_id: str) -> dict[str, str]:
    """Name of the source and code of each line that has one."""
    told = [line for line in lines(core, job_id) if "error" in line]
    return {line["source"].rpartition("/")[2]: line["error"]["code"] for line in told}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- there and back ----------------------------------------------------------------------------------------


def test_tree_goes_there_and_back(core: Core, files: Path) -> None:
    plain = {"a.csv": b"1", "b/c.csv": b"22", "b/d/.env": b"", "z z/ü%*": os.urandom(70_000)}
    fill(files / "in", **{name.replace("/", "__"): data for name, data in plain.items()})

    there = done(core, "encrypt", url(files / "in", "**"), url(files / "sealed"))
    back = done(core, "decrypt", url(files / "sealed", "**/*.age"), url(files / "out/deep"))

    assert set(tree(files / "sealed")) == {f"{name}.age" for name in plain}
    assert tree(files / "out" / "deep") == plain
    assert (there.state, there.items, there.items_done, there.items_failed) == ("succeeded", 4, 4, 0)
    assert (there.bytes, there.bytes_done) == (70_003, 70_003)
    assert back.state == "succeeded"
    told = lines(core, there.job_id)
    assert told[0] == {
        "index": 0,
        "source": url(files / "in", "a.csv"),
        "target": url(files / "sealed", "a.csv.age"),
    }
    assert [line["index"] for line in told] == [0, 1, 2, 3]
    assert {path.stat().st_mode & 0o777 for path in (files / "sealed").rglob("*.age")} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (files / "out").rglob("*") if path.is_dir()} == {0o700}


@pytest.mark.parametrize(
    ("source", "target", "made"),
    [("in/*/x", "out", {"out/a/x.age", "out/b/x.age"}), ("*", "", {"top.age"})],
    ids=["pattern", "root itself"],
)
def test_files_that_the_pattern_names_are_sealed(
    core: Core, files: Path, source: str, target: str, made: set[str]
) -> None:
    fill(files, top=b"0", in__a__x=b"1", in__b__x=b"2", in__b__y=b"3", in__c=b"4")
    before = set(tree(files))

    done(core, "encrypt", url(files, source), url(files / target))

    assert set(tree(files)) - before == made


def test_nothing_that_is_no_plain_file_beneath_the_root_is_touched(
    core: Core, files: Path, tmp_path: Path
) -> None:
    outside, inside = tmp_path / "outside", files / "in"
    fill(outside, secret=b"secret")
    fill(inside, good=b"1")
    (inside / "link").symlink_to(outside / "secret")
    (inside / "linked").symlink_to(outside, target_is_directory=True)
    (inside / "hard").hardlink_to(outside / "secret")
    os.mkfifo(inside / "fifo")
    (inside / ".kms-1-1.tmp").write_bytes(b"half")

    job_id = done(core, "encrypt", url(inside, "**"), url(files / "out")).job_id

    assert set(tree(files / "out")) == {"good.age"}
    assert refused(core, job_id) == {"hard": "path_refused"}


def test_refused_file_sinks_no_other(core: Core, files: Path) -> None:
    fill(files / "in", a=b"1", c=b"3")
    done(core, "encrypt", url(files / "in", "*"), url(files / "sealed"))
    fill(files / "sealed", b=b"no age file", d=b"")
    fill(files / "out", c=b"precious")
    (files / "sealed" / os.fsdecode(b"caf\xe9")).write_bytes(b"x")

    job_id = done(core, "decrypt", url(files / "sealed", "**"), url(files / "out")).job_id

    assert tree(files / "out") == {"a": b"1", "c": b"precious"}
    assert ended(core, job_id) == ("failed", "items_failed", 5, 4)
    assert refused(core, job_id) == {
        "b": "not_a_ciphertext",
        "c.age": "target_exists",
        "caf%E9": "path_refused",
        "d": "not_a_ciphertext",
    }


def test_nothing_named_is_nothing_done(core: Core, files: Path) -> None:
    (files / "in").mkdir()

    job = done(core, "encrypt", url(files / "in", "**"), url(files / "out"))

    assert (job.state, job.items) == ("succeeded", 0)
    assert lines(core, job.job_id) == []


def test_more_files_than_allowed_are_refused_and_none_is_touched(core: Core, files: Path) -> None:
    core.worker_context.store.rules = with_jobs(fanout_files=2).jobs

    job_id, _ = split_into_parts(core, files, a=b"1", b=b"2", c=b"3")

    assert ended(core, job_id)[:2] == ("failed", "too_large")
    assert not (files / "out").exists()
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []


@pytest.mark.parametrize("limit", ["resource", "tenant"])
def test_parts_count_as_running_jobs(
    core: Core, files: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr("kms_core.jobs.execution.tree.PART_FILES", 1)
    job_id, _ = split_into_parts(core, files, a=b"1", b=b"2", c=b"3")
    is_tenant = limit == "tenant"
    settings = with_jobs(tenant_leases=2) if is_tenant else with_jobs(resource_leases={f"root:{files}": 2})
    store = store_of(core, settings)

    first, second, third = (store.claim(part_id(job_id, number), "w") for number in range(3))

    assert first
    assert second
    assert third is None
    store.defer(first, 0, away=False)
    assert store.claim(part_id(job_id, 2), "w")


def test_two_files_that_would_be_one_are_one_and_a_refusal(core: Core, files: Path) -> None:
    fill(files / "in", a=b"1")
    done(core, "encrypt", url(files / "in", "*"), url(files / "sealed"))
    (files / "sealed" / "a").write_bytes((files / "sealed" / "a.age").read_bytes())

    job_id = done(core, "decrypt", url(files / "sealed", "*"), url(files / "out")).job_id

    assert tree(files / "out") == {"a": b"1"}
    assert refused(core, job_id) == {"a.age": "target_exists"}


# -- parts ---------------------------------------------------------------------------------------------------


def test_many_files_are_few_parts(core: Core, files: Path) -> None:
    fill(files / "in", **{f"f{number:04}": b"x" for number in range(PART_FILES + 1)})

    job_id = done(core, "encrypt", url(files / "in", "*"), url(files / "out")).job_id

    job = now(core, job_id)
    assert (job.state, job.parts, job.items_done) == ("succeeded", 2, PART_FILES + 1)
    assert [line["index"] for line in lines(core, job_id)] == list(range(PART_FILES + 1))
    assert len(names(files / "out")) == PART_FILES + 1


def test_large_files_are_parts_of_their_own(core: Core, files: Path) -> None:
    fill(files / "in", a=b"", b=b"", c=b"", d=b"")
    for name, size in (("a", PART_BYTES // 2), ("b", PART_BYTES), ("c", PART_BYTES + 1), ("d", 1)):
        os.truncate(files / "in" / name, size)
    job_id = submit(core, "encrypt", url(files / "in", "*"), url(files / "out"))

    run_job(job_id, core.worker_context, "w")

    store = core.worker_context.store
    parts = [store.part(part_id(job_id, number)).job for number in range(now(core, job_id).parts)]
    assert [part.items for part in parts] == [1, 1, 1, 1]
    assert now(core, job_id).bytes == PART_BYTES * 5 // 2 + 2


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([PART_BYTES, 1], 2),
        ([0] * 1000, 2),
        ([PART_BYTES + 1] * 100_000, 401),
        ([2**40] * 1001, 101),
        ([PART_BYTES // 2 + 1, 1] * 50_000, 401),
    ],
    ids=["by bytes", "by number", "large files", "of the largest", "in turn"],
)
def test_one_script_can_store_all_parts(sizes: list[int], parts: int) -> None:
    """However a caller cuts up what it has: a hole in a file costs nothing to make."""
    found = cut_into_parts([(size, 10 * number) for number, size in enumerate(sizes, start=1)])

    assert len(found) <= parts
    assert [each.first for each in found] == [0, *accumulate(each.files for each in found)][:-1]
    assert (sum(each.files for each in found), sum(each.size_bytes for each in found)) == (
        len(sizes),
        sum(sizes),
    )
    assert [each.begin for each in found] == [0, *(each.end for each in found)][:-1]
    assert max(each.files for each in found) <= PART_FILES


def test_listing_that_was_cut_off_is_made_anew_and_what_comes_later_is_not_in_it(
    core: Core, files: Path
) -> None:
    fill(files / "in", a=b"1")
    job_id = submit(core, "encrypt", url(files / "in", "*"), url(files / "out"))
    run_until_killed(core, job_id, "split", after=False)
    fill(files / "in", b=b"2")
    run_after_lease_expiry(core, job_id)
    fill(files / "in", c=b"3")
    for _ in range(2):
        run_after_lease_expiry(core, job_id)
        run(core, job_id)

    assert set(tree(files / "out")) == {"a.age", "b.age"}
    assert ended(core, job_id) == ("succeeded", "", 2, 0)


# -- killed in the middle ------------------------------------------------------------------------------------

STEPS = 5  # of a part of three files: one for each commit, one for the last, and the end


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("how", ["create", "overwrite", "reseal in place", "Redis is lost"])
def test_part_of_a_killed_worker_is_finished_and_each_file_is_done_once(
    core: Core, files: Path, how: str, at: int, *, after: bool
) -> None:
    plain = {"a": b"1", "b": b"22", "c": b"333"}
    fill(files / "in", **plain)
    source, target, kind = url(files / "in", "*"), url(files / "out"), "encrypt"
    if how == "overwrite":
        fill(files / "out", **{f"{name}.age": b"old" for name in plain})
    elif how == "reseal in place":
        done(core, "encrypt", source, target)
        core.kms.rotate(WHO, "default")
        source, target, kind = url(files / "out", "*"), url(files / "out", "*"), "reseal"
    overwrite = how in {"overwrite", "reseal in place"}
    job_id = submit(core, kind, source, target, overwrite=overwrite)  # type: ignore[arg-type]  # a kind
    run_job(job_id, core.worker_context, "w")
    part = part_id(job_id, 0)

    run_until_killed(core, part, at, after=after, error=JobsUnavailable if how == "Redis is lost" else Killed)
    before = {path.name: path.stat().st_ino for path in (files / "out").glob("*.age")}
    settled = len(core.worker_context.store.part(part).log.outcomes)
    run_after_lease_expiry(core, part)

    assert ended(core, job_id) == ("succeeded", "", 3, 0)
    assert now(core, job_id).bytes_done == now(core, job_id).bytes
    assert refused(core, job_id) == {}
    assert names(files / "out") == [f"{name}.age" for name in sorted(plain)]
    assert {name: opened(core, files / "out" / f"{name}.age") for name in plain} == plain
    for name in sorted(plain)[:settled]:  # what was done before is left as it is
        assert (files / "out" / f"{name}.age").stat().st_ino == before[f"{name}.age"]


def test_worker_that_was_overtaken_in_the_middle_has_no_effect(core: Core, files: Path) -> None:
    job_id, part = split_into_parts(core, files, a=b"1", b=b"2")
    turns = count()

    def overtake(_step: str) -> None:
        if next(turns) == 1:  # the first file is in place
            forge(core.worker_context.store, part, lease_until="0")
            run_job(part, core.worker_context, "w2")

    run_job(part, worker_calling_at_each_step(core, overtake, after=False), "w1")

    assert now(core, job_id).state == "succeeded"
    assert names(files / "out") == ["a.age", "b.age"]
    assert opened(core, files / "out" / "b.age") == b"2"


def test_part_that_comes_further_each_time_is_no_dead_letter(core: Core, files: Path) -> None:
    sources = [f"f{number}" for number in range(LASTING_LEASES.jobs.attempts + 3)]
    job_id, part = split_into_parts(core, files, **dict.fromkeys(sources, b"x"))
    for _ in sources:
        run_until_killed(core, part, 1, after=False)
        expire_leases(core.worker_context.store)
    run_after_lease_expiry(core, part)

    assert ended(core, job_id) == ("succeeded", "", len(sources), 0)
    assert set(tree(files / "out")) == {f"{name}.age" for name in sources}


def test_part_that_kills_every_worker_ends_and_tells_what_was_done(core: Core, files: Path) -> None:
    job_id, part = split_into_parts(core, files, a=b"1", b=b"2", c=b"3")
    for at in (2, 1, *[0] * (LASTING_LEASES.jobs.attempts - 1)):  # at c, at c once b is in place, at c
        run_until_killed(core, part, at, after=False)
        expire_leases(core.worker_context.store)
    run_after_lease_expiry(core, part)

    assert ended(core, job_id) == ("failed", "items_failed", 3, 1)
    assert refused(core, job_id) == {"c": "attempts_exhausted"}
    assert names(files / "out") == ["a.age", "b.age"]


@pytest.mark.parametrize("whose", ["nobody's", "another part's", "an earlier life's"])
def test_log_that_is_not_of_this_part_ends_it_at_once(core: Core, files: Path, whose: str) -> None:
    """Or files that were never written would count as done."""
    job_id, part = split_into_parts(core, files, a=b"1")
    store, log = core.worker_context.store, bytes(32) + b"\x80"
    if whose == "another part's":
        other = done(core, "encrypt", url(files / "in", "*"), url(files / "other"))
        log = record(store, part_id(other.job_id, 0))[b"log"]
    elif whose == "an earlier life's":
        run_job(part, core.worker_context, "w")
        spec, log = store.accepted(job_id), record(store, part)[b"log"]
        store.redis.delete(f"kms:job:{job_id}", f"kms:job:{part}")
        (files / "out" / "a.age").unlink()
        store.submit(spec)
        run_job(job_id, core.worker_context, "w")
    forge(store, part, log=log)

    run_job(part, core.worker_context, "w")

    assert refused(core, job_id) == {"a": "record_refused"}
    assert tree(files / "out") == {}


# -- cancelled, expired --------------------------------------------------------------------------------------


def test_cancelled_job_keeps_what_was_done_and_leaves_nothing_else(core: Core, files: Path) -> None:
    job_id, part = split_into_parts(core, files, a=b"1", b=b"2", c=b"3")
    run_until_killed(core, part, 1, after=True)

    core.worker_context.store.cancel(job_id, TENANT)
    run_after_lease_expiry(core, part)

    assert now(core, job_id).state == "cancelled"
    assert names(files / "out") == ["a.age"]
    told = [line.get("error") for line in lines(core, job_id)]
    assert told == [None, {"code": "cancelled"}, {"code": "cancelled"}]
    remove_inputs(core)
    folder = spool_folder(core) / job_id
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {"files"}, "the list, for its result"


# -- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("encrypt", {"target": "file:///out"}),
        ("encrypt", {"target": "file:///*/"}),
        ("encrypt", {}),
        ("encrypt", {"overwrite": True}),
        ("encrypt", {"target": "file:///out/", "dry_run": True}),
        ("decrypt", {"target": "SOURCE", "overwrite": True}),
        ("rewrap", {}),
        ("reseal", {"target": "SOURCE"}),
        ("rewrap", {"source": "file:///a", "overwrite": True, "dry_run": True}),
        ("encrypt", {"source": "file:///**.csv", "target": "file:///out/"}),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_are_refused(kind: wire.JobKind, fields: dict[str, object]) -> None:
    asked = {"source": "file:///in/**"} | fields
    asked |= {"target": asked["source"]} if fields.get("target") == "SOURCE" else {}

    with pytest.raises(InvalidRequest):
        urls_of(wire.JobIn(kind=kind, **asked))  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("file:///etc/**", "file://{root}/out/"),
        ("file://{root}/../**", "file://{root}/out/"),
        ("file://{root}/missing/**", "file://{root}/out/"),
        ("file://{root}/link/**", "file://{root}/out/"),
        ("file://{root}/file/*", "file://{root}/out/"),
        ("file://{root}/in/**", "file:///tmp/out/"),
        ("file://{root}/in/**", "file://{root}/a/../out/"),
        ("*", "file://{root}/out/"),
        ("ftp://{root}/*", "file://{root}/out/"),
        ("file://{root}/in//*", "file://{root}/out/"),
    ],
)
def test_tree_outside_the_roots_is_refused_at_once(core: Core, files: Path, source: str, target: str) -> None:
    fill(files, file=b"", in__a=b"")
    (files / "link").symlink_to("/etc")

    with pytest.raises(PathRefused):
        submit(core, "encrypt", source.format(root=files), target.format(root=files))
