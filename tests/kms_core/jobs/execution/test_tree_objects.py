"""Jobs over many objects: the same patterns and protocol, over a bucket that is listed instead of walked."""

from typing import Final

import pytest

from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import part_id
from kms_protocol.errors import PathRefused
from support.core_jobs import WHO, done, lines, submit, taken_up
from support.failing_store import killed
from support.object_jobs import Bench

PLAIN: Final = {"a.csv": b"1", "b/c d.csv": b"22", "b/ü%?*.csv": b"", "b/x.txt": b"no"}


def below(bench: Bench, prefix: str) -> set[str]:
    found = bench.bucket.keys()
    return {key.removeprefix(prefix) for key in found if key.startswith(prefix)}


def test_objects_go_there_and_back_and_to_files(bench: Bench) -> None:
    for name, data in PLAIN.items():
        bench.bucket.put(f"in/{name}", data)
    bench.bucket.put("in/b/", b"")  # as consoles make folders
    url = bench.bucket.url

    there = done(bench.core, "encrypt", url("in/**/*.csv"), url("out/sealed/"))
    back = done(bench.core, "decrypt", url("out/sealed/**"), bench.file("back") + "/")

    wanted = {name: data for name, data in PLAIN.items() if name.endswith(".csv")}
    assert there.state == back.state == "succeeded"
    assert there.items == 3
    assert below(bench, "out/sealed/") == {f"{name}.age" for name in wanted}
    assert {name: (bench.files / "back" / name).read_bytes() for name in wanted} == wanted
    assert [line["target"] for line in lines(bench.core, there.job_id)] == [
        url(f"out/sealed/{name}.age") for name in ("a.csv", "b/c%20d.csv", "b/%C3%BC%25%3F%2A.csv")
    ]
    assert bench.bucket.uploads() == []


def test_base_may_be_written_in_another_way(bench: Bench) -> None:
    bench.bucket.put("in put/x", b"1")

    job = done(bench.core, "encrypt", bench.bucket.url("%69n%20put/*"), bench.bucket.url("out/"))

    assert lines(bench.core, job.job_id)[0].get("error") is None
    assert below(bench, "out/") == {"x.age"}


def test_campaign_replaces_objects_and_leaves_the_newest(bench: Bench) -> None:
    for name in ("a", "b/c"):
        bench.bucket.put(f"in/{name}", b"x")
    done(bench.core, "encrypt", bench.bucket.url("in/**"), bench.bucket.url("out/"))
    bench.core.kms.rotate(WHO, "default")
    before = {key: bench.bucket.etag(f"out/{key}") for key in ("a.age", "b/c.age")}

    first = done(bench.core, "reseal", bench.bucket.url("out/**"), None, overwrite=True)
    after = {key: bench.bucket.etag(f"out/{key}") for key in before}
    second = done(bench.core, "reseal", bench.bucket.url("out/**"), None, overwrite=True)

    assert [line["outcome"] for line in lines(bench.core, first.job_id)] == ["changed", "changed"]
    assert [line["outcome"] for line in lines(bench.core, second.job_id)] == ["newest", "newest"]
    assert not set(before.values()) & set(after.values())
    assert bench.by_age(bench.bucket.get("out/b/c.age")) == b"x"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(4))
def test_part_over_objects_of_a_killed_worker_is_finished(bench: Bench, at: int, *, after: bool) -> None:
    plain = {name: name.encode() for name in ("a", "b", "c")}
    for name, data in plain.items():
        bench.bucket.put(f"in/{name}", data)
    job_id = submit(bench.core, "encrypt", bench.bucket.url("in/*"), bench.bucket.url("out/"))
    run_job(job_id, bench.core.worker_context, "w")

    killed(bench.core, part_id(job_id, 0), at, after=after)
    taken_up(bench.core, part_id(job_id, 0))

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
        submit(bench.core, "encrypt", bench.bucket.url(source), bench.bucket.url(target))

    assert isinstance(refused.value, PathRefused) == (target != "out/x")
