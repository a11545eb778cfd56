"""Tokens of several hosts that share a bucket and Redis, and no disk."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Final, cast

import httpx2 as httpx
import pytest

from kms_core import container, redis_client
from kms_core.auth import tokens
from kms_core.auth.tokens import Token, TokenRequest
from kms_core.documents.document import SignedDocument
from kms_core.documents.storage import ObjectStorage
from kms_core.s3.connection import S3Connection
from support import object_stores
from support.credentials import DAY, SecuredService, bearer
from support.object_stores import S3Proxy, SeenRequest, TestBucket
from support.service import CONTEXT, b64
from support.waiting import until

STALE_S: Final = 6.0
KEY: Final = "state/tokens"
LINES: Final[list[S3Connection]] = []
SECRET: Final = {"plaintext": b64(b"x"), "context": CONTEXT}


@dataclass
class Store:
    """A bucket behind a proxy, which can take it away from all hosts or answer nothing."""

    bucket: TestBucket
    s3_proxy: S3Proxy
    spool: Path
    is_away: bool = False
    gets: list[float] = field(default_factory=list)

    def settings(self, folder: Path) -> str:
        return (
            f'[kms.jobs]\nspool_dir = "{self.spool}"\n'
            f'[kms.auth]\nmode = "required"\ntokens = "{self.bucket.url(KEY)}"\nmax_stale_s = {STALE_S}\n'
            + self.bucket.settings(folder / "secret", self.s3_proxy.url, job_rights="")
        )

    def intercept(self, seen: SeenRequest) -> int | None:
        if seen.operation == "GetObject":
            self.gets.append(time.monotonic())
        return 503 if self.is_away else None


class Host(SecuredService):
    """A host with a state directory of its own and the spool key of all."""

    def __init__(self, folder: Path, store: Store, redis: str, like: "Host | None" = None) -> None:
        folder.mkdir()
        super().__init__(folder, store.settings(folder), redis)
        if like:
            self.take_keys(like)

    @cached_property
    def document(self) -> SignedDocument:
        settings = self.settings
        made = container.token_document(settings, redis_client.connect(settings.kms.redis))
        LINES.append(cast("ObjectStorage", made.storage).bucket.line)
        return made

    def make(self, *scopes: str, tenant: str = "default", ttl: timedelta | None = DAY) -> tuple[Token, str]:
        return tokens.create(self.document, TokenRequest(f"t{time.monotonic_ns()}", tenant, scopes, ttl))

    def status_of(self, text: str) -> int:
        return self.post("/encrypt", SECRET, headers=bearer(text)).status_code


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """No connection of this process is left open."""
    yield
    for line in LINES:
        line.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    weed = object_stores.weed()
    with S3Proxy(weed) as s3_proxy:
        made = Store(weed.new(), s3_proxy, tmp_path_factory.mktemp("shared") / "spool")
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
        one.start("api")
        two.start()
        yield one, two


def test_a_new_token_and_a_rotated_one_are_accepted_everywhere_at_once(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    token, old = one.make("*")
    assert (two.status_of(old), one.status_of(old)) == (200, 200)
    _, new = tokens.rotate(one.document, token.id, timedelta(hours=1), None)

    assert (two.status_of(new), two.status_of(old)) == (200, 200)


def test_a_revoked_token_is_refused_everywhere_within_five_seconds(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    token, text = one.make("*")
    assert [host.status_of(text) for host in hosts] == [200, 200]
    tokens.revoke(one.document, token.id)
    revoked_at = time.monotonic()

    until(lambda: [host.status_of(text) for host in hosts] == [401, 401], "it is refused everywhere")
    assert time.monotonic() - revoked_at < 5
    assert two.get("/keys", headers=bearer(text)).json()["code"] == "unauthenticated"


def test_an_unknown_token_costs_the_store_two_requests_a_second(
    hosts: tuple[Host, Host], store: Store
) -> None:
    _, two = hosts
    store.gets.clear()
    begun = time.monotonic()
    answers = {two.status_of(f"kms_{'a' * 10}_{'A' * 43}") for _ in range(8)}
    assert answers == {401}
    assert len(store.gets) <= (time.monotonic() - begun) * (2 + 2) + 3


def test_while_the_store_is_away_tokens_work_until_the_copy_is_too_old(
    hosts: tuple[Host, Host], store: Store
) -> None:
    one, two = hosts
    _, text = one.make("*")
    assert two.status_of(text) == 200
    store.is_away = True
    try:
        away_at = time.monotonic()
        assert two.status_of(text) == 200
        unknown = two.post("/encrypt", SECRET, headers=bearer(f"kms_{'b' * 10}_{'A' * 43}"))
        assert (unknown.status_code, unknown.json()["code"]) == (503, "unavailable")
        seen = set[int]()
        while time.monotonic() < away_at + STALE_S + 2:
            seen.add(two.status_of(text))
            time.sleep(0.2)
        assert seen == {200, 503}, "never 401"
        last = two.post("/encrypt", SECRET, headers=bearer(text))
        assert (last.status_code, last.json()["code"]) == (503, "unavailable")
        assert int(last.headers["retry-after"]) >= 1
        assert age_s(two) > STALE_S / 2
    finally:
        store.is_away = False
    until(lambda: two.status_of(text) == one.status_of(text) == 200, "they answer again")
    until(lambda: age_s(two) < STALE_S / 2, "the worker reads it again")


def age_s(host: Host) -> float:
    text = httpx.get(f"http://127.0.0.1:{host.port + 1}/metrics", trust_env=False).text
    return max(map(float, re.findall(r'^kms_document_age_seconds{.*"tokens".*} (\S+)$', text, re.MULTILINE)))


def test_status_says_that_the_tokens_are_late_before_none_is_accepted(
    hosts: tuple[Host, Host], store: Store, module_redis: str, tmp_path: Path
) -> None:
    one, two = hosts
    _, text = one.make("*")
    with Host(tmp_path / "patient", store, module_redis, one) as host:
        host.config.write_text(
            host.config.read_text().replace(f"max_stale_s = {STALE_S}", "max_stale_s = 60")
        )
        host.start("api")

        def is_late() -> bool:
            answer = host.get("/status", headers=bearer(text))
            assert answer.status_code == 200, answer.text
            return "tokens" in answer.json()["degraded"]

        until(lambda: host.status_of(text) == 200, "the tokens are read")
        until(lambda: not is_late(), "they are fresh")
        store.is_away = True
        try:
            until(is_late, "the tokens are late")
            assert host.status_of(text) == 200
        finally:
            store.is_away = False
        until(lambda: not is_late(), "they are read again")
    until(lambda: two.status_of(text) == one.status_of(text) == 200, "the other hosts answer again")


def test_an_old_document_that_is_put_back_revives_no_token(
    hosts: tuple[Host, Host], store: Store, module_redis: str, tmp_path: Path
) -> None:
    one, two = hosts
    token, text = one.make("*")
    _, kept = one.make("*")
    past = store.bucket.get(KEY)
    tokens.revoke(one.document, token.id)
    until(lambda: [host.status_of(text) for host in hosts] == [401, 401], "it is revoked on both")
    newest = store.bucket.get(KEY)
    store.bucket.put(KEY, past)
    try:
        time.sleep(2.5)
        assert {one.status_of(text), two.status_of(text)} <= {401, 503}
        assert two.status_of(kept) == 200, "the copy is newer"
        until(lambda: "was seen before" in two.output("api"), "it is said")
        done = one.run_kms("token", "list")
        assert done.returncode == 69, done.stderr
        assert "kms token adopt" in done.stderr
        with Host(tmp_path / "three", store, module_redis, one) as three:
            three.start("api")
            assert three.status_of(text) == 503, "a new host asks Redis"
    finally:
        store.bucket.put(KEY, newest)
    until(lambda: one.status_of(kept) == two.status_of(kept) == 200, "the newest one is back")
    assert two.status_of(text) == 401


def test_the_command_works_on_the_document(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = hosts
    file = tmp_path / "token"
    made = one.run_kms("token", "create", "--name", "by-command", "--scope", "*", "-o", str(file))
    assert made.returncode == 0, made.stderr
    assert two.status_of(file.read_text().strip()) == 200
    listed = two.run_kms("--json", "token", "list")
    assert "by-command" in {json.loads(line)["name"] for line in listed.stdout.splitlines()}, listed
    assert two.run_kms("token", "revoke", "by-command").returncode == 0
    until(lambda: one.status_of(file.read_text().strip()) == 401, "it is revoked")

    path = tmp_path / "tokens.json"
    _, text = tokens.create(path, TokenRequest("of-a-file", "default", ("*",), DAY))
    adopted = one.run_kms("token", "adopt", "--yes", "--file", str(path))
    assert adopted.returncode == 0, adopted.stderr
    assert two.status_of(text) == 200


def test_a_document_tells_no_token(hosts: tuple[Host, Host], store: Store) -> None:
    """Read access to the bucket, or to the state directory, gives nothing to log in with."""
    one, two = hosts
    _, text = one.make("*")
    secret = text.split("_", 2)[2].encode()
    assert two.status_of(text) == 200
    copies = [path.read_bytes() for path in (two.state / "documents").iterdir()]
    assert not [data for data in (store.bucket.get(KEY), *copies) if secret in data]
    assert {path.stat().st_mode & 0o777 for path in (two.state / "documents").iterdir()} == {0o600}
    assert (two.state / "documents").stat().st_mode & 0o777 == 0o700
