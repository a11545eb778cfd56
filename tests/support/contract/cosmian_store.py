"""What is inside of the double of a Cosmian KMS server: keys that really encrypt, their states, their owners.

Refusals are those of the recorded exchanges (``cosmian_exchanges/``), of 5.26 and of 4.24.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

LIVING: Final = frozenset({"PreActive", "Active", "Deactivated", "Compromised"})
ACTIVE: Final = frozenset({"Active"})
DECRYPTING: Final = frozenset({"Active", "Deactivated", "Compromised"})
_DETAILS: Final = "Error: OpenSSL error. Details: ErrorStack([])"


class Refused(Exception):
    """``reason`` and ``message`` as an item of a message has them; ``words`` as the body of an error."""

    def __init__(self, reason: str, message: str, *, words: str = "", status: int = 422) -> None:
        super().__init__(message)
        self.reason, self.message, self.status = reason, message, status
        self.words = words or f"{reason}: {message}"


def text_refusal(message: str, status: int = 422) -> Refused:
    """A refusal without a reason of its own."""
    return Refused("Operation_Not_Supported", message, words=message, status=status)


@dataclass
class Key:
    octets: bytes
    owner: str
    tags: frozenset[str]
    state: str = "Active"
    keyset: str = ""
    made: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    lent: dict[str, set[str]] = field(default_factory=dict)

    def may(self, user: str, operation: str) -> bool:
        return user == self.owner or bool(self.lent.get(user, set()) & {operation, "get"})


class Store:
    """The keys of one server; they outlive its restarts."""

    def __init__(self, *, old: bool = False) -> None:
        """``old``: refuse in the words of 4.x."""
        self.keys: dict[str, Key] = {}
        self.lock = threading.RLock()
        self.next_nonce: Callable[[], bytes] = lambda: os.urandom(12)
        self.old = old

    def add(self, uid: str, key: Key) -> None:
        with self.lock:
            if uid not in self.keys:
                self.keys[uid] = key
                return
        if not self.old:
            raise text_refusal("Database Error: Ext. store error: one or more objects already exist")
        raise text_refusal(
            "Ext. store error: creation of object failed: Database Error: error returned from database: "
            "(code: 1555) UNIQUE constraint failed: objects.id",
            500,
        )

    def located(self, tag: str, user: str) -> list[str]:
        with self.lock:
            return [
                uid
                for uid, key in self.keys.items()
                if tag in key.tags
                and (key.state in ACTIVE if self.old else key.state in LIVING)
                and (key.owner == user or user in key.lent)
            ]

    def visible_key(self, uid: str, user: str) -> Key:
        """A key whose attributes this user may see: his own, or one that was lent him for anything."""
        key = self.keys.get(uid)
        hidden = key is None or (key.owner != user and not key.lent.get(user))
        if key is None or hidden or (self.old and key.state not in ACTIVE):
            raise Refused("Object_Not_Found", f"object not found for identifier {uid}")
        return key

    def owned(self, uid: str, user: str) -> Key:
        key = self.keys.get(uid)
        if key is None or key.owner != user:
            words = f"Access denied: Object with uid `{uid}` is not owned by owner `{user}`"
            raise text_refusal(words, 401)
        return key

    def encrypting(self, uid: str, user: str) -> Key:
        key = self.keys.get(uid)
        if self.old and key is None:
            raise text_refusal(f"Invalid Request: Encrypt: failed to retrieve key: {uid}")
        if key is None or key.state not in LIVING:
            raise self._not_found(f"Encrypt: key id: {uid}, not found", "Encrypt", uid)
        words = f"Encrypt: the user {user} does not have permission to encrypt using the key: {uid}"
        return self._usable(uid, key, user, "Encrypt", words)

    def decrypting(self, uid: str, user: str) -> Key:
        key = self.keys.get(uid)
        if self.old and key is None:
            raise Refused("Item_Not_Found", f"Decrypt: failed to retrieve the key: {uid}")
        if key is None or key.state not in LIVING:
            raise self._not_found(f"Decrypt: failed to retrieve the key: {uid}", "Decrypt", uid)
        words = f"Decrypt: the user {user} does not have the permission to decrypt using the key: {uid}"
        return self._usable(uid, key, user, "Decrypt", words)

    def _not_found(self, message: str, name: str, uid: str) -> Refused:
        if self.old:
            return Refused("Item_Not_Found", f"{name}: no valid key for id: {uid}")
        return Refused("Item_Not_Found", message, words=f"Item not found: {message}")

    def _usable(self, uid: str, key: Key, user: str, name: str, denied: str) -> Key:
        states = DECRYPTING if name == "Decrypt" and not self.old else ACTIVE
        if key.state not in states and self.old:
            raise self._not_found("", name, uid)
        if key.state not in states:
            wanted = "Active, Deactivated, Compromised" if name == "Decrypt" else "Active"
            message = f"{name}: key {uid} is in state {key.state} but operation requires one of [{wanted}]"
            raise Refused("Permission_Denied", message)
        if not key.may(user, name.lower()):
            raise Refused("Permission_Denied", denied, words=f"Access denied: {denied}", status=401)
        return key

    def seal(self, key: Key, plaintext: bytes, aad: bytes, nonce: bytes = b"") -> tuple[bytes, bytes, bytes]:
        """Nonce, ciphertext, tag."""
        nonce = nonce or self.next_nonce()
        sealed = AESGCM(key.octets).encrypt(nonce, plaintext, aad)
        return nonce, sealed[:-16], sealed[-16:]

    def open(self, key: Key, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
        try:
            return AESGCM(key.octets).decrypt(nonce, sealed, aad)
        except (InvalidTag, ValueError):
            raise self._damaged() from None

    def _damaged(self) -> Refused:
        if self.old:
            return text_refusal(f"Cryptographic error: OpenSSL Error: {_DETAILS}", 500)
        return Refused("Cryptographic_Failure", f"CRYPTO: error: {_DETAILS}")


def items_of_bulk(data: bytes) -> list[bytes] | None:
    """The items, if these bytes would be taken for BulkData (here of short ones alone)."""
    if not data.startswith(b"\x87\x87") or len(data) <= len(b"\x87\x87"):
        return None
    items, rest = [], data[3:]
    for _ in range(data[2]):
        if not rest or len(rest) <= rest[0]:
            return None
        items.append(rest[1 : 1 + rest[0]])
        rest = rest[1 + rest[0] :]
    return None if rest else items


def bulk_of(items: list[bytes]) -> bytes:
    return b"\x87\x87" + bytes([len(items)]) + b"".join(bytes([len(item)]) + item for item in items)
