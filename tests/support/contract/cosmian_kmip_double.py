"""The KMIP operations of the double, in the dialects of 5.x and 4.x: fields in, fields out."""

import json
import os
import uuid
from typing import Any, Final

from support.contract.cosmian_store import Key, Refused, Store, bulk_of, items_of_bulk, text_refusal

Node = dict[str, Any]
MANY_USES: Final = 2108
"""Encrypt, decrypt, wrap, unwrap and agree on keys: what 4.x says of a key, whatever was asked for."""
OPERATIONS: Final = frozenset(
    {"Create", "Locate", "GetAttributes", "Encrypt", "Decrypt", "Activate", "Revoke", "Destroy"}
)


def find(fields: list[Node], tag: str) -> Any:  # noqa: ANN401 -- a value of any type
    """The value of the first field of this tag, or None."""
    return next((each["value"] for each in fields if each["tag"] == tag), None)


def node(tag: str, kind: str, value: object) -> Node:
    return {"tag": tag, "type": kind, "value": value}


def text(tag: str, value: str) -> Node:
    return node(tag, "TextString", value)


def octets(tag: str, value: bytes) -> Node:
    return node(tag, "ByteString", value.hex().upper())


class Kmip:
    """As 5.13 and later do it."""

    nonce = "IVCounterNonce"

    def __init__(self, store: Store) -> None:
        self.store = store

    def run(self, operation: str, fields: list[Node], user: str) -> list[Node]:
        if operation not in OPERATIONS:
            raise text_refusal(f"Not Supported route: Operation: {operation}", 404)
        answer: list[Node] = getattr(self, operation.lower())(fields, user)
        return answer

    def structure(self, tag: str, *fields: Node) -> Node:
        return {"tag": tag, "value": list(fields)}

    def create(self, fields: list[Node], user: str) -> list[Node]:
        asked = find(fields, "Attributes")
        uid = find(asked, "UniqueIdentifier") or str(uuid.uuid4())
        key = Key(os.urandom(find(asked, "CryptographicLength") // 8), user, self.tags(asked))
        key.state, key.keyset = self.first_state(asked), find(asked, "RotateName") or ""
        self.store.add(uid, key)
        return [node("ObjectType", "Enumeration", "SymmetricKey"), text("UniqueIdentifier", uid)]

    def locate(self, fields: list[Node], user: str) -> list[Node]:
        (tag,) = self.tags(find(fields, "Attributes"))
        uids = self.store.located(tag, user)
        found = [text("UniqueIdentifier", uid) for uid in uids]
        return [node("LocatedItems", "Integer", len(uids)), *self.repeated_fields("UniqueIdentifier", found)]

    def getattributes(self, fields: list[Node], user: str) -> list[Node]:
        uid = find(fields, "UniqueIdentifier")
        key = self.store.visible_key(uid, user)
        return [text("UniqueIdentifier", uid), self.structure("Attributes", *self.attributes(key))]

    def encrypt(self, fields: list[Node], user: str) -> list[Node]:
        uid = find(fields, "UniqueIdentifier")
        key = self.store.encrypting(uid, user)
        tags = ("Data", "AuthenticatedEncryptionAdditionalData", self.nonce)
        plaintext, aad, given = (read(fields, tag) for tag in tags)
        items = items_of_bulk(plaintext)
        if items is not None:
            many = bulk_of([b"".join(self.store.seal(key, item, aad, given)) for item in items])
            return [text("UniqueIdentifier", uid), octets("Data", many)]
        return self.sealed(uid, *self.store.seal(key, plaintext, aad, given), given)

    def decrypt(self, fields: list[Node], user: str) -> list[Node]:
        uid, ciphertext = find(fields, "UniqueIdentifier"), read(fields, "Data")
        key = self.store.decrypting(uid, user)
        items = items_of_bulk(ciphertext)
        if items is not None:  # without any AAD
            opened = [self.store.open(key, item[:12], item[12:], b"") for item in items]
            return [text("UniqueIdentifier", uid), octets("Data", bulk_of(opened))]
        if find(fields, self.nonce) is None:
            raise Refused("Invalid_Message", "missing-iv")
        aad, tag = (read(fields, f"AuthenticatedEncryption{each}") for each in ("AdditionalData", "Tag"))
        plaintext = self.store.open(key, read(fields, self.nonce), ciphertext + tag, aad)
        return [text("UniqueIdentifier", uid), octets("Data", plaintext)]

    def activate(self, fields: list[Node], user: str) -> list[Node]:
        uid = find(fields, "UniqueIdentifier")
        self.store.owned(uid, user).state = "Active"
        return [text("UniqueIdentifier", uid)]

    def revoke(self, fields: list[Node], user: str) -> list[Node]:
        uid = find(fields, "UniqueIdentifier")
        reason = find(fields, "RevocationReason")
        compromised = isinstance(reason, list) and "Compromise" in find(reason, "RevocationReasonCode")
        self.store.owned(uid, user).state = "Compromised" if compromised else "Deactivated"
        return [text("UniqueIdentifier", uid)]

    def destroy(self, fields: list[Node], user: str) -> list[Node]:
        uid = find(fields, "UniqueIdentifier")
        key = self.store.owned(uid, user)
        if key.state == "Active":
            raise Refused("Wrong_Key_Lifecycle_State", "DENIED")
        key.state = "Destroyed"
        return [text("UniqueIdentifier", uid)]

    # -- what differs in 4.x -------------------------------------------------------------------------

    def tags(self, attributes: list[Node]) -> frozenset[str]:
        return frozenset(json.loads(find(find(attributes, "Attribute") or [], "AttributeValue") or "[]"))

    def first_state(self, attributes: list[Node]) -> str:
        """Keys rest without a date of activation; ours is long past."""
        return "Active" if find(attributes, "ActivationDate") else "PreActive"

    def repeated_fields(self, tag: str, found: list[Node]) -> list[Node]:
        del tag
        return found

    def attributes(self, key: Key) -> list[Node]:
        """The attributes that our backend asks for, in the order of their names."""
        rotation = [
            node("RotateGeneration", "Integer", 0),
            node("RotateLatest", "Boolean", True),  # noqa: FBT003 -- a value like the others
            text("RotateName", key.keyset),
        ]
        state = node("State", "Enumeration", key.state)
        return [node("InitialDate", "DateTime", key.made), *(rotation if key.keyset else ()), state]

    def sealed(self, uid: str, nonce: bytes, ciphertext: bytes, tag: bytes, given: bytes) -> list[Node]:
        """The nonce is told unless the request gave it."""
        parts = {"Data": ciphertext, self.nonce: b"" if given else nonce, "AuthenticatedEncryptionTag": tag}
        found = [octets(name, part) for name, part in parts.items() if part or name == "Data"]
        return [text("UniqueIdentifier", uid), *found]


class OldKmip(Kmip):
    """As 4.24 does it: structures have a type, what repeats is nested, keys are in use at once."""

    nonce = "IvCounterNonce"

    def structure(self, tag: str, *fields: Node) -> Node:
        return node(tag, "Structure", list(fields))

    def tags(self, attributes: list[Node]) -> frozenset[str]:
        own = find(find(attributes, "VendorAttributes") or [], "VendorAttributes") or []
        return frozenset(json.loads(read(own, "AttributeValue") or b"[]"))

    def first_state(self, attributes: list[Node]) -> str:
        del attributes
        return "Active"

    def sealed(self, uid: str, nonce: bytes, ciphertext: bytes, tag: bytes, given: bytes) -> list[Node]:
        """All parts, even those that the request gave."""
        del given
        parts = {"Data": ciphertext, self.nonce: nonce, "AuthenticatedEncryptionTag": tag}
        return [text("UniqueIdentifier", uid), *(octets(name, part) for name, part in parts.items())]

    def repeated_fields(self, tag: str, found: list[Node]) -> list[Node]:
        return [self.structure(tag, *found)] if found else []

    def attributes(self, key: Key) -> list[Node]:
        tags = json.dumps(["_kk", *sorted(key.tags)], separators=(",", ":"))
        vendor = self.structure(
            "VendorAttributes",
            text("VendorIdentification", "cosmian"),
            text("AttributeName", "tag"),
            octets("AttributeValue", tags.encode()),
        )
        return [
            node("CryptographicAlgorithm", "Enumeration", "AES"),
            node("CryptographicLength", "Integer", len(key.octets) * 8),
            node("CryptographicUsageMask", "Integer", MANY_USES),
            node("KeyFormatType", "Enumeration", "TransparentSymmetricKey"),
            node("ObjectType", "Enumeration", "SymmetricKey"),
            node("Sensitive", "Boolean", False),  # noqa: FBT003 -- whatever was asked for
            self.structure("VendorAttributes", vendor),
        ]


def read(fields: list[Node], tag: str) -> bytes:
    return bytes.fromhex(find(fields, tag) or "")
