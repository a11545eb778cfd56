"""KMIP 2.1 operations on a Cosmian KMS server, in the dialects of 5.x and 4.x.

From 5.0 on, operations travel in a RequestMessage, which gives the reason of each failure in a field of its
own; what several threads ask at once goes in one message. 4.x gets one operation a call, and says in text
what was wrong. Never BulkData, which drops the AAD. Knows no settings and no versions of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, Protocol

import msgspec

from kms_core.backends.cosmian.batcher import Batcher
from kms_core.backends.cosmian.ttlv import (
    Kind,
    Node,
    Refusal,
    date,
    flag,
    name,
    number,
    octets,
    refusal,
    structure,
    text,
)
from kms_core.http_client.peer import PeerAnswer
from kms_protocol.errors import BackendUnavailable

PATH: Final = "/kmip/2_1"
_USAGE: Final = 4 + 8  # encrypt and decrypt
_LONG_AGO: Final = "2020-01-01T00:00:00Z"  # without a past date of activation a key of 5.13 and later rests
_GCM: Final = structure(
    "CryptographicParameters", name("BlockCipherMode", "GCM"), name("CryptographicAlgorithm", "AES")
)
_REFUSING: Final = (  # the last is also what a wrong tag gets
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.INTERNAL_SERVER_ERROR,
)
_PLACE: Final = "UniqueBatchItemID"  # comes back with the answer
_HEADER: Final = (
    structure("ProtocolVersion", number("ProtocolVersionMajor", 2), number("ProtocolVersionMinor", 1)),
    name("BatchErrorContinuationOption", "Continue"),
    flag("BatchOrderOption", value=True),
)


class KmipConnection(Protocol):
    """The connection to the server, as us."""

    def post(self, path: str, body: bytes, judged: Sequence[int] = ()) -> PeerAnswer:
        """Raises what calls raise; 4xx, and 5xx that are judged, are answered."""

    def left_s(self) -> float:
        """Seconds that this thread's call may still take."""

    def late(self) -> BackendUnavailable:
        """The error for a call whose time is over."""


@dataclass(frozen=True, slots=True)
class GcmResult:
    """What AES-GCM makes of a plaintext: nonce, as many bytes as the plaintext, tag."""

    nonce: bytes
    ciphertext: bytes
    tag: bytes


@dataclass(frozen=True, slots=True)
class KeyAttributes:
    """What the server tells of a key; ``state`` is a name of KMIP's, such as ``Active``."""

    state: str
    created: str
    keyset: str


class Sender(Protocol):
    """How operations get to the server."""

    def ask(self, operation: Node) -> Node:
        """The fields of the answer. Raises Refusal, and what calls raise."""


class Messages:
    """Operations of 5.0 and later."""

    def __init__(self, line: KmipConnection, lanes: int) -> None:
        self._line = line
        self._coalescer: Batcher[Node, Node] = Batcher(self._send, lanes=lanes)

    @property
    def waiting(self) -> int:
        """How many operations wait for the next message."""
        return self._coalescer.waiting

    def ask(self, operation: Node) -> Node:
        try:
            return self._coalescer.call(operation, self._line.left_s())
        except TimeoutError:
            raise self._line.late() from None

    def _send(self, operations: Sequence[Node]) -> Sequence[Node | Refusal]:
        header = structure("RequestHeader", *_HEADER, number("BatchCount", len(operations)))
        items = (_item(place, each) for place, each in enumerate(operations))
        message = structure("RequestMessage", header, *items)
        answer = self._line.post(PATH, msgspec.json.encode(message))
        if not answer.ok:
            raise answer.odd()
        found = answer.read(Node)
        outcomes = [node for node in found.fields if node.tag == "BatchItem"]
        places = [node.octets(_PLACE) for node in outcomes]
        if found.tag != "ResponseMessage" or places != [bytes([place]) for place in range(len(operations))]:
            raise answer.odd()  # an answer to another's question would make a file that nobody opens
        return [_outcome(each) for each in outcomes]


def _item(place: int, operation: Node) -> Node:
    payload = structure("RequestPayload", *operation.fields)
    return structure("BatchItem", name("Operation", operation.tag), octets(_PLACE, bytes([place])), payload)


def _outcome(item: Node) -> Node | Refusal:
    payload = item.find("ResponsePayload")
    if item.text("ResultStatus") == "Success" and payload is not None:
        return payload
    return refusal(f"{item.text('ResultReason')}: {item.text('ResultMessage')}")


class Singles:
    """Operations of 4.x, one in each call."""

    def __init__(self, line: KmipConnection) -> None:
        self._line = line

    def ask(self, operation: Node) -> Node:
        answer = self._line.post(PATH, msgspec.json.encode(operation), _REFUSING)
        if answer.status in _REFUSING:
            found = refusal(answer.body.decode("utf-8", "replace"))
            within = answer.status == HTTPStatus.INTERNAL_SERVER_ERROR
            raise Refusal(Kind.BUSY) if within and found.kind is Kind.OTHER else found
        fields = answer.read(Node) if answer.ok else None
        if fields is None or fields.tag != f"{operation.tag}Response":
            raise answer.odd()
        return fields


class Kmip:
    """Operations by name, whichever way they are sent. Safe to call from several threads."""

    def __init__(self, sender: Sender, *, old: bool = False) -> None:
        """``old``: in the dialect of 4.x."""
        self._ask = sender.ask
        self._old = old
        self._nonce = "IvCounterNonce" if old else "IVCounterNonce"

    def seal(self, uid: str, plaintext: bytes, aad: bytes) -> GcmResult | None:
        """AES-GCM under a nonce of the server's; None if another key than ``uid`` did it. Raises Refusal."""
        found = self._ask(
            structure(
                "Encrypt",
                text("UniqueIdentifier", uid),
                _GCM,
                octets("Data", plaintext),
                octets("AuthenticatedEncryptionAdditionalData", aad),
            )
        )
        if found.text("UniqueIdentifier") != uid:
            return None
        return GcmResult(
            found.octets(self._nonce), found.octets("Data"), found.octets("AuthenticatedEncryptionTag")
        )

    def open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes | None:
        """The plaintext; None if another key than ``uid`` gave it. Raises Refusal."""
        found = self._ask(
            structure(
                "Decrypt",
                text("UniqueIdentifier", uid),
                _GCM,
                octets("Data", sealed.ciphertext),
                octets(self._nonce, sealed.nonce),
                octets("AuthenticatedEncryptionAdditionalData", aad),
                octets("AuthenticatedEncryptionTag", sealed.tag),
            )
        )
        return found.octets("Data") if found.text("UniqueIdentifier") == uid else None

    def create(self, uid: str, label: str, tag: str) -> None:
        """A 256-bit AES key that may encrypt and decrypt, and never leaves in clear. Raises Refusal."""
        attributes = [
            name("CryptographicAlgorithm", "AES"),
            number("CryptographicLength", 256),
            number("CryptographicUsageMask", _USAGE),
            name("KeyFormatType", "TransparentSymmetricKey"),
            name("ObjectType", "SymmetricKey"),
            text("UniqueIdentifier", uid),
            flag("Sensitive", value=True),
        ]
        if not self._old:
            attributes += [
                date("ActivationDate", _LONG_AGO),
                structure("Name", text("NameValue", label), name("NameType", "UninterpretedTextString")),
            ]
        attributes.append(self._tagged(tag))
        self._ask(
            structure("Create", name("ObjectType", "SymmetricKey"), structure("Attributes", *attributes))
        )

    def locate(self, tag: str) -> list[str]:
        """The identifiers of at most 1,000 symmetric keys that bear a tag, whoever owns them."""
        wanted = structure("Attributes", name("ObjectType", "SymmetricKey"), self._tagged(tag))
        found = self._ask(structure("Locate", wanted))
        nested = found.find("UniqueIdentifier") if self._old else found
        return nested.texts("UniqueIdentifier") if nested else []

    def attributes(self, uid: str) -> KeyAttributes:
        """Raises Refusal."""
        references = (name("AttributeReference", each) for each in ("State", "InitialDate", "RotateName"))
        found = self._ask(structure("GetAttributes", text("UniqueIdentifier", uid), *references))
        told = found.find("Attributes") or structure("Attributes")
        return KeyAttributes(told.text("State"), told.text("InitialDate"), told.text("RotateName"))

    def _tagged(self, tag: str) -> Node:
        """The vendor's attribute that holds the tags of a key, as a JSON list."""
        value = f'["{tag}"]'
        fields = (text("VendorIdentification", "cosmian"), text("AttributeName", "tag"))
        if not self._old:
            return structure("Attribute", *fields, text("AttributeValue", value))
        one = structure("VendorAttributes", *fields, octets("AttributeValue", value.encode()))
        return structure("VendorAttributes", one)
