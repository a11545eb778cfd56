"""Cosmian ciphers for the tests of faults: one that asks for the version first, and one for each dialect.

The latter know version and identifiers already, so that the fault meets the operation itself.
"""

from collections.abc import Callable, Mapping
from functools import partial

from kms_core.backends.cosmian.backend import FORM, LENGTHS, CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import CosmianServer, Protocol
from kms_core.backends.file_token import FileToken
from kms_core.backends.remote import Cipher
from kms_core.http_client import PeerServer


class KnownServer(CosmianServer):
    """A server whose version is known."""

    known = (5, 26)

    def version(self) -> tuple[int, int]:
        return self.known


class KnownOldServer(KnownServer):
    known = (4, 24)


class KnownKey(CosmianKey):
    """A key whose versions are known."""

    def uid(self, version: str) -> str:
        del version
        return "2f1d7a52-6d0f-5f0e-9a7e-0d9d5b8f4c11"


class UncheckedCipher(CosmianCipher):
    """Asks the server about every wrap: those of another shape would be refused before that."""

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        return super().decrypt(FORM + wrapped[: LENGTHS[0] - len(FORM)], version, aad)


def cosmian_makers(token: str) -> Mapping[str, Callable[[str, float], Cipher]]:
    """Ciphers by name, each of a URL and a timeout in seconds."""

    def make(
        kind: type[CosmianServer], key: type[CosmianKey], protocol: Protocol, url: str, timeout_s: float
    ) -> Cipher:
        server = PeerServer(url, "Cosmian KMS", "kms.cosmian.server_url", timeout_s)
        return UncheckedCipher(key(kind(server, FileToken(token, None, strict=False), protocol), "pay"))

    return {
        "cosmian": partial(make, CosmianServer, CosmianKey, "kmip"),
        "cosmian-kmip": partial(make, KnownServer, KnownKey, "kmip"),
        "cosmian-jose": partial(make, KnownServer, KnownKey, "jose"),
        "cosmian-4": partial(make, KnownOldServer, KnownKey, "kmip"),
    }
