"""The line to an object store: what is tried again, what is told, and what becomes of connections."""

import http.client
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from kms_core.s3.bucket import ALWAYS, Bucket, Completion, If, ObjectReader, UploadedPart
from kms_core.s3.connection import SILENCES, TRIES, Credentials, S3Connection, S3Endpoint, S3Request
from kms_protocol.errors import PathRefused, Unavailable
from support.http_servers import QuietHandler, served
from support.webhooks import make_localhost_tls

Reply = tuple[int, dict[str, str], bytes] | None
ERROR = b'<?xml version="1.0"?>\n<Error><Code>%s</Code><Message>about secret-key</Message></Error>'


class Script:
    """A server that gives these replies, the last of them for ever; None hangs up instead."""

    def __init__(self, port: int, *replies: Reply) -> None:
        self.port, self.replies = port, list(replies)
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.connections: set[int] = set()
        self.line = _line(f"http://127.0.0.1:{port}")
        self.bucket = Bucket("b", self.line, path_style=True)


@contextmanager
def scripted(*replies: Reply, tls: ssl.SSLContext | None = None) -> Iterator[Script]:
    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            made.asked.append((self.command, self.path, headers, body))
            made.connections.add(self.client_address[1])
            reply = made.replies.pop(0) if len(made.replies) > 1 else made.replies[0]
            if reply is None:
                self.close_connection = True
                return
            status, more, content = reply
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(content))} | more).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if self.command != "HEAD" else b"")

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 -- the library's names

    with served(Handler, tls=tls) as port:
        made = Script(port, *replies)
        with closing(made.line):
            yield made


def _line(url: str, trust: ssl.SSLContext | None = None, timeout_s: float = 5.0) -> S3Connection:
    endpoint = S3Endpoint(url, "r", lambda: Credentials("AKID", "secret-key"), trust, timeout_s)
    return S3Connection(endpoint, first_wait_s=0.001)


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted((200, {}, b"")) as made:
        yield made


@pytest.mark.parametrize(
    "trouble",
    [
        None,
        (500, {}, b""),
        (503, {}, ERROR % b"SlowDown"),
        (200, {}, ERROR % b"InternalError"),
        (409, {}, ERROR % b"OperationAborted"),
        (400, {}, ERROR % b"RequestTimeout"),
    ],
    ids=["hung-up", "500", "slow-down", "error-in-200", "aborted", "timeout"],
)
def test_what_may_pass_is_tried_again(script: Script, trouble: Reply) -> None:
    script.replies = [trouble, trouble, (200, {}, b"fine")]

    assert script.line.ask(S3Request("PUT", "/b/k", body=b"data")).body == b"fine"
    assert [body for *_, body in script.asked] == [b"data"] * 3


@pytest.mark.parametrize("trouble", [None, (503, {}, b"secret-key")], ids=["hung-up", "503"])
def test_what_does_not_pass_is_unavailable_and_not_quoted(script: Script, trouble: Reply) -> None:
    script.replies = [trouble]

    with pytest.raises(Unavailable) as told:
        script.line.ask(S3Request("GET", "/b/k"))
    assert len(script.asked) == TRIES
    assert "secret-key" not in str(told.value)


def test_a_store_that_is_silent_is_asked_twice() -> None:
    """The first connection may have been dead; each further wait would take as long."""
    asked: list[None] = []
    line = _line("http://127.0.0.1:1")

    def time_out(*_: object) -> None:
        asked.append(None)
        raise TimeoutError

    line._once = time_out  # type: ignore[assignment, method-assign]  # noqa: SLF001 -- no test waits for a timeout
    with pytest.raises(Unavailable):
        line.ask(S3Request("GET", "/b/k"))
    assert len(asked) == SILENCES


@pytest.mark.parametrize("status", [403, 404, 412, 501])
def test_an_answer_is_not_asked_for_twice(script: Script, status: int) -> None:
    script.replies = [(status, {}, b"")]

    assert script.line.ask(S3Request("GET", "/b/k")).status == status
    assert len(script.asked) == 1


def test_a_body_fills_the_views_one_after_another(script: Script) -> None:
    script.replies = [(206, {}, bytes(range(10)))]
    views = [memoryview(bytearray(4)), memoryview(bytearray(6))]

    script.line.fetch(S3Request("GET", "/b/k"), views)

    assert [bytes(view) for view in views] == [bytes(range(4)), bytes(range(4, 10))]


@pytest.mark.parametrize("answer", [(206, {}, b"12345"), (200, {}, b"12345678901")], ids=["less", "more"])
def test_a_body_of_another_size_is_no_answer(script: Script, answer: Reply) -> None:
    script.replies = [answer]

    with pytest.raises(Unavailable):
        script.line.fetch(S3Request("GET", "/b/k"), [memoryview(bytearray(10))])


def test_a_body_that_is_cut_is_asked_for_again(script: Script) -> None:
    cut = {"Content-Length": "10", "Connection": "close"}
    script.replies = [(206, cut, b"12345"), (206, {}, b"abcdefghij")]
    view = memoryview(bytearray(10))
    script.line.fetch(S3Request("GET", "/b/k"), [view])

    assert bytes(view) == b"abcdefghij"


def test_connections_are_kept(script: Script) -> None:
    for _ in range(5):
        script.line.ask(S3Request("GET", "/b/k"))

    assert len(script.connections) == 1


def test_a_connection_that_the_store_closed_is_not_used(script: Script) -> None:
    script.replies = [(200, {"Connection": "close"}, b""), (200, {}, b"")]
    for _ in range(2):
        script.line.ask(S3Request("POST", "/b/k"))

    assert len(script.asked) == 2


def test_a_child_makes_connections_of_its_own(script: Script) -> None:
    script.line.ask(S3Request("GET", "/b/k"))
    child = os.fork()
    if not child:
        status = script.line.ask(S3Request("GET", "/b/k")).status
        os._exit(status == http.client.OK)
    _, status = os.waitpid(child, 0)
    script.line.ask(S3Request("GET", "/b/k"))

    assert os.waitstatus_to_exitcode(status) == 1
    assert len(script.connections) == 2


def test_a_virtual_host_is_named_and_signed(script: Script) -> None:
    with closing(_line(f"http://1:{script.port}")) as line:
        Bucket("127.0.0", line, path_style=False).put("a b", b"", ALWAYS, "job")  # a name that needs no DNS

    ((_, path, headers, _),) = script.asked
    assert (path, headers["host"]) == ("/a%20b", f"127.0.0.1:{script.port}")


def test_a_bucket_elsewhere_is_told_with_its_setting(script: Script) -> None:
    script.replies = [(301, {"Location": "http://127.0.0.1:1/"}, ERROR % b"PermanentRedirect")]

    with pytest.raises(PathRefused, match=r"\[kms\.jobs\.buckets\.b\]"):
        script.bucket.head("k")
    assert len(script.asked) == 1


def test_a_completion_that_fails_late_is_no_completion(script: Script) -> None:
    script.replies = [(200, {}, b"\n " + ERROR % b"InvalidPart")]

    with pytest.raises(PathRefused, match="InvalidPart"):
        script.bucket.complete("k", "u", [UploadedPart(1, "e", 1)], ALWAYS)


@pytest.mark.parametrize(
    ("status", "code", "end"),
    [
        (412, b"PreconditionFailed", Completion.TAKEN),
        (409, b"ConditionalRequestConflict", Completion.TAKEN),
        (404, b"NoSuchUpload", Completion.GONE),
    ],
)
def test_a_completion_ends_in_three_ways(script: Script, status: int, code: bytes, end: Completion) -> None:
    script.replies = [(status, {}, ERROR % code)]

    assert script.bucket.complete("k", "u", [UploadedPart(1, "e", 1)], If(absent=True)) is end
    _, _, headers, body = script.asked[0]
    assert headers["if-none-match"] == "*"
    assert b'<PartNumber>1</PartNumber><ETag>"e"</ETag>' in body


def test_a_listing_goes_on_to_its_end(script: Script) -> None:
    page = (
        b"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>%s</IsTruncated>%s"
        b"<NextContinuationToken>a&amp;b</NextContinuationToken></ListBucketResult>"
    )
    entry = b"<Contents><Key>%s</Key><Size>%d</Size></Contents>"
    script.replies = [
        (200, {}, page % (b"true", entry % (b"in/a+b%2Bc", 3) + entry % (b"in/d", 4))),
        (200, {}, page % (b"false", entry % (b"in/e", 5))),
    ]

    assert [found[:2] for found in script.bucket.listed("in/")] == [("in/a b+c", 3), ("in/d", 4), ("in/e", 5)]
    assert "continuation-token=a%26b" in script.asked[1][1]
    assert "prefix=in%2F" in script.asked[1][1]


def test_parts_are_listed_to_their_end(script: Script) -> None:
    page = b"<ListPartsResult><IsTruncated>%s</IsTruncated>%s</ListPartsResult>"
    part = b"<Part><PartNumber>%d</PartNumber><ETag>&quot;e&quot;</ETag><Size>7</Size></Part>"
    script.replies = [
        (200, {}, page % (b"true", part % 1 + part % 2)),
        (200, {}, page % (b"false", part % 3)),
    ]

    assert script.bucket.parts("k", "u") == [UploadedPart(number, "e", 7) for number in (1, 2, 3)]
    assert "part-number-marker=2" in script.asked[1][1]


def test_a_store_that_ignores_a_copy_is_found_out(script: Script) -> None:
    script.replies = [(200, {"ETag": '"of-nothing"'}, b"")]
    source = ObjectReader(script.bucket, "ü +", '"e"', 10, 5)

    assert script.bucket.copy_part("k", "u", 2, source) is None
    _, _, headers, _ = script.asked[0]
    assert headers["x-amz-copy-source"] == "/b/%C3%BC%20%2B"
    assert headers["x-amz-copy-source-range"] == "bytes=5-14"


def test_an_endless_answer_is_cut(script: Script) -> None:
    script.replies = [(200, {}, bytes(9 * 1024 * 1024))]

    with pytest.raises(Unavailable):
        script.line.ask(S3Request("GET", "/b/k"))


def test_a_connection_that_ended_while_it_was_kept_is_not_used(script: Script) -> None:
    script.replies = [(200, {"Connection": "keep-alive"}, b"")]
    script.line.ask(S3Request("POST", "/b/k"))
    (kept,) = script.line._idle  # noqa: SLF001 -- what the store does to it cannot be timed
    kept.sock.shutdown(socket.SHUT_RDWR)
    script.line.ask(S3Request("POST", "/b/k"))

    assert len(script.asked) == 2


@pytest.mark.parametrize("trusted", [True, False])
def test_tls_is_for_a_name_under_an_authority_that_is_trusted(tmp_path: Path, *, trusted: bool) -> None:
    authority = make_localhost_tls(tmp_path)
    trust = ssl.create_default_context(cafile=authority.ca_file if trusted else None)
    with scripted((200, {}, b"fine"), tls=authority.serving()) as script:
        for host, known in (("localhost", trusted), ("127.0.0.1", False)):
            with closing(_line(f"https://{host}:{script.port}", trust)) as line:
                if known:
                    assert line.ask(S3Request("GET", "/b/k")).body == b"fine"
                else:
                    with pytest.raises(Unavailable, match="SSLCertVerificationError"):
                        line.ask(S3Request("GET", "/b/k"))


@pytest.mark.parametrize(
    "headers", [{}, {"ETag": '"e"', "Content-Length": "many"}], ids=["no-etag", "no-size"]
)
def test_an_object_without_size_or_tag_is_none_to_work_on(script: Script, headers: dict[str, str]) -> None:
    script.replies = [(200, headers, b"")]

    with pytest.raises(PathRefused):
        script.bucket.head("k")


def test_an_upload_without_an_id_is_none(script: Script) -> None:
    with pytest.raises(PathRefused):
        script.bucket.begin("k", "job")


@pytest.mark.parametrize("status", [204, 404])
def test_an_upload_that_is_gone_is_aborted_already(script: Script, status: int) -> None:
    script.replies = [(status, {}, b"")]

    script.bucket.abort("k", "u")
    assert script.asked[0][:2] == ("DELETE", "/b/k?uploadId=u")


def test_request_without_an_answer_arrives_no_later() -> None:
    """A write that is tried again, and then deleted, must not come after the deletion."""
    body = bytes(512 * 1024)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line = _line(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(Unavailable):
            line.ask(S3Request("PUT", "/b/k", body=body))

        for _ in range(SILENCES):
            with server.accept()[0] as connection:
                assert len(_read_all(connection)) < len(body)


def _read_all(connection: socket.socket) -> bytes:
    """All that arrives, until the other side ends or resets the connection."""
    found = b""
    connection.settimeout(5)
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            found += data
    return found
