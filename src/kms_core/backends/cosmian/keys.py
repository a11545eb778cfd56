"""The versions of one key on a Cosmian KMS server: which there are, which are ours, and making new ones.

Version n is a key of the server's whose identifier follows from our key's name and n (UUIDv5), so that making
it twice makes one, and whose tag is ``kms-service:<name>``. UUIDs, since for each call under any other
identifier servers from 5.25 on look through all their keys for a key set of that name. Where version 1 is
not there, a key whose identifier is the name itself stands for it: somebody made it for us. All others count
only if we own them: any user of the server can make keys under free identifiers, and lend them to us.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Final

import structlog

from kms_core.backends import KeyMissing, KeyVersion
from kms_core.backends.cosmian.server import CosmianServer
from kms_core.backends.cosmian.ttlv import Kind, Refusal
from kms_core.http_client import Busy
from kms_protocol.errors import BackendUnavailable

MOST_VERSIONS: Final = 1000
_NAMESPACE: Final = uuid.UUID("5d9be8cf-0f4c-4c0d-9e5c-6d6b8f1e7a51")
_TRIES: Final = 4
_ACTIVE: Final = frozenset({"Active", ""})  # 4.x may not tell
_RESTING: Final = "PreActive"
_OPENING: Final = _ACTIVE | {"Deactivated", "Compromised"}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    uid: str
    state: str
    created_at: datetime | None


class CosmianKey:
    """Safe to use from several threads."""

    def __init__(self, server: CosmianServer, name: str) -> None:
        """``name`` is 1 to 80 of ``A-Za-z0-9_.-``. Connects to nothing."""
        self.server = server
        self.name = name
        self._tag = f"kms-service:{name}"
        self._numbers = {self.made_uid(number): number for number in range(1, MOST_VERSIONS + 1)}
        self._ours: set[str] = set()
        self._uids: dict[str, str] = {}

    def uid(self, version: str) -> str | None:
        """The identifier behind a version that opens; asks the server about one that is not known yet."""
        if version not in self._uids:
            self._look()
        return self._uids.get(version)

    def versions(self) -> Sequence[KeyVersion]:
        """All that open, the newest that may encrypt last. Raises KeyMissing if there are none."""
        found = self._look()
        active = [each for each in found if each.state in _ACTIVE]
        current = (active or found)[-1]
        others = (each for each in found if each is not current)
        return [KeyVersion(str(each.number), each.created_at) for each in (*others, current)]

    def rotate(self) -> KeyVersion:
        """A fresh key. Never ReKey, which up to 5.22 overwrites the old one."""
        first = self._look()[-1].number + 1
        for number in range(first, min(first + _TRIES, MOST_VERSIONS + 1)):
            self._create(number)
            made = self._if_current(number)
            if made:
                return made
        raise self._taken()

    def init(self) -> tuple[KeyVersion, bool]:
        """The version in use, and whether it was made just now."""
        try:
            return self.versions()[-1], False
        except KeyMissing:
            is_new = self._create(1)
        made = self._if_current(1)
        if made is None:
            raise self._taken()
        return made, is_new

    def made_uid(self, number: int) -> str:
        """The identifier of a version that we make."""
        return str(uuid.uuid5(_NAMESPACE, f"{self.name}/{number}"))

    def _look(self) -> list[_Version]:
        """All versions that open, the oldest first. Raises KeyMissing if there are none."""
        located = self.server.kmip().locate(self._tag)
        uids = {self._numbers[uid]: uid for uid in located if uid in self._numbers and self._is_ours(uid)}
        uids.setdefault(1, self.name)
        found = [self._version(number, uid) for number, uid in uids.items()]
        known = sorted((each for each in found if each), key=attrgetter("number"))
        self._uids = {str(each.number): each.uid for each in known}
        if not known:
            raise self.missing()
        return known

    def _is_ours(self, uid: str) -> bool:
        if uid not in self._ours:
            if not self.server.owns(uid):
                _log.warning("key.of_another_user", backend="cosmian", name=self.name, uid=uid)
                return False
            self._ours.add(uid)
        return True

    def _version(self, number: int, uid: str) -> _Version | None:
        """None if there is no such key, or it does not open anything any more."""
        try:
            found = self.server.kmip().attributes(uid)
        except Refusal as exc:
            if exc.kind is Kind.MISSING:
                return None
            raise
        if found.keyset:
            raise self.is_keyset()
        if found.state == _RESTING and uid == self.name:  # whoever made it has to activate it
            raise Refusal(Kind.STATE, found.state)
        if found.state not in _OPENING:
            return None
        return _Version(number, uid, found.state, _moment(found.created))

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
        """The version in use, if it is this one: a key that was there already may be another user's."""
        try:
            current = self.versions()[-1]
        except KeyMissing:
            return None
        return current if current.version == str(number) else None

    # -- errors --------------------------------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """One timeout for all of it, and our errors for what the server refuses."""
        try:
            with self.server.one_timeout():
                yield
        except Refusal as exc:
            raise self._error(exc) from exc

    def missing(self) -> KeyMissing:
        return KeyMissing(f"{self} is not there: make it with `kms cosmian init-key`")

    def is_keyset(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self} is a key set, which rotates by itself: name a key without RotateName, or a new one"
        )

    def _taken(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self} gets no new version: the identifiers are taken, by destroyed keys or by other users'; "
            "name another key"
        )

    def _error(self, exc: Refusal) -> BackendUnavailable:
        match exc.kind:
            case Kind.MISSING:
                return self.missing()
            case Kind.STATE:
                return BackendUnavailable(f"{self} is {exc.state.lower()}, which does not allow this")
            case Kind.DENIED:
                return BackendUnavailable(
                    f"{self} is not ours to use: have encrypt and decrypt granted to our user"
                )
            case Kind.BUSY:
                return Busy(f"{self.server.where} has trouble inside: its log says more")
            case _:
                return BackendUnavailable(f"{self} cannot be used so: the log of the server says why")

    def __str__(self) -> str:
        return f"The key {self.name} on {self.server.where}"


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
