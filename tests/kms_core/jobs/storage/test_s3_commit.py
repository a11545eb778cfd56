"""An object as a target appears once and whole: each way to die or be overtaken on the way there."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

import pytest

from kms_core.jobs.recovery.reaper import reap_all
from kms_core.jobs.spec import FileJob
from kms_core.jobs.storage.locations import JobTarget, PendingTarget
from kms_core.s3.bucket import Bucket
from kms_protocol.errors import JobsUnavailable, PathRefused, TargetExists
from kms_protocol.wire import JobKind
from support.core_jobs import end_of, run_job
from support.failing_store import CRASH_POINTS, worker_calling_at
from support.job_stores import TENANT, accepted, expire_leases, forge, later, put_back_as_due, record
from support.object_jobs import ObjectJobs
from support.object_stores import S3Proxy, SeenRequest
from support.waiting import until

MiB = 1024 * 1024
SMALL, LARGE = MiB, 9 * MiB  # one write; two parts of an upload
Opened = TypeVar("Opened")
SIZES = {"small": SMALL, "large": LARGE}
MOMENT_IDS = ["-".join(moment) for moment in CRASH_POINTS]


@pytest.mark.parametrize("death", CRASH_POINTS, ids=MOMENT_IDS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["encrypt", "decrypt over", "rewrap", "reseal in place"])
def test_job_of_a_killed_worker_is_finished_once(
    object_jobs: ObjectJobs, death: tuple[str, str], size: int, how: str
) -> None:
    data, bucket = os.urandom(size), object_jobs.bucket
    word, _, rest = how.partition(" ")
    kind: JobKind = {"encrypt": "encrypt", "decrypt": "decrypt", "rewrap": "rewrap"}.get(word, "reseal")  # type: ignore[assignment]  # dict.get widens literals
    source, target = bucket.put("in", data), bucket.url("out/target")
    if kind != "encrypt":
        object_jobs.ok("encrypt", source, bucket.url("out/sealed"))
        source = bucket.url("out/sealed")
    if rest == "over":
        bucket.put("out/target", b"old")
    if rest == "in place":
        target = source
    key = target.removeprefix(bucket.url(""))
    job_id = object_jobs.submit(kind, source, target, overwrite=bool(rest))
    moment, step = death

    object_jobs.run_until_killed(job_id, step, after=moment == "after")
    placed = bucket.etag(key) if step == "finish" else None
    job = object_jobs.run_after_lease_expiry(job_id)

    assert (job.state, job.error) == ("succeeded", "")
    assert (bucket.get(key) if kind == "decrypt" else object_jobs.by_age(bucket.get(key))) == data
    assert object_jobs.nothing_left()
    assert placed in {None, bucket.etag(key)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("after", [False, True], ids=["unheard", "heard"])
def test_redis_lost_at_the_commit_costs_nothing(object_jobs: ObjectJobs, size: int, *, after: bool) -> None:
    data, bucket = os.urandom(size), object_jobs.bucket
    job_id = object_jobs.submit("encrypt", bucket.put("in", data), bucket.url("out/x"))

    object_jobs.run_until_killed(job_id, "committing", after=after, error=JobsUnavailable)
    job = object_jobs.run_after_lease_expiry(job_id)

    assert job.state == "succeeded"
    assert object_jobs.by_age(bucket.get("out/x")) == data
    assert object_jobs.nothing_left()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("death", CRASH_POINTS[:3], ids=MOMENT_IDS[:3])
@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "over"])
def test_worker_that_was_overtaken_has_no_effect(
    object_jobs: ObjectJobs, size: int, death: tuple[str, str], *, overwrite: bool
) -> None:
    """It stops at a moment, another brings the job to its end, and then it goes on."""
    data, bucket = os.urandom(size), object_jobs.bucket
    job_id = object_jobs.submit("encrypt", bucket.put("in", data), bucket.url("out/x"), overwrite=overwrite)
    if overwrite:
        bucket.put("out/x", b"old")
    written: list[str | None] = []

    def is_overtaken() -> bool:
        forge(object_jobs.core.worker_context.store, job_id, lease_until="0")
        return object_jobs.run(job_id).state == "succeeded"

    def overtake() -> None:
        until(is_overtaken, "another has brought it to its end")  # a renewal may come between the two steps
        written.append(bucket.etag("out/x"))

    moment, step = death
    run_job(job_id, worker_calling_at(object_jobs.core, step, overtake, after=moment == "after"), "w1")

    assert (object_jobs.now(job_id).state, object_jobs.now(job_id).fence) == ("succeeded", 2)
    assert written == [bucket.etag("out/x")]
    assert object_jobs.by_age(bucket.get("out/x")) == data
    assert object_jobs.nothing_left()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("in_place", [False, True], ids=["create", "in place"])
def test_target_that_others_write_before_the_finish_is_left_alone(
    object_jobs: ObjectJobs, size: int, *, in_place: bool
) -> None:
    """Also where it is the source, which the result would replace."""
    bucket = object_jobs.bucket
    source, target = bucket.put("in", bytes(size)), bucket.url("out/x")
    if in_place:
        object_jobs.ok("encrypt", source, target)
        job_id = object_jobs.submit("reseal", target, target, overwrite=True)
    else:
        job_id = object_jobs.submit("encrypt", source, target)
    written = worker_calling_at(
        object_jobs.core, "committing", lambda: bucket.put("out/x", b"somebody else's"), after=True
    )

    run_job(job_id, written, "w1")

    assert end_of(object_jobs.core, job_id) == ("failed", "target_exists")
    assert bucket.get("out/x") == b"somebody else's"
    assert object_jobs.nothing_left()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mark", ["no mark", "id of the job", "another attempt's"])
def test_target_taken_while_its_worker_was_dead_is_left_alone(
    object_jobs: ObjectJobs, size: int, mark: str
) -> None:
    """And not taken for the result: a writer to the bucket can read the marks of objects that are there."""
    bucket = object_jobs.bucket
    job_id = object_jobs.submit("encrypt", bucket.put("in", bytes(size)), bucket.url("out/x"))
    object_jobs.run_until_killed(job_id, "committing", after=True)
    marks = {"id of the job": job_id, "another attempt's": f"{job_id}/{bytes(16).hex()}"}
    metadata = {"kms-job": marks[mark]} if mark in marks else {}
    theirs = b"somebody else's"
    bucket.store.admin.put_object(Bucket=bucket.name, Key="out/x", Body=theirs, Metadata=metadata)

    job = object_jobs.run_after_lease_expiry(job_id)

    assert (job.state, job.error) == ("failed", "target_exists")
    assert bucket.get("out/x") == theirs
    assert object_jobs.nothing_left()


@pytest.mark.parametrize("change", ["aborted", "a part exchanged"])
def test_upload_that_was_changed_before_the_finish_is_not_put_in_place(
    object_jobs: ObjectJobs, change: str
) -> None:
    bucket = object_jobs.bucket
    job_id = object_jobs.submit("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/x"))
    object_jobs.run_until_killed(job_id, "committing", after=True)
    admin = bucket.store.admin
    (upload,) = admin.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    name, upload_id = bucket.name, upload["UploadId"]
    if change == "aborted":
        admin.abort_multipart_upload(Bucket=name, Key="out/x", UploadId=upload_id)
    else:
        admin.upload_part(Bucket=name, Key="out/x", UploadId=upload_id, PartNumber=1, Body=bytes(8 * MiB))

    job = object_jobs.run_after_lease_expiry(job_id)

    assert (job.state, job.error) == ("failed", "path_refused")
    assert bucket.keys() == {"in"}
    assert object_jobs.nothing_left()


def cancelled(object_jobs: ObjectJobs, job_id: str) -> None:
    reap_all(object_jobs.core.worker_context.store, [job_id])
    object_jobs.core.worker_context.store.cancel(job_id, "default")


def gone(object_jobs: ObjectJobs, _job_id: str) -> None:
    """Its source is gone, so the next attempt fails before it begins."""
    object_jobs.bucket.store.admin.delete_object(Bucket=object_jobs.bucket.name, Key="in")


@pytest.mark.parametrize("end", [cancelled, gone])
def test_upload_of_a_killed_attempt_is_aborted_however_the_job_ends(
    object_jobs: ObjectJobs, end: Callable[[ObjectJobs, str], None]
) -> None:
    bucket = object_jobs.bucket
    job_id = object_jobs.submit("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/x"))
    object_jobs.run_until_killed(job_id, "committing", after=False)
    assert bucket.uploads() == ["out/x"]
    expire_leases(object_jobs.core.worker_context.store)
    end(object_jobs, job_id)

    job = object_jobs.run_after_lease_expiry(job_id)

    assert job.ended
    assert bucket.etag("out/x") is None
    assert object_jobs.nothing_left()


def test_upload_that_cannot_be_aborted_now_is_aborted_by_the_next_attempt(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    bucket = proxied_object_jobs.bucket
    job_id = proxied_object_jobs.submit("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/x"))

    def away(seen: SeenRequest) -> int | None:
        return 503 if seen.operation in {"AbortMultipartUpload", "UploadPart"} else None

    s3_proxy.intercept = away
    assert proxied_object_jobs.run(job_id).state == "queued"
    assert bucket.uploads() == ["out/x"]
    s3_proxy.intercept = lambda _: None
    forge(proxied_object_jobs.core.worker_context.store, job_id, not_before="0")

    assert proxied_object_jobs.run(job_id).state == "succeeded"
    assert proxied_object_jobs.nothing_left()


@pytest.mark.parametrize("request_", ["UploadPart", "UploadPartCopy"])
def test_upload_that_another_aborts_is_done_again(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy, request_: str
) -> None:
    """A worker that has lost its lease may sweep late, and a lifecycle of the bucket at any time."""
    bucket = proxied_object_jobs.bucket
    source, target = _sealed(proxied_object_jobs), bucket.url("out/x")
    job_id = proxied_object_jobs.submit("rewrap", source, target)
    admin = bucket.store.admin
    aborted: list[str] = []

    def abort(seen: SeenRequest) -> None:
        if seen.operation == request_ and not aborted:
            (upload,) = admin.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
            admin.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
            aborted.append(upload["UploadId"])

    s3_proxy.intercept = abort
    job = proxied_object_jobs.run(job_id)
    assert (job.state, job.error) == ("queued", "")
    forge(proxied_object_jobs.core.worker_context.store, job_id, not_before="0")

    assert proxied_object_jobs.run(job_id).state == "succeeded"
    assert aborted
    assert proxied_object_jobs.nothing_left()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("answer", [503, 409], ids=["store away", "another write under way"])
def test_store_that_does_not_take_the_commit_holds_it_up_and_no_more(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy, size: int, answer: int
) -> None:
    """S3 answers 409 to a write that meets another, and nothing may be there in the end."""
    data, bucket = os.urandom(size), proxied_object_jobs.bucket
    job_id = proxied_object_jobs.submit("encrypt", bucket.put("in", data), bucket.url("out/x"))
    s3_proxy.intercept = lambda seen: answer if "if-none-match" in seen.headers else None
    assert proxied_object_jobs.run(job_id).state == "committing"
    s3_proxy.intercept = lambda _: None

    job = proxied_object_jobs.run_after_lease_expiry(job_id)

    assert job.state == "succeeded"
    assert proxied_object_jobs.by_age(bucket.get("out/x")) == data
    assert proxied_object_jobs.nothing_left()


def test_cancelled_job_leaves_nothing(proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy) -> None:
    bucket = proxied_object_jobs.bucket
    job_id = proxied_object_jobs.submit("reseal", _sealed(proxied_object_jobs), bucket.url("out/x"))

    def cancel(seen: SeenRequest) -> None:
        if seen.operation == "UploadPart":
            proxied_object_jobs.core.worker_context.store.cancel(job_id, "default")

    s3_proxy.intercept = cancel
    job = proxied_object_jobs.run(job_id)

    assert job.state == "cancelled"
    assert bucket.keys() == {"in", "out/sealed"}
    assert proxied_object_jobs.nothing_left()


def _sealed(object_jobs: ObjectJobs) -> str:
    target = object_jobs.bucket.url("out/sealed")
    object_jobs.ok("encrypt", object_jobs.bucket.put("in", bytes(2 * LARGE)), target)
    return target


def held(opened: AbstractContextManager[Opened]) -> Opened:
    return ExitStack().enter_context(opened)


def begun(target: JobTarget, attempt_id: str) -> PendingTarget:
    opened: AbstractContextManager[PendingTarget] = target.prepare(attempt_id)
    return held(opened)


def target_of(object_jobs: ObjectJobs, *, overwrite: bool) -> JobTarget:
    job = accepted(
        job_id="a-job", source="s3://bucket/in", target=object_jobs.bucket.url("out/x"), overwrite=overwrite
    )
    assert isinstance(job, FileJob)
    return object_jobs.core.worker_context.places.target(job, "a-job", b"spec")


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "over"])
def test_of_two_attempts_that_write_a_small_object_the_first_wins(
    object_jobs: ObjectJobs, *, overwrite: bool
) -> None:
    """Neither notices that it has lost its lease."""
    bucket, places = object_jobs.bucket, object_jobs.core.worker_context.places
    source = held(places.open_source(bucket.put("in", b"source")))
    if overwrite:
        bucket.put("out/x", b"old")
    target = target_of(object_jobs, overwrite=overwrite)
    attempts = [begun(target, attempt_id) for attempt_id in ("one", "two")]
    for attempt, data in zip(attempts, (b"first", b"second"), strict=True):
        attempt.writer.reserve(len(data))
        attempt.writer.write_at(memoryview(data), 0)
    commit = attempts[0].settle(source, in_place=False)

    assert not target.finish(commit)
    attempts[0].finish(commit)
    attempts[1].finish(commit)

    assert bucket.get("out/x") == b"first"
    assert target.finish(commit)


def test_an_upload_is_completed_once_and_a_late_completion_replaces_nothing(
    object_jobs: ObjectJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, places = object_jobs.bucket, object_jobs.core.worker_context.places
    source = held(places.open_source(bucket.put("in", b"source")))
    target = target_of(object_jobs, overwrite=True)
    attempt = begun(target, "one")
    attempt.writer.reserve(LARGE)
    attempt.writer.write_at(memoryview(bytes(LARGE)), 0)
    commit = attempt.settle(source, in_place=False)
    attempt.finish(commit)

    assert target.finish(commit)
    with monkeypatch.context() as ending:  # while SeaweedFS ends an upload, it lists some of its parts
        ending.setattr(Bucket, "parts", lambda *_: [])
        assert target.finish(commit)
    bucket.put("out/x", b"somebody else's")
    with pytest.raises(PathRefused):
        attempt.finish(commit)
    assert bucket.get("out/x") == b"somebody else's"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_commit_that_is_put_back_after_its_expiry_writes_no_object(
    object_jobs: ObjectJobs, size: int
) -> None:
    """A small object would be made anew, since its bytes died with their worker."""
    bucket, store = object_jobs.bucket, object_jobs.core.worker_context.store
    job_id = object_jobs.submit("encrypt", bucket.put("in", bytes(size)), bucket.url("out/x"))
    object_jobs.run_until_killed(job_id, "committing", after=True)
    dump = record(store, job_id)
    assert object_jobs.run_after_lease_expiry(job_id).state == "succeeded"
    bucket.store.admin.delete_object(Bucket=bucket.name, Key="out/x")
    put_back_as_due(store, job_id, dump)
    with later():
        run_job(job_id, object_jobs.core.worker_context, "w3")

    assert store.get(job_id, TENANT).state == "failed"
    assert bucket.keys() == {"in"}


def test_upload_of_an_expired_commit_is_not_completed(object_jobs: ObjectJobs) -> None:
    bucket, store = object_jobs.bucket, object_jobs.core.worker_context.store
    job_id = object_jobs.submit(
        "encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/x"), overwrite=True
    )
    object_jobs.run_until_killed(job_id, "committing", after=True)
    bucket.put("out/x", b"written later, by somebody else")
    put_back_as_due(store, job_id, record(store, job_id))
    with later():
        run_job(job_id, object_jobs.core.worker_context, "w2")

    assert end_of(object_jobs.core, job_id) == ("failed", "expired")
    assert bucket.get("out/x") == b"written later, by somebody else"
    assert object_jobs.nothing_left()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_object_that_was_put_in_place_in_time_is_recognised_after_the_expiry(
    object_jobs: ObjectJobs, size: int
) -> None:
    """Its worker died between the last request and the end."""
    bucket, store = object_jobs.bucket, object_jobs.core.worker_context.store
    job_id = object_jobs.submit("encrypt", bucket.put("in", bytes(size)), bucket.url("out/x"))
    object_jobs.run_until_killed(job_id, "finish", after=False)
    placed = bucket.etag("out/x")
    forge(store, job_id, lease_until="0")
    with later(store.accepted(job_id).expires_at - time.time() + 70):
        run_job(job_id, object_jobs.core.worker_context, "w2")

    assert object_jobs.now(job_id).state == "succeeded"
    assert bucket.etag("out/x") == placed
    assert object_jobs.nothing_left()


# -- whose object it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_attempt_does_not_take_the_object_of_another_for_its_own(object_jobs: ObjectJobs, size: int) -> None:
    bucket, places = object_jobs.bucket, object_jobs.core.worker_context.places
    source = held(places.open_source(bucket.put("in", b"source")))
    target = target_of(object_jobs, overwrite=False)
    attempts = [begun(target, attempt_id) for attempt_id in ("one", "two")]
    commits = []
    for attempt in attempts:
        attempt.writer.reserve(size)
        attempt.writer.write_at(memoryview(os.urandom(size)), 0)
        commits.append(attempt.settle(source, in_place=False))
    attempts[0].finish(commits[0])
    first = bucket.get("out/x")

    assert [target.is_placed(commit) for commit in commits] == [True, False]
    with pytest.raises(TargetExists):
        attempts[1].finish(commits[1])
    target.give_up(commits[1])
    assert bucket.get("out/x") == first
    assert not bucket.uploads()
