"""The spool in a bucket: one object for each blob, ``<prefix><folder>/<name>``, byte for byte as its file.

An answered write is durable. A blob appears whole or not at all: below one part it is one PUT, above it a
multipart upload. Writes ask for a free name (``If-None-Match: *``) where the store knows that. The spool's
errors are raised in place of the store's; after a call without an answer others fail at once, also in the
processes that were forked from the same parent, until a thread of one that asks every 1 to 8 seconds has one.
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import chain, repeat
from typing import Final

import structlog

from kms_core.jobs.storage.blob_store import SpoolNote, WriteBlob
from kms_core.s3.bucket import ALWAYS, Bucket, ObjectHead, ObjectReader, StoreRefused
from kms_core.s3.connection import SILENCES, StoreAway
from kms_core.s3.streams import BufferPool, ReadAhead, StreamedObject
from kms_core.settings.model import Settings
from kms_core.settings.model import SpoolBucketSection as Section
from kms_core.shared_time import SharedTime
from kms_core.stores import s3_connection
from kms_protocol.errors import (
    InvalidRequest,
    KmsError,
    RecordRefused,
    ResultExpired,
    SpoolFull,
    SpoolUnavailable,
    Unavailable,
)

WHERE: Final = "kms.jobs.spool_bucket"
UNFINISHED_S: Final = 86_400.0
"""So old is a multipart upload of a writer that was killed: one that goes on looks the same."""

_USAGE_CACHE_S: Final = 30.0
_ASK_S: Final = (1.0, 2.0, 4.0, 8.0)
_LINGERS_S: Final = 1.0
_REFUSED_S: Final = 60.0
_WANTED_S: Final = 60.0
_ROOM_BYTES: Final = 1 << 62  # a store does not say how much it takes
_FULL: Final = (
    "The bucket of uploads and results takes no more: wait until results expire, or raise its quota"
)
_AWAY: Final = "The bucket of uploads and results does not answer: try again later"
_REFUSED: Final = (
    "The bucket of uploads and results refuses this ({said}): the operator checks [kms.jobs.spool_bucket], "
    "the policy of the bucket and the clock, and kms doctor"
)
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class SpoolBucket:
    """A bucket as ``BlobStore``. ``prefix`` is empty or ends in a slash."""

    bucket: Bucket
    prefix: str
    pool: BufferPool
    usage_cache_s: float = _USAGE_CACHE_S
    is_remote: bool = True
    away: SharedTime = field(default_factory=SharedTime)  # until when it counts as away, and a second more
    _wanted: float = field(default=-math.inf, init=False)
    _refused: float = field(default=-math.inf, init=False)

    @property
    def is_away(self) -> bool:
        """Return whether it does not answer, or did not a second ago: a caller sees why its call failed."""
        return time.monotonic() < self.away.at

    @property
    def is_refused(self) -> bool:
        return time.monotonic() - self._refused < _REFUSED_S

    @contextmanager
    def create(self, folder: str, name: str, declared_bytes: int = 0) -> Iterator[WriteBlob]:
        self.check()  # nothing is read of an upload that cannot be kept
        mark = f"spool/{os.urandom(16).hex()}"
        with closing(
            StreamedObject(self.bucket, self._key(folder, name), mark, self.pool, declared_bytes)
        ) as out:

            def write(data: memoryview, _position: int) -> None:
                with self.errors(goes_on=True):
                    out.write(data)

            try:
                yield write
                with self.errors(goes_on=True):
                    out.finish()
                self._refused = -math.inf
            except BaseException:
                out.discard()
                raise

    @contextmanager
    def open(self, folder: str, name: str) -> Iterator[ReadAhead]:
        with self.errors():
            key = self._key(folder, name)
            found = self._found(key)
            source = ObjectReader(self.bucket, key, found.etag, found.size)
        with closing(ReadAhead(source, self.pool, lambda exc: self._read_error(source.key, exc))) as reader:
            yield reader

    def put(self, folder: str, name: str, data: bytes, *, durable: bool) -> None:
        del durable  # it is
        with self.errors():
            self.bucket.put(self._key(folder, name), data, ALWAYS, "spool")
        self._refused = -math.inf

    def get(self, folder: str, name: str, most_bytes: int) -> SpoolNote:
        key = self._key(folder, name)
        with self.errors():
            found = self._found(key)
            data = ObjectReader(self.bucket, key, found.etag, found.size).read_at(0, most_bytes)
            return SpoolNote(data, found.modified or time.time())

    def names(self, folder: str, young_s: float = math.inf) -> list[str]:
        prefix = self._key(folder, "")
        with self.errors():
            found = [each.key for each in self.bucket.listed(prefix) if each.age_s <= young_s]
        return [key.removeprefix(prefix) for key in found]

    def remove(self, folder: str, name: str) -> None:
        with self.errors():
            self.bucket.delete(self._key(folder, name))

    def remove_folder(self, folder: str) -> bool:
        try:
            with self.errors():
                for found in list(self.bucket.listed(self._key(folder, ""))):
                    self.bucket.delete(found.key)
        except SpoolUnavailable:
            return False
        return True

    def folders(self, older_than_s: float) -> Iterator[str]:
        youngest: dict[str, float] = {}
        with self.errors():
            for found in self.bucket.listed(self.prefix):
                folder = found.key.removeprefix(self.prefix).partition("/")[0]
                youngest[folder] = min(found.age_s, youngest.get(folder, found.age_s))
        return (folder for folder, age_s in youngest.items() if age_s > older_than_s)

    def sweep(self) -> None:
        with self.errors():
            for found in list(self.bucket.unfinished(self.prefix)):
                if found.age_s > UNFINISHED_S:
                    self.bucket.abort(found.key, found.upload)
                    _log.info("spool.upload_aborted")

    def used_bytes(self) -> int:
        with self.errors():
            return sum(found.size for found in self.bucket.listed(self.prefix))

    def free_bytes(self) -> int:
        return _ROOM_BYTES

    @contextmanager
    def errors(self, *, goes_on: bool = False) -> Iterator[None]:
        """Raise SpoolUnavailable and SpoolFull in place of the store's errors.

        ``goes_on``: it asks the store also while others get no answer.
        """
        if not goes_on:
            self.check()
        try:
            yield
        except (StoreRefused, Unavailable) as exc:
            raise self._error(exc) from exc

    def check(self) -> None:
        """Raise SpoolUnavailable after a call without an answer, until there is one."""
        if self._is_asked():
            self._wanted = time.monotonic()
            raise SpoolUnavailable(_AWAY)

    def _is_asked(self) -> bool:
        return time.monotonic() < self.away.at - _LINGERS_S

    def _count_as_away(self, wait_s: float) -> None:
        """Count as away until an attempt in so many seconds has ended, also if its process is killed."""
        longest_s = SILENCES * self.bucket.line.endpoint.timeout_s
        self.away.set(time.monotonic() + wait_s + longest_s + 2 * _LINGERS_S)

    def _ask(self) -> None:
        """Ask until there is an answer, or no call in a minute, in a thread: no caller waits for it."""
        try:
            for wait_s in chain(_ASK_S, repeat(_ASK_S[-1])):
                self._count_as_away(wait_s)
                time.sleep(wait_s)
                if time.monotonic() - self._wanted > _WANTED_S:
                    return
                with suppress(Unavailable):
                    self.bucket.head(self._key("hosts", "install"))
                    return
        except StoreRefused:
            return
        finally:
            self.away.set(time.monotonic() + _LINGERS_S)

    def _error(self, exc: StoreRefused | Unavailable) -> KmsError:
        full = isinstance(exc, StoreAway) and exc.status == HTTPStatus.INSUFFICIENT_STORAGE
        if full or isinstance(exc, SpoolFull):
            return SpoolFull(_FULL)
        if isinstance(exc, StoreRefused):
            self._refused = time.monotonic()
            return SpoolUnavailable(_REFUSED.format(said=exc.said))
        if isinstance(exc, StoreAway):
            if not self._is_asked():
                self._wanted = time.monotonic()
                self._count_as_away(0.0)
                threading.Thread(target=self._ask, name="spool-away", daemon=True).start()
            return SpoolUnavailable(_AWAY)
        return exc if isinstance(exc, SpoolUnavailable) else SpoolUnavailable(exc.detail)

    def _read_error(self, key: str, exc: KmsError) -> KmsError:
        """The error of a read: ResultExpired if the object is gone, RecordRefused if it is another."""
        if isinstance(exc, StoreRefused | Unavailable):
            return self._error(exc)
        if not isinstance(exc, InvalidRequest):
            return exc
        with self.errors():
            return ResultExpired() if self.bucket.head(key) is None else RecordRefused()

    def _found(self, key: str) -> ObjectHead:
        found = self.bucket.head(key)
        if found is None:
            if self.bucket.is_missing(key):
                raise ResultExpired
            raise Unavailable(_AWAY)
        return found

    def _key(self, folder: str, name: str) -> str:
        return f"{self.prefix}{folder}/{name}"


_away: Final[dict[str, SharedTime]] = {}  # of this process and those that it forks


def build(settings: Settings, section: Section) -> SpoolBucket:
    """The bucket of ``[kms.jobs.spool_bucket]``; reads files of secrets, connects to nothing.

    Raises ConfigurationError.
    """
    line = s3_connection(WHERE, section, strict=settings.is_prod)
    bucket = Bucket(section.bucket, line, path_style=section.path_style)
    away = _away.setdefault(f"{section.endpoint} {section.url}", SharedTime())
    return SpoolBucket(bucket, section.prefix, BufferPool(section.buffer_bytes), away=away)
