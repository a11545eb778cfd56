"""KMIP 2.1 operations on a Cosmian KMS server, in the dialects of 5.x and 4.x, and their JSON form of TTLV.

From 5.0 on, operations are items of a RequestMessage, whose answer has a field for the reason of each
failure. Concurrent calls are batched: those that arrive while a message is in flight form the next one, and a
call is sent at once if none is. 4.x gets one operation for each request and describes failures in text.
BulkData, which drops the AAD, is never used.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http import HTTPStatus
from typing import Final, Self

import msgspec

from kms_core.backends.batching import Batcher
from kms_core.http_client import Peer, PeerAnswer
from kms_protocol.errors import KmsError

# TTLV in JSON in the form of Cosmian KMS, and the reasons of its refusals.
#
# A node is ``{"tag", "type", "value"}``, in that order: the server parses a stream, and treats a value
# before its type as a structure. Structures in answers of 5.x have no type. Bytes are hexadecimal, in
# either case.

_REASONS: Final = r"^(?:Operation_Not_Supported: )?"
PATH: Final = "/kmip/2_1"
_USAGE: Final = 4 + 8  # encrypt and decrypt
_LONG_AGO: Final = "2020-01-01T00:00:00Z"  # from 5.13 on a key without a past activation date stays PreActive
Post = Callable[[str, bytes, Sequence[int]], PeerAnswer]
"""Sends a body to a path of the server (``CosmianServer.post``)."""


class Kind(Enum):
    """The reason of a refused operation."""

    MISSING = "no such key"
    STATE = "the key is in a state that does not allow it"
    DENIED = "the key is not ours to use"
    CRYPTO = "ciphertext, tag or AAD are not right"
    EXISTS = "the identifier is taken"
    BUSY = "an internal error of the server"
    OTHER = "something else"


_KINDS: Final = tuple(  # the first match; anchored where an identifier could contain such a text
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r" is in state (?P<state>\w+) but operation requires ", Kind.STATE),
        (r"objects already exist|UNIQUE constraint failed|(?i:duplicate (?:key|entry))", Kind.EXISTS),
        (_REASONS + r"(?:Item not found|Item_Not_Found|Object_Not_Found|Object_Destroyed)", Kind.MISSING),
        (_REASONS + r"Invalid Request: \w+: failed to retrieve", Kind.MISSING),  # before 5.13
        (_REASONS + r"(?:Access denied|Permission_Denied)", Kind.DENIED),
        (_REASONS + r"(?:Cryptographic_Failure|Cryptographic error)", Kind.CRYPTO),
        (_REASONS + r"(?:Database Error|Redis Error|Unexpected server error)", Kind.BUSY),
    )
)


class Refusal(KmsError):
    """A refused operation; ``state`` is that of the key, if it is the reason. Internal to this backend."""

    def __init__(self, kind: Kind, state: str = "") -> None:
        super().__init__(kind.value)
        self.kind = kind
        self.state = state

    @classmethod
    def of(cls, words: str) -> Self:
        """The refusal in a text of a server: ``<reason>: <message>`` of an item, or an error's body."""
        for pattern, kind in _KINDS:
            if found := pattern.search(words):
                return cls(kind, found.groupdict().get("state") or "")
        return cls(Kind.OTHER)


class Node(msgspec.Struct, frozen=True):
    """A tag with its value."""

    tag: str
    type: str = "Structure"
    value: "list[Node] | str | int | bool | None" = None

    @property
    def fields(self) -> "list[Node]":
        return self.value if isinstance(self.value, list) else []

    def find(self, tag: str) -> "Node | None":
        """The first field of this tag."""
        return next((node for node in self.fields if node.tag == tag), None)

    def text(self, tag: str) -> str:
        """The text, name or date of a field; empty if there is none."""
        node = self.find(tag)
        return node.value if node and isinstance(node.value, str) else ""

    def texts(self, tag: str) -> list[str]:
        """The texts of all fields with this tag."""
        return [node.value for node in self.fields if node.tag == tag and isinstance(node.value, str)]

    def octets(self, tag: str) -> bytes:
        """The bytes of a field; empty if there are none."""
        try:
            return bytes.fromhex(self.text(tag))
        except ValueError:
            return b""


def structure(tag: str, *fields: Node) -> Node:
    """Return a Structure."""
    return Node(tag, "Structure", list(fields))


def text(tag: str, value: str) -> Node:
    """Return a TextString."""
    return Node(tag, "TextString", value)


def name(tag: str, value: str) -> Node:
    """An enumeration, by the name of its value."""
    return Node(tag, "Enumeration", value)


def number(tag: str, value: int) -> Node:
    """Return an Integer."""
    return Node(tag, "Integer", value)


def octets(tag: str, value: bytes) -> Node:
    """Return a ByteString."""
    return Node(tag, "ByteString", value.hex().upper())


_GCM: Final = structure(
    "CryptographicParameters", name("BlockCipherMode", "GCM"), name("CryptographicAlgorithm", "AES")
)
_REFUSING: Final = (  # the last is also the status for a wrong tag
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.INTERNAL_SERVER_ERROR,
)
_INDEX: Final = "UniqueBatchItemID"  # returned with the answer
_HEADER: Final = (
    structure("ProtocolVersion", number("ProtocolVersionMajor", 2), number("ProtocolVersionMinor", 1)),
    name("BatchErrorContinuationOption", "Continue"),
    Node("BatchOrderOption", "Boolean", value=True),
)


Ask = Callable[[Node], Node]
"""Sends an operation; returns the fields of the answer. Raises Refusal, and the errors of ``Peer.call``."""


@dataclass(frozen=True, slots=True)
class GcmResult:
    """The output of AES-GCM; the ciphertext is as long as the plaintext."""

    nonce: bytes
    ciphertext: bytes
    tag: bytes


class Messages:
    """Sends operations to servers from 5.0 on, in batches."""

    def __init__(self, post: Post, peer: Peer) -> None:
        """``peer`` bounds the time that an operation may wait."""
        self._post, self._peer = post, peer
        self.batcher: Batcher[Node, Node] = Batcher(self._send)

    def ask(self, operation: Node) -> Node:
        """As ``Ask``."""
        return self._peer.in_time(partial(self.batcher.call, operation))

    def _send(self, operations: Sequence[Node]) -> Sequence[Node | Refusal]:
        header = structure("RequestHeader", *_HEADER, number("BatchCount", len(operations)))
        items = (_item(index, each) for index, each in enumerate(operations))
        message = structure("RequestMessage", header, *items)
        answer = self._post(PATH, msgspec.json.encode(message), ())
        if not answer.ok:
            raise answer.unexpected_error()
        found = answer.read(Node)
        outcomes = [node for node in found.fields if node.tag == "BatchItem"]
        indexes = [node.octets(_INDEX) for node in outcomes]
        if found.tag != "ResponseMessage" or indexes != [bytes([index]) for index in range(len(operations))]:
            raise answer.unexpected_error()  # the answer to another request would make an unreadable file
        return [_outcome(each) for each in outcomes]


def _item(index: int, operation: Node) -> Node:
    payload = structure("RequestPayload", *operation.fields)
    return structure("BatchItem", name("Operation", operation.tag), octets(_INDEX, bytes([index])), payload)


def _outcome(item: Node) -> Node | Refusal:
    payload = item.find("ResponsePayload")
    if item.text("ResultStatus") == "Success" and payload is not None:
        return payload
    return Refusal.of(f"{item.text('ResultReason')}: {item.text('ResultMessage')}")


def ask_alone(post: Post, operation: Node) -> Node:
    """As ``Ask``, for 4.x: one operation in each request."""
    answer = post(PATH, msgspec.json.encode(operation), _REFUSING)
    if answer.status in _REFUSING:
        found = Refusal.of(answer.body.decode("utf-8", "replace"))
        within = answer.status == HTTPStatus.INTERNAL_SERVER_ERROR
        raise Refusal(Kind.BUSY) if within and found.kind is Kind.OTHER else found
    fields = answer.read(Node) if answer.ok else None
    if fields is None or fields.tag != f"{operation.tag}Response":
        raise answer.unexpected_error()
    return fields


class Kmip:
    """KMIP operations. Safe for several threads."""

    def __init__(self, ask: Ask, *, old: bool = False) -> None:
        """``old``: use the dialect of 4.x."""
        self._ask = ask
        self._old = old
        self._nonce = "IvCounterNonce" if old else "IVCounterNonce"

    def seal(self, uid: str, plaintext: bytes, aad: bytes) -> GcmResult | None:
        """Encrypt by AES-GCM, nonce by the server; None if another key than ``uid`` did. Raises Refusal."""
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
        """Decrypt; None if another key than ``uid`` did. Raises Refusal."""
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
        """Make a 256-bit AES key for encrypt and decrypt, not exportable in clear. Raises Refusal."""
        attributes = [
            name("CryptographicAlgorithm", "AES"),
            number("CryptographicLength", 256),
            number("CryptographicUsageMask", _USAGE),
            name("KeyFormatType", "TransparentSymmetricKey"),
            name("ObjectType", "SymmetricKey"),
            text("UniqueIdentifier", uid),
            Node("Sensitive", "Boolean", value=True),
        ]
        if not self._old:
            attributes += [
                Node("ActivationDate", "DateTime", _LONG_AGO),
                structure("Name", text("NameValue", label), name("NameType", "UninterpretedTextString")),
            ]
        attributes.append(self._tagged(tag))
        self._ask(
            structure("Create", name("ObjectType", "SymmetricKey"), structure("Attributes", *attributes))
        )

    def locate(self, tag: str) -> list[str]:
        """The identifiers of at most 1,000 symmetric keys with a tag, of all users of the server."""
        wanted = structure("Attributes", name("ObjectType", "SymmetricKey"), self._tagged(tag))
        found = self._ask(structure("Locate", wanted))
        nested = found.find("UniqueIdentifier") if self._old else found
        return nested.texts("UniqueIdentifier") if nested else []

    def attributes(self, uid: str) -> Node:
        """``State``, ``InitialDate`` and ``RotateName`` (of its key set) of a key. Raises Refusal."""
        references = (name("AttributeReference", each) for each in ("State", "InitialDate", "RotateName"))
        found = self._ask(structure("GetAttributes", text("UniqueIdentifier", uid), *references))
        return found.find("Attributes") or structure("Attributes")

    def _tagged(self, tag: str) -> Node:
        """The vendor's attribute with the tags of a key, a JSON list."""
        value = f'["{tag}"]'
        fields = (text("VendorIdentification", "cosmian"), text("AttributeName", "tag"))
        if not self._old:
            return structure("Attribute", *fields, text("AttributeValue", value))
        one = structure("VendorAttributes", *fields, octets("AttributeValue", value.encode()))
        return structure("VendorAttributes", one)
