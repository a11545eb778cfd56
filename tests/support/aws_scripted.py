"""A stand-in for AWS KMS that answers as a script says, and checks signatures, which emulators do not."""

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import msgspec

from kms_core.backends.aws.backend import AwsCipher
from support.aws_servers import ACCESS_KEY, REGION, SECRET_KEY, calls_to
from support.http_servers import QuietHandler, served

KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"
ARN_PREFIX = f"arn:aws:kms:{REGION}:111122223333:"
ARN = f"{ARN_PREFIX}key/{KEY}"
SECRET = b"sixteen secrets!"
AAD = b"acme payroll env=prod"
Document = Mapping[str, object]
Reply = tuple[int, Document | bytes]


@dataclass
class Script:
    """What a stand-in answers to each operation; it keeps what it was asked, and checks each signature."""

    answer: Callable[[str, Mapping[str, object]], Reply]
    asked: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    bad_signatures: int = 0


@contextmanager
def scripted(answer: Callable[[str, Mapping[str, object]], Reply]) -> Iterator[tuple[str, Script]]:
    """The stand-in's URL, and its script."""
    script = Script(answer)

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536  # head and body in one segment

        def do_POST(self) -> None:  # noqa: N802 -- the library's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            script.raw.append(bytes(self.headers) + body)
            script.bad_signatures += not signed(dict(self.headers.items()), body)
            operation = self.headers["X-Amz-Target"].removeprefix("TrentService.")
            asked = cast("Mapping[str, object]", msgspec.json.decode(body))
            script.asked.append((operation, asked))
            status, reply = script.answer(operation, asked)
            out = reply if isinstance(reply, bytes) else msgspec.json.encode(reply)
            self.reply(status, out, "application/x-amz-json-1.1")

    with served(Handler) as port:
        yield f"http://127.0.0.1:{port}", script


def signed(headers: Mapping[str, str], body: bytes) -> bool:
    """Signature version 4 as AWS documents its check ("Create a signed AWS API request")."""
    given = {name.lower(): value for name, value in headers.items()}
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\S+?)/(\d{8}/\S+/kms/aws4_request), "
        r"SignedHeaders=(\S+), Signature=([0-9a-f]{64})",
        given.get("authorization", ""),
    )
    if found is None or found[1] != ACCESS_KEY or not {"host", "x-amz-target"} <= set(found[3].split(";")):
        return False
    lines = [f"{name}:{given[name].strip()}\n" for name in found[3].split(";")]
    canonical = "\n".join(["POST", "/", "", "".join(lines), found[3], hashlib.sha256(body).hexdigest()])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{SECRET_KEY}".encode()
    for part in found[2].split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = "\n".join(["AWS4-HMAC-SHA256", given["x-amz-date"], found[2], digest])
    return hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), found[4])


# -- answers ------------------------------------------------------------------------------------------

DESCRIBED: Reply = (200, {"KeyMetadata": {"Arn": ARN, "KeyId": KEY, "CreationDate": 1.5e9}})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def working(operation: str, asked: Mapping[str, object]) -> Reply:
    """Encrypts by reversing."""
    match operation:
        case "DescribeKey":
            return DESCRIBED
        case "ListAliases":
            return 200, {"Aliases": [], "Truncated": False}
        case "Encrypt":
            blob = base64.b64decode(str(asked["Plaintext"]))[::-1]
            return 200, {"CiphertextBlob": b64(blob), "KeyId": asked["KeyId"]}
        case _:
            secret = base64.b64decode(str(asked["CiphertextBlob"]))[::-1]
            return 200, {"Plaintext": b64(secret), "KeyId": asked["KeyId"]}


@contextmanager
def cipher_with(
    replies: Mapping[str, Reply], key: str = KEY, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[AwsCipher, Script]]:
    """A cipher whose peer answers so to these operations, and works otherwise."""

    def answer(operation: str, asked: Mapping[str, object]) -> Reply:
        return replies.get(operation) or working(operation, asked)

    with scripted(answer) as (url, script):
        yield AwsCipher(calls_to(url, timeout_s=5.0), key, clock=clock), script


def refused(code: str, message: str = "", status: int = 400) -> Reply:
    return status, {"__type": code, "message": message}
