"""What ``kms doctor`` tells of the bucket that holds the spool."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import redis

from kms_cli.commands import doctor
from kms_cli.commands.doctor import Finding, exit_code, machine_findings
from kms_core import container
from kms_core.jobs.hosts.notes import HostNote, HostNotes
from kms_core.settings.load import load
from kms_core.settings.model import Settings
from kms_protocol.errors import EXIT_UNAVAILABLE
from support import object_stores
from support.blob_stores import PREFIX
from support.object_stores import ObjectStore, S3Proxy, SeenRequest, TestBucket

NO_MARKS = SimpleNamespace(install_id=lambda: None)
RULE = {
    "ID": "abort",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2},
    "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
}


@pytest.fixture(scope="module")
def server() -> ObjectStore:
    return object_stores.moto()


@pytest.fixture
def s3_proxy(server: ObjectStore) -> Iterator[S3Proxy]:
    with S3Proxy(server) as s3_proxy:
        yield s3_proxy


@pytest.fixture
def bucket(server: ObjectStore) -> TestBucket:
    return server.new()


def settings(folder: Path, bucket: TestBucket, url: str) -> Settings:
    secret = folder / "secret"
    secret.write_text(object_stores.SECRET)
    secret.chmod(0o600)
    (folder / "kms.toml").write_text(
        f'[kms.jobs.spool_bucket]\nurl = "s3://{bucket.name}/{PREFIX}"\nendpoint = "{url}"\n'
        f'allow_http = true\naccess_key_id = "{object_stores.ACCESS_KEY}"\nsecret_key_file = "{secret}"\n'
    )
    return load(folder / "kms.toml", {"HOME": str(folder)})


def told(settings: Settings) -> list[Finding]:
    with click.Context(click.Command("kms")):
        return [each for each in machine_findings(settings) if each.subject == "spool bucket"]


def told_of(folder: Path, bucket: TestBucket, s3_proxy: S3Proxy) -> list[Finding]:
    return told(settings(folder, bucket, s3_proxy.url))


def test_a_bucket_that_works_and_has_a_rule(tmp_path: Path, bucket: TestBucket, s3_proxy: S3Proxy) -> None:
    bucket.store.admin.put_bucket_lifecycle_configuration(
        Bucket=bucket.name,
        LifecycleConfiguration={"Rules": [RULE]},  # type: ignore[list-item]  # a dict of this shape
    )
    (only,) = told_of(tmp_path, bucket, s3_proxy)

    assert (only.level, only.subject) == ("ok", "spool bucket")
    assert "can be written, read and listed" in only.text
    assert bucket.keys() == set()


def test_a_bucket_without_a_rule_for_uploads(tmp_path: Path, bucket: TestBucket, s3_proxy: S3Proxy) -> None:
    ok, warned = told_of(tmp_path, bucket, s3_proxy)

    assert (ok.level, warned.level) == ("ok", "warn")
    assert "AbortIncompleteMultipartUpload" in warned.next


def test_versioning_and_object_lock_are_told(tmp_path: Path, server: ObjectStore, s3_proxy: S3Proxy) -> None:
    bucket = TestBucket(server, "kept-for-long")
    server.admin.create_bucket(Bucket=bucket.name, ObjectLockEnabledForBucket=True)
    texts = [each.text for each in told_of(tmp_path, bucket, s3_proxy) if each.level == "warn"]

    assert any(text.startswith("versioning is on") for text in texts)
    assert any(text.startswith("object lock is on") for text in texts)


def ignoring(seen: SeenRequest) -> None:
    seen.headers.pop("if-none-match", None)


def not_knowing(seen: SeenRequest) -> int | None:
    return 501 if "if-none-match" in seen.headers else None


@pytest.mark.parametrize("intercept", [ignoring, not_knowing])
def test_a_store_without_conditions_is_told(
    tmp_path: Path, bucket: TestBucket, s3_proxy: S3Proxy, intercept: Callable[[SeenRequest], int | None]
) -> None:
    s3_proxy.intercept = intercept
    found = told_of(tmp_path, bucket, s3_proxy)

    assert (found[0].level, "ignores If-None-Match" in found[0].text) == ("warn", True)
    assert bucket.keys() == set()


@pytest.mark.parametrize("status", [403, 503, 507])
def test_a_bucket_that_cannot_be_written_fails(
    tmp_path: Path, bucket: TestBucket, s3_proxy: S3Proxy, status: int
) -> None:
    s3_proxy.intercept = lambda seen: status if seen.method == "PUT" else None
    (only,) = told_of(tmp_path, bucket, s3_proxy)

    assert (only.level, only.subject) == ("FAIL", "spool bucket")
    assert exit_code([only]) == EXIT_UNAVAILABLE


def test_a_bucket_that_is_not_there_fails(tmp_path: Path, server: ObjectStore, s3_proxy: S3Proxy) -> None:
    (only,) = told_of(tmp_path, TestBucket(server, "not-there"), s3_proxy)

    assert only.level == "FAIL"
    assert "404" in only.text


def test_hosts_are_not_said_to_share_a_spool_that_cannot_be_read(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        notes = HostNotes(client)
        notes.write(HostNote("b", "kms-2", notes.now()[0]))
    monkeypatch.setattr(container, "marks", lambda *_, **__: NO_MARKS)
    with click.Context(click.Command("kms")):
        found = list(machine_findings(load(None, {"HOME": str(tmp_path), "KMS_REDIS_URL": redis_url})))

    told = {each.subject: (each.level, each.text) for each in found if each.subject in {"install", "hosts"}}
    assert told["install"] == ("warn", "the spool cannot be read, so it is not compared")
    assert told["hosts"][1].startswith("kms-2 shares Redis")


def test_a_store_without_an_answer_is_not_waited_for_as_long_as_by_a_service(
    tmp_path: Path, bucket: TestBucket, s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Settings] = []

    def noting(result: object) -> Callable[..., object]:
        def note(found: Settings, **_: object) -> object:
            asked.append(found)
            return result

        return note

    settings(tmp_path, bucket, s3_proxy.url)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KMS_CONFIG", str(tmp_path / "kms.toml"))
    monkeypatch.setattr(doctor, "machine_findings", noting([]))
    monkeypatch.setattr(container, "marks", noting(NO_MARKS))
    with click.Context(click.Command("kms")):
        list(doctor._report())  # noqa: SLF001 -- as the command

    sections = [each.kms.jobs.spool_bucket for each in asked]
    assert [section and section.timeout_s for section in sections] == [doctor.TIMEOUT_S] * 2


def test_without_the_setting_nothing_is_told(tmp_path: Path) -> None:
    assert told(load(None, {"HOME": str(tmp_path)})) == []
