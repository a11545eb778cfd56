"""A peer in memory, for tests of what stands before any peer: it really encrypts, counts, and can be cut."""

import os
from collections import Counter
from collections.abc import Sequence
from threading import Barrier

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kms_core.backends import KeyVersion
from kms_core.backends.circuit_breaker import RetryPolicy
from kms_core.backends.file_token import FileToken
from kms_core.backends.remote import RemoteBackend
from kms_core.http_client import PeerServer, Unreachable
from kms_protocol.errors import DecryptFailed, KmsError
from support.waiting import WAIT_S

NO_RETRIES = RetryPolicy(attempts=1, failures=1_000_000)


class MemoryCipher:
    """AES-256-GCM under one key a version. ``trouble`` is raised by every call while it is set."""

    def __init__(self, name: str = "memory") -> None:
        self.name, self.token = name, FileToken("memory", None, strict=False)
        self.server = PeerServer(f"http://{name}.test", name, "kms.memory.address", 5.0)
        self.keys: dict[str, AESGCM] = {}
        self.calls: Counter[str] = Counter()
        self.trouble: KmsError | None = None
        self.rotate()
        self.calls.clear()

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        self._called("encrypt")
        nonce = os.urandom(12)
        return nonce + self.keys[version].encrypt(nonce, secret, aad)

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        self._called("decrypt")
        if version not in self.keys:
            raise DecryptFailed
        try:
            return self.keys[version].decrypt(wrapped[:12], wrapped[12:], aad)
        except InvalidTag as exc:
            raise DecryptFailed from exc

    def versions(self) -> Sequence[KeyVersion]:
        self._called("versions")
        return [KeyVersion(version) for version in self.keys]

    def rotate(self) -> KeyVersion:
        self._called("rotate")
        version = str(len(self.keys) + 1)
        self.keys[version] = AESGCM(AESGCM.generate_key(256))
        return KeyVersion(version)

    def cut(self) -> None:
        self.trouble = Unreachable("cut off")

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.trouble:
            raise self.trouble


class FrozenCipher(MemoryCipher):
    """A server that gives no answer, and whose calls end once all servers were called."""

    def __init__(self, name: str, called: Barrier) -> None:
        super().__init__(name)
        self._all_called = called

    def versions(self) -> Sequence[KeyVersion]:
        self._all_called.wait(WAIT_S)
        raise Unreachable("no answer")


def memory_backend(name: str = "memory") -> tuple[RemoteBackend, MemoryCipher]:
    cipher = MemoryCipher(name)
    return RemoteBackend(cipher, policy=NO_RETRIES), cipher
