"""Signed documents at each storage: changes by several hosts, lost answers, old and forged documents."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import redis

from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument, Version
from kms_core.documents.storage import FileStorage, ObjectStorage, Storage
from kms_core.s3.bucket import Bucket
from kms_core.s3.connection import S3Connection
from kms_protocol.errors import ConfigurationError, DocumentOutdated, InvalidRequest, Unavailable
from support import blob_stores, object_stores
from support.job_stores import connect
from support.object_stores import Intercept, ObjectStore, S3Proxy, SeenRequest

KEY: Final = b"d" * 32
NOWHERE: Final = "unix:///nonexistent/valkey.sock"
STORES: Final = {"weed": object_stores.weed, "moto": object_stores.moto}


@dataclass
class SharedDocument:
    """A storage that hosts share, and a way to put other bytes there."""

    storage: Callable[[], Storage]
    get: Callable[[], bytes]
    put: Callable[[bytes], object]
    remove: Callable[[], object]


LINES: Final[list[S3Connection]] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """No connection is left open."""
    yield
    while LINES:
        LINES.pop().close()


def object_storage(store: ObjectStore, bucket: str, url: str = "") -> ObjectStorage:
    LINES.append(blob_stores.connection(url or store.url))
    return ObjectStorage(Bucket(bucket, LINES[-1], path_style=True), "state/tokens")


@pytest.fixture(params=["file", *STORES])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> SharedDocument:
    if request.param == "file":
        path = tmp_path / "shared/document"
        return SharedDocument(lambda: FileStorage(path), path.read_bytes, path.write_bytes, path.unlink)
    store = STORES[request.param]()
    bucket = store.new()
    return SharedDocument(
        lambda: object_storage(store, bucket.name),
        lambda: bucket.get("state/tokens"),
        lambda data: bucket.put("state/tokens", data),
        lambda: store.admin.delete_object(Bucket=bucket.name, Key="state/tokens"),
    )


class Hosts:
    """Hosts that share a storage and Redis; each has its own state directory."""

    def __init__(self, folder: Path, client: redis.Redis) -> None:
        self.folder, self.client = folder, client

    def host(self, name: str, storage: Storage, client: redis.Redis | None = None) -> SignedDocument:
        anchors = Anchors("tokens", self.folder / name, client or self.client, KEY)
        return SignedDocument("tokens", storage, KEY, anchors)


@pytest.fixture
def hosts(tmp_path: Path, redis_url: str) -> Hosts:
    return Hosts(tmp_path, connect(redis_url))


def added(*words: str) -> Callable[[bytes], bytes]:
    """An edit that adds words to a list."""
    return lambda body: json.dumps([*json.loads(body or b"[]"), *words]).encode()


def words(version: Version) -> list[str]:
    found: list[str] = json.loads(version.body or b"[]")
    return found


@pytest.fixture
def one(shared: SharedDocument, hosts: Hosts) -> SignedDocument:
    """The first host, which has written a."""
    document = hosts.host("one", shared.storage())
    document.write(document.read(), added("a"))
    return document


def test_what_one_host_writes_others_read(shared: SharedDocument, hosts: Hosts) -> None:
    one, two = hosts.host("one", shared.storage()), hosts.host("two", shared.storage())
    empty = one.read()
    assert (empty.generation, words(empty)) == (0, [])

    first = one.write(empty, added("a"))
    assert (first.generation, words(first)) == (1, ["a"])
    seen = two.read()
    assert (seen.generation, seen.write_id, words(seen)) == (1, first.write_id, ["a"])
    assert two.read(seen) is seen, "it has not changed"
    second = two.write(seen, added("b"))
    assert words(one.read(first)) == ["a", "b"]
    assert second.earlier == (first.write_id,)


def test_a_change_of_an_old_version_is_made_again_on_the_newest(shared: SharedDocument, hosts: Hosts) -> None:
    one, two = hosts.host("one", shared.storage()), hosts.host("two", shared.storage())
    old = one.read()
    two.write(two.read(), added("two"))

    assert words(one.write(old, added("one"))) == ["two", "one"]


def test_of_concurrent_changes_none_is_lost(shared: SharedDocument, hosts: Hosts) -> None:
    def work(name: str) -> None:
        document = hosts.host(name, shared.storage())
        for number in range(5):
            document.write(document.read(), added(f"{name}-{number}"))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [f"h{number}" for number in range(4)]))
    final = hosts.host("h0", shared.storage()).read()
    assert sorted(words(final)) == sorted(f"h{host}-{number}" for host in range(4) for number in range(5))
    assert final.generation == 20


def test_a_version_that_was_overtaken_while_it_was_read_is_read_again(
    shared: SharedDocument, hosts: Hosts, one: SignedDocument
) -> None:
    """Others write between the answer of the storage and that of Redis."""
    two = hosts.host("two", shared.storage())
    read, overtaken = two.storage.read, list[Version]()

    def slow(unless: str = "") -> tuple[bytes | None, str]:
        found = read(unless)
        if not overtaken:
            overtaken.append(one.write(one.read(), added("b")))
        return found

    two.storage.read = slow  # type: ignore[method-assign]
    assert words(two.read()) == ["a", "b"]


def test_an_old_document_that_is_put_back_is_refused_on_every_host(
    shared: SharedDocument, hosts: Hosts, one: SignedDocument
) -> None:
    two = hosts.host("two", shared.storage())
    two.read()
    past = shared.get()
    two.write(two.read(), added("b"))
    one.read()
    shared.put(past)

    for document in (
        one,
        two,
        hosts.host("new", shared.storage()),
        hosts.host("one", shared.storage(), connect(NOWHERE)),
    ):
        with pytest.raises(DocumentOutdated, match=r"generation 1,.*generation 2,.*kms token adopt"):
            document.read()
    with pytest.raises(DocumentOutdated):
        one.write(one.open(past, "x"), added("c"))


def test_a_document_that_is_deleted_is_refused(
    shared: SharedDocument, hosts: Hosts, one: SignedDocument
) -> None:
    shared.remove()

    with pytest.raises(DocumentOutdated):
        one.read()
    with pytest.raises(DocumentOutdated):
        hosts.host("new", shared.storage()).read()


def test_another_document_of_the_same_generation_is_refused(shared: SharedDocument, hosts: Hosts) -> None:
    """Two histories, as after a restore: neither is the newest."""
    one = hosts.host("one", shared.storage())
    first = one.write(one.read(), added("a"))
    past = shared.get()
    one.write(first, added("b"))
    shared.put(past)
    hosts.client.delete("kms:document:tokens")
    elsewhere = hosts.host("two", shared.storage())
    elsewhere.adopt(added())
    assert elsewhere.read().generation == 2

    with pytest.raises(DocumentOutdated):
        one.read()


@pytest.mark.usefixtures("one")
def test_a_new_host_asks_the_operator_where_redis_knows_nothing(shared: SharedDocument, hosts: Hosts) -> None:
    assert words(hosts.host("two", shared.storage()).read()) == ["a"], "Redis vouches for it"
    hosts.client.delete("kms:document:tokens")

    new = hosts.host("three", shared.storage())
    with pytest.raises(DocumentOutdated, match="kms token adopt"):
        new.read()
    assert new.adopt(added()).generation == 2
    for name in ("one", "two", "three", "four"):
        assert words(hosts.host(name, shared.storage()).read()) == ["a"]


def test_an_old_document_is_adopted_above_all_that_was_seen(
    shared: SharedDocument, hosts: Hosts, one: SignedDocument
) -> None:
    past = shared.get()
    for _ in range(3):
        one.write(one.read(), added("b"))
    shared.put(past)

    assert one.adopt(added()).generation == 5
    assert words(hosts.host("two", shared.storage()).read()) == words(one.read()) == ["a"]


@pytest.mark.usefixtures("one")
def test_a_host_that_knows_no_generation_waits_for_redis(shared: SharedDocument, hosts: Hosts) -> None:
    with pytest.raises(Unavailable, match="Redis"):
        hosts.host("new", shared.storage(), connect(NOWHERE)).read()
    assert words(hosts.host("one", shared.storage(), connect(NOWHERE)).read()) == ["a"]


def test_an_anchor_in_redis_that_others_wrote_counts_as_none(
    shared: SharedDocument, hosts: Hosts, one: SignedDocument
) -> None:
    for forged in (b"", b"x", b"0" * 64 + b' {"generation":999,"write_id":"x"}'):
        hosts.client.set("kms:document:tokens", forged)
        assert words(one.read()) == ["a"]
        assert words(hosts.host(f"new-{len(forged)}", shared.storage()).read()) == ["a"], (
            "host one raised it again"
        )


@pytest.mark.parametrize(
    "change", [lambda raw: raw.replace(b'"a"', b'"z"'), lambda raw: raw[:-66], lambda _: b"{}"]
)
def test_a_document_that_others_changed_is_refused(
    shared: SharedDocument, one: SignedDocument, change: Callable[[bytes], bytes]
) -> None:
    shared.put(change(shared.get()))

    with pytest.raises(ConfigurationError, match="changed by others"):
        one.read()


def test_a_document_is_signed_for_one_name_and_one_key(hosts: Hosts, tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "document")
    one = hosts.host("one", storage)
    one.write(one.read(), added("a"))

    with pytest.raises(ConfigurationError, match="another document"):
        SignedDocument("states", storage, KEY, Anchors("states", tmp_path, None, KEY)).read()
    with pytest.raises(ConfigurationError, match="another spool key"):
        SignedDocument("tokens", storage, b"e" * 32, Anchors("tokens", tmp_path, None, KEY)).read()


def test_a_document_has_a_bound(hosts: Hosts, tmp_path: Path) -> None:
    one = hosts.host("one", FileStorage(tmp_path / "document"))

    with pytest.raises(InvalidRequest, match="4 MiB"):
        one.write(one.read(), added("x" * 5_000_000))


# -- answers that are lost, and stores that cannot -----------------------------------------------------------


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest) -> ObjectStore:
    return STORES[request.param]()


@pytest.mark.parametrize("lost", [1, 4, 5])
def test_a_lost_answer_is_settled_by_the_write_id(store: ObjectStore, hosts: Hosts, lost: int) -> None:
    """Each request is tried four times; the second finds what the first has written."""
    bucket = store.new()
    puts: list[SeenRequest] = []

    def intercept(seen: SeenRequest) -> int | None:
        if seen.operation != "PutObject" or seen.path.endswith(".probe"):
            return None
        puts.append(seen)
        return 0 if len(puts) <= lost else None

    with S3Proxy(store, intercept) as s3_proxy:
        one = hosts.host("one", object_storage(store, bucket.name, s3_proxy.url))
        made = one.write(one.read(), added("a"))
        assert (made.generation, words(made)) == (1, ["a"])
        puts.clear()
        again = one.write(made, added("b"))
        assert words(again) == ["a", "b"], "and no change is made twice"
        assert again.generation == 2


def test_a_large_object_in_place_of_the_probe_stops_no_change(store: ObjectStore, hosts: Hosts) -> None:
    """Or one write to the bucket would keep a token from being revoked."""
    bucket = store.new()
    bucket.put("state/tokens.probe", bytes(9 * 1024 * 1024))
    one = hosts.host("one", object_storage(store, bucket.name))

    assert words(one.write(one.read(), added("a"))) == ["a"]


def test_a_store_that_is_away_changes_nothing(store: ObjectStore, hosts: Hosts) -> None:
    bucket = store.new()
    with S3Proxy(store, lambda seen: 503 if seen.operation == "PutObject" else None) as s3_proxy:
        one = hosts.host("one", object_storage(store, bucket.name, s3_proxy.url))
        with pytest.raises(Unavailable):
            one.write(one.read(), added("a"))
    assert bucket.keys() == set()


def stripped(*names: str) -> Intercept:
    """A store that does not know these headers."""

    def intercept(seen: SeenRequest) -> int | None:
        for name in names if seen.method == "PUT" else ():
            seen.headers.pop(name, None)
        return None

    return intercept


@pytest.mark.parametrize("header", ["if-match", "if-none-match"])
def test_a_bucket_that_ignores_conditions_is_refused(hosts: Hosts, header: str) -> None:
    store = object_stores.moto()  # which checks no signature
    bucket = store.new()
    with S3Proxy(store, stripped(header)) as s3_proxy:
        one = hosts.host("one", object_storage(store, bucket.name, s3_proxy.url))
        with pytest.raises(ConfigurationError, match=f"(?i)ignores {header} on writes"):
            one.storage.check()
        with pytest.raises(ConfigurationError, match=r"docs/hosts\.md"):
            one.write(one.read(), added("a"))
    assert bucket.keys() == {"state/tokens.probe"}


def test_a_bucket_that_holds_conditions_is_probed_once_for_a_process(store: ObjectStore) -> None:
    bucket = store.new()
    with S3Proxy(store) as s3_proxy:
        storage = object_storage(store, bucket.name, s3_proxy.url)
        storage.check()
        before = len(s3_proxy.seen)
        storage.check()
        assert len(s3_proxy.seen) == before > 0
