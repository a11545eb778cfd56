"""Object stores: SeaweedFS and MinIO check signatures, moto knows the semantics of AWS; one of each a run.

``S3Proxy`` stands between a core and a store, and breaks what it is told to.
"""

import atexit
import errno
import functools
import http.client
import json
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, ClassVar, Final, Self
from urllib.parse import urlsplit
from uuid import uuid4

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from kms_core.programs.tether import spawn
from support import aws_servers
from support.http_servers import QuietHandler
from support.ports import free_port
from support.programs import program, venv_program
from support.waiting import until_up

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # of boto3-stubs, which has no run-time part

ACCESS_KEY: Final = "AKIDOBJECTS"
READER_KEY: Final = "AKIDREADER"
SECRET: Final = "not-much-of-a-secret"
_IDENTITIES: Final = [
    {
        "name": "all",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    },
    {
        "name": "reader",
        "credentials": [{"accessKey": READER_KEY, "secretKey": SECRET}],
        "actions": ["Read", "List"],
    },
]


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

    def find(self, key: str) -> bytes | None:
        """None if there is no such object: it may have been deleted since it was listed."""
        try:
            return self.get(key)
        except self.store.admin.exceptions.NoSuchKey:
            return None

    def etag(self, key: str) -> str | None:
        """None if there is no such object."""
        try:
            return self.store.admin.head_object(Bucket=self.name, Key=key)["ETag"]
        except ClientError:
            return None

    def keys(self) -> set[str]:
        """All but the object that shows whether the store honours conditions."""
        pages = self.store.admin.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        found = {entry["Key"] for page in pages for entry in page.get("Contents", ())}
        return found - {"out/.kms-probe"}

    def uploads(self) -> list[str]:
        """Multipart uploads that nobody completed or aborted."""
        found = self.store.admin.list_multipart_uploads(Bucket=self.name)
        return [entry["Key"] for entry in found.get("Uploads", ())]

    def creations(self, prefix: str) -> Counter[str]:
        """How often each name below a prefix was put in place; the bucket has versioning."""
        pager = self.store.admin.get_paginator("list_object_versions")
        pages = pager.paginate(Bucket=self.name, Prefix=prefix)
        return Counter(entry["Key"] for page in pages for entry in page.get("Versions", ()))

    def settings(
        self,
        secret: Path,
        endpoint: str = "",
        access_key: str = ACCESS_KEY,
        job_rights: str = 'read = [""]\nwrite = ["out/"]\n',
    ) -> str:
        """A section of ``kms.toml`` for it: jobs read everything, and write below ``out/``."""
        secret.write_text(SECRET)
        secret.chmod(0o600)
        return (
            f'[kms.jobs.buckets.{self.name}]\nendpoint = "{endpoint or self.store.url}"\nallow_http = true\n'
            f'access_key_id = "{access_key}"\nsecret_key_file = "{secret}"\n'
            f"{job_rights}timeout_s = 20.0\n"
        )


@dataclass(frozen=True)
class ObjectPath:
    """An object, as a test uses the path of a file."""

    bucket: TestBucket
    name: str

    def as_uri(self) -> str:
        return self.bucket.url(self.name)

    def exists(self) -> bool:
        return self.bucket.etag(self.name) is not None

    def read_bytes(self) -> bytes:
        return self.bucket.get(self.name)

    def write_bytes(self, data: bytes) -> None:
        self.bucket.put(self.name, data)


@functools.cache
def moto() -> ObjectStore:
    return ObjectStore(aws_servers.moto().url)


@functools.cache
def weed() -> ObjectStore:
    """A SeaweedFS server on loopback."""
    folder = Path(tempfile.mkdtemp(prefix="kms-weed-"))
    server, store = start_weed(folder)
    atexit.register(_stop, server, folder)
    return store


def start_weed(
    folder: Path, bind: str = "127.0.0.1", config: Path | None = None
) -> tuple[subprocess.Popen[bytes], ObjectStore]:
    """A SeaweedFS server with its files in ``folder``, and the way to it on loopback.

    Of each bucket the objects are in ``<bucket>_*.dat`` there, also those that were deleted. ``config`` is
    another configuration of the S3 gateway; it lets ACCESS_KEY do everything.
    """
    if config is None:
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": _IDENTITIES}))
    remove_dead_sockets()
    (folder / ".seaweedfs").mkdir()  # every bucket grows volumes of its own, seven at a time unless told so
    (folder / ".seaweedfs" / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    argv = [venv_program("weed"), "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1"]
    argv += [f"-ip.bind={bind}", "-filer", "-s3", f"-s3.config={config}", "-master.telemetry=false"]
    argv += ["-volume.max=0", "-master.volumeSizeLimitMB=128", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    argv += [f"-filer.localSocket={folder}/filer.sock"]  # else by port in /tmp, which other networks have too
    for name, port in ports.items():
        argv += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 1}"]
    with (folder / "weed.log").open("wb") as log:
        server = spawn(argv, env={"HOME": str(folder)}, output=log)
    store = ObjectStore(f"http://127.0.0.1:{ports['s3']}")
    until_up(server, lambda: _takes_objects(store), (folder / "weed.log").read_text)
    return server, store


@functools.cache
def minio() -> ObjectStore:
    """A MinIO server on loopback."""
    folder = Path(tempfile.mkdtemp(prefix="kms-minio-"))
    port = free_port()
    env = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET, "HOME": str(folder)}
    env |= {"MINIO_UPDATE": "off", "MINIO_BROWSER": "off", "MINIO_CI_CD": "1"}  # on a root file system
    with (folder / "minio.log").open("wb") as log:
        argv = [program("minio"), "server", f"--address=127.0.0.1:{port}", str(folder / "data")]
        server = spawn(argv, env=env, output=log)
    atexit.register(_stop, server, folder)
    store = ObjectStore(f"http://127.0.0.1:{port}")
    until_up(server, lambda: _takes_objects(store), (folder / "minio.log").read_text)
    return store


def _takes_objects(store: ObjectStore) -> bool:
    """Whether an object can be written: the gateway answers before the volumes are there.

    Each bucket grows volumes, so there is one for all tries.
    """
    try:
        with suppress(ClientError):  # it is there
            store.admin.create_bucket(Bucket="ready")
        TestBucket(store, "ready").put("ready", b"yes")
    except Exception:  # noqa: BLE001 -- whatever it says while it starts
        return False
    return True


def _stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.kill()
    server.wait()
    subprocess.run(["rm", "-rf", folder], check=False)
    remove_dead_sockets()


def remove_dead_sockets() -> None:
    """Remove the sockets that killed SeaweedFS servers left in /tmp, the only place they know."""
    for path in Path("/tmp").glob("seaweedfs-*.sock"):
        with socket.socket(socket.AF_UNIX) as line, suppress(OSError):
            if line.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()


# -- a proxy before a store, which breaks requests --------------------------------------------------


@dataclass
class SeenRequest:
    """One request."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    size: int = 0

    @property
    def operation(self) -> str:
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


Intercept = Callable[[SeenRequest], int | None]
"""What becomes of a request: None passes it on, a status answers it.

0 passes it on and loses the answer; below 0 so many bytes of the answer's body arrive before it breaks off.
"""


class S3Proxy:
    """An HTTP proxy on loopback; ``seen`` are the requests that came, in order.

    ``code`` is the error code in the answers that ``intercept`` makes.
    """

    def __init__(self, store: ObjectStore, intercept: Intercept = lambda _: None) -> None:
        self.seen: list[SeenRequest] = []
        self.code = ""
        self.intercept = intercept
        handler = type("Handler", (_Handler,), {"s3_proxy": self, "host": urlsplit(store.url).netloc})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def operations(self) -> list[str]:
        return [seen.operation for seen in self.seen]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(QuietHandler):
    protocol_version = "HTTP/1.1"
    s3_proxy: S3Proxy
    host: str

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = SeenRequest(self.command, self.path, headers, len(body))
        self.s3_proxy.seen.append(seen)
        verdict = self.s3_proxy.intercept(seen)
        if verdict and verdict > 0:
            code = self.s3_proxy.code
            self.reply(verdict, f"<Error><Code>{code}</Code></Error>".encode() if code else b"")
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
        self.wfile.write(given[: -verdict if verdict else None])
        self.close_connection = self.close_connection or bool(verdict)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815 -- their names in the library
