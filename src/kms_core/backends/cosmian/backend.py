"""The Cosmian backend: the server wraps file keys with AES-GCM, and its keys never leave it.

A wrap is ``01``, the nonce (12 bytes), the ciphertext and the tag (16 bytes): 46 bytes for a file key, 62 for
a job key. The plaintext is ``01`` and the secret, so that it never looks like BulkData. The AAD is that of a
JWE in direct encryption (RFC 7516) in each dialect, so that each decrypts the wraps of the others: header
``{"alg":"dir","enc":"A256GCM","kid":"<identifier>"}``, our AAD as ``aad``.

Version n of a key is a key on the server whose identifier is a UUIDv5 of our key's name and n, so that making
it twice gives one key, and whose tag is ``kms-service:<name>``. For calls with any other identifier, servers
from 5.25 on search all their keys for a key set of that name. Without version 1, a key whose identifier is
the name itself takes its place: an operator made it for us. All other keys count only if we own them, since
any user of the server can make keys under free identifiers and grant them to us.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Final
from urllib.parse import SplitResult
from weakref import WeakValueDictionary

import structlog

from kms_core.backends import KeyMissing, KeyVersion
from kms_core.backends.cosmian.kmip import GcmResult, Kind, Refusal
from kms_core.backends.cosmian.server import CosmianServer
from kms_core.backends.cosmian.settings import CosmianSection as Section
from kms_core.backends.file_token import FileToken
from kms_core.backends.remote import RemoteBackend
from kms_core.envelope.binding import KEY_ID
from kms_core.http_client import Busy, PeerServer, Tls
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed
from kms_protocol.units import time_or_none

MOST_VERSIONS: Final = 1000
_NAMESPACE: Final = uuid.UUID("5d9be8cf-0f4c-4c0d-9e5c-6d6b8f1e7a51")
_TRIES: Final = 4
_ACTIVE: Final = frozenset({"Active", ""})  # 4.x may not tell
_RESTING: Final = "PreActive"
_OPENING: Final = _ACTIVE | {"Deactivated", "Compromised"}
FORM: Final = b"\x01"
MARK: Final = b"\x01"
BULK: Final = b"\x87\x87"
"""The first bytes of BulkData: the server treats a ciphertext or plaintext that begins so as several."""
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
LENGTHS: Final = tuple(len(FORM) + NONCE_BYTES + len(MARK) + secret + TAG_BYTES for secret in (16, 32))
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    uid: str
    state: str
    created_at: datetime | None


class CosmianKey:
    """One key and its versions on the server. Safe for several threads."""

    def __init__(self, server: CosmianServer, name: str) -> None:
        """``name`` is 1 to 80 of ``A-Za-z0-9_.-``. Makes no call."""
        self.server = server
        self.name = name
        self._tag = f"kms-service:{name}"
        self._numbers = {self.made_uid(number): number for number in range(1, MOST_VERSIONS + 1)}
        self._ours: set[str] = set()
        self._uids: dict[str, str] = {}

    def uid(self, version: str) -> str | None:
        """The identifier of a version that decrypts, or None. Asks the server about an unknown version."""
        if version not in self._uids:
            self._look()
        return self._uids.get(version)

    def versions(self) -> Sequence[KeyVersion]:
        """All versions that decrypt, the newest that may encrypt last.

        Raises KeyMissing if there are none.
        """
        found = self._look()
        active = [each for each in found if each.state in _ACTIVE]
        current = (active or found)[-1]
        others = (each for each in found if each is not current)
        return [KeyVersion(str(each.number), each.created_at) for each in (*others, current)]

    def rotate(self) -> KeyVersion:
        """Make a fresh key. ReKey is never used: up to 5.22 it overwrites the old key."""
        first = self._look()[-1].number + 1
        for number in range(first, min(first + _TRIES, MOST_VERSIONS + 1)):
            self._create(number)
            made = self._if_current(number)
            if made:
                return made
        raise self._taken_error()

    def init(self) -> tuple[KeyVersion, bool]:
        """The version in use, and whether this call made it."""
        try:
            return self.versions()[-1], False
        except KeyMissing:
            is_new = self._create(1)
        made = self._if_current(1)
        if made is None:
            raise self._taken_error()
        return made, is_new

    def made_uid(self, number: int) -> str:
        """The identifier of a version of ours."""
        return str(uuid.uuid5(_NAMESPACE, f"{self.name}/{number}"))

    def _look(self) -> list[_Version]:
        """All versions that decrypt, the oldest first. Raises KeyMissing if there are none."""
        located = self.server.kmip().locate(self._tag)
        uids = {self._numbers[uid]: uid for uid in located if uid in self._numbers and self._is_ours(uid)}
        uids.setdefault(1, self.name)
        found = [self._version(number, uid) for number, uid in uids.items()]
        known = sorted((each for each in found if each), key=attrgetter("number"))
        self._uids = {str(each.number): each.uid for each in known}
        if not known:
            raise self.missing_error()
        return known

    def _is_ours(self, uid: str) -> bool:
        if uid not in self._ours:
            if not self.server.owns(uid):
                _log.warning("key.of_another_user", backend="cosmian", name=self.name, uid=uid)
                return False
            self._ours.add(uid)
        return True

    def _version(self, number: int, uid: str) -> _Version | None:
        """A version, or None if there is no such key or it no longer decrypts."""
        try:
            found = self.server.kmip().attributes(uid)
        except Refusal as exc:
            if exc.kind is Kind.MISSING:
                return None
            raise
        if found.text("RotateName"):
            raise self.keyset_error()
        state = found.text("State")
        if state == _RESTING and uid == self.name:  # its creator has to activate it
            raise Refusal(Kind.STATE, state)
        if state not in _OPENING:
            return None
        return _Version(number, uid, state, time_or_none(found.text("InitialDate")))

    def _create(self, number: int) -> bool:
        """Make a version; False if its identifier is taken."""
        try:
            self.server.kmip().create(self.made_uid(number), f"{self.name}/{number}", self._tag)
        except Refusal as exc:
            if exc.kind is Kind.EXISTS:
                return False
            raise
        return True

    def _if_current(self, number: int) -> KeyVersion | None:
        """The version in use if it is this one, else None: an existing key may be another user's."""
        try:
            current = self.versions()[-1]
        except KeyMissing:
            return None
        return current if current.version == str(number) else None

    # -- errors --------------------------------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """Bound the calls within the block by one timeout, and convert refusals to our errors."""
        try:
            with self.server.peer.one_timeout():
                yield
        except Refusal as exc:
            raise self._error(exc) from exc

    def missing_error(self) -> KeyMissing:
        return KeyMissing(f"{self} is not there: make it with `kms cosmian init-key`")

    def keyset_error(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self} is a key set, which rotates by itself: name a key without RotateName, or a new one"
        )

    def _taken_error(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self} gets no new version: the identifiers are taken, by destroyed keys or by other users'; "
            "name another key"
        )

    def _error(self, exc: Refusal) -> BackendUnavailable:
        match exc.kind:
            case Kind.MISSING:
                return self.missing_error()
            case Kind.STATE:
                return BackendUnavailable(f"{self} is {exc.state.lower()}, which does not allow this")
            case Kind.DENIED:
                return BackendUnavailable(
                    f"{self} is not ours to use: have encrypt and decrypt granted to our user"
                )
            case Kind.BUSY:
                return Busy(f"{self.server.where} has an internal error: see its log")
            case _:
                return BackendUnavailable(f"{self} cannot be used so: the log of the server says why")

    def __str__(self) -> str:
        return f"The key {self.name} on {self.server.where}"


class CosmianCipher:
    """The ``Cipher`` of one key. Safe for several threads."""

    name = "cosmian"

    def __init__(self, key: CosmianKey) -> None:
        self.key, self.token, self.server = key, key.server.token, key.server.peer.server

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        plaintext = MARK + secret
        with self.key.call():
            uid = self.key.uid(version)
            if uid is None:
                raise BackendUnavailable(f"{self.key} has no version {version}")
            for _ in range(_TRIES):
                sealed = self.key.server.seal(uid, plaintext, aad)
                if sealed is None:
                    raise self.key.keyset_error()
                lengths = len(sealed.nonce), len(sealed.ciphertext), len(sealed.tag)
                if lengths != (NONCE_BYTES, len(plaintext), TAG_BYTES):
                    break
                if not sealed.ciphertext.startswith(BULK):  # one in 65,536; another nonce avoids it
                    return FORM + sealed.nonce + sealed.ciphertext + sealed.tag
        raise self._impossible_answer_error()

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        sealed = _read(wrapped)
        with self.key.call():
            uid = self.key.uid(version)
            if uid is None:
                raise DecryptFailed
            plaintext = self._open(uid, sealed, aad)
        if len(plaintext) != len(sealed.ciphertext):
            raise self._impossible_answer_error()
        if not plaintext.startswith(MARK):
            raise DecryptFailed
        return plaintext.removeprefix(MARK)

    def versions(self) -> Sequence[KeyVersion]:
        with self.key.call():
            return self.key.versions()

    def rotate(self) -> KeyVersion:
        with self.key.call():
            return self.key.rotate()

    def _open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes:
        try:
            plaintext = self.key.server.open(uid, sealed, aad)
        except Refusal as exc:
            if exc.kind is Kind.MISSING:
                self.key.versions()  # KeyMissing if all versions are gone, not only this one
                raise DecryptFailed from exc
            if exc.kind is Kind.CRYPTO:
                raise DecryptFailed from exc
            raise
        if plaintext is None:
            raise self.key.keyset_error()
        return plaintext

    def _impossible_answer_error(self) -> BackendUnavailable:
        server = self.key.server
        return BackendUnavailable(
            f"{server.where} answers with what AES-GCM cannot have made: check {server.section}.server_url"
        )


def _read(wrapped: bytes) -> GcmResult:
    """Parse a wrap. Raises DecryptFailed for anything that ``encrypt`` cannot have returned."""
    nonce_end = len(FORM) + NONCE_BYTES
    sealed = GcmResult(wrapped[len(FORM) : nonce_end], wrapped[nonce_end:-TAG_BYTES], wrapped[-TAG_BYTES:])
    if len(wrapped) not in LENGTHS or not wrapped.startswith(FORM) or sealed.ciphertext.startswith(BULK):
        raise DecryptFailed
    return sealed


# -- opening -----------------------------------------------------------------------------------------

_open: Final[WeakValueDictionary[tuple[Section, bool, int], CosmianServer]] = WeakValueDictionary()


def open_key(uri: SplitResult | None, section: Section, *, strict: bool) -> RemoteBackend:
    """``cosmian:<name>``; None means ``default_key_id`` of ``[kms.cosmian]``. Raises ConfigurationError."""
    if uri and (uri.netloc or uri.query or uri.fragment):
        raise ConfigurationError("A Cosmian key is cosmian:<name>; the server is set under [kms.cosmian]")
    name = uri.path if uri else section.default_key_id
    return RemoteBackend(CosmianCipher(key_of(name, section, strict=strict)))


def key_of(name: str, section: Section, *, strict: bool) -> CosmianKey:
    """A key of the server of ``[kms.cosmian]``. Makes no call. Raises ConfigurationError."""
    if not KEY_ID.fullmatch(name):
        raise ConfigurationError("A Cosmian key is cosmian:<name>, of at most 80 letters, digits, _ . -")
    return CosmianKey(_connect(section, strict=strict), name)


def _connect(section: Section, *, strict: bool) -> CosmianServer:
    """The server. Keys of one process share it while in use, so that their calls are batched."""
    used = (section, strict, os.getpid())
    found = _open.get(used)
    if found is None:
        tls = Tls(section.tls_verify, section.ca_file, section.client_cert_file, section.client_key_file)
        url, setting = section.server_url or "", "kms.cosmian.server_url"
        server = PeerServer(url, "Cosmian KMS", setting, section.timeout_s, tls)
        given = section.api_key or section.api_key_file
        new = "put the API token of our user there"
        token = FileToken(section.api_key, section.api_key_file, strict=strict, new=new) if given else None
        found = _open[used] = CosmianServer(server, token, section.protocol)
    return found
