"""Jobs to and from objects: the bytes, in every direction, as stock age and another client see them."""

import os

import pytest

from kms_protocol.errors import PathRefused, Unavailable
from kms_protocol.wire import JobKind
from support import object_stores
from support.core_jobs import NEW
from support.job_stores import forge
from support.object_jobs import Bench, Make
from support.object_stores import ObjectStore, Seen, Way

KiB, MiB = 1024, 1024 * 1024
SIZES = [0, 1, 64 * KiB - 1, 64 * KiB + 1, 5 * MiB - 1, 5 * MiB + 1, 17 * MiB]
LARGE = 17 * MiB  # three parts; a small object is one write


# -- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bytes_go_every_way_and_back(bench: Bench, size: int) -> None:
    data, bucket = os.urandom(size), bench.bucket
    plain, s3 = bucket.put("in", data), bucket.url
    bench.ok("encrypt", plain, s3("out/sealed"))
    bench.ok("encrypt", bench.file("in", data), s3("out/from-file"))
    bench.ok("encrypt", plain, bench.file("sealed"))
    bench.ok("decrypt", s3("out/sealed"), s3("out/plain"))
    bench.ok("decrypt", s3("out/sealed"), bench.file("plain"))
    bench.ok("decrypt", bench.file("sealed"), s3("out/plain-from-file"))

    assert data == bench.by_age(bucket.get("out/sealed")) == bench.by_age(bucket.get("out/from-file"))
    assert data == bench.by_age((bench.files / "sealed").read_bytes()) == (bench.files / "plain").read_bytes()
    assert data == bucket.get("out/plain") == bucket.get("out/plain-from-file")
    assert bench.nothing_left()


@pytest.mark.parametrize("kind", ["rewrap", "reseal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_files_move_to_a_new_context_every_way(bench: Bench, size: int, kind: JobKind) -> None:
    data, bucket = os.urandom(size), bench.bucket
    sealed = bucket.url("out/sealed")
    bench.ok("encrypt", bucket.put("in", data), sealed)
    on_disk = bench.file("sealed", before := bucket.get("out/sealed"))
    bench.ok(kind, sealed, bucket.url("out/moved"))
    bench.ok(kind, sealed, bench.file("moved"))
    bench.ok(kind, on_disk, bucket.url("out/moved-from-file"))
    bench.ok(kind, on_disk, bench.file("moved-on-disk"))
    bench.ok("decrypt", bucket.url("out/moved"), bench.file("plain"), NEW)
    everywhere = [bucket.get("out/moved"), bucket.get("out/moved-from-file")]
    everywhere += [(bench.files / name).read_bytes() for name in ("moved", "moved-on-disk")]

    assert (bench.files / "plain").read_bytes() == data
    assert all(bench.by_age(moved) == data for moved in everywhere)
    payload = size + 16 + 16 * max(1, -(-size // (64 * KiB)))
    kept = [moved[-payload:] == before[-payload:] for moved in everywhere]
    assert kept == [kind == "rewrap"] * 4
    assert bench.nothing_left()


def test_progress_tells_the_bytes(bench: Bench) -> None:
    job = bench.done("encrypt", bench.bucket.put("in", bytes(LARGE)), bench.bucket.url("out/sealed"))

    assert (job.bytes, job.bytes_done) == (LARGE, LARGE)


def test_a_key_may_hold_what_a_url_can_write(bench: Bench) -> None:
    bench.bucket.put("in/ü +%?#&;=.txt", b"salary")
    source = bench.bucket.url("in/%C3%BC%20+%25%3F%23&;=.txt")
    bench.ok("encrypt", source, bench.bucket.url("out/a%20b/ü+.age"))

    assert bench.bucket.keys() == {"in/ü +%?#&;=.txt", "out/a b/ü+.age"}
    assert list(bench.core.worker_context.places.buckets.listing(bench.bucket.url("in/"))) == [
        (bench.bucket.url("in/%C3%BC%20%2B%25%3F%23%26%3B%3D.txt"), 6)
    ]


def test_a_small_object_is_one_write(watched: Bench, way: Way) -> None:
    watched.ok("encrypt", watched.bucket.put("in", bytes(5 * MiB)), watched.bucket.url("out/sealed"))

    (written,) = [seen for seen in way.seen if seen.method == "PUT"]
    assert (written.name, written.headers["if-none-match"]) == ("PutObject", "*")
    assert "POST" not in {seen.method for seen in way.seen}


def test_a_large_object_is_read_at_one_version_and_written_in_parts_on_condition(
    watched: Bench, way: Way
) -> None:
    watched.ok("encrypt", watched.bucket.put("in", bytes(LARGE)), watched.bucket.url("out/sealed"))

    reads = [seen for seen in way.seen if seen.name == "GetObject"]
    assert {read.headers["if-match"] for read in reads} == {watched.bucket.etag("in")}
    assert all(read.headers["range"] for read in reads)
    (completion,) = [seen for seen in way.seen if seen.name == "CompleteMultipartUpload"]
    assert completion.headers["if-none-match"] == "*"
    assert way.names.count("UploadPart") == 3
    assert way.names.index("CompleteMultipartUpload") > max(
        number for number, name in enumerate(way.names) if name in {"UploadPart", "GetObject"}
    )


def test_the_store_itself_moves_the_payload_of_a_rewrap(watched: Bench, way: Way) -> None:
    bucket, data = watched.bucket, os.urandom(40 * MiB)
    watched.ok("encrypt", bucket.put("in", data), bucket.url("out/sealed"))
    way.seen.clear()
    watched.ok("rewrap", bucket.url("out/sealed"), bucket.url("out/moved"))

    assert sum(seen.size for seen in way.seen if seen.name == "UploadPart") == 8 * MiB
    assert way.names.count("UploadPartCopy") == 1
    assert watched.by_age(bucket.get("out/moved")) == data
    assert watched.nothing_left()


@pytest.mark.parametrize("answer", [501, 405])
def test_a_store_that_cannot_copy_parts_is_sent_them(watched: Bench, way: Way, answer: int) -> None:
    bucket, data = watched.bucket, os.urandom(LARGE)
    watched.ok("encrypt", bucket.put("in", data), bucket.url("out/sealed"))
    way.meddle = lambda seen: answer if seen.name == "UploadPartCopy" else None
    watched.ok("rewrap", bucket.url("out/sealed"), bucket.url("out/moved"))

    assert watched.by_age(bucket.get("out/moved")) == data
    assert watched.nothing_left()


def test_a_listing_names_objects_and_no_folders(either: Bench) -> None:
    bucket = either.bucket
    for key, data in (("in/a", b"1"), ("in/deep/b", b"22"), ("in/deep/", b""), ("in-2/c", b"3")):
        bucket.put(key, data)

    assert list(either.core.worker_context.places.buckets.listing(bucket.url("in/"))) == [
        (bucket.url("in/a"), 1),
        (bucket.url("in/deep/b"), 2),
    ]


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["source", "target"])
def test_an_unknown_bucket_and_a_forbidden_prefix_get_one_answer(bench: Bench, name: str) -> None:
    answers = set()
    for forbidden in ("s3://unknown-bucket/out/x", bench.bucket.url("elsewhere/x")):
        asked = {"source": bench.bucket.put("in", b"x"), "target": bench.bucket.url("out/x"), name: forbidden}
        if name == "source":  # the fixture lets everything be read
            asked["source"] = "s3://unknown-bucket/out/x"
        with pytest.raises(PathRefused) as refusal:
            bench.submit("encrypt", asked["source"], asked["target"])
        answers.add(str(refusal.value))

    assert len(answers) == 1


def test_a_missing_object_or_bucket_is_refused_at_once(either: Bench) -> None:
    bucket = either.bucket
    with pytest.raises(PathRefused, match="nothing at this place"):
        either.submit("encrypt", bucket.url("missing"), bucket.url("out/x"))

    bucket.store.admin.delete_bucket(Bucket=bucket.name)
    with pytest.raises(PathRefused):
        either.submit("encrypt", bucket.url("missing"), bucket.url("out/x"))


def test_a_target_that_exists_is_left_alone(either: Bench) -> None:
    either.bucket.put("out/taken", b"precious")

    job = either.done("encrypt", either.bucket.put("in", bytes(LARGE)), either.bucket.url("out/taken"))

    assert (job.state, job.error) == ("failed", "target_exists")
    assert either.bucket.get("out/taken") == b"precious"
    assert either.nothing_left()


@pytest.mark.parametrize("size", [MiB, LARGE], ids=["small", "large"])
def test_overwriting_replaces_and_may_replace_the_source(either: Bench, size: int) -> None:
    data, bucket = os.urandom(size), either.bucket
    target = bucket.put("out/target", b"old")

    assert either.done("encrypt", bucket.put("in", data), target, overwrite=True).state == "succeeded"
    assert either.done("rewrap", target, target, overwrite=True).state == "succeeded"
    assert either.done("reseal", target, target, overwrite=True, context=NEW).state == "succeeded"
    assert either.by_age(bucket.get("out/target")) == data
    assert either.nothing_left()


def test_credentials_without_the_right_are_told_as_a_refusal(make: Make, weed: ObjectStore) -> None:
    bench = make(weed.new(), access_key=object_stores.READER_KEY)

    job = bench.done("encrypt", bench.bucket.put("in", bytes(LARGE)), bench.bucket.url("out/x"))

    assert (job.state, job.error) == ("failed", "path_refused")


def test_wrong_credentials_are_refused_at_once_and_their_secret_is_not_told(
    make: Make, weed: ObjectStore
) -> None:
    bench = make(weed.new(), access_key="AKIDNOBODY")

    with pytest.raises(PathRefused, match="credentials") as refusal:
        bench.submit("encrypt", bench.bucket.put("in", b"x"), bench.bucket.url("out/x"))
    assert object_stores.SECRET not in str(refusal.value)


def test_a_store_that_is_away_costs_time_and_no_attempt(watched: Bench, way: Way) -> None:
    job_id = watched.submit("encrypt", watched.bucket.put("in", bytes(LARGE)), watched.bucket.url("out/x"))
    way.meddle = lambda seen: 503 if seen.name == "UploadPart" else None

    job = watched.run(job_id)
    assert (job.state, job.attempt) == ("queued", 0)
    way.meddle = lambda _: None
    forge(watched.core.worker_context.store, job_id, not_before="0")
    job = watched.run(job_id)

    assert (job.state, job.attempt) == ("succeeded", 1)
    assert watched.nothing_left()


def test_a_store_that_is_away_is_told_at_submission(watched: Bench, way: Way) -> None:
    way.meddle = lambda _: 503

    with pytest.raises(Unavailable):
        watched.submit("encrypt", watched.bucket.url("in"), watched.bucket.url("out/x"))


@pytest.mark.parametrize("lost", ["PutObject", "UploadPart", "CompleteMultipartUpload", "HeadObject"])
def test_an_answer_that_is_lost_changes_nothing(watched: Bench, way: Way, lost: str) -> None:
    """Each request of the kind arrives, and its first answer does not."""
    bucket, data = watched.bucket, os.urandom(MiB if lost == "PutObject" else LARGE)
    source = bucket.put("in", data)
    met: list[str] = []

    def meddle(seen: Seen) -> int | None:
        if seen.name == lost and seen.path not in met:
            met.append(seen.path)
            return 0
        return None

    way.meddle = meddle
    watched.ok("encrypt", source, bucket.url("out/sealed"))

    assert met
    assert watched.by_age(bucket.get("out/sealed")) == data
    assert watched.nothing_left()


# -- what may not be trusted ---------------------------------------------------------------------------------


def test_a_source_that_changes_meanwhile_is_refused(watched: Bench, way: Way) -> None:
    bucket = watched.bucket
    job_id = watched.submit("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/x"))

    def meddle(_: Seen) -> None:
        if way.names.count("GetObject") == 3:
            bucket.put("in", b"x" * LARGE)

    way.meddle = meddle
    job = watched.run(job_id)

    assert (job.state, job.error) == ("failed", "invalid_request")
    assert bucket.keys() == {"in"}
    assert watched.nothing_left()


def test_a_source_that_changes_while_the_store_copies_is_refused(watched: Bench, way: Way) -> None:
    bucket = watched.bucket
    watched.ok("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/sealed"))

    def meddle(seen: Seen) -> None:
        if seen.name == "UploadPartCopy":
            bucket.put("out/sealed", bucket.get("out/sealed")[::-1])

    way.meddle = meddle
    job = watched.done("rewrap", bucket.url("out/sealed"), bucket.url("out/moved"))

    assert (job.state, job.error) == ("failed", "invalid_request")
    assert bucket.keys() == {"in", "out/sealed"}
    assert watched.nothing_left()


CONDITIONS = {
    "If-None-Match": ("PutObject", "if-none-match"),
    "If-Match": ("PutObject", "if-match"),
    "If-None-Match of multipart uploads": ("CompleteMultipartUpload", "if-none-match"),
}


@pytest.mark.parametrize("told", CONDITIONS)
def test_a_store_that_ignores_a_condition_gets_no_target_that_must_appear_once(make: Make, told: str) -> None:
    name, header = CONDITIONS[told]

    def meddle(seen: Seen) -> None:
        if seen.name == name:
            seen.headers.pop(header, None)

    with Way(moto := object_stores.moto(), meddle) as way:  # which checks no signature
        bench = make(moto.new(), way.url)
        bucket = bench.bucket
        source = bucket.put("in", b"plain")
        once = bench.done("encrypt", source, bucket.url("out/once"))
        replaced = bench.done("encrypt", source, bucket.url("out/replaced"), overwrite=True)
        url = bucket.url("out/replaced")
        in_place = bench.done("rewrap", url, url, overwrite=True)
        with pytest.raises(PathRefused, match=f"ignores {told}, so"):
            bench.core.worker_context.places.buckets.require_conditions(bucket.url("out/x"))

    assert (once.state, once.error, replaced.state) == ("failed", "path_refused", "succeeded")
    assert (in_place.state, in_place.error) == ("failed", "path_refused")
    assert bucket.keys() == {"in", "out/replaced"}
    assert bench.nothing_left()


def test_a_store_is_asked_once_whether_it_honours_conditions(make: Make, weed: ObjectStore) -> None:
    with Way(weed) as way:
        bench = make(weed.new(), way.url)
        url = bench.bucket.url("out/x")
        buckets = bench.core.worker_context.places.buckets
        buckets.require_conditions(url)
        before = len(way.seen)
        buckets.require_conditions(url)
        assert len(way.seen) == before > 0
        assert list(buckets.listing(bench.bucket.url("out/"))) == []


@pytest.mark.parametrize("at", [-1, 9_000_000, 100], ids=["last", "middle", "header"])
@pytest.mark.parametrize("kind", ["decrypt", "reseal"])
def test_a_damaged_object_leaves_nothing_to_see(bench: Bench, kind: JobKind, at: int) -> None:
    bucket = bench.bucket
    bench.ok("encrypt", bucket.put("in", bytes(LARGE)), bucket.url("out/sealed"))
    damaged = bytearray(bucket.get("out/sealed"))
    damaged[at] ^= 1
    bucket.put("out/sealed", bytes(damaged))

    job = bench.done(kind, bucket.url("out/sealed"), bucket.url("out/plain"))

    assert (job.state, job.error) == ("failed", "decrypt_failed")
    assert bucket.keys() == {"in", "out/sealed"}
    assert bench.nothing_left()
