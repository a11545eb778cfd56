"""Backends on a server: stanzas, versions, retries, circuit breaker, and wrap keys in place of calls.

A backend's own module is a ``Cipher``: one key of one server, which encrypts and decrypts a few bytes under
a version and an AAD. ``RemoteBackend`` makes a ``Backend`` of it, and ``SharingBackend`` one that asks the
server for wrap keys instead of file keys.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import structlog

from kms_core import http_client
from kms_core.age.header import FILE_KEY_BYTES, Stanza
from kms_core.backends import Health, KeyMissing, KeyVersion, NotRotated
from kms_core.backends.batching import SingleFlight
from kms_core.backends.circuit_breaker import RetryingCaller, RetryPolicy
from kms_core.backends.file_token import FileToken
from kms_core.backends.wrap_keys import SOON_S, WrapKeys, aad_of
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef, Wrap
from kms_core.http_client import PeerServer, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError, TooManyVersions

T = TypeVar("T")

RUN_S: Final = 300.0
"""Seconds that a wrap key of one run of a job serves, where the key does not share by itself."""
RUN_OPENED: Final = 256
VERSIONS_FRESH_S: Final = 30.0
MOST_VERSIONS: Final = 500
"""Versions of a key to which a rotation adds one: half of what each server lists in an answer and in time."""
HEALTH_FRESH_S: Final = 2.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _ListedVersions:
    """The versions of the last answer, the state of our credentials, and the time of the question."""

    versions: tuple[KeyVersion, ...] = ()
    token_changes: int = 0
    asked_at: float = -math.inf

    def age_s(self) -> float:
        return time.monotonic() - self.asked_at


class Cipher(Protocol):
    """One key of one server, over its network protocol; safe for several threads.

    Secrets are 16 bytes (a file key) or 32 (a wrap key). A version is what ``KeyRef.version`` allows: 1 to 80
    of ``A-Za-z0-9_.-``. Each request of a method waits at most the settings' timeout, and all of them as long
    as ``http_client.within`` allows. Methods raise only these errors (the first two are in ``http_client``):

    - ``Unreachable``: no connection, timeout, or 502 to 504. Retried, counted by the circuit breaker, and
      another backend of the key may unwrap instead;
    - ``Busy``: 429, 412, other 5xx, which request data may have caused. Retried, not counted;
    - ``BackendUnavailable``: credentials refused, key or mount missing, an answer of another kind of server.
      Its text tells the operator the reason. Not retried;
    - ``DecryptFailed`` (only ``decrypt``): ciphertext, AAD or version are wrong.
    """

    name: str
    """The backend's scheme: ``cosmian``, ``transit``, …"""

    @property
    def token(self) -> FileToken | None:
        """Our credential, if a change of it ends the wrap keys."""

    @property
    def server(self) -> PeerServer:
        """The server, whose ``timeout_s`` bounds a call with its retries."""

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        """Encrypt ``secret`` under exactly this version, with ``aad`` authenticated."""

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        """Decrypt what ``encrypt`` returned."""

    def versions(self) -> Sequence[KeyVersion]:
        """Ask the server for all versions that decrypt, the one that encrypts last."""

    def rotate(self) -> KeyVersion:
        """Make a new version, which encrypts from now on. Old ones still decrypt. Not retried."""


class RemoteBackend:
    """One key of a server as a ``Backend``.

    Its wraps authenticate the AAD, so files need no origin stanza.
    """

    data_keys = True
    native = False

    def __init__(self, cipher: Cipher, *, policy: RetryPolicy | None = None) -> None:
        """Make no call: a server that is down degrades the service and does not stop its start."""
        self.name, self.server = cipher.name, cipher.server
        self._cipher = cipher
        self._caller = RetryingCaller(cipher.name, policy or RetryPolicy())
        self._health: tuple[float, Health] | None = None
        self._health_lock = threading.Lock()
        self._known = _ListedVersions()
        self._asking: SingleFlight[tuple[KeyVersion, ...]] = SingleFlight()
        self.changes = 0
        """Number of changes of versions, their states or our credentials; wrap keys outlive none."""

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A ``kms-service/wrap`` stanza. Raises BackendUnavailable."""
        return binding.wrap_stanza(key, self.encrypt(file_key, key, aad))

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """The file key. Raises NoMatch for a stanza of another backend, key or version."""
        wrap = binding.wrap_of(stanza, key)
        if wrap.job:
            wrap_key = self.decrypt(wrap.job, key, aad_of(key))
            return binding.open_file_key(wrap_key, wrap.body, aad, binding.WRAP_KEY_INFO)
        file_key = self.decrypt(wrap.body, key, aad)
        if len(file_key) != FILE_KEY_BYTES:
            raise DecryptFailed
        return file_key

    def origin_key(self, key: KeyRef) -> None:
        """None: the wrap itself authenticates the AAD."""
        del key

    def versions(self) -> Sequence[KeyVersion]:
        """All versions, from the server within the last 30 seconds or, while it is down, before.

        One thread asks, and the others wait for its answer. Raises BackendUnavailable if the server never
        answered, or no longer has the key.
        """
        known = self._known
        if known.versions and known.age_s() < VERSIONS_FRESH_S:
            return known.versions
        return self._asking.run("versions", self._ask)

    def _ask(self) -> tuple[KeyVersion, ...]:
        known, asked_at = self._known, time.monotonic()
        try:
            found = tuple(self._call("versions", self._cipher.versions))
        except Unreachable:
            if not known.versions:
                raise
            _log.warning("backend.versions_stale", backend=self.name)
            found = known.versions
        except BackendUnavailable:
            self.changes += 1
            raise
        token = self._cipher.token
        new = _ListedVersions(found, token.changes if token else 0, asked_at)
        if self._known is known:  # else a rotation was faster
            was = known.versions, known.token_changes
            self.changes += bool(known.versions) and (found, new.token_changes) != was
            self._known = new
        if not found:
            raise BackendUnavailable(f"The {self.name} backend has no version of this key")
        return found

    def listed(self, for_s: float) -> Sequence[str]:
        """The versions listed last, if they are valid for ``for_s`` seconds more; else none. No call."""
        known = self._known
        is_fresh = known.age_s() + for_s < VERSIONS_FRESH_S
        return [each.version for each in known.versions] if is_fresh else []

    def rotate(self) -> KeyVersion:
        """A new version, in use at once in this process and within 30 seconds in others.

        The server is asked for its versions first: one that does not answer is not asked to rotate, since it
        might do so later. Raises TooManyVersions from ``MOST_VERSIONS`` on, NotRotated, BackendUnavailable.
        """
        try:
            found = self._call("versions", self._cipher.versions)
        except KeyMissing:  # the rotation makes the first one, where its server allows that
            found = ()
        except BackendUnavailable as exc:
            raise NotRotated(exc.detail, retry_after_s=exc.retry_after_s) from exc
        if len(found) >= MOST_VERSIONS:
            raise TooManyVersions
        made = self._caller.once("rotate", self._cipher.rotate)
        self.changes += 1
        self._known = _ListedVersions()
        return made

    def was_silent(self) -> bool:
        return self._caller.breaker.was_silent()

    def health_check(self) -> Health:
        """Wrap and unwrap within ``timeout_s``. Concurrent checks share one result."""
        with self._health_lock:
            if self._health is None or time.monotonic() - self._health[0] > HEALTH_FRESH_S:
                found = self._probe()
                self._health = (time.monotonic(), found)
            return self._health[1]

    def _probe(self) -> Health:
        probe = os.urandom(FILE_KEY_BYTES)
        try:
            with http_client.within(self.server.timeout_s):
                version = self.versions()[-1].version
                wrapped = self._caller.once("health", lambda: self._cipher.encrypt(probe, version, b"health"))
                again = self._caller.once("health", lambda: self._cipher.decrypt(wrapped, version, b"health"))
        except KmsError as exc:
            return Health(healthy=False, detail=exc.detail, answered=not isinstance(exc, Unreachable))
        return Health(healthy=again == probe, detail="" if again == probe else "wrong answer")

    def for_job(self) -> "SharingBackend":
        """Return this key for one run of a bulk job: a few calls to the server for any number of items."""
        return SharingBackend(self, WrapKeys(RUN_OPENED), RUN_S)

    def is_ready(self, tenant: str, key_id: str, wrap: Wrap | None) -> bool:
        """False: each wrap and unwrap asks the server."""
        del tenant, key_id, wrap
        return False

    def encrypt(self, secret: bytes, key: KeyRef, aad: bytes) -> bytes:
        """Encrypt a file key or a wrap key. Raises BackendUnavailable."""
        try:
            return self._call("wrap", lambda: self._cipher.encrypt(secret, key.version, aad))
        except BackendUnavailable:  # this version may no longer encrypt: ask before the next wrap
            self._known = replace(self._known, asked_at=-math.inf)
            raise

    def decrypt(self, wrapped: bytes, key: KeyRef, aad: bytes) -> bytes:
        """Decrypt a file key or a wrap key. Raises DecryptFailed, BackendUnavailable."""
        return self._call("unwrap", lambda: self._cipher.decrypt(wrapped, key.version, aad))

    def _call(self, operation: str, function: Callable[[], T]) -> T:
        """Call the server, with retries, all within ``timeout_s``."""
        with http_client.within(self.server.timeout_s):
            return self._caller.call(operation, function)


class SharingBackend:
    """A ``RemoteBackend`` that asks its server for wrap keys, each for many files.

    Calls about versions and health are those of the ``RemoteBackend``.
    """

    data_keys = True
    native = False

    def __init__(self, remote: RemoteBackend, keys: WrapKeys, life_s: float) -> None:
        """``life_s``: seconds that a wrap key serves after the server wrapped or unwrapped it."""
        self.name, self.server = remote.name, remote.server
        self.versions, self.rotate, self.health_check = remote.versions, remote.rotate, remote.health_check
        self.origin_key, self.was_silent = remote.origin_key, remote.was_silent
        self._remote = remote
        self._keys, self._owner, self._life_s = keys, keys.owner(), life_s
        self._seen_changes = remote.changes

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A stanza with the wrapped key that sealed ``file_key``. Raises BackendUnavailable."""
        self._drop_after_change()
        held = self._keys.sealing(
            self._owner, key, self._life_s, lambda secret: self._remote.encrypt(secret, key, aad_of(key))
        )
        body = binding.seal_file_key(held.secret, file_key, aad, binding.WRAP_KEY_INFO)
        return binding.wrap_stanza(key, body, held.wrapped)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """Unwrap a file key with opened wrap keys, each only while the server lists its version."""
        wrap = binding.wrap_of(stanza, key)
        if not wrap.job or not self._is_listed(key):
            return self._remote.unwrap(stanza, key, aad)
        secret = self._keys.opened(
            self._owner, key, wrap.job, self._life_s, lambda: self._remote.decrypt(wrap.job, key, aad_of(key))
        )
        return binding.open_file_key(secret, wrap.body, aad, binding.WRAP_KEY_INFO)

    def for_job(self) -> "SharingBackend":
        """The backend itself: its keys serve jobs and single calls alike."""
        return self

    def is_ready(self, tenant: str, key_id: str, wrap: Wrap | None) -> bool:
        """Return whether the wrap key is at hand, and stays so for the next second."""
        listed = self._remote.listed(SOON_S)
        version = wrap.version if wrap else listed[-1] if listed else ""
        if version not in listed or self._seen_changes != self._remote.changes:
            return False
        key = KeyRef(tenant, key_id, version, self.name)
        return self._keys.is_ready(self._owner, key, wrap.job if wrap else None)

    def _is_listed(self, key: KeyRef) -> bool:
        """Return whether the server lists the version. Drops the keys if anything changed there since."""
        try:
            versions = self.versions()
        except BackendUnavailable:  # then the server decides about each file
            versions = ()
        self._drop_after_change()
        return any(each.version == key.version for each in versions)

    def _drop_after_change(self) -> None:
        changes = self._remote.changes
        if self._seen_changes != changes:
            self._seen_changes = changes
            self._keys.drop(self._owner)
