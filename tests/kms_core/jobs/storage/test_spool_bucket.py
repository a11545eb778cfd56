"""The spool in a bucket whose server fails: a coded error for each, nothing left, nothing lost."""

import math
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import Self

import pytest

from kms_core.age import stream
from kms_core.backends.age import AgeBackend
from kms_core.jobs.hosts.install import mismatch
from kms_core.jobs.hosts.notes import SpoolMarks
from kms_core.jobs.storage import spool_bucket
from kms_core.jobs.storage.spool import Label, Spool
from kms_core.jobs.storage.spool_bucket import SpoolBucket
from kms_core.payload import parallel
from kms_core.payload.parallel import ParallelOptions
from kms_core.s3 import connection, streams
from kms_core.s3.bucket import Bucket
from kms_core.s3.connection import Credentials, S3Connection, S3Endpoint
from kms_core.s3.multipart import PART_BYTES
from kms_core.s3.streams import BufferPool
from kms_protocol.errors import ResultExpired, SpoolFull, SpoolUnavailable
from support import blob_stores, object_stores
from support.blob_stores import JOB, MIB, PREFIX, label, read, write
from support.object_stores import ObjectStore, S3Proxy, SeenRequest, TestBucket
from support.ports import free_port
from support.waiting import until

KEY = f"{PREFIX}{JOB}/upload"


@pytest.fixture(scope="module")
def server() -> ObjectStore:
    return object_stores.moto()


@pytest.fixture
def bucket(server: ObjectStore) -> TestBucket:
    return server.new()


@pytest.fixture
def s3_proxy(server: ObjectStore) -> Iterator[S3Proxy]:
    with S3Proxy(server) as s3_proxy:
        yield s3_proxy


@pytest.fixture
def store(bucket: TestBucket, s3_proxy: S3Proxy) -> Iterator[SpoolBucket]:
    store = blob_stores.spool_bucket(bucket, s3_proxy.url)
    yield store
    blob_stores.close(store)


@pytest.fixture
def spool(store: SpoolBucket, key: AgeBackend) -> Spool:
    spool = Spool(store, key, 1024 * MIB)
    spool.store.used_bytes()
    return spool


def test_small_blob_is_one_put_and_read_by_two_requests(spool: Spool, s3_proxy: S3Proxy) -> None:
    spool.use()
    write(spool, label(), b"the first counts what is there")
    spool.delete(JOB)
    del s3_proxy.seen[:]

    written = write(spool, label(), bytes(100_000))
    assert s3_proxy.operations == ["PutObject"]
    assert s3_proxy.seen[0].headers["if-none-match"] == "*"
    del s3_proxy.seen[:]

    assert read(spool, written) == bytes(100_000)
    assert s3_proxy.operations == ["HeadObject", "GetObject"]
    assert s3_proxy.seen[1].headers["if-match"]


def test_large_blob_takes_few_requests(spool: Spool, s3_proxy: S3Proxy) -> None:
    data = os.urandom(64 * MIB)
    written = write(spool, label(), *(data[at : at + MIB] for at in range(0, len(data), MIB)))
    assert s3_proxy.operations.count("UploadPart") == 9
    del s3_proxy.seen[:]

    assert read(spool, written) == data
    assert len(s3_proxy.operations) <= 8


def test_large_ciphertext_is_verified_by_few_requests(spool: Spool, s3_proxy: S3Proxy) -> None:
    """By threads, whose slabs end between the chunks of the blob."""
    key = os.urandom(32)
    written = write(spool, label(), bytes(300), stream.seal(key, bytes(64 * MIB)))
    del s3_proxy.seen[:]

    with spool.opened(written) as content:
        parallel.verify_file(key, content.tail(300), ParallelOptions(threads=2))
    assert len(s3_proxy.operations) <= 40


@pytest.mark.parametrize("size", [1000, 20 * MIB], ids=["one-put", "parts"])
@pytest.mark.parametrize("lost", ["PutObject", "CompleteMultipartUpload", "UploadPart"])
def test_write_whose_answer_is_lost_is_recognised(
    spool: Spool, bucket: TestBucket, s3_proxy: S3Proxy, lost: str, size: int
) -> None:
    left = [lost]

    def lose_once(seen: SeenRequest) -> int | None:
        if seen.operation not in left:
            return None
        left.clear()
        return 0

    s3_proxy.intercept = lose_once
    data = os.urandom(size)
    written = write(spool, label(), data)

    assert read(spool, written) == data
    assert (bucket.keys(), bucket.uploads()) == ({KEY}, [])


ENDS, PARTS = {"PutObject", "CompleteMultipartUpload"}, {"PutObject", "UploadPart"}
FAILURES = {
    "no-answer": (0, "", ENDS, SpoolUnavailable, "does not answer"),
    "away": (503, "", PARTS, SpoolUnavailable, "does not answer"),
    "full": (507, "XMinioStorageFull", PARTS, SpoolFull, "takes no more"),
    "quota": (403, "QuotaExceeded", PARTS, SpoolFull, "takes no more"),
    "read-only": (403, "", PARTS, SpoolUnavailable, r"refuses this \(403\)"),
    "elsewhere": (301, "", PARTS, SpoolUnavailable, r"refuses this \(301\)"),
}


@pytest.mark.parametrize("size", [1000, 20 * MIB], ids=["one-put", "parts"])
@pytest.mark.parametrize("failure", FAILURES)
def test_bucket_that_takes_nothing_is_a_coded_error(
    spool: Spool, bucket: TestBucket, s3_proxy: S3Proxy, size: int, failure: str
) -> None:
    status, s3_proxy.code, names, error, text = FAILURES[failure]
    s3_proxy.intercept = lambda seen: status if seen.operation in names else None

    with pytest.raises(error, match=text):
        write(spool, label(), bytes(size))
    s3_proxy.intercept = lambda _: None

    assert (bucket.keys(), bucket.uploads()) == (set(), [])


@pytest.fixture
def written_before(spool: Spool, s3_proxy: S3Proxy) -> Label:
    """A blob of a bucket that is away since it was written: the first call had no answer."""
    written = write(spool, label(), b"x")
    s3_proxy.intercept = lambda _: 503
    with pytest.raises(SpoolUnavailable):
        read(spool, written)
    return written


def test_bucket_that_is_away_fails_calls_at_once_and_comes_back(
    spool: Spool, s3_proxy: S3Proxy, written_before: Label
) -> None:
    assert spool.use().is_away
    asked = of_job(s3_proxy)

    with pytest.raises(SpoolUnavailable):
        read(spool, written_before)
    with pytest.raises(SpoolUnavailable), spool.writing(label(role="head", attempt="1")):
        pytest.fail("nothing may be read of it")
    assert of_job(s3_proxy) == asked
    s3_proxy.intercept = lambda _: None
    until(lambda: not spool.use().is_away, "the bucket is back")

    assert read(spool, written_before) == b"x"


def test_bucket_that_is_away_is_asked_by_no_other_process_of_its_parent(
    spool: Spool, bucket: TestBucket, key: AgeBackend, s3_proxy: S3Proxy, written_before: Label
) -> None:
    """A process that found out tells them all: a second timeout would hold up what they are to do."""
    asked, first = of_job(s3_proxy), spool.store
    assert isinstance(first, SpoolBucket)
    other = blob_stores.spool_bucket(bucket, s3_proxy.url, away=first.away)

    with pytest.raises(SpoolUnavailable):
        read(Spool(other, key, MIB), written_before)
    assert (of_job(s3_proxy), other.is_away) == (asked, True)
    s3_proxy.intercept = lambda _: None
    until(lambda: not other.is_away, "the first one has an answer")

    assert read(Spool(other, key, MIB), written_before) == b"x"
    blob_stores.close(other)


def test_calls_that_were_under_way_when_it_went_away_have_no_other_process_ask(
    bucket: TestBucket, s3_proxy: S3Proxy, store: SpoolBucket, written_before: Label
) -> None:
    del written_before
    other = blob_stores.spool_bucket(bucket, s3_proxy.url, away=store.away)

    with pytest.raises(SpoolUnavailable), other.errors(goes_on=True):
        raise connection.StoreAway("no answer", 0)

    assert [each.name for each in threading.enumerate()].count("spool-away") == 1
    blob_stores.close(store)
    blob_stores.close(other)


def of_job(s3_proxy: S3Proxy) -> list[str]:
    """The requests that name the job."""
    return [seen.operation for seen in s3_proxy.seen if JOB in seen.path]


def test_no_call_waits_for_the_one_that_asks_whether_the_bucket_is_back(
    spool: Spool, s3_proxy: S3Proxy, written_before: Label
) -> None:
    is_back = threading.Event()
    del s3_proxy.seen[:]

    def silent(_: SeenRequest) -> None:
        is_back.wait(60)

    s3_proxy.intercept = silent
    until(lambda: s3_proxy.seen, "it is asked")
    with pytest.raises(SpoolUnavailable):
        read(spool, written_before)
    assert of_job(s3_proxy) == []
    is_back.set()
    until(lambda: not spool.use().is_away, "the bucket is back")


def test_process_that_was_forked_while_the_bucket_was_away_learns_that_it_is_back(
    spool: Spool, s3_proxy: S3Proxy, written_before: Label
) -> None:
    s3_proxy.intercept = lambda _: None
    pid = os.fork()
    if not pid:
        try:
            until(lambda: not spool.store.is_away, "its parent has an answer")
            os._exit(7 if read(spool, written_before) == b"x" else 1)
        finally:
            os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_process_that_ends_while_it_asks_leaves_the_bucket_to_others(
    spool: Spool, store: SpoolBucket, s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(spool, label(), b"x")
    s3_proxy.intercept = lambda _: 503
    pid = os.fork()
    if not pid:
        try:
            with pytest.raises(SpoolUnavailable):
                read(spool, written)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    s3_proxy.intercept = lambda _: None
    with pytest.raises(SpoolUnavailable):
        read(spool, written)

    later = store.away.at + 0.1
    assert later < math.inf
    monkeypatch.setattr(spool_bucket, "time", SimpleNamespace(monotonic=lambda: later))

    assert read(spool, written) == b"x"


def test_refusal_is_told_until_something_is_written(spool: Spool, s3_proxy: S3Proxy) -> None:
    s3_proxy.intercept = lambda seen: 403 if seen.method == "PUT" else None
    with pytest.raises(SpoolUnavailable):
        write(spool, label(), b"x")
    assert spool.use().is_away
    assert not spool.store.is_away
    s3_proxy.intercept = lambda _: None

    assert read(spool, write(spool, label(), b"x")) == b"x"
    assert not spool.use().is_away


class NoSmallBlobs:
    """A place for small blobs that has none."""

    most_bytes = 10_000

    def get(self, job_id: str, name: str) -> bytes | None:
        del job_id, name
        return None

    def names(self, job_id: str) -> tuple[list[str], bool]:
        del job_id
        return [], False

    def remove(self, job_id: str, name: str) -> None:
        """Nothing is there."""

    def delete(self, job_id: str) -> bool:
        del job_id
        return False


def test_small_blob_needs_no_bucket(store: SpoolBucket, key: AgeBackend, s3_proxy: S3Proxy) -> None:
    """Also the first one of a process, whose first write to the bucket waits for a count."""
    s3_proxy.intercept = lambda _: 503
    spool = Spool(store, key, MIB, NoSmallBlobs())

    with spool.writing(label(), may_be_small=True) as out:
        out.write(b"x")

    assert out.small is not None
    until(lambda: store.is_away, "it was counted aside")


@pytest.mark.parametrize("size", [20_000, 300_000], ids=["one-slab", "several"])
def test_blob_that_outgrows_redis_is_bounded_by_what_is_there(
    store: SpoolBucket, key: AgeBackend, bucket: TestBucket, size: int
) -> None:
    bucket.put(f"{PREFIX}{JOB}/other", bytes(90_000))
    spool = Spool(store, key, 100_000, NoSmallBlobs())

    with pytest.raises(SpoolFull), spool.writing(label(), may_be_small=True) as out:
        out.write(bytes(size))

    assert bucket.keys() == {f"{PREFIX}{JOB}/other"}


def test_deleting_while_the_bucket_is_away_says_so(
    spool: Spool, bucket: TestBucket, s3_proxy: S3Proxy
) -> None:
    write(spool, label(), b"x")
    s3_proxy.intercept = lambda _: 503

    assert not spool.delete(JOB)
    with pytest.raises(SpoolUnavailable):
        spool.discard_input(JOB)
    assert bucket.keys() == {KEY}


def test_bucket_that_is_not_asked_is_away_although_a_write_goes_on(spool: Spool, s3_proxy: S3Proxy) -> None:
    """The reaper waits for a bucket that is away; what it took for a refusal would stay for days."""
    with spool.writing(label(role="head", attempt="1")) as out:
        out.write(b"x")
        s3_proxy.intercept = lambda _: 503
        assert not spool.delete(JOB)
        s3_proxy.intercept = lambda _: None

    assert not spool.delete(JOB)  # nothing is asked yet
    assert spool.store.is_away


def test_missing_bucket_is_no_expired_result(spool: Spool, server: ObjectStore, store: SpoolBucket) -> None:
    """HEAD tells neither a missing bucket from a missing object; a job must not end for the first."""
    with pytest.raises(ResultExpired):
        read(spool, label())
    with pytest.raises(ResultExpired):
        store.get("hosts", "install", 100)
    server.admin.delete_bucket(Bucket=store.bucket.name)

    with pytest.raises(SpoolUnavailable):
        read(spool, label())
    with pytest.raises(SpoolUnavailable):
        store.get("hosts", "install", 100)


class HourAhead(datetime):
    """A clock that is an hour off."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + timedelta(hours=1)


@pytest.mark.parametrize("wrong", ["secret", "key", "right", "clock"])
def test_request_that_the_store_does_not_allow_is_a_refusal(
    key: AgeBackend, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """By SeaweedFS, which checks signatures and their times."""
    bucket = object_stores.weed().new()
    names = {"key": "AKIDNOBODY", "right": object_stores.READER_KEY}
    secret = "another" if wrong == "secret" else object_stores.SECRET
    credentials = Credentials(names.get(wrong, object_stores.ACCESS_KEY), secret)
    endpoint = S3Endpoint(bucket.store.url, "us-east-1", lambda: credentials, None, 20.0)
    line = S3Connection(endpoint)
    store = SpoolBucket(Bucket(bucket.name, line, path_style=True), PREFIX, BufferPool(64 * MIB))
    if wrong == "clock":
        monkeypatch.setattr(connection, "datetime", HourAhead)

    with pytest.raises(SpoolUnavailable, match=r"refuses this \(403 .*the clock"):
        store.put(JOB, "note", b"x", durable=True)
    with pytest.raises(SpoolUnavailable, match=r"refuses this \(403 "):
        write(Spool(store, key, MIB), label(), b"x")

    assert store.is_refused
    assert bucket.keys() == set()
    blob_stores.close(store)


def test_store_without_conditions_is_written_without(spool: Spool, s3_proxy: S3Proxy) -> None:
    s3_proxy.intercept = lambda seen: 501 if "if-none-match" in seen.headers else None

    assert read(spool, write(spool, label(), b"x")) == b"x"


def test_store_that_ignores_conditions_keeps_what_each_attempt_wrote(
    spool: Spool, bucket: TestBucket, s3_proxy: S3Proxy
) -> None:
    def ignore(seen: SeenRequest) -> None:
        seen.headers.pop("if-none-match", None)

    s3_proxy.intercept = ignore
    labels = [label(role="result", attempt=attempt) for attempt in ("1", "2")]
    written = [write(spool, each, each.name.encode()) for each in labels]

    assert [read(spool, each) for each in written] == [b"result.1", b"result.2"]
    assert bucket.keys() == {f"{PREFIX}{JOB}/result.1", f"{PREFIX}{JOB}/result.2"}


def test_bucket_that_keeps_what_is_deleted_works(server: ObjectStore, key: AgeBackend) -> None:
    """Blobs are written, read, replaced and deleted; older versions stay and are not counted."""
    bucket = TestBucket(server, f"kept-{uuid.uuid4()}")
    server.admin.create_bucket(Bucket=bucket.name, ObjectLockEnabledForBucket=True)  # and so versioning
    server.admin.put_object_lock_configuration(
        Bucket=bucket.name,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}},
        },
    )
    store = blob_stores.spool_bucket(bucket)
    spool = Spool(store, key, 1024 * MIB)

    for data in (b"x", os.urandom(20 * MIB)):
        written = write(spool, label(), data)
        assert read(spool, written) == data
        assert spool.delete(JOB)
        with pytest.raises(ResultExpired):
            read(spool, written)
    assert read(spool, write(spool, label(), b"again")) == b"again"

    assert store.used_bytes() < MIB
    assert len(server.admin.list_object_versions(Bucket=bucket.name)["Versions"]) == 3
    store.bucket.line.close()


def test_two_installs_in_one_prefix_are_told_apart(store: SpoolBucket) -> None:
    """The id that was first stays, and a host whose Redis has another is refused."""
    first, second = SpoolMarks(store), SpoolMarks(store)
    first.create_id("1" * 32)
    second.create_id("2" * 32)

    assert second.install_id() == "1" * 32
    assert mismatch(second.install_id(), "2" * 32).startswith("install_mismatch: ")
    assert not mismatch(first.install_id(), "1" * 32)


def test_two_writers_of_one_name_have_one_winner(spool: Spool, bucket: TestBucket) -> None:
    seconds: list[Label] = []

    def overtaken() -> None:
        with spool.writing(label()) as first:
            first.write(b"first")
            seconds.append(write(spool, label(), b"second"))

    with pytest.raises(SpoolUnavailable, match="Another process"):
        overtaken()

    assert read(spool, seconds[0]) == b"second"
    assert bucket.keys() == {KEY}


def test_parts_of_a_writer_that_was_killed_are_swept_after_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = object_stores.weed().new()  # moto says that all uploads began in 2010
    store = blob_stores.spool_bucket(bucket)
    store.bucket.begin(KEY, "mark")
    other = store.bucket.begin("elsewhere", "mark")
    store.sweep()
    assert sorted(bucket.uploads()) == ["elsewhere", KEY]

    monkeypatch.setattr(spool_bucket, "UNFINISHED_S", -1.0)
    store.sweep()

    assert bucket.uploads() == ["elsewhere"]
    store.bucket.abort("elsewhere", other)
    store.bucket.line.close()


# -- buffers -------------------------------------------------------------------------------------------


def test_uploads_share_the_buffers_that_the_settings_name(key: AgeBackend, bucket: TestBucket) -> None:
    store = blob_stores.spool_bucket(bucket, buffer_bytes=16 * MIB)
    spool = Spool(store, key, 1024 * MIB)
    labels = [label(role="result", attempt=str(number)) for number in range(3)]
    with spool.writing(labels[0]) as first, spool.writing(labels[1]) as second:
        first.write(bytes(200_000))
        second.write(bytes(200_000))
        assert store.pool.used == 16 * MIB

        with pytest.raises(SpoolUnavailable, match="buffer_bytes"), spool.writing(labels[2]) as third:
            third.write(bytes(200_000))

    assert store.pool.used == 0
    with spool.writing(labels[2], declared_bytes=100_000) as third:
        third.write(bytes(100_000))
        assert store.pool.used < 2 * MIB
    with spool.opened(replace(labels[2], ref=third.ref)) as reader:
        assert b"".join(reader.slabs()) == bytes(100_000)
        assert 0 < store.pool.used < MIB
    assert store.pool.used == 0
    store.bucket.line.close()


def test_waiting_for_buffers_ends_when_another_gives_them_back() -> None:
    pool = BufferPool(10, wait_s=20.0)
    threading.Timer(0.2, pool.give, (pool.take(10),)).start()

    pool.take(10)

    assert not pool.take_now(1)


def test_child_has_buffers_of_its_own() -> None:
    pool = BufferPool(10, wait_s=0.1)
    pool.take(10)
    pid = os.fork()
    if not pid:
        pool.take(10)
        os._exit(7)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert pool.used == 10


def test_parts_grow_so_that_ten_thousand_suffice(monkeypatch: pytest.MonkeyPatch, bucket: TestBucket) -> None:
    assert sum(PART_BYTES << (number // streams.GROW_EVERY) for number in range(10_000)) > 5 * 1024**4
    monkeypatch.setattr(streams, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(streams, "GROW_EVERY", 1)
    store = blob_stores.spool_bucket(bucket)
    data = os.urandom(20 * MIB)

    with store.create(JOB, "upload") as write:
        for at in range(0, len(data), MIB):
            write(memoryview(data)[at : at + MIB], at)

    assert bucket.get(KEY) == data
    assert store.pool.used == 0
    store.bucket.line.close()


def test_unreachable_store_is_told_as_such(bucket: TestBucket) -> None:
    store = blob_stores.spool_bucket(bucket, f"http://127.0.0.1:{free_port()}")

    with pytest.raises(SpoolUnavailable, match="does not answer"):
        store.names(JOB)
    blob_stores.close(store)
