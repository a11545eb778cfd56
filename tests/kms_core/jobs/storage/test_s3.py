"""Jobs to and from objects: the bytes, in every direction, as stock age and another client see them."""

import os

import pytest

from kms_protocol.errors import PathRefused, Unavailable
from kms_protocol.wire import JobKind
from support import object_stores
from support.core_jobs import NEW
from support.job_stores import forge
from support.object_jobs import Make, ObjectJobs
from support.object_stores import ObjectStore, S3Proxy, SeenRequest

KiB, MiB = 1024, 1024 * 1024
SIZES = [0, 1, 64 * KiB - 1, 64 * KiB + 1, 5 * MiB - 1, 5 * MiB + 1, 17 * MiB]
LARGE = 17 * MiB  # three parts; a small object is one write


# -- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bytes_go_every_way_and_back(object_jobs: ObjectJobs, size: int) -> None:
    data, bucket = os.urandom(size), object_jobs.bucket
    plain, s3 = bucket.put("in", data), bucket.url
    object_jobs.ok("encrypt", plain, s3("out/sealed"))
    object_jobs.ok("encrypt", object_jobs.file("in", data), s3("out/from-file"))
    object_jobs.ok("encrypt", plain, object_jobs.file("sealed"))
    object_jobs.ok("decrypt", s3("out/sealed"), s3("out/plain"))
    object_jobs.ok("decrypt", s3("out/sealed"), object_jobs.file("plain"))
    object_jobs.ok("decrypt", object_jobs.file("sealed"), s3("out/plain-from-file"))

    assert (
        data
        == object_jobs.by_age(bucket.get("out/sealed"))
        == object_jobs.by_age(bucket.get("out/from-file"))
    )
    assert (
        data
        == object_jobs.by_age((object_jobs.files / "sealed").read_bytes())
        == (object_jobs.files / "plain").read_bytes()
    )
    assert data == bucket.get("out/plain") == bucket.get("out/plain-from-file")
    assert object_jobs.nothing_left()


@pytest.mark.parametrize("kind", ["rewrap", "reseal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_files_move_to_a_new_context_every_way(object_jobs: ObjectJobs, size: int, kind: JobKind) -> None:
    data, bucket = os.urandom(size), object_jobs.bucket
    sealed = bucket.url("out/sealed")
    object_jobs.ok("encrypt", bucket.put("in", data), sealed)
    on_disk = object_jobs.file("sealed", before := bucket.get("out/sealed"))
    object_jobs.ok(kind, sealed, bucket.url("out/moved"))
    object_jobs.ok(kind, sealed, object_jobs.file("moved"))
    object_jobs.ok(kind, on_disk, bucket.url("out/moved-from-file"))
    object_jobs.ok(kind, on_disk, object_jobs.file("moved-on-disk"))
    object_jobs.ok("decrypt", bucket.url("out/moved"), object_jobs.file("plain"), NEW)
    everywhere = [bucket.get("out/moved"), bucket.get("out/moved-from-file")]
    everywhere += [(object_jobs.files / name).read_bytes() for name in ("moved", "moved-on-disk")]

    assert (object_jobs.files / "plain").read_bytes() == data
    assert all(object_jobs.by_age(moved) == data for moved in everywhere)
    payload = size + 16 + 16 * max(1, -(-size // (64 * KiB)))
    kept = [moved[-payload:] == before[-payload:] for moved in everywhere]
    assert kept == [kind == "rewrap"] * 4
    assert object_jobs.nothing_left()


def test_progress_tells_the_bytes(object_jobs: ObjectJobs) -> None:
    job = object_jobs.done(
        "encrypt", object_jobs.bucket.put("in", bytes(LARGE)), object_jobs.bucket.url("out/sealed")
    )

    assert (job.bytes, job.bytes_done) == (LARGE, LARGE)


def test_a_key_may_hold_what_a_url_can_write(object_jobs: ObjectJobs) -> None:
    object_jobs.bucket.put("in/ü +%?#&;=.txt", b"salary")
    source = object_jobs.bucket.url("in/%C3%BC%20+%25%3F%23&;=.txt")
    object_jobs.ok("encrypt", source, object_jobs.bucket.url("out/a%20b/ü+.age"))

    assert object_jobs.bucket.keys() == {"in/ü +%?#&;=.txt", "out/a b/ü+.age"}
    assert list(object_jobs.core.worker_context.places.buckets.listing(object_jobs.bucket.url("in/"))) == [
        (object_jobs.bucket.url("in/%C3%BC%20%2B%25%3F%23%26%3B%3D.txt"), 6)
    ]


def test_a_bucket_over_its_quota_delays_the_job_that_writes_to_it(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    bucket = proxied_object_jobs.bucket
    job_id = proxied_object_jobs.submit("encrypt", bucket.put("in", b"salary"), bucket.url("out/sealed"))
    s3_proxy.code = "QuotaExceeded"
    s3_proxy.intercept = lambda seen: 403 if seen.operation == "PutObject" else None
    assert proxied_object_jobs.run(job_id).state == "committing"
    s3_proxy.intercept = lambda _: None

    assert proxied_object_jobs.run_after_lease_expiry(job_id).state == "succeeded"


def test_a_small_object_is_one_write(proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy) -> None:
    proxied_object_jobs.ok(
        "encrypt",
        proxied_object_jobs.bucket.put("in", bytes(5 * MiB)),
        proxied_object_jobs.bucket.url("out/sealed"),
    )

    (written,) = [seen for seen in s3_proxy.seen if seen.method == "PUT"]
    assert (written.operation, written.headers["if-none-match"]) == ("PutObject", "*")
    assert "POST" not in {seen.method for seen in s3_proxy.seen}


def test_a_large_object_is_read_at_one_version_and_written_in_parts_on_condition(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    proxied_object_jobs.ok(
        "encrypt",
        proxied_object_jobs.bucket.put("in", bytes(LARGE)),
        proxied_object_jobs.bucket.url("out/sealed"),
    )

    reads = [seen for seen in s3_proxy.seen if seen.operation == "GetObject"]
    assert {read.headers["if-match"] for read in reads} == {proxied_object_jobs.bucket.etag("in")}
    assert all(read.headers["range"] for read in reads)
    (completion,) = [seen for seen in s3_proxy.seen if seen.operation == "CompleteMultipartUpload"]
    assert completion.headers["if-none-match"] == "*"
    assert s3_proxy.operations.count("UploadPart") == 3
    assert s3_proxy.operations.index("CompleteMultipartUpload") > max(
        number for number, name in enumerate(s3_proxy.operations) if name in {"UploadPart", "GetObject"}
    )


def test_the_store_itself_moves_the_payload_of_a_rewrap(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    bucket, data = proxied_object_jobs.bucket, os.urandom(40 * MiB)
    proxied_object_jobs.ok("encrypt", bucket.put("in", data), bucket.url("out/sealed"))
    s3_proxy.seen.clear()
    proxied_object_jobs.ok("rewrap", bucket.url("out/sealed"), bucket.url("out/moved"))

    assert sum(seen.size for seen in s3_proxy.seen if seen.operation == "UploadPart") == 8 * MiB
    assert s3_proxy.operations.count("UploadPartCopy") == 1
    assert proxied_object_jobs.by_age(bucket.get("out/moved")) == data
    assert proxied_object_jobs.nothing_left()


@pytest.mark.parametrize("answer", [501, 405])
def test_a_store_that_cannot_copy_parts_is_sent_them(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy, answer: int
) -> None:
    bucket, data = proxied_object_jobs.bucket, os.urandom(LARGE)
    proxied_object_jobs.ok("encrypt", bucket.put("in", data), bucket.url("out/sealed"))
    s3_proxy.intercept = lambda seen: answer if seen.operation == "UploadPartCopy" else None
    proxied_object_jobs.ok("rewrap", bucket.url("out/sealed"), bucket.url("out/moved"))

    assert proxied_object_jobs.by_age(bucket.get("out/moved")) == data
    assert proxied_object_jobs.nothing_left()


def test_a_listing_names_objects_and_no_folders(object_jobs_of_each_store: ObjectJobs) -> None:
    bucket = object_jobs_of_each_store.bucket
    for key, data in (("in/a", b"1"), ("in/deep/b", b"22"), ("in/deep/", b""), ("in-2/c", b"3")):
        bucket.put(key, data)

    assert list(object_jobs_of_each_store.core.worker_context.places.buckets.listing(bucket.url("in/"))) == [
        (bucket.url("in/a"), 1),
        (bucket.url("in/deep/b"), 2),
    ]


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["source", "target"])
def test_an_unknown_bucket_and_a_forbidden_prefix_get_one_answer(object_jobs: ObjectJobs, name: str) -> None:
    answers = set()
    for forbidden in ("s3://unknown-bucket/out/x", object_jobs.bucket.url("elsewhere/x")):
        asked = {
            "source": object_jobs.bucket.put("in", b"x"),
            "target": object_jobs.bucket.url("out/x"),
            name: forbidden,
        }
        if name == "source":  # the fixture lets everything be read
            asked["source"] = "s3://unknown-bucket/out/x"
        with pytest.raises(PathRefused) as refusal:
            object_jobs.submit("encrypt", asked["source"], asked["target"])
        answers.add(str(refusal.value))

    assert len(answers) == 1


def test_a_missing_object_or_bucket_is_refused_at_once(object_jobs_of_each_store: ObjectJobs) -> None:
    bucket = object_jobs_of_each_store.bucket
    with pytest.raises(PathRefused, match="nothing at this place"):
        object_jobs_of_each_store.submit("encrypt", bucket.url("missing"), bucket.url("out/x"))

    bucket.store.admin.delete_bucket(Bucket=bucket.name)
    with pytest.raises(PathRefused):
        object_jobs_of_each_store.submit("encrypt", bucket.url("missing"), bucket.url("out/x"))


def test_a_target_that_exists_is_left_alone(object_jobs_of_each_store: ObjectJobs) -> None:
    object_jobs_of_each_store.bucket.put("out/taken", b"precious")

    job = object_jobs_of_each_store.done(
        "encrypt",
        object_jobs_of_each_store.bucket.put("in", bytes(LARGE)),
        object_jobs_of_each_store.bucket.url("out/taken"),
    )

    assert (job.state, job.error) == ("failed", "target_exists")
    assert object_jobs_of_each_store.bucket.get("out/taken") == b"precious"
    assert object_jobs_of_each_store.nothing_left()


@pytest.mark.parametrize("size", [MiB, LARGE], ids=["small", "large"])
def test_overwriting_replaces_and_may_replace_the_source(
    object_jobs_of_each_store: ObjectJobs, size: int
) -> None:
    data, bucket = os.urandom(size), object_jobs_of_each_store.bucket
    target = bucket.put("out/target", b"old")

    assert (
        object_jobs_of_each_store.done("encrypt", bucket.put("in", data), target, overwrite=True).state
        == "succeeded"
    )
    assert object_jobs_of_each_store.done("rewrap", target, target, overwrite=True).state == "succeeded"
    assert (
        object_jobs_of_each_store.done("reseal", target, target, overwrite=True, context=NEW).state
        == "succeeded"
    )
    assert object_jobs_of_each_store.by_age(bucket.get("out/target")) == data
    assert object_jobs_of_each_store.nothing_left()


def test_credentials_without_the_right_are_told_as_a_refusal(make: Make, weed: ObjectStore) -> None:
    object_jobs = make(weed.new(), access_key=object_stores.READER_KEY)

    job = object_jobs.done(
        "encrypt", object_jobs.bucket.put("in", bytes(LARGE)), object_jobs.bucket.url("out/x")
    )

    assert (job.state, job.error) == ("failed", "path_refused")


def test_wrong_credentials_are_refused_at_once_and_their_secret_is_not_told(
    make: Make, weed: ObjectStore
) -> None:
    object_jobs = make(weed.new(), access_key="AKIDNOBODY")

    with pytest.raises(PathRefused, match="credentials") as refusal:
        object_jobs.submit("encrypt", object_jobs.bucket.put("in", b"x"), object_jobs.bucket.url("out/x"))
    assert object_stores.SECRET not in str(refusal.value)


def test_a_store_that_is_away_costs_time_and_no_attempt(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    job_id = proxied_object_jobs.submit(
        "encrypt", proxied_object_jobs.bucket.put("in", bytes(LARGE)), proxied_object_jobs.bucket.url("out/x")
    )
    s3_proxy.intercept = lambda seen: 503 if seen.operation == "UploadPart" else None

    job = proxied_object_jobs.run(job_id)
    assert (job.state, job.attempt) == ("queued", 0)
    s3_proxy.intercept = lambda _: None
    forge(proxied_object_jobs.core.worker_context.store, job_id, not_before="0")
    job = proxied_object_jobs.run(job_id)

    assert (job.state, job.attempt) == ("succeeded", 1)
    assert proxied_object_jobs.nothing_left()


def test_a_store_that_is_away_is_told_at_submission(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    s3_proxy.intercept = lambda _: 503

    with pytest.raises(Unavailable):
        proxied_object_jobs.submit(
            "encrypt", proxied_object_jobs.bucket.url("in"), proxied_object_jobs.bucket.url("out/x")
        )


@pytest.mark.parametrize("lost", ["PutObject", "UploadPart", "CompleteMultipartUpload", "HeadObject"])
def test_an_answer_that_is_lost_changes_nothing(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy, lost: str
) -> None:
    """Each request of the kind arrives, and its first answer does not."""
    bucket, data = proxied_object_jobs.bucket, os.urandom(MiB if lost == "PutObject" else LARGE)
    source = bucket.put("in", data)
    met: list[str] = []

    def intercept(seen: SeenRequest) -> int | None:
        if seen.operation == lost and seen.path not in met:
            met.append(seen.path)
            return 0
        return None

    s3_proxy.intercept = intercept
    proxied_object_jobs.ok("encrypt", source, bucket.url("out/sealed"))

    assert met
    assert proxied_object_jobs.by_age(bucket.get("out/sealed")) == data
    assert proxied_object_jobs.nothing_left()


# -- what may not be trusted ---------------------------------------------------------------------------------


def test_a_source_that_changes_meanwhile_is_refused(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    bucket = proxied_object_jobs.bucket
    job_id = proxied_object_jobs.submit("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/x"))

    def intercept(_: SeenRequest) -> None:
        if s3_proxy.operations.count("GetObject") == 3:
            bucket.put("in", b"x" * LARGE)

    s3_proxy.intercept = intercept
    job = proxied_object_jobs.run(job_id)

    assert (job.state, job.error) == ("failed", "invalid_request")
    assert bucket.keys() == {"in"}
    assert proxied_object_jobs.nothing_left()


def test_a_source_that_changes_while_the_store_copies_is_refused(
    proxied_object_jobs: ObjectJobs, s3_proxy: S3Proxy
) -> None:
    bucket = proxied_object_jobs.bucket
    proxied_object_jobs.ok("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/sealed"))

    def intercept(seen: SeenRequest) -> None:
        if seen.operation == "UploadPartCopy":
            bucket.put("out/sealed", bucket.get("out/sealed")[::-1])

    s3_proxy.intercept = intercept
    job = proxied_object_jobs.done("rewrap", bucket.url("out/sealed"), bucket.url("out/moved"))

    assert (job.state, job.error) == ("failed", "invalid_request")
    assert bucket.keys() == {"in", "out/sealed"}
    assert proxied_object_jobs.nothing_left()


CONDITIONS = {
    "If-None-Match": ("PutObject", "if-none-match"),
    "If-Match": ("PutObject", "if-match"),
    "If-None-Match of multipart uploads": ("CompleteMultipartUpload", "if-none-match"),
}


@pytest.mark.parametrize("told", CONDITIONS)
def test_a_store_that_ignores_a_condition_gets_no_target_that_must_appear_once(make: Make, told: str) -> None:
    name, header = CONDITIONS[told]

    def intercept(seen: SeenRequest) -> None:
        if seen.operation == name:
            seen.headers.pop(header, None)

    with S3Proxy(moto := object_stores.moto(), intercept) as s3_proxy:  # which checks no signature
        object_jobs = make(moto.new(), s3_proxy.url)
        bucket = object_jobs.bucket
        source = bucket.put("in", b"plain")
        once = object_jobs.done("encrypt", source, bucket.url("out/once"))
        replaced = object_jobs.done("encrypt", source, bucket.url("out/replaced"), overwrite=True)
        url = bucket.url("out/replaced")
        in_place = object_jobs.done("rewrap", url, url, overwrite=True)
        with pytest.raises(PathRefused, match=f"ignores {told}, so"):
            object_jobs.core.worker_context.places.buckets.require_conditions(bucket.url("out/x"))

    assert (once.state, once.error, replaced.state) == ("failed", "path_refused", "succeeded")
    assert (in_place.state, in_place.error) == ("failed", "path_refused")
    assert bucket.keys() == {"in", "out/replaced"}
    assert object_jobs.nothing_left()


def test_a_store_is_asked_once_whether_it_honours_conditions(make: Make, weed: ObjectStore) -> None:
    with S3Proxy(weed) as s3_proxy:
        object_jobs = make(weed.new(), s3_proxy.url)
        url = object_jobs.bucket.url("out/x")
        buckets = object_jobs.core.worker_context.places.buckets
        buckets.require_conditions(url)
        before = len(s3_proxy.seen)
        buckets.require_conditions(url)
        assert len(s3_proxy.seen) == before > 0
        assert list(buckets.listing(object_jobs.bucket.url("out/"))) == []


@pytest.mark.parametrize("at", [-1, 9_000_000, 100], ids=["last", "middle", "header"])
@pytest.mark.parametrize("kind", ["decrypt", "reseal"])
def test_a_damaged_object_leaves_nothing_to_see(object_jobs: ObjectJobs, kind: JobKind, at: int) -> None:
    bucket = object_jobs.bucket
    object_jobs.ok("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/sealed"))
    damaged = bytearray(bucket.get("out/sealed"))
    damaged[at] ^= 1
    bucket.put("out/sealed", bytes(damaged))

    job = object_jobs.done(kind, bucket.url("out/sealed"), bucket.url("out/plain"))

    assert (job.state, job.error) == ("failed", "decrypt_failed")
    assert bucket.keys() == {"in", "out/sealed"}
    assert object_jobs.nothing_left()
