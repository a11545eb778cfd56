"""Jobs over many objects: the same patterns and protocol, over a bucket that is listed instead of walked."""

import json
from collections.abc import Callable
from typing import Final

import pytest

from kms_core.jobs.execution import results
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import part_id
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.errors import PathRefused
from support.failing_store import Killed
from support.job_stores import lapse
from support.object_jobs import CONTEXT, WHO, Bench

PLAIN: Final = {"a.csv": b"1", "b/c d.csv": b"22", "b/ü%?*.csv": b"", "b/x.txt": b"no"}


def submit(bench: Bench, kind: wire.JobKind, source: str, target: str | None, **more: object) -> str:
    body = wire.JobIn(kind=kind, source=source, target=target, **more)  # type: ignore[arg-type]  # fields by name
    return bench.core.submitter.submit(SubmissionOptions(WHO, kind, CONTEXT), body).job_id


def done(bench: Bench, kind: wire.JobKind, source: str, target: str | None, **more: object) -> str:
    job_id = submit(bench, kind, source, target, **more)
    run_job(job_id, bench.core.worker_context, "w")
    for number in range(bench.now(job_id).parts):
        run_job(part_id(job_id, number), bench.core.worker_context, "w")
    return job_id


def lines(bench: Bench, job_id: str) -> list[dict[str, object]]:
    found = results.of(bench.now(job_id), bench.core.worker_context.store, bench.core.worker_context.spool)
    return [json.loads(line) for line in b"".join(found.slabs(0, found.size)).splitlines()]


def below(bench: Bench, prefix: str) -> set[str]:
    found = bench.bucket.keys()
    return {key.removeprefix(prefix) for key in found if key.startswith(prefix)}


def test_objects_go_there_and_back_and_to_files(bench: Bench) -> None:
    for name, data in PLAIN.items():
        bench.bucket.put(f"in/{name}", data)
    bench.bucket.put("in/b/", b"")  # as consoles make folders
    url = bench.bucket.url

    there = done(bench, "encrypt", url("in/**/*.csv"), url("out/sealed/"))
    back = done(bench, "decrypt", url("out/sealed/**"), bench.file("back") + "/")

    wanted = {name: data for name, data in PLAIN.items() if name.endswith(".csv")}
    assert bench.now(there).state == bench.now(back).state == "succeeded"
    assert bench.now(there).items == 3
    assert below(bench, "out/sealed/") == {f"{name}.age" for name in wanted}
    assert {name: (bench.files / "back" / name).read_bytes() for name in wanted} == wanted
    assert [line["target"] for line in lines(bench, there)] == [
        url(f"out/sealed/{name}.age") for name in ("a.csv", "b/c%20d.csv", "b/%C3%BC%25%3F%2A.csv")
    ]
    assert bench.bucket.uploads() == []


def test_base_may_be_written_in_another_way(bench: Bench) -> None:
    bench.bucket.put("in put/x", b"1")

    job_id = done(bench, "encrypt", bench.bucket.url("%69n%20put/*"), bench.bucket.url("out/"))

    assert lines(bench, job_id)[0].get("error") is None
    assert below(bench, "out/") == {"x.age"}


def test_campaign_replaces_objects_and_leaves_the_newest(bench: Bench) -> None:
    for name in ("a", "b/c"):
        bench.bucket.put(f"in/{name}", b"x")
    done(bench, "encrypt", bench.bucket.url("in/**"), bench.bucket.url("out/"))
    bench.core.kms.rotate(WHO, "default")
    before = {key: bench.bucket.etag(f"out/{key}") for key in ("a.age", "b/c.age")}

    first = done(bench, "reseal", bench.bucket.url("out/**"), None, overwrite=True)
    after = {key: bench.bucket.etag(f"out/{key}") for key in before}
    second = done(bench, "reseal", bench.bucket.url("out/**"), None, overwrite=True)

    assert [line["outcome"] for line in lines(bench, first)] == ["changed", "changed"]
    assert [line["outcome"] for line in lines(bench, second)] == ["newest", "newest"]
    assert not set(before.values()) & set(after.values())
    assert bench.by_age(bench.bucket.get("out/b/c.age")) == b"x"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(4))
def test_part_over_objects_of_a_killed_worker_is_finished(
    bench: Bench, dying: Callable[..., WorkerContext], at: int, *, after: bool
) -> None:
    plain = {name: name.encode() for name in ("a", "b", "c")}
    for name, data in plain.items():
        bench.bucket.put(f"in/{name}", data)
    job_id = submit(bench, "encrypt", bench.bucket.url("in/*"), bench.bucket.url("out/"))
    run_job(job_id, bench.core.worker_context, "w")

    with pytest.raises(Killed):
        run_job(part_id(job_id, 0), dying(bench.core, at, after=after), "w1")
    lapse(bench.core.worker_context.store)
    run_job(part_id(job_id, 0), bench.core.worker_context, "w2")

    assert (bench.now(job_id).state, bench.now(job_id).items_failed) == ("succeeded", 0)
    assert {name: bench.by_age(bench.bucket.get(f"out/{name}.age")) for name in plain} == plain
    assert bench.bucket.uploads() == []


@pytest.mark.parametrize(
    ("source", "target"), [("in/**", "elsewhere/"), ("in/../**", "out/"), ("in/**", "out/x")], ids=str
)
def test_objects_outside_what_is_allowed_are_refused_at_once(bench: Bench, source: str, target: str) -> None:
    with pytest.raises(
        Exception, match=r"allows no such object|no empty part|ends? it with a slash"
    ) as refused:
        submit(bench, "encrypt", bench.bucket.url(source), bench.bucket.url(target))

    assert isinstance(refused.value, PathRefused) == (target != "out/x")
