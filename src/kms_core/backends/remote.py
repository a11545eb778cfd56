"""What backends over a network have in common: stanzas, versions, retries, the breaker, per-job keys.

A backend's own module is a ``Cipher``: one key of one peer, that encrypts and decrypts a few bytes under a
version and an AAD. ``RemoteBackend`` makes a ``Backend`` of it. Knows no settings, policy, audit or protocol.
"""

from collections.abc import Sequence
from typing import Protocol

from kms_core.backends import KeyVersion


class Cipher(Protocol):
    """One key of one peer, over its network protocol; safe to call from several threads at once.

    Secrets are 16 bytes (a file key) or 32 (a job key). A version is what ``KeyRef.version`` allows: 1 to 80
    of ``A-Za-z0-9_.-``. Every method waits at most the settings' timeout and raises, of our errors alone
    (the first two are in ``kms_core.backends``):

    - ``Unreachable``: no connection, time out, or 502 to 504: tried again, counted by the breaker,
      and another declared backend may unwrap instead;
    - ``Busy``: 429, 412, other 5xx, which request data may have caused: tried again, not counted;
    - ``BackendUnavailable``: credentials refused, key or mount missing, an answer that makes no sense
      (the wrong server): for the operator, who finds the reason in its text; not tried again;
    - ``DecryptFailed`` (``decrypt`` alone): the peer says that ciphertext, AAD or version are not right.
    """

    name: str
    """``cosmian``, ``transit``, …: as it stands in stanzas and metrics."""

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        """What the peer makes of ``secret`` under exactly this version, with ``aad`` authenticated."""

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        """The secret again."""

    def versions(self) -> Sequence[KeyVersion]:
        """Asks the peer: all versions that decrypt, the one to encrypt with last."""

    def rotate(self) -> KeyVersion:
        """Make a new version and encrypt with it from now on. Old ones decrypt. Never repeated blindly."""
