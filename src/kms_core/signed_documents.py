"""Signed documents: their format, verification, changes by compare-and-set, and where they are kept.

Two lines: a JSON object with the name, generation, write id and body of the document, and the HMAC-SHA-256
of that line in hexadecimal digits, under a key of the document's own.

An older document that is put back, in a bucket or from a backup, would revive what was revoked. So the
highest generation that was seen is kept: by each host in its state directory, and by all in Redis.
"""

import hashlib
import hmac
import math
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import redis
import structlog

from kms_core import secure_files
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_core.reload import reason_of, stamp_of_stat
from kms_core.s3.bucket import Bucket, If
from kms_core.s3.conditions import PROBE, PROBE_MARK, ignored_conditions
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, DocumentOutdated, InvalidRequest, KmsError, Unavailable
from kms_protocol.wire import NOT_JSON

MOST_BYTES: Final = 4 * 1024 * 1024


class FilePlace:
    """A file (0600) that processes of one host share, written under a lock.

    A tag names what lies at a place and changes with each write; it is empty if nothing does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self, unless: str = "") -> tuple[bytes | None, str]:
        """The content and its tag; None for that of ``unless``, which is a tag that the caller knows.

        Raises OSError and what stores raise.
        """
        try:
            data = small_files.read(self._path, MOST_BYTES)
        except FileNotFoundError:
            return b"", ""
        tag = hashlib.sha256(data).hexdigest()
        return None if tag == unless else data, tag

    def write(self, data: bytes, tag: str) -> bool:
        """Replace the content of this tag. Returns False, and writes nothing, if there is another.

        Raises as ``read``; the outcome is then unknown.
        """
        secure_files.make_folders(self._path.parent)
        with secure_files.lock(self._path.with_name(f"{self._path.name}.lock")):
            _, found = self.read()
            if found != tag:
                return False
            secure_files.write(self._path, data, locked=True)
            return True

    def check(self) -> None:
        """A file has a lock."""


class ObjectPlace:
    """An object, written with ``If-Match`` by its ETag, the first time with ``If-None-Match``."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket = bucket
        self._key = key
        self._is_checked = False

    def __str__(self) -> str:
        return f"s3://{self.bucket.name}/{self._key}"

    def read(self, unless: str = "") -> tuple[bytes | None, str]:
        """As ``FilePlace.read``."""
        return self.bucket.get(self._key, unless)

    def write(self, data: bytes, tag: str) -> bool:
        """As ``FilePlace.write``."""
        return self.bucket.put(self._key, data, If(etag=tag) if tag else If(absent=True), "document")

    def check(self) -> None:
        """Try conditional writes that must fail, and one that must not, on an object beside the document.

        It stays, so that this needs no right to delete. Once for each process. Raises ConfigurationError if
        the bucket ignores conditions; others as ``write``.
        """
        if self._is_checked:
            return
        probe = f"{self._key}.probe"
        missing = ignored_conditions(self.bucket, probe, uploads=False)
        found = self.bucket.head(probe)  # whatever others put there
        known = If(etag=found.etag if found else "")
        if missing or not self.bucket.put(probe, PROBE, known, PROBE_MARK):
            raise ConfigurationError(
                f"{self}: this bucket ignores {' and '.join(missing) or 'the ETag'} on writes, so two hosts "
                "could overwrite each other's changes: use a store with conditional writes (docs/hosts.md)"
            )
        self._is_checked = True


Place: TypeAlias = FilePlace | ObjectPlace


# A signed document: its format, its verification, and changes of it by compare-and-set.

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


# A host's copy of a signed document, kept fresh by its processes and read by a stat.
#
# Each process that polls finds out by the age of the copy whether another one has just asked, so that a
# host asks once a second, however many processes it has and whichever of them dies.

POLL_S: Final = 1.0
LATE_S: Final = 10.0
"""Seconds without an answer after which the service is degraded: ten polls in a row have failed."""
_JUST_S: Final = POLL_S * 0.6
_PACE_S: Final = 0.5
_AHEAD_S: Final = 2.0  # by which a clock may have been set back


class LocalCopy:
    """The copy in ``<folder>/<name>.copy``: the tag of its place (JSON), then the stored document.

    Its time of change says when the place answered last. Safe in several threads and processes.
    """

    def __init__(
        self,
        document: SignedDocument,
        folder: Path,
        max_stale_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``max_stale_s``: seconds without an answer for which the copy is used; infinity: without bound."""
        self.gauge = metrics.DOCUMENT_AGE.labels(document.name)
        self._document, self._max_stale_s, self._clock = document, max_stale_s, clock
        self._path, self._lock_path = folder / f"{document.name}.copy", folder / f"{document.name}.lock"
        self._name = str(self._path)
        self._loaded: tuple[tuple[int, ...], Version] = ((), Version())
        self._reading = threading.Lock()
        self._begun = 0.0
        self._failure: Unavailable | None = None

    def current(self) -> Version:
        """The document as this host has it. Raises Unavailable if it is missing or too old; a stat if not."""
        try:
            found = os.stat(self._name)  # noqa: PTH116 -- for each call: a Path takes half as long again
            age_s = self._clock() - found.st_mtime
            if self._max_stale_s < math.inf and not -_AHEAD_S <= age_s <= self._max_stale_s:
                raise Unavailable(f"The document {self._document.name} could not be read for too long")
            return self._load(found)
        except (OSError, ValueError) as exc:
            raise Unavailable(f"The document {self._document.name} was not read yet") from exc

    @property
    def is_late(self) -> bool:
        """True if the place has not answered for ten seconds, or ``max_stale_s`` if that is less."""
        return self._age_s() >= min(LATE_S, self._max_stale_s)

    @property
    def age_s(self) -> float:
        """Seconds since the place answered last; those for which a copy is used at most, if it never did."""
        return max(0.0, self._age_s())

    def poll(self) -> None:
        """Ask the place, unless a process of this host just did or is doing so. Raises as ``reread``."""
        if self._age_s() >= _JUST_S:
            with suppress(BlockingIOError), self._locked(wait=False):
                if self._age_s() >= _JUST_S:
                    self._update()

    def reread(self) -> None:
        """Ask the place after this call has begun; threads that wait share an answer, two a second at most.

        Raises Unavailable if it cannot be read, or what it holds is refused; the log says why.
        """
        called = time.monotonic()
        with self._reading:
            if self._begun <= called:
                time.sleep(max(0.0, self._begun + _PACE_S - time.monotonic()))
                self._begun, self._failure = time.monotonic(), None
                try:
                    with self._locked():
                        self._update()
                except Unavailable as exc:
                    self._failure = exc
            if self._failure:
                raise self._failure

    def _locked(self, *, wait: bool = True) -> AbstractContextManager[int]:
        secure_files.make_folders(self._lock_path.parent)
        return secure_files.lock(self._lock_path, wait=wait)

    def _update(self) -> None:
        try:
            known = self._load(self._path.stat())
        except (OSError, ValueError):  # none yet, or damaged
            known = None
        asked = self._clock()
        try:
            found = self._document.read(known)
            if found is not known:
                tag = msgspec.json.encode(found.tag)
                content = self._document.encode(found) if found.generation else b""
                secure_files.write(self._path, tag + b"\n" + content, locked=True)
                _log.info("document.read", document=self._document.name, generation=found.generation)
            os.utime(self._path, (asked, asked))
        except (OSError, KmsError) as exc:
            _log.error("document.not_read", document=self._document.name, reason=reason_of(exc))
            raise Unavailable(
                f"The document {self._document.name} cannot be read; the service's log says why"
            ) from exc

    def _load(self, found: os.stat_result) -> Version:
        """The copy. A process reads and verifies it again when another one has replaced it.

        A new copy may have size and inode of the one before. Its times also change with each answer of the
        place: then the tag says whether it is another one.
        """
        stamp, held = self._loaded
        now = stamp_of_stat(found)
        if stamp != now:
            with open(self._path, "rb", opener=small_files.at_once) as file:
                try:
                    tag = msgspec.json.decode(file.readline(), type=str)
                    if stamp[:3] != now[:3] or tag != held.tag:
                        held = self._document.open(file.read(), tag)
                except (msgspec.MsgspecError, KmsError) as exc:
                    raise ValueError("a damaged copy") from exc
            self._loaded = now, held
        return held

    def _age_s(self) -> float:
        with suppress(OSError):
            age_s = self._clock() - self._path.stat().st_mtime
            return age_s if age_s >= -_AHEAD_S else self._max_stale_s
        return self._max_stale_s


class CopyPoll(PeriodicThread):
    """Polls for the processes of this host."""

    def __init__(self, copy: LocalCopy) -> None:
        super().__init__("documents", POLL_S, failed="document.poll_failed")
        self._copy = copy
        self.wake()

    def round(self) -> None:
        try:
            self._copy.poll()
        finally:
            self._copy.gauge.set(self._copy.age_s)
