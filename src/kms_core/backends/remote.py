"""What backends over a network have in common: stanzas, versions, retries, the breaker, per-job keys.

A backend's own module is a ``Cipher``: one key of one peer, that encrypts and decrypts a few bytes under a
version and an AAD. ``RemoteBackend`` makes a ``Backend`` of it. Knows no settings, policy, audit or protocol.
"""

import os
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

import structlog

from kms_core.age.header import FILE_KEY_BYTES, Stanza
from kms_core.age.x25519 import NoMatch
from kms_core.backends import Health, KeyVersion
from kms_core.backends.circuit_breaker import Guard, RetryPolicy
from kms_core.backends.wrap_key import JobKeys, job_aad, open_
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef, Wrap
from kms_core.http_client import Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError

VERSIONS_FRESH_S: Final = 30.0
HEALTH_FRESH_S: Final = 2.0
_log = structlog.get_logger(__name__)


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


class RemoteBackend:
    """One key of a peer as a ``Backend``: its wraps authenticate the AAD, so files carry no origin stanza."""

    blocks = True

    def __init__(
        self, cipher: Cipher, *, data_keys: bool = True, patience: RetryPolicy | None = None
    ) -> None:
        """Calls no peer: one that is away degrades, it does not stop a start."""
        self.name = cipher.name
        self.data_keys = data_keys
        self._cipher = cipher
        self._guard = Guard(cipher.name, patience or RetryPolicy())
        self._lock = threading.Lock()
        self._health: tuple[float, Health] | None = None
        self._health_lock = threading.Lock()
        self._known: tuple[KeyVersion, ...] = ()
        self._known_at = 0.0

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A ``kms-service/wrap`` stanza. Raises BackendUnavailable."""
        return binding.wrap_stanza(key, self.encrypt(file_key, key, aad))

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """The file key; NoMatch for a stanza of another backend, key or version."""
        wrap = ours(stanza, key)
        if wrap.job:
            return open_(self.decrypt(wrap.job, key, job_aad(key)), wrap.body, aad)
        file_key = self.decrypt(wrap.body, key, aad)
        if len(file_key) != FILE_KEY_BYTES:
            raise DecryptFailed
        return file_key

    def origin_key(self, key: KeyRef) -> None:
        """The wrap proves the origin."""
        del key

    def current_version(self) -> str:
        """The version to wrap with, as the peer said within the last 30 seconds, or last before it went."""
        return self.versions()[-1].version

    def versions(self) -> Sequence[KeyVersion]:
        """Raises BackendUnavailable while the peer has never answered, or no longer has the key."""
        with self._lock:  # one caller asks, the others wait for its answer
            if self._known and time.monotonic() - self._known_at < VERSIONS_FRESH_S:
                return self._known
            try:
                self._known = tuple(self._guard.call("versions", self._cipher.versions))
            except Unreachable:
                if not self._known:
                    raise
                _log.warning("backend.versions_stale", backend=self.name)
            self._known_at = time.monotonic()
            if not self._known:
                raise BackendUnavailable(f"The {self.name} backend has no version of this key")
            return self._known

    def rotate(self) -> KeyVersion:
        """A new version, in use at once in this process and within 30 seconds in others."""
        made = self._guard.once("rotate", self._cipher.rotate)
        with self._lock:
            self._known = ()
        return made

    def health_check(self) -> Health:
        """A wrap and an unwrap, each tried once; probes that come together share one answer."""
        with self._health_lock:
            if self._health is None or time.monotonic() - self._health[0] > HEALTH_FRESH_S:
                found = self._probe()
                self._health = (time.monotonic(), found)
            return self._health[1]

    def _probe(self) -> Health:
        now, probe = datetime.now(UTC), os.urandom(FILE_KEY_BYTES)
        try:
            version = self.current_version()
            wrapped = self._guard.once("health", lambda: self._cipher.encrypt(probe, version, b"health"))
            again = self._guard.once("health", lambda: self._cipher.decrypt(wrapped, version, b"health"))
        except KmsError as exc:
            return Health(healthy=False, checked_at=now, detail=exc.detail)
        return Health(healthy=again == probe, checked_at=now, detail="" if again == probe else "wrong answer")

    def for_job(self) -> "JobBackend":
        """The same key for one run of a bulk job: a few calls to the peer, whatever the number of items."""
        return JobBackend(self)

    def encrypt(self, secret: bytes, key: KeyRef, aad: bytes) -> bytes:
        """What the peer makes of a file key or a job key."""
        try:
            return self._guard.call("wrap", lambda: self._cipher.encrypt(secret, key.version, aad))
        except BackendUnavailable:  # perhaps it no longer seals with this version: ask before the next wrap
            self._known_at = -VERSIONS_FRESH_S
            raise

    def decrypt(self, wrapped: bytes, key: KeyRef, aad: bytes) -> bytes:
        """The file key or job key again."""
        return self._guard.call("unwrap", lambda: self._cipher.decrypt(wrapped, key.version, aad))


class JobBackend:
    """A ``RemoteBackend`` as one run of a bulk job sees it; see ``jobkey``."""

    blocks = True

    def __init__(self, remote: RemoteBackend) -> None:
        self.name, self.data_keys = remote.name, remote.data_keys
        self._remote = remote
        self._keys = JobKeys(remote)

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A stanza with a ``job`` argument."""
        body, job = self._keys.wrap(file_key, key, aad)
        return binding.wrap_stanza(key, body, job)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """As ``RemoteBackend.unwrap``; job keys that were opened stay at hand for the run."""
        wrap = ours(stanza, key)
        if not wrap.job:
            return self._remote.unwrap(stanza, key, aad)
        return self._keys.unwrap(wrap.body, wrap.job, key, aad)

    def origin_key(self, key: KeyRef) -> None:
        """The wrap proves the origin."""
        del key

    def current_version(self) -> str:
        return self._remote.current_version()

    def versions(self) -> Sequence[KeyVersion]:
        return self._remote.versions()

    def rotate(self) -> KeyVersion:
        return self._remote.rotate()

    def health_check(self) -> Health:
        return self._remote.health_check()

    def for_job(self) -> "JobBackend":
        return self


def ours(stanza: Stanza, key: KeyRef) -> Wrap:
    """The wrap of this key version. Raises NoMatch for another's, DecryptFailed for a misshapen one."""
    if stanza.type != binding.WRAP:
        raise NoMatch
    wrap = binding.read_wrap(stanza)
    if (wrap.backend, wrap.key_id, wrap.version) != (key.backend, key.key_id, key.version):
        raise NoMatch
    return wrap
