"""Notes of multipart uploads: a store keeps the parts of an upload, and does not tell whose they are.

A note is a small blob in the spool, ``multipart/<job id>.<attempt>.<digest of the target>``. It
is written empty before the upload begins, then holds its id, and goes with it. Any later attempt finds the
notes of its job, also of attempts that Redis has forgotten. An upload whose note is empty (a kill between two
requests) has no parts, and is found by listing the uploads to its key.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.storage.buckets import SCHEME, Buckets
from kms_protocol.errors import KmsError, RecordRefused, ResultExpired

_FOLDER: Final = "multipart"
_LONGEST: Final = 4096
_NAME: Final = re.compile(r"(.+)\.([a-z0-9]+)\.([0-9a-f]{32})")
_LEEWAY_S: Final = 60.0
"""So far the clock of a store may be off."""


@dataclass(frozen=True, slots=True)
class UploadNote:
    """One attempt's note of ``at`` (seconds since the epoch); ``upload`` is empty until that has begun."""

    job_id: str
    attempt: str
    place: str
    upload: str
    at: float


class MultipartJournal:
    """One note for each attempt and target. Shared by all workers of an install, as the spool is."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def add(self, job_id: str, attempt: str, url: str, upload: str = "") -> None:
        """Note an upload that has begun, or, without its id, that one will begin.

        Raises SpoolFull, SpoolUnavailable, RecordRefused for what is no plain file there.
        """
        name = self._name(job_id, attempt, url)
        self._store.put(_FOLDER, name, upload.encode("ascii"), durable=bool(upload))

    def forget(self, job_id: str, attempt: str, url: str) -> None:
        """Remove the note of an upload that has ended; may be called twice."""
        with suppress(ResultExpired, RecordRefused):
            self._store.remove(_FOLDER, self._name(job_id, attempt, url))

    def sweep(self, buckets: Buckets, targets: Mapping[str, str], keep: Collection[str]) -> None:
        """Abort the uploads of jobs, by id, to their targets, but for those of the attempts ``keep``.

        What cannot be aborted now is left to a later call.
        """
        wanted = {job_id: url for job_id, url in targets.items() if url.startswith(SCHEME)}
        found = list(self.noted(wanted.values())) if wanted else []
        for note in found:
            url = wanted.get(note.job_id, "")
            if note.place != _place(url) or note.attempt in keep:
                continue
            with suppress(KmsError):
                if _abort(buckets, url, note, [other for other in found if other is not note]):
                    self.forget(note.job_id, note.attempt, url)

    def noted(self, urls: Iterable[str]) -> Iterator[UploadNote]:
        """The notes of uploads to these targets."""
        places = {_place(url) for url in urls}
        with suppress(ResultExpired, RecordRefused):
            for name in self._store.names(_FOLDER):
                if (matched := _NAME.fullmatch(name)) and matched[3] in places:
                    with suppress(ResultExpired, RecordRefused):
                        note = self._store.get(_FOLDER, name, _LONGEST)
                        upload = note.data.decode("ascii", "replace")
                        yield UploadNote(matched[1], matched[2], matched[3], upload, note.at)

    @staticmethod
    def _name(job_id: str, attempt: str, url: str) -> str:
        return f"{job_id}.{attempt}.{_place(url)}"


def _place(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _abort(buckets: Buckets, url: str, note: UploadNote, others: list[UploadNote]) -> bool:
    """Abort the upload of a note. False if it cannot be known which one that is, while another begins."""
    bucket, key = buckets.writing(url)
    if note.upload:
        bucket.abort(key, note.upload)
        return True
    same = [other for other in others if other.place == note.place]
    if not all(other.upload for other in same):
        return False
    named = {other.upload for other in same}
    for found in list(bucket.unfinished(key)):
        is_new = found.upload not in named and _is_after(found.begun, note.at)
        if found.key == key and is_new and not bucket.parts(key, found.upload):
            bucket.abort(key, found.upload)
    return True


def _is_after(begun: str, at: float) -> bool:
    try:
        return datetime.fromisoformat(begun).timestamp() >= at - _LEEWAY_S
    except ValueError:
        return False
