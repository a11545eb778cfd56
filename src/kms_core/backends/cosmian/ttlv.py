"""TTLV in JSON in the form of Cosmian KMS, and the reasons of its refusals.

A node is ``{"tag", "type", "value"}``, in that order: the server parses a stream, and treats a value before
its type as a structure. Structures in answers of 5.x have no type. Bytes are hexadecimal, in either case.
"""

import re
from enum import Enum
from typing import Final

import msgspec

from kms_protocol.errors import KmsError

_REASONS: Final = r"^(?:Operation_Not_Supported: )?"


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


def refusal(words: str) -> Refusal:
    """The refusal for a text of the server: ``<reason>: <message>`` of an item, or the body of an error."""
    for pattern, kind in _KINDS:
        if found := pattern.search(words):
            return Refusal(kind, found.groupdict().get("state") or "")
    return Refusal(Kind.OTHER)


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


def flag(tag: str, *, value: bool) -> Node:
    """Return a Boolean."""
    return Node(tag, "Boolean", value)


def date(tag: str, value: str) -> Node:
    """A time in RFC 3339."""
    return Node(tag, "DateTime", value)


def octets(tag: str, value: bytes) -> Node:
    """Return a ByteString."""
    return Node(tag, "ByteString", value.hex().upper())
