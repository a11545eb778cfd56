"""What a Cosmian KMS server's words mean, in a field of their own or as the text of an error."""

import msgspec
import pytest

from kms_core.backends.cosmian.kmip import Kind, Node, Refusal, octets, structure, text

WORDS = {
    "Item_Not_Found: Encrypt: key id: pay, not found": Kind.MISSING,
    "Item not found: Encrypt: key id: pay, not found": Kind.MISSING,
    "Operation_Not_Supported: Item not found: Encrypt: key id: pay, not found": Kind.MISSING,  # before 5.13
    "Item_Not_Found: Decrypt: failed to retrieve the key: pay": Kind.MISSING,
    "Invalid Request: Encrypt: failed to retrieve key: pay": Kind.MISSING,  # 4.24
    "Object_Not_Found: object not found for identifier pay": Kind.MISSING,
    "Permission_Denied: Encrypt: key pay is in state Deactivated but operation requires one of "
    "[Active]": Kind.STATE,
    "Permission_Denied: Encrypt: the user bob does not have permission to encrypt using the "
    "key: pay": Kind.DENIED,
    "Access denied: Encrypt: the user bob does not have permission to use the key: pay": Kind.DENIED,
    "Cryptographic_Failure: CRYPTO: error: Error: OpenSSL error. Details: ErrorStack([])": Kind.CRYPTO,
    "Cryptographic error: OpenSSL Error: Error: OpenSSL error. Details: ErrorStack([])": Kind.CRYPTO,  # 4.24
    "Operation_Not_Supported: Database Error: Ext. store error: one or more objects already "
    "exist": Kind.EXISTS,
    "Ext. store error: creation of object failed: Database Error: error returned from database: "
    "(code: 1555) UNIQUE constraint failed: objects.id": Kind.EXISTS,  # 4.24
    'Database Error: error returned from database: duplicate key value violates "x_pkey"': Kind.EXISTS,
    "Operation_Not_Supported: Database Error: connection closed": Kind.BUSY,
    "Operation_Not_Supported: Redis Error: broken pipe": Kind.BUSY,
    "Operation_Not_Supported: Unexpected server error: no more memory": Kind.BUSY,
    "Operation_Not_Supported: Invalid Request: Encrypt: data to encrypt must be provided": Kind.OTHER,
    "Item_Not_Found: Decrypt: failed to retrieve the key: Cryptographic_Failure": Kind.MISSING,
    ": ": Kind.OTHER,
}


@pytest.mark.parametrize(("words", "kind"), WORDS.items())
def test_words_are_of_a_kind(words: str, kind: Kind) -> None:
    assert Refusal.of(words).kind is kind


def test_a_state_is_told() -> None:
    words = "Encrypt: key pay is in state PreActive but operation requires one of [Active]"

    assert (Refusal.of(words).kind, Refusal.of(words).state) == (Kind.STATE, "PreActive")


def test_a_type_stands_before_its_value() -> None:
    """The server reads a stream: it has to know the type when the value comes."""
    node = structure("Encrypt", text("UniqueIdentifier", "pay"), octets("Data", b"\xab"))

    assert msgspec.json.encode(node) == (
        b'{"tag":"Encrypt","type":"Structure","value":['
        b'{"tag":"UniqueIdentifier","type":"TextString","value":"pay"},'
        b'{"tag":"Data","type":"ByteString","value":"AB"}]}'
    )


def test_structures_without_a_type_and_hex_of_either_case_are_read() -> None:
    fields = b'{"tag":"D","type":"ByteString","value":"aB"},{"tag":"U","type":"TextString","value":"x"}'
    node = msgspec.json.decode(b'{"tag":"R","value":[' + fields + b"]}", type=Node)

    assert (node.octets("D"), node.text("U"), node.text("none"), node.octets("U")) == (b"\xab", "x", "", b"")
