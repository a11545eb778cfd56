"""Jobs over many objects: the same patterns and protocol, over a bucket that is listed instead of walked."""

from typing import Final

import pytest

from kms_core.jobs.model import part_id
from kms_protocol.errors import PathRefused
from support.core_jobs import WHO, done, lines, run_after_lease_expiry, run_job, submit
from support.failing_store import run_until_killed
from support.object_jobs import ObjectJobs

PLAIN: Final = {"a.csv": b"1", "b/c d.csv": b"22", "b/ü%?*.csv": b"", "b/x.txt": b"no"}


def below(object_jobs: ObjectJobs, prefix: str) -> set[str]:
    found = object_jobs.bucket.keys()
    return {key.removeprefix(prefix) for key in found if key.startswith(prefix)}


def test_objects_go_there_and_back_and_to_files(object_jobs: ObjectJobs) -> None:
    for name, data in PLAIN.items():
        object_jobs.bucket.put(f"in/{name}", data)
    object_jobs.bucket.put("in/b/", b"")  # as consoles make folders
    url = object_jobs.bucket.url

    there = done(object_jobs.core, "encrypt", url("in/**/*.csv"), url("out/sealed/"))
    back = done(object_jobs.core, "decrypt", url("out/sealed/**"), object_jobs.file("back") + "/")

    wanted = {name: data for name, data in PLAIN.items() if name.endswith(".csv")}
    assert there.state == back.state == "succeeded"
    assert there.items == 3
    assert below(object_jobs, "out/sealed/") == {f"{name}.age" for name in wanted}
    assert {name: (object_jobs.files / "back" / name).read_bytes() for name in wanted} == wanted
    assert [line["target"] for line in lines(object_jobs.core, there.job_id)] == [
        url(f"out/sealed/{name}.age") for name in ("a.csv", "b/c%20d.csv", "b/%C3%BC%25%3F%2A.csv")
    ]
    assert object_jobs.bucket.uploads() == []


def test_base_may_be_written_in_another_way(object_jobs: ObjectJobs) -> None:
    object_jobs.bucket.put("in put/x", b"1")

    job = done(
        object_jobs.core, "encrypt", object_jobs.bucket.url("%69n%20put/*"), object_jobs.bucket.url("out/")
    )

    assert lines(object_jobs.core, job.job_id)[0].get("error") is None
    assert below(object_jobs, "out/") == {"x.age"}


def test_campaign_replaces_objects_and_leaves_the_newest(object_jobs: ObjectJobs) -> None:
    for name in ("a", "b/c"):
        object_jobs.bucket.put(f"in/{name}", b"x")
    done(object_jobs.core, "encrypt", object_jobs.bucket.url("in/**"), object_jobs.bucket.url("out/"))
    object_jobs.core.kms.rotate(WHO, "default")
    before = {key: object_jobs.bucket.etag(f"out/{key}") for key in ("a.age", "b/c.age")}

    first = done(object_jobs.core, "reseal", object_jobs.bucket.url("out/**"), None, overwrite=True)
    after = {key: object_jobs.bucket.etag(f"out/{key}") for key in before}
    second = done(object_jobs.core, "reseal", object_jobs.bucket.url("out/**"), None, overwrite=True)

    assert [line["outcome"] for line in lines(object_jobs.core, first.job_id)] == ["changed", "changed"]
    assert [line["outcome"] for line in lines(object_jobs.core, second.job_id)] == ["newest", "newest"]
    assert not set(before.values()) & set(after.values())
    assert object_jobs.by_age(object_jobs.bucket.get("out/b/c.age")) == b"x"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(4))
def test_part_over_objects_of_a_killed_worker_is_finished(
    object_jobs: ObjectJobs, at: int, *, after: bool
) -> None:
    plain = {name: name.encode() for name in ("a", "b", "c")}
    for name, data in plain.items():
        object_jobs.bucket.put(f"in/{name}", data)
    job_id = submit(
        object_jobs.core, "encrypt", object_jobs.bucket.url("in/*"), object_jobs.bucket.url("out/")
    )
    run_job(job_id, object_jobs.core.worker_context, "w")

    run_until_killed(object_jobs.core, part_id(job_id, 0), at, after=after)
    run_after_lease_expiry(object_jobs.core, part_id(job_id, 0))

    assert (object_jobs.now(job_id).state, object_jobs.now(job_id).items_failed) == ("succeeded", 0)
    assert {name: object_jobs.by_age(object_jobs.bucket.get(f"out/{name}.age")) for name in plain} == plain
    assert object_jobs.bucket.uploads() == []


@pytest.mark.parametrize(
    ("source", "target"), [("in/**", "elsewhere/"), ("in/../**", "out/"), ("in/**", "out/x")], ids=str
)
def test_objects_outside_what_is_allowed_are_refused_at_once(
    object_jobs: ObjectJobs, source: str, target: str
) -> None:
    with pytest.raises(
        Exception, match=r"allows no such object|no empty part|ends? it with a slash"
    ) as refused:
        submit(object_jobs.core, "encrypt", object_jobs.bucket.url(source), object_jobs.bucket.url(target))

    assert isinstance(refused.value, PathRefused) == (target != "out/x")
