"""A signed document: its format, its verification, and changes of it by compare-and-set.

Two lines: a JSON object with the name, generation, write id and body of the document, and the HMAC-SHA-256
of that line in hexadecimal digits, under a key of the document's own.

An older document that is put back, in a bucket or from a backup, would revive what was revoked. So the
highest generation that was seen is kept: by each host in its state directory, and by all in Redis.
"""

import hmac
import random
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import redis
import structlog

from kms_core import secure_files
from kms_core.documents.places import MOST_BYTES, Place
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, DocumentOutdated, InvalidRequest, Unavailable
from kms_protocol.wire import NOT_JSON

_VERSION: Final = 1
_EARLIER: Final = 16
_TRIES: Final = 30
_PAUSE_S: Final = 0.05
_AGAIN_S: Final = (0.1, 0.2, 0.4)
_PREFIX: Final = "kms:document:"
_ANCHOR_BYTES: Final = 4096
_log = structlog.get_logger(__name__)
Edit = Callable[[bytes], bytes]
"""Makes the next body of a document, empty before the first; called again if others changed it."""


class Anchor(msgspec.Struct, frozen=True, order=True):
    """A version of a document: generations count from 1, and each has one write id."""

    generation: int = 0
    write_id: str = ""


class Anchors:
    """The two anchors of one document. An entry in Redis without a valid MAC counts as none."""

    def __init__(
        self,
        name: str,
        folder: Path,
        client: redis.Redis | None,
        key: bytes,
        adopt: str = "kms token adopt",
    ) -> None:
        """``client`` None: Redis cannot be asked, which is so for some commands.

        ``adopt`` is the command that makes what lies at the place the newest version.
        """
        self._name, self._key, self._adopt = name, key, adopt
        self._path = folder / f"{name}.anchor"
        self._client = client

    def accept(self, found: Anchor, *, follows: bool = False) -> None:
        """Note a version that was read or written. ``follows``: it came after one that was accepted.

        Raises DocumentOutdated for one that is older than an anchor, another one of the same generation, or,
        without any anchor, one that may be an old one unless it ``follows``; Unavailable if this host has no
        anchor and Redis does not answer; OSError.
        """
        local, shared, is_away = self._local(), None, False
        try:
            shared = self._shared()
        except redis.RedisError as exc:
            is_away = True
            if local is None:
                raise Unavailable(
                    f"Redis does not answer, and this host has not seen the document {self._name} before"
                ) from exc
        known = [anchor for anchor in (local, shared) if anchor]
        if found.generation and not known and not follows:
            raise DocumentOutdated(
                f"Neither this host nor Redis has seen the document {self._name} before, so an old one "
                f"cannot be told from the newest: run `{self._adopt}` once if it is the right one"
            )
        newer = [one for one in known if found < one or (found > one and found.generation == one.generation)]
        if newer:
            raise DocumentOutdated(
                f"The document {self._name} has generation {found.generation}, and another one, of "
                f"generation {max(newer).generation}, was seen before: put that back, or run `{self._adopt}` "
                "to go on with this one (docs/hosts.md says what is lost)"
            )
        if (local or Anchor()) < found:
            self._note_here(found)
        if not is_away and (shared or Anchor()) < found:
            self._note_for_all(found)

    def highest(self) -> int:
        """The highest generation of both anchors, as far as they can be read. Raises OSError."""
        try:
            shared = self._shared()
        except redis.RedisError:
            shared = None
        return max(self._local() or Anchor(), shared or Anchor()).generation

    def note(self, found: Anchor) -> None:
        """Raise both anchors to a version. Raises OSError; an error of Redis is logged."""
        self._note_here(found)
        self._note_for_all(found)

    def _note_here(self, found: Anchor) -> None:
        secure_files.make_folders(self._path.parent)
        secure_files.write(self._path, msgspec.json.encode(found))

    def _note_for_all(self, found: Anchor) -> None:
        if self._client:
            try:
                self._client.transaction(lambda pipe: self._raise(pipe, found), self._redis_key)
            except redis.RedisError as exc:
                _log.warning("document.not_anchored", document=self._name, error=type(exc).__name__)

    @property
    def _redis_key(self) -> str:
        return f"{_PREFIX}{self._name}"

    def _local(self) -> Anchor | None:
        try:
            return msgspec.json.decode(small_files.read(self._path, _ANCHOR_BYTES), type=Anchor)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError) as exc:
            raise OSError(f"{self._path} is no anchor of a document: put it back from a backup") from exc

    def _shared(self) -> Anchor | None:
        """Raises redis.RedisError, also without a client."""
        if self._client is None:
            raise redis.ConnectionError("no client")
        return self._opened(self._client.get(self._redis_key))

    def _opened(self, raw: Any) -> Anchor | None:  # noqa: ANN401 -- redis-py has one type for async clients too
        tag, _, body = (raw or b"").partition(b" ")
        if not hmac.compare_digest(tag, self._tag(body)):
            return None
        return msgspec.json.decode(body, type=Anchor)

    def _raise(self, pipe: Any, found: Anchor) -> None:  # noqa: ANN401 -- as above
        """In a transaction: no other host has written in between."""
        before = self._opened(pipe.get(self._redis_key))
        pipe.multi()
        if before is None or before < found:
            body = msgspec.json.encode(found)
            pipe.set(self._redis_key, self._tag(body) + b" " + body)

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"anchor " + body, "sha256").hex().encode()


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a document; generation 0 is one that does not exist. ``tag`` is that of its place.

    ``earlier`` are the write ids of the versions before it, newest first.
    """

    generation: int = 0
    write_id: str = ""
    earlier: tuple[str, ...] = ()
    written_at: datetime | None = None
    body: bytes = b""
    tag: str = ""

    @property
    def anchor(self) -> Anchor:
        return Anchor(self.generation, self.write_id)


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    version: int = _VERSION
    name: str
    generation: int
    write_id: str
    earlier: tuple[str, ...]
    written_at: datetime | None
    body: msgspec.Raw


class SignedDocument:
    """One document. Raises what its place raises, and ConfigurationError for one that is not signed here."""

    def __init__(self, name: str, place: Place, key: bytes, anchors: Anchors) -> None:
        self.name = name
        self.place = place
        self._key = key
        self._anchors = anchors

    def read(self, known: Version | None = None, *, follows: bool = False) -> Version:
        """The current version; the one that the caller knows if it has not changed.

        A version that seems old may have been overtaken while it was read: it is read again. Raises
        DocumentOutdated, see ``Anchors.accept``.
        """
        waits = iter(_AGAIN_S)
        while True:
            found = self.verified(known)
            try:
                self._anchors.accept(found.anchor, follows=follows)
            except DocumentOutdated:
                if (wait_s := next(waits, None)) is None:
                    raise
                time.sleep(wait_s)
            else:
                return found

    def write(self, before: Version, edit: Edit) -> Version:
        """Replace a version, or what others have written since, by an edited one.

        A lost answer is settled by the write ids that a later version names. Raises what ``edit`` raises;
        Unavailable if the outcome is unknown or others keep changing the document; InvalidRequest above
        4 MiB.
        """
        self.place.check()
        mine: set[str] = set()
        for number in range(_TRIES):
            made = self._next(before, before.generation, edit(before.body))
            mine.add(made.write_id)
            try:
                is_written = self.place.write(self.encode(made), before.tag)
            except Unavailable:
                is_written = False
            before = self.read(follows=True)
            if mine.intersection((before.write_id, *before.earlier)):
                return before
            if is_written:
                raise Unavailable(f"{self.place} does not have what was written to it")
            time.sleep(random.uniform(0, _PAUSE_S * (number + 1)))  # noqa: S311 -- jitter, no secret
        raise Unavailable(f"{self.place} is changed by others all the time, or takes no writes")

    def adopt(self, edit: Edit) -> Version:
        """Make what lies at the place the newest version, also if it is older than an anchor.

        Its generation becomes higher than each that this host or Redis has seen. Raises Unavailable if others
        change the document at the same time.
        """
        self.place.check()
        before = self.verified()
        made = self._next(before, max(before.generation, self._anchors.highest()), edit(before.body))
        if not self.place.write(self.encode(made), before.tag):
            raise Unavailable(f"{self.place} was changed at the same time: try again")
        self._anchors.note(made.anchor)
        return made

    def encode(self, version: Version) -> bytes:
        """The bytes of a version at its place."""
        line = msgspec.json.encode(
            _Line(
                name=self.name,
                generation=version.generation,
                write_id=version.write_id,
                earlier=version.earlier,
                written_at=version.written_at,
                body=msgspec.Raw(version.body),
            )
        )
        if len(line) > MOST_BYTES - 100:
            raise InvalidRequest(f"{self.place} would have more than 4 MiB: remove what is not needed")
        return line + b"\n" + self._tag(line) + b"\n"

    def open(self, data: bytes, tag: str) -> Version:
        """The version in these bytes. Raises ConfigurationError if they are not signed for this document."""
        if not data:
            return Version()
        line, _, mac = data.partition(b"\n")
        if not hmac.compare_digest(mac.strip(), self._tag(line)):
            raise ConfigurationError(
                f"{self.place} was changed by others, or written with another spool key than this host's"
            )
        try:
            found = msgspec.json.decode(line, type=_Line)
        except NOT_JSON as exc:
            raise ConfigurationError(f"{self.place} was written by a later version") from exc
        if found.name != self.name or found.version != _VERSION:
            raise ConfigurationError(
                f"{self.place} is another document, {found.name} and not {self.name}, or was written by a "
                "later version"
            )
        return Version(
            generation=found.generation,
            write_id=found.write_id,
            earlier=found.earlier,
            written_at=found.written_at,
            body=bytes(found.body),
            tag=tag,
        )

    def verified(self, known: Version | None = None) -> Version:
        """Read what lies at the place, which may be old: anchors are neither compared nor changed."""
        data, tag = self.place.read(known.tag if known else "")
        if data is None and known:
            return known
        return self.open(data or b"", tag)

    def _next(self, before: Version, above: int, body: bytes) -> Version:
        earlier = (before.write_id, *before.earlier)[:_EARLIER] if before.write_id else ()
        return Version(
            generation=above + 1,
            write_id=secrets.token_hex(16),
            earlier=earlier,
            written_at=datetime.now(UTC).replace(microsecond=0),
            body=body,
        )

    def _tag(self, line: bytes) -> bytes:
        return hmac.digest(self._key, line, "sha256").hex().encode()
