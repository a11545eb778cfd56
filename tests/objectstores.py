"""Object stores: SeaweedFS, which checks signatures, and moto, which knows AWS's semantics; one each a run.

``Way`` stands between a core and a store, and breaks what it is told to.
"""

import atexit
import functools
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Final, Self
from urllib.parse import urlsplit
from uuid import uuid4

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

import awsservers
from kms_core.programs.tether import spawn
from peers import program
from ports import free_port

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # of boto3-stubs, which has no run-time part

ACCESS_KEY: Final = "AKIDOBJECTS"
READER_KEY: Final = "AKIDREADER"
SECRET: Final = "not-much-of-a-secret"
START_S: Final = 60.0


@dataclass(frozen=True)
class ObjectStore:
    """A store, and boto3's way to it, as anybody else would have one."""

    url: str

    @functools.cached_property
    def admin(self) -> "S3Client":
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET,
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                retries={"total_max_attempts": 1},
            ),
        )

    def new(self) -> "TestBucket":
        name = f"test-{uuid4()}"
        self.admin.create_bucket(Bucket=name)
        return TestBucket(self, name)


@dataclass(frozen=True)
class TestBucket:
    """A bucket of one test."""

    __test__: ClassVar = False

    store: ObjectStore
    name: str

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def put(self, key: str, data: bytes) -> str:
        """Write an object; its URL."""
        self.store.admin.put_object(Bucket=self.name, Key=key, Body=data)
        return self.url(key)

    def get(self, key: str) -> bytes:
        return self.store.admin.get_object(Bucket=self.name, Key=key)["Body"].read()

    def etag(self, key: str) -> str | None:
        """None if there is no such object."""
        try:
            return self.store.admin.head_object(Bucket=self.name, Key=key)["ETag"]
        except ClientError:
            return None

    def keys(self) -> set[str]:
        found = self.store.admin.list_objects_v2(Bucket=self.name)
        return {entry["Key"] for entry in found.get("Contents", ())}

    def uploads(self) -> list[str]:
        """Multipart uploads that nobody completed or aborted."""
        found = self.store.admin.list_multipart_uploads(Bucket=self.name)
        return [entry["Key"] for entry in found.get("Uploads", ())]

    def settings(self, secret: Path, endpoint: str = "", access_key: str = ACCESS_KEY) -> str:
        """A section of ``kms.toml`` for it: everything may be read, and written below ``out/``."""
        secret.write_text(SECRET)
        secret.chmod(0o600)
        return (
            f'[kms.jobs.buckets.{self.name}]\nendpoint = "{endpoint or self.store.url}"\nallow_http = true\n'
            f'access_key_id = "{access_key}"\nsecret_key_file = "{secret}"\n'
            'read = [""]\nwrite = ["out/"]\ntimeout_s = 20.0\n'
        )


@functools.cache
def moto() -> ObjectStore:
    return ObjectStore(awsservers.moto().url)


@functools.cache
def weed() -> ObjectStore:
    """A SeaweedFS server on loopback."""
    folder = Path(tempfile.mkdtemp(prefix="kms-weed-"))
    identities = [
        {
            "name": "all",
            "credentials": [_credential(ACCESS_KEY)],
            "actions": ["Admin", "Read", "Write", "List"],
        },
        {"name": "reader", "credentials": [_credential(READER_KEY)], "actions": ["Read", "List"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / ".seaweedfs").mkdir()  # every bucket grows volumes of its own, seven at a time unless told so
    (folder / ".seaweedfs" / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    argv = [_weed_program(), "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1"]
    argv += ["-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={folder}/s3.json", "-master.telemetry=false"]
    argv += ["-volume.max=0", "-master.volumeSizeLimitMB=128", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    for name, port in ports.items():
        argv += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 1}"]
    with (folder / "weed.log").open("wb") as log:
        server = spawn(argv, env={"HOME": str(folder)}, output=log)
    atexit.register(_stop, server, folder)
    store = ObjectStore(f"http://127.0.0.1:{ports['s3']}")
    _await(store, server, folder)
    return store


def _credential(access_key: str) -> dict[str, str]:
    return {"accessKey": access_key, "secretKey": SECRET}


def _weed_program() -> str:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else program("weed")


def _await(store: ObjectStore, server: subprocess.Popen[bytes], folder: Path) -> None:
    """Until an object can be written: the gateway answers before the volumes are there."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            store.new().put("ready", b"yes")
        except Exception:  # noqa: BLE001 -- whatever it says while it starts
            time.sleep(0.1)  # between two looks
        else:
            return
    raise RuntimeError(f"weed did not start:\n{(folder / 'weed.log').read_text()[-2000:]}")


def _stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.kill()
    server.wait()
    subprocess.run(["rm", "-rf", folder], check=False)


# -- a way to a store that breaks ----------------------------------------------------------------------------


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    size: int = 0

    @property
    def name(self) -> str:
        """What it asks for, in S3's terms."""
        query = urlsplit(self.path).query
        if "x-amz-copy-source" in self.headers:
            return "UploadPartCopy"
        names = {"PUT partNumber": "UploadPart", "POST uploads": "CreateMultipartUpload"}
        names |= {"POST uploadId": "CompleteMultipartUpload", "DELETE uploadId": "AbortMultipartUpload"}
        names |= {"GET list-type": "ListObjects", "GET uploadId": "ListParts"}
        for begins, name in names.items():
            method, _, word = begins.partition(" ")
            if method == self.method and word in query:
                return name
        return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject"}.get(self.method, self.method)


Meddle = Callable[[Seen], int | None]
"""What becomes of a request: None passes it on; 0 passes it on and loses the answer; a status answers it."""


class Way:
    """An HTTP proxy on loopback; ``seen`` are the requests that came, in order."""

    def __init__(self, store: ObjectStore, meddle: Meddle = lambda _: None) -> None:
        self.seen: list[Seen] = []
        self.meddle = meddle
        handler = type("Handler", (_Handler,), {"way": self, "host": urlsplit(store.url).netloc})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def names(self) -> list[str]:
        return [seen.name for seen in self.seen]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    way: Way
    host: str

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the library
        """Nothing."""

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, len(body))
        self.way.seen.append(seen)
        verdict = self.way.meddle(seen)
        if verdict:
            self.send_response(verdict)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with closing(http.client.HTTPConnection(self.host, timeout=60)) as upstream:
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            given = answer.read()
        if verdict == 0:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                self.send_header(name, value)
        size = answer.headers.get("content-length") if self.command == "HEAD" else str(len(given))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        self.wfile.write(given)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815 -- their names in the library
