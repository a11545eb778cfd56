"""A sealed Age key of two hosts in a bucket, under a key of OpenBao: rotated on one, used on both."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from kms_core.age.recipients import parse_recipient
from kms_core.envelope.binding import version_of
from support import object_stores
from support.object_stores import S3Proxy, SeenRequest, TestBucket
from support.openbao import Bao
from support.sealed_keys import current_version, ok, root_settings
from support.service import CONTEXT, Service, b64, check_problem
from support.waiting import until

KEY: Final = "keys/default"


@dataclass
class Store:
    """A bucket behind a proxy, which can take it away from all hosts."""

    bucket: TestBucket
    s3_proxy: S3Proxy
    folder: Path
    roots: str
    is_away: bool = False

    @property
    def url(self) -> str:
        return self.bucket.url(KEY)

    def settings(self, folder: Path) -> str:
        section = self.bucket.settings(folder / "secret", self.s3_proxy.url, job_rights="")
        jobs = f'[kms.jobs]\nspool_dir = "{self.folder / "spool"}"\n'
        return f'{jobs}{section}{self.roots}default = "age:{self.url}"\n'

    def intercept(self, seen: SeenRequest) -> int | None:
        del seen
        return 503 if self.is_away else None

    @contextmanager
    def away(self) -> Iterator[None]:
        self.is_away = True
        try:
            yield
        finally:
            self.is_away = False


class Host(Service):
    """A host with a state directory of its own."""

    def __init__(self, folder: Path, store: Store, redis: str, like: "Host | None" = None) -> None:
        folder.mkdir()
        super().__init__(folder, store.settings(folder), redis)
        if like:
            self.take_keys(like)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    running = Bao(tmp_path_factory.mktemp("bao"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, server: Bao) -> Iterator[Store]:
    weed = object_stores.weed()
    with S3Proxy(weed) as s3_proxy:
        roots = root_settings(server, timeout_s=2.0)
        made = Store(weed.new(), s3_proxy, tmp_path_factory.mktemp("shared"), roots)
        s3_proxy.intercept = made.intercept
        yield made


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory, store: Store, module_redis: str
) -> Iterator[tuple[Host, Host]]:
    folder = tmp_path_factory.mktemp("hosts")
    one = Host(folder / "one", store, module_redis)
    two = Host(folder / "two", store, module_redis, one)
    with one, two:
        ok(one, "keygen", "--sealed-by", "root", "-o", store.url)
        one.start("api")
        two.start()
        yield one, two


def rotated(host: Host) -> str:
    answer = host.post("/keys/default/rotate")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["key_version"])


def test_a_rotation_on_one_host_fails_no_call_on_any(hosts: tuple[Host, Host]) -> None:
    """Each host opens what the other one seals, before, during and after it; and so does the worker."""
    one, two = hosts
    old, ends, files = one.encrypt(b"old"), threading.Event(), list[bytes]()

    def work() -> None:
        while not ends.is_set():
            for sealer, opener in ((one, two), (two, one)):
                files.append(sealer.encrypt(b"at work"))
                assert opener.decrypt(files[-1]) == b"at work"

    thread = threading.Thread(target=work)
    thread.start()
    try:
        new = rotated(one)
        until(
            lambda: current_version(two) == current_version(one) == new,
            "both hosts seal with the new version",
        )
    finally:
        ends.set()
        thread.join()
    for host in hosts:
        assert {host.decrypt(file) for file in files} == {b"at work"}
        assert host.decrypt(old) == b"old"
    assert one.decrypt(two.encrypt(b"new")) == b"new"
    job = one.upload("encrypt", b"by the worker", CONTEXT)  # of host two
    assert one.wait(job, "succeeded")
    assert one.decrypt(one.result(job)) == b"by the worker"


def test_while_the_store_is_away_keys_go_on_and_hosts_start(
    hosts: tuple[Host, Host], store: Store, module_redis: str, tmp_path: Path
) -> None:
    one, two = hosts
    with store.away():
        until(lambda: "key_documents" in two.degraded, "it is said")
        assert age_s(two) >= 5
        assert two.http.get("/readyz").status_code == 200
        file = one.encrypt(b"local")
        assert two.decrypt(file) == b"local"
        check_problem(one.post("/keys/default/rotate"), 503, "backend_unavailable")

        two.kill("api")
        two.start("api")  # from the copy of this host
        assert two.decrypt(file) == b"local"
        with Host(tmp_path / "new", store, module_redis, one) as new:
            new.start("api")
            encrypt = {"plaintext": b64(b"x"), "context": CONTEXT}
            check_problem(new.post("/encrypt", encrypt), 503, "backend_unavailable")
            ready = new.http.get("/readyz")
            assert (ready.status_code, ready.json()["keys"]) == (503, "unavailable")
            store.is_away = False
            until(lambda: new.http.get("/readyz").status_code == 200, "the key is read")
            assert new.decrypt(file) == b"local"
    until(lambda: "key_documents" not in two.degraded, "it is read again")


def age_s(host: Host) -> float:
    text = httpx.get(f"http://127.0.0.1:{host.port + 1}/metrics", trust_env=False).text
    return max(map(float, re.findall(r'^kms_document_age_seconds{.*"key-.*} (\S+)$', text, re.MULTILINE)))


def test_an_old_document_that_is_put_back_loses_no_version(hosts: tuple[Host, Host], store: Store) -> None:
    one, two = hosts
    past = store.bucket.get(KEY)
    new = rotated(one)
    until(lambda: current_version(two) == new, "host two has it")
    file = two.encrypt(b"of the newest version")
    store.bucket.put(KEY, past)

    until(lambda: "was seen before" in two.output("api"), "it is said")
    until(lambda: "key_documents" in two.degraded, "the status says it too")
    assert one.decrypt(file) == b"of the newest version"
    assert current_version(two) == new
    check_problem(two.post("/keys/default/rotate"), 503, "backend_unavailable")
    told = two.run_kms("doctor").stdout
    assert "a document with keys cannot be read again, or is older than before" in told

    ok(one, "keys", "adopt", "default", "--yes")
    until(lambda: "key_documents" not in two.degraded, "it is read again")
    assert two.decrypt(file) == b"of the newest version"
    assert current_version(two) == current_version(one) == new


def test_commands_make_one_document_and_no_plain_one(
    hosts: tuple[Host, Host], store: Store, tmp_path: Path
) -> None:
    one, _ = hosts
    before = store.bucket.get(KEY)
    for words, said in (
        (("keygen", "--sealed-by", "root", "-o", store.url), "exists"),
        (("keygen", "--sealed-by", "root", "-o", f"{store.url}-2"), "settings name s3:"),
        (("keygen", "-o", store.url), "--sealed-by"),
        (
            ("keys", "adopt", "default", "--yes", "--from", str(one.state / "age" / "private_key.txt")),
            "plain",
        ),
        (("keys", "adopt", "other", "--yes"), "name no document"),
    ):
        done = one.run_kms(*words)
        assert done.returncode != 0
        assert said in done.stderr, done.stderr
    assert store.bucket.get(KEY) == before
    assert f"default (age, in {store.url}) wraps and unwraps" in one.run_kms("doctor").stdout

    in_use, file = current_version(one), tmp_path / "sealed"
    ok(one, "keygen", "--sealed-by", "root", "-o", str(file))
    ok(one, "keys", "adopt", "default", "--yes", "--from", str(file))
    added = version_of_file(one, file)
    until(lambda: added in one.get("/keys/default").text, "its identity opens files")
    assert current_version(one) == in_use


def version_of_file(host: Host, file: Path) -> str:
    """The version that the identity in a sealed file makes, by another command than the one under test."""
    shown = ok(host, "keygen", "-y", str(file)).strip()
    return version_of(parse_recipient(shown))
