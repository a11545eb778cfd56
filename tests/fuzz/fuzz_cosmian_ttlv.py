"""What a Cosmian KMS server may answer over KMIP: a node, a refusal, or an error that blames the server."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import msgspec

from kms_core.backends.cosmian.kmip import (
    GcmResult,
    Kind,
    Kmip,
    Messages,
    Node,
    Refusal,
    ask_alone,
    name,
    octets,
    structure,
    text,
)
from kms_core.http_client import Peer, PeerAnswer, PeerServer
from kms_protocol.errors import BackendUnavailable
from support.fuzz.harness import SEPARATOR, assert_not_echoed, parts

MOST_BYTES: Final = 4 * 1024
UID: Final = "5d9be8cf-0f4c-4c0d-9e5c-6d6b8f1e7a51"
SERVER: Final = PeerServer("http://kms.example.com", "Cosmian KMS", "kms.cosmian.server_url", 5.0)
PEER: Final = Peer(SERVER)
STATUSES: Final = (200, 401, 404, 422, 500)
WORDS: Final = (
    b'{"tag":"',
    b'","type":"Structure","value":[',
    b'"TextString"',
    b'"ByteString"',
    b'"Enumeration"',
    b'"ResponsePayload"',
    b'"ResultReason"',
    b'"UniqueIdentifier"',
    UID.encode(),
    b"Item_Not_Found",
    b"Cryptographic_Failure",
    b" is in state Active but operation requires ",
    b"Operation_Not_Supported: ",
    b"[" * 64,
)


class FixedAnswer:
    """A connection whose server answers this to everything."""

    def __init__(self, status: int, body: bytes) -> None:
        self._answer = PeerAnswer(SERVER, status, body)

    def post(self, path: str, body: bytes, judged: Sequence[int]) -> PeerAnswer:
        assert path.startswith("/")
        assert json.loads(body)
        assert isinstance(judged, Sequence)
        return self._answer


def seeds() -> Iterable[bytes]:
    """A status, and an answer of either dialect to each operation; one refusal."""
    fields = [
        text("UniqueIdentifier", UID),
        octets("Data", b"d" * 17),
        octets("IVCounterNonce", b"n" * 12),
        octets("IvCounterNonce", b"n" * 12),
        octets("AuthenticatedEncryptionTag", b"t" * 16),
    ]
    told = structure("Attributes", text("State", "Active"), text("InitialDate", "2026-01-01T00:00:00Z"))
    payload = structure("ResponsePayload", *fields, told)
    placed = octets("UniqueBatchItemID", b"\x00")
    good = structure("BatchItem", placed, name("ResultStatus", "Success"), payload)
    bad = structure(
        "BatchItem",
        placed,
        name("ResultStatus", "OperationFailed"),
        name("ResultReason", "Item_Not_Found"),
        text("ResultMessage", "no such thing"),
    )
    for item in (good, bad):
        yield b"\x00" + msgspec.json.encode(structure("ResponseMessage", item))
    for operation in ("Encrypt", "Decrypt", "Create", "Locate", "GetAttributes"):
        yield b"\x00" + msgspec.json.encode(structure(f"{operation}Response", *fields, told))
    yield b"\x04Item not found: " + SEPARATOR + b"x"
    yield b"\x03Invalid Request: x: failed to retrieve"
    yield b"\x00" + b'{"tag":"a","value":[' * 50


def check(data: bytes) -> None:
    status, body = STATUSES[(data[:1] or b"\x00")[0] % len(STATUSES)], data[1:]
    _node(body)
    _reasons(body)
    post = FixedAnswer(status, body).post
    with PEER.one_timeout():
        _each(Kmip(Messages(post, PEER).ask))
        _each(Kmip(partial(ask_alone, post), old=True))


def _node(body: bytes) -> None:
    try:
        node = PeerAnswer(SERVER, 200, body).read(Node)
    except BackendUnavailable as exc:
        if len(body) > len("Cosmian"):
            assert_not_echoed(exc.detail, [body])
        return
    assert msgspec.json.decode(msgspec.json.encode(node), type=Node) == node
    for field in node.fields:
        assert isinstance(node.octets(field.tag), bytes)
        assert node.find(field.tag) is not None
        assert len(node.texts(field.tag)) <= len(node.fields)


def _reasons(body: bytes) -> None:
    """Words of a server are judged, and never said again, but for the name of a state."""
    reason, _ = parts(body, 2)
    words = reason.decode("utf-8", "replace")
    found = Refusal.of(words)
    assert found.kind in Kind
    assert found.state in words
    assert found.detail == found.kind.value


def _each(kmip: Kmip) -> None:
    sealed = GcmResult(b"n" * 12, b"c" * 17, b"t" * 16)
    calls: Sequence[tuple[Callable[[], object], object]] = (
        (lambda: kmip.seal(UID, b"p" * 17, b"aad"), GcmResult | None),
        (lambda: kmip.open(UID, sealed, b"aad"), bytes | None),
        (lambda: kmip.create(UID, "label", "tag"), None),
        (lambda: kmip.locate("tag"), list),
        (lambda: kmip.attributes(UID), object),
    )
    for call, kind in calls:
        try:
            found = call()
        except (Refusal, BackendUnavailable):
            continue
        assert kind is None or isinstance(found, kind)  # type: ignore[arg-type]  # unions are classes here
