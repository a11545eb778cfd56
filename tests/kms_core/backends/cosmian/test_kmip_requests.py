"""What we ask a Cosmian KMS server for, field by field and in their order.

The server takes requests that are weaker than ours without a word: CBC, no parameters at all, keys of 128
bits, keys for any use. So no answer of its tells whether we asked for the right thing, and these tests look
at the requests. They are written out here as KMIP 2.1 and RFC 7516 have them; none of our code makes them.
"""

import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from typing import Any, Final

import pytest

from kms_core.backends.cosmian.backend import CosmianCipher
from support.contract.cosmian_ciphers import AAD, SECRET, cipher_of, with_first_version
from support.contract.cosmian_double import NEW, OLD, CosmianDouble

UID: Final = str(uuid.uuid5(uuid.UUID("5d9be8cf-0f4c-4c0d-9e5c-6d6b8f1e7a51"), "payroll/1"))
HEADER: Final = f'{{"alg":"dir","enc":"A256GCM","kid":"{UID}"}}'
PLAINTEXT: Final = "01000102030405060708090A0B0C0D0E0F"
"""A byte that BulkData does not begin with, and the secret."""

Tree = tuple[Any, ...]
GCM: Final = (
    "CryptographicParameters",
    "Structure",
    [("BlockCipherMode", "Enumeration", "GCM"), ("CryptographicAlgorithm", "Enumeration", "AES")],
)
LIST_OF_TAGS: Final = '["kms-service:payroll"]'
TAGGED: Final[dict[str, Tree]] = {
    NEW: (
        "Attribute",
        "Structure",
        [
            ("VendorIdentification", "TextString", "cosmian"),
            ("AttributeName", "TextString", "tag"),
            ("AttributeValue", "TextString", LIST_OF_TAGS),
        ],
    ),
    OLD: (
        "VendorAttributes",
        "Structure",
        [
            (
                "VendorAttributes",
                "Structure",
                [
                    ("VendorIdentification", "TextString", "cosmian"),
                    ("AttributeName", "TextString", "tag"),
                    ("AttributeValue", "ByteString", LIST_OF_TAGS.encode().hex().upper()),
                ],
            )
        ],
    ),
}
NONCE: Final = {NEW: "IVCounterNonce", OLD: "IvCounterNonce"}
both = pytest.mark.parametrize("version", [NEW, OLD], ids=["5", "4"])


def b64(octets: bytes) -> str:
    """Base64url without padding (RFC 7515 §2)."""
    return urlsafe_b64encode(octets).rstrip(b"=").decode()


def tree(node: dict[str, Any]) -> Tree:
    """A node as a tuple; its members have to stand in the order in which the server's reader wants them."""
    assert list(node) == ["tag", "type", "value"]
    value = node["value"]
    return node["tag"], node["type"], [tree(each) for each in value] if isinstance(value, list) else value


def sent(double: CosmianDouble, operation: str) -> list[Tree]:
    """The fields of the one request of this operation, which 5.x gets in a message and 4.x bare."""
    found = [fields for name, fields in _operations(double) if name == operation]
    assert len(found) == 1
    return found[0]


def _operations(double: CosmianDouble) -> Iterator[tuple[str, list[Tree]]]:
    for path, body in double.requests:
        if not body:
            continue
        assert path == "/kmip/2_1"
        name, kind, fields = tree(body)
        assert kind == "Structure"
        if name != "RequestMessage":
            yield name, fields
            continue
        for _, _, item in fields[1:]:
            (_, _, operation), _, (payload, _, inside) = item
            assert payload == "RequestPayload"
            yield operation, inside


def asked(double: CosmianDouble) -> CosmianCipher:
    """A cipher whose key is there, and whose requests so far are forgotten."""
    cipher = with_first_version(cipher_of(double))
    cipher.versions()
    double.requests.clear()
    return cipher


AUTHENTICATED: Final = f"{b64(HEADER.encode())}.{b64(AAD)}".encode().hex().upper()


@both
def test_an_encryption_names_its_key_and_mode_and_no_nonce(version: str) -> None:
    with CosmianDouble(version) as double:
        asked(double).encrypt(SECRET, "1", AAD)

        assert sent(double, "Encrypt") == [
            ("UniqueIdentifier", "TextString", UID),
            GCM,
            ("Data", "ByteString", PLAINTEXT),
            ("AuthenticatedEncryptionAdditionalData", "ByteString", AUTHENTICATED),
        ]


@both
def test_a_decryption_gives_all_that_gcm_needs(version: str) -> None:
    with CosmianDouble(version) as double:
        cipher = asked(double)
        wrapped = cipher.encrypt(SECRET, "1", AAD)
        cipher.decrypt(wrapped, "1", AAD)

        assert sent(double, "Decrypt") == [
            ("UniqueIdentifier", "TextString", UID),
            GCM,
            ("Data", "ByteString", wrapped[13:30].hex().upper()),
            (NONCE[version], "ByteString", wrapped[1:13].hex().upper()),
            ("AuthenticatedEncryptionAdditionalData", "ByteString", AUTHENTICATED),
            ("AuthenticatedEncryptionTag", "ByteString", wrapped[30:].hex().upper()),
        ]


@both
def test_a_key_is_of_256_bits_sensitive_and_for_nothing_but_encrypt_and_decrypt(version: str) -> None:
    with CosmianDouble(version) as double:
        with_first_version(cipher_of(double))
        kind, (_, _, attributes) = sent(double, "Create")

    only_new = [
        ("ActivationDate", "DateTime", "2020-01-01T00:00:00Z"),
        (
            "Name",
            "Structure",
            [
                ("NameValue", "TextString", "payroll/1"),
                ("NameType", "Enumeration", "UninterpretedTextString"),
            ],
        ),
    ]
    assert kind == ("ObjectType", "Enumeration", "SymmetricKey")
    assert attributes == [
        ("CryptographicAlgorithm", "Enumeration", "AES"),
        ("CryptographicLength", "Integer", 256),
        ("CryptographicUsageMask", "Integer", 12),  # Encrypt 4, Decrypt 8 (KMIP 2.1 §11.12)
        ("KeyFormatType", "Enumeration", "TransparentSymmetricKey"),
        ("ObjectType", "Enumeration", "SymmetricKey"),
        ("UniqueIdentifier", "TextString", UID),
        ("Sensitive", "Boolean", True),
        *(only_new if version == NEW else []),
        TAGGED[version],
    ]


@both
def test_keys_are_found_by_kind_and_tag(version: str) -> None:
    with CosmianDouble(version) as double:
        asked(double).versions()

        wanted = [("ObjectType", "Enumeration", "SymmetricKey"), TAGGED[version]]
        assert sent(double, "Locate") == [("Attributes", "Structure", wanted)]


@both
def test_of_a_key_its_state_age_and_key_set_are_asked(version: str) -> None:
    with CosmianDouble(version) as double:
        asked(double).versions()

        assert sent(double, "GetAttributes") == [
            ("UniqueIdentifier", "TextString", UID),
            ("AttributeReference", "Enumeration", "State"),
            ("AttributeReference", "Enumeration", "InitialDate"),
            ("AttributeReference", "Enumeration", "RotateName"),
        ]


def test_a_message_goes_on_after_a_failure_and_numbers_its_operations(double: CosmianDouble) -> None:
    asked(double).encrypt(SECRET, "1", AAD)
    ((_, body),) = double.requests
    name, _, (header, (_, _, item)) = tree(body)

    assert name == "RequestMessage"
    assert header == (
        "RequestHeader",
        "Structure",
        [
            (
                "ProtocolVersion",
                "Structure",
                [("ProtocolVersionMajor", "Integer", 2), ("ProtocolVersionMinor", "Integer", 1)],
            ),
            ("BatchErrorContinuationOption", "Enumeration", "Continue"),
            ("BatchOrderOption", "Boolean", True),
            ("BatchCount", "Integer", 1),
        ],
    )
    assert item[:2] == [("Operation", "Enumeration", "Encrypt"), ("UniqueBatchItemID", "ByteString", "00")]


def test_jose_names_direct_encryption_with_gcm_of_256_bits(double: CosmianDouble) -> None:
    asked(double)
    cipher = cipher_of(double, "jose")
    cipher.versions()
    double.requests.clear()
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    cipher.decrypt(wrapped, "1", AAD)

    assert double.requests == [
        (
            "/v1/crypto/encrypt",
            {
                "kid": UID,
                "alg": "dir",
                "enc": "A256GCM",
                "data": b64(bytes.fromhex(PLAINTEXT)),
                "aad": b64(AAD),
            },
        ),
        (
            "/v1/crypto/decrypt",
            {
                "protected": b64(HEADER.encode()),
                "encrypted_key": "",
                "iv": b64(wrapped[1:13]),
                "ciphertext": b64(wrapped[13:30]),
                "tag": b64(wrapped[30:]),
                "aad": b64(AAD),
            },
        ),
    ]
