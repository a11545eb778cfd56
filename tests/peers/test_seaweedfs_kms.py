"""docs/integrations/seaweedfs.md, word for word: the service encrypts the keys of objects in SeaweedFS."""

import os
import re
import secrets
import shlex
import sys
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from support import pages
from support.credentials import SecuredService
from support.object_stores import ACCESS_KEY, SECRET, ObjectStore, TestBucket, start_weed
from support.vault_api import NO_REDIS

PAGE: Final = "docs/integrations/seaweedfs.md"
SETTINGS: Final = """
[kms.auth]
mode = "required"
[kms.facade]
enabled = true
"""
CONTEXT: Final = b64encode(b'{"team": "payroll"}').decode()
LARGE: Final = 20_000_000
PART: Final = 5 << 20  # the least that S3 allows but for the last


@dataclass(frozen=True)
class Setup:
    """A service, a store that has its keys encrypted there, and the folder of the page's commands."""

    service: SecuredService
    store: ObjectStore
    folder: Path
    data: Path
    environ: dict[str, str]

    def holds(self, text: bytes) -> bool:
        """Whether any file of the store has these bytes."""
        return any(text in path.read_bytes() for path in self.data.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("seaweedfs")
    (script,) = pages.blocks_to_run(PAGE, "sh")
    data = folder / "data"
    data.mkdir()
    with SecuredService(folder / "install", SETTINGS, NO_REDIS) as service:
        environ = service.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        pages.said(script.replace("http://localhost:8082", service.url), folder, environ)
        server, store = start_weed(data, config=folder / "s3.json")  # it starts without the service
        try:
            yield Setup(service.start("api"), store, folder, data, environ)
        finally:
            server.kill()
            server.wait()


def put(bucket: TestBucket, key: str, data: bytes, key_id: str = "default") -> None:
    bucket.store.admin.put_object(
        Bucket=bucket.name,
        Key=key,
        Body=data,
        ServerSideEncryption="aws:kms",
        SSEKMSKeyId=key_id,
        SSEKMSEncryptionContext=CONTEXT,
    )


def test_the_program_of_the_page_reads_what_it_wrote(setup: Setup) -> None:
    assert (setup.folder / "s3.json").stat().st_mode & 0o077 == 0
    (source,) = re.findall(r"```python\n(.*?)```", (pages.ROOT / PAGE).read_text("utf-8"), re.DOTALL)
    (setup.folder / "objects.py").write_text(source)

    environ = setup.environ | {"AWS_ENDPOINT_URL_S3": setup.store.url, "HOME": str(setup.folder)}
    said = pages.said(shlex.join([sys.executable, "objects.py"]), setup.folder, environ)

    assert said == "ada,4711\nbob,4712\n"
    for key in ("june.csv", "july.csv"):
        head = setup.store.admin.head_object(Bucket="payroll", Key=key)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "default")
    assert not setup.holds(b"ada,4711")
    assert not setup.holds(b"bob,4712")


@pytest.mark.parametrize("size", [0, 1, 140, LARGE])
def test_an_object_is_read_as_it_was_written_and_is_not_on_the_disk(setup: Setup, size: int) -> None:
    bucket, data = setup.store.new(), secrets.token_bytes(size)

    put(bucket, "sealed", data)

    assert bucket.get("sealed") == data
    if size >= 140:
        assert not setup.holds(data[:64])
        bucket.put("clear", data)
        assert setup.holds(data[:64])  # so would have been found


def test_parts_ranges_and_copies_of_objects(setup: Setup) -> None:
    bucket, data = setup.store.new(), secrets.token_bytes(PART + 1000)
    s3 = setup.store.admin
    sealing = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "default"}
    parts = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART)
    s3.upload_fileobj(BytesIO(data), bucket.name, "parts", ExtraArgs=sealing, Config=parts)
    assert s3.head_object(Bucket=bucket.name, Key="parts")["ETag"].endswith('-2"')
    s3.copy_object(
        Bucket=bucket.name,
        Key="copy",
        CopySource={"Bucket": bucket.name, "Key": "parts"},
        ServerSideEncryption="aws:kms",
        SSEKMSKeyId="default",
    )

    assert bucket.get("parts") == data
    assert bucket.get("copy") == data
    ranged = s3.get_object(Bucket=bucket.name, Key="parts", Range=f"bytes={PART - 10}-{PART + 9}")[
        "Body"
    ].read()
    assert ranged == data[PART - 10 : PART + 10]
    assert not setup.holds(data[:64])


def test_an_object_is_read_after_a_rotation(setup: Setup) -> None:
    bucket = setup.store.new()
    put(bucket, "older", b"older")

    header = {"X-Vault-Token": setup.service.new_token("rotate")[1]}
    assert setup.service.http.post("/v1/transit/keys/default/rotate", headers=header).is_success
    put(bucket, "newer", b"newer")

    assert (bucket.get("older"), bucket.get("newer")) == (b"older", b"newer")


def test_a_key_that_the_token_may_not_use_writes_nothing(setup: Setup) -> None:
    bucket = setup.store.new()

    with pytest.raises(ClientError):
        put(bucket, "sealed", b"payroll", "another")

    assert bucket.keys() == set()


def test_nothing_is_read_or_written_while_the_service_is_away(setup: Setup) -> None:
    bucket = setup.store.new()
    put(bucket, "sealed", b"payroll")
    assert bucket.get("sealed") == b"payroll"

    setup.service.kill("api")
    try:
        with pytest.raises(ClientError, match="InternalError"):
            bucket.get("sealed")
        with pytest.raises(ClientError, match="InternalError"):
            put(bucket, "later", b"later")
        assert bucket.get(bucket.put("clear", b"clear").rpartition("/")[2]) == b"clear"
    finally:
        setup.service.start("api")

    assert bucket.get("sealed") == b"payroll"
    put(bucket, "later", b"later")
    assert bucket.keys() == {"sealed", "later", "clear"}
