"""One bucket: objects by range and condition, and multipart uploads (Amazon S3 API reference).

Conditions are ``If-Match`` and ``If-None-Match: *``; a probe says whether the store ignores them. Raises
PathRefused for a refused request or a missing object, Unavailable while the store does not answer,
InvalidRequest for an object that changed. Sizes are in bytes.
"""

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_plus
from xml.sax.saxutils import escape  # nosec B406  # text to text: nothing is parsed

import structlog

from kms_core.payload.files import source_changed_error
from kms_core.s3.connection import S3Answer, S3Body, S3Connection, S3Request, elements, tag
from kms_protocol.errors import KmsError, PathRefused, SpoolFull, Unavailable

MOST_PARTS: Final = 10_000
MARK: Final = "x-amz-meta-kms-job"
"""User metadata with the job that wrote an object, so that a later attempt recognises it."""

_CHANGED: Final = frozenset({HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND})
_TAKEN: Final = frozenset({HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT})
_CANNOT: Final = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED})
_FULL: Final = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_OTHER: Final = "The object store answers {said} for bucket {bucket}"
_MOVED: Final = (
    "Bucket {bucket} is elsewhere ({said}): check endpoint and region in [kms.jobs.buckets.{bucket}]"
)
_ADVICE: Final[Mapping[int, str]] = {
    HTTPStatus.FORBIDDEN: "The object store refuses this for bucket {bucket} ({said}): "
    "check credentials and policy of [kms.jobs.buckets.{bucket}]",
    HTTPStatus.NOT_FOUND: "No such object, or no bucket {bucket}",
    HTTPStatus.MOVED_PERMANENTLY: _MOVED,
    HTTPStatus.TEMPORARY_REDIRECT: _MOVED,
    HTTPStatus.PERMANENT_REDIRECT: _MOVED,
}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """The current state of an object.

    ``etag`` changes with each write; ``mark`` names the job that wrote it. ``modified`` (seconds since the
    epoch) and ``age_s`` are by the store's clock; 0 where it says none.
    """

    size: int
    etag: str
    mark: str
    modified: float = 0.0
    age_s: float = 0.0


class Listed(NamedTuple):
    """An object of a listing; ``age_s`` are the seconds since it was written, by the store's clock."""

    key: str
    size: int
    age_s: float


class Unfinished(NamedTuple):
    """A multipart upload that was not completed or aborted.

    ``begun`` is in seconds since the epoch, 0 where the store does not say.
    """

    key: str
    upload: str
    begun: float
    age_s: float


class StoreRefused(PathRefused):
    """A refused request: the status and the error code of the store's answer."""

    def __init__(self, detail: str, status: int, said: str) -> None:
        super().__init__(detail)
        self.status, self.said = status, said


class UploadAborted(Unavailable):
    """An upload that ended under its writer: a worker without its lease, or a lifecycle rule, aborted it."""

    summary = "The upload was aborted before it was complete: try again"


class UploadedPart(NamedTuple):
    """An uploaded part; its ETag is without quotes, which some stores omit."""

    number: int
    etag: str
    size: int


class Completion(Enum):
    """The result of a completion. TAKEN: the condition did not hold. GONE: completed before, or aborted."""

    DONE = "done"
    TAKEN = "taken"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class If:
    """The condition of a write: none, no existing object, or an existing object with this ETag."""

    absent: bool = False
    etag: str = ""

    @property
    def headers(self) -> dict[str, str]:
        if self.absent:
            return {"If-None-Match": "*"}
        return {"If-Match": self.etag} if self.etag else {}


ALWAYS: Final = If()


class Bucket:
    """One bucket of an object store."""

    def __init__(self, name: str, line: S3Connection, *, path_style: bool) -> None:
        self.name = name
        self.line = line
        self._subdomain, self._base = ("", f"/{name}") if path_style else (name, "")
        self._wants_md5 = False

    # -- objects -------------------------------------------------------------------------------------

    def head(self, key: str) -> ObjectHead | None:
        """The object, or None."""
        answer = self._ask("HEAD", key)
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        self._check(answer)
        size = answer.headers.get("content-length", "")
        if not size.isdecimal() or not answer.headers.get("etag"):
            raise self._refusal(answer)
        modified = answer.time("last-modified")
        age_s = _age_s(modified, answer.time("date"))
        return ObjectHead(int(size), answer.headers["etag"], answer.headers.get(MARK, ""), modified, age_s)

    def is_missing(self, key: str) -> bool:
        """Return whether the bucket has no such object: ``head`` answers the same for a missing bucket.

        Raises StoreRefused if the bucket is missing.
        """
        answer = self._ask("GET", key, headers={"Range": "bytes=0-0"})
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return False
        if answer.status == HTTPStatus.NOT_FOUND and answer.code == "NoSuchKey":
            return True
        self._check(answer)
        return False

    def read_into(self, key: str, etag: str, start: int, views: Sequence[memoryview]) -> None:
        """Fill the views with the bytes from ``start`` on. Raises InvalidRequest if the ETag is another."""
        if size := sum(map(len, views)):
            self._check_range(self.line.fetch(self._range(key, etag, start, size), views))

    def stream(self, key: str, etag: str, start: int, size: int) -> S3Body:
        """The bytes from ``start`` on, unread; the caller closes it. Raises as ``read_into``."""
        found = self.line.stream(self._range(key, etag, start, size), size)
        if isinstance(found, S3Body):
            return found
        self._check_range(found)
        raise self._refusal(found)

    def _range(self, key: str, etag: str, start: int, size: int) -> S3Request:
        headers = {"If-Match": etag, "Range": f"bytes={start}-{start + size - 1}"}
        return S3Request("GET", self._path(key), headers=headers, subdomain=self._subdomain)

    def _check_range(self, answer: S3Answer) -> None:
        if answer.status in _CHANGED or answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise source_changed_error()
        self._check(answer)

    def get(self, key: str, unless: str = "") -> tuple[bytes | None, str]:
        """An object of at most 8 MiB, None if it has the ETag ``unless``, and its ETag; empty for none."""
        answer = self._ask("GET", key, headers={"If-None-Match": unless} if unless else {})
        if answer.status == HTTPStatus.NOT_MODIFIED:
            return None, unless
        if answer.status == HTTPStatus.NOT_FOUND and answer.code == "NoSuchKey":
            return b"", ""
        self._check(answer)
        if not answer.headers.get("etag"):
            raise self._refusal(answer)
        return answer.body, answer.headers["etag"]

    def put(self, key: str, body: memoryview | bytes, condition: If, mark: str) -> bool:
        """Write an object. Returns False, and writes nothing, if the condition does not hold."""
        answer = self._write(key, body, headers=condition.headers | {MARK: mark})
        if _not_held(answer, condition):
            return False
        self._check(answer)
        return True

    def listed(self, prefix: str) -> Iterator[Listed]:
        """Each object whose key begins with ``prefix``, in the store's order."""
        query = {"list-type": "2", "prefix": prefix, "max-keys": "1000"}
        following = {"continuation-token": "NextContinuationToken"}
        for entry, key, now in self._entries("Contents", query, following):
            yield Listed(key, int(tag(entry, "Size")), _age_s(_time(tag(entry, "LastModified")), now))

    def _entries(
        self, name: str, query: dict[str, str], following: Mapping[str, str]
    ) -> Iterator[tuple[str, str, float]]:
        """Each element of this name in a listing of several pages, its key, and the time of the answer.

        ``following`` are the parameters of the next page, by the elements with their values.
        """
        query["encoding-type"] = "url"
        while True:
            answer = self._check(self._ask("GET", "", query=query))
            now, text = answer.time("date"), answer.text
            unquoted = unquote_plus if tag(text, "EncodingType") == "url" else str
            for entry in elements(text, name):
                yield entry, unquoted(tag(entry, "Key")), now
            found = {parameter: tag(text, element) for parameter, element in following.items()}
            if tag(text, "IsTruncated") != "true" or not next(iter(found.values())):
                return
            query |= found
            if "key-marker" in query:
                query["key-marker"] = unquoted(query["key-marker"])

    def delete(self, key: str) -> None:
        """Delete an object. Without effect on one that is not there."""
        answer = self._ask("DELETE", key)
        if answer.status != HTTPStatus.NOT_FOUND or answer.code == "NoSuchBucket":
            self._check(answer)

    def setting(self, name: str) -> str | None:
        """A setting of the bucket (``versioning``, ``object-lock``, ``lifecycle``) as XML.

        None where it has none, or the store does not say.
        """
        answer = self._ask("GET", "", query={name: ""})
        return answer.text if answer.ok else None

    # -- multipart uploads ---------------------------------------------------------------------------

    def begin(self, key: str, mark: str) -> str:
        """Begin an upload, and return its id."""
        answer = self._check(self._ask("POST", key, query={"uploads": ""}, headers={MARK: mark}))
        upload = tag(answer.text, "UploadId")
        if not upload:
            raise self._refusal(answer)
        return upload

    def put_part(self, key: str, upload: str, number: int, body: memoryview) -> UploadedPart:
        """Send a part. Raises UploadAborted."""
        query = {"partNumber": str(number), "uploadId": upload}
        answer = self._check(self._write(key, body, query=query))
        return UploadedPart(number, answer.headers.get("etag", "").strip('"'), len(body))

    def copy_part(self, key: str, upload: str, number: int, source: "ObjectReader") -> UploadedPart | None:
        """Have the store copy a part from an object of the same endpoint. None if it cannot.

        Raises InvalidRequest if the object has another ETag, where the store checks that, UploadAborted.
        """
        last = source.offset + source.size - 1
        headers = {
            "x-amz-copy-source": quote(f"/{source.bucket.name}/{source.key}"),
            "x-amz-copy-source-if-match": source.etag,
            "x-amz-copy-source-range": f"bytes={source.offset}-{last}",
        }
        query = {"partNumber": str(number), "uploadId": upload}
        answer = self._ask("PUT", key, query=query, headers=headers, slow=True)
        if answer.status == HTTPStatus.PRECONDITION_FAILED:
            raise source_changed_error()
        etag = tag(answer.text, "ETag").strip('"')
        if answer.status in _CANNOT or answer.code == "NotImplemented" or (answer.ok and not etag):
            return None
        self._check(answer)
        return UploadedPart(number, etag, source.size)

    def complete(self, key: str, upload: str, parts: Sequence[UploadedPart], condition: If) -> Completion:
        """Make the object of its parts, atomically."""
        listed = "".join(
            f'<Part><PartNumber>{part.number}</PartNumber><ETag>"{escape(part.etag)}"</ETag></Part>'
            for part in parts
        )
        answer = self._ask(
            "POST",
            key,
            query={"uploadId": upload},
            headers=condition.headers | {"Content-Type": "application/xml"},
            body=f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode(),
            slow=True,
        )
        if _not_held(answer, condition):
            return Completion.TAKEN
        if answer.status == HTTPStatus.NOT_FOUND:
            return Completion.GONE
        self._check(answer)
        return Completion.DONE

    def parts(self, key: str, upload: str) -> list[UploadedPart] | None:
        """The uploaded parts by number; None if the upload no longer exists."""
        found: list[UploadedPart] = []
        query = {"uploadId": upload, "max-parts": "1000"}
        while True:
            answer = self._ask("GET", key, query=query)
            if answer.status == HTTPStatus.NOT_FOUND:
                return None
            self._check(answer)
            for entry in elements(answer.text, "Part"):
                number, size = int(tag(entry, "PartNumber")), int(tag(entry, "Size"))
                found.append(UploadedPart(number, tag(entry, "ETag").strip('"'), size))
            if tag(answer.text, "IsTruncated") != "true":
                return found
            query["part-number-marker"] = str(found[-1].number)

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Each upload to a key that begins with ``prefix`` and was not completed or aborted.

        MinIO lists those to one whole key only.
        """
        query = {"uploads": "", "prefix": prefix, "max-uploads": "1000"}
        following = {"key-marker": "NextKeyMarker", "upload-id-marker": "NextUploadIdMarker"}
        for entry, key, now in self._entries("Upload", query, following):
            begun = _time(tag(entry, "Initiated"))
            yield Unfinished(key, tag(entry, "UploadId"), begun, _age_s(begun, now))

    def abort(self, key: str, upload: str) -> None:
        """Abort an upload. Without effect on one that was completed or aborted."""
        answer = self._ask("DELETE", key, query={"uploadId": upload})
        if answer.status != HTTPStatus.NOT_FOUND:
            self._check(answer)

    # -- requests ------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._base}/{quote(key, safe='/~')}"

    def _ask(  # noqa: PLR0913 -- the parts of a request
        self,
        method: str,
        key: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: memoryview | bytes = b"",
        slow: bool = False,
    ) -> S3Answer:
        return self.line.ask(
            S3Request(method, self._path(key), query or {}, headers or {}, body, slow, self._subdomain)
        )

    def _write(
        self,
        key: str,
        body: memoryview | bytes,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> S3Answer:
        """PUT bytes; with their MD5 once the store refused them without, as under object lock."""
        answer = None if self._wants_md5 else self._ask("PUT", key, query=query, headers=headers, body=body)
        if answer is None or answer.status == HTTPStatus.BAD_REQUEST:
            md5 = b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            more = {**(headers or {}), "Content-MD5": md5}
            answer = self._ask("PUT", key, query=query, headers=more, body=body)
            self._wants_md5 = self._wants_md5 or answer.ok
        return answer

    def _check(self, answer: S3Answer) -> S3Answer:
        if not answer.ok:
            raise self._refusal(answer)
        return answer

    def _refusal(self, answer: S3Answer) -> KmsError:
        if answer.code == "NoSuchUpload":
            return UploadAborted()
        status = f"{answer.status} {answer.code}".rstrip()
        if answer.code in _FULL:
            return SpoolFull(f"Bucket {self.name} takes no more ({status}): make room, or raise its quota")
        _log.warning("s3.refused", bucket=self.name, said=status)
        detail = _ADVICE.get(answer.status, _OTHER).format(bucket=self.name, said=status)
        return StoreRefused(detail, answer.status, status)


@dataclass(frozen=True, slots=True)
class ObjectReader:
    """A range of one version of an object; reads fail once the object has changed."""

    bucket: Bucket
    key: str
    etag: str
    size: int
    offset: int = 0

    def read_at(self, position: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, self.size - position)))
        self.bucket.read_into(self.key, self.etag, self.offset + position, [memoryview(data)])
        return bytes(data)

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        if position + sum(map(len, views)) > self.size:
            return False
        self.bucket.read_into(self.key, self.etag, self.offset + position, views)
        return True

    def stream(self, position: int, size: int) -> S3Body:
        """A range, unread; the caller closes it."""
        return self.bucket.stream(self.key, self.etag, self.offset + position, size)

    def stamp(self) -> str:
        return self.etag

    def tail(self, position: int) -> "ObjectReader":
        return replace(self, size=self.size - position, offset=self.offset + position)

    def head(self, size: int) -> "ObjectReader":
        """The first ``size`` bytes of the range."""
        return replace(self, size=size)

    def check(self) -> None:
        """Raise InvalidRequest if the object has changed, for copies made by the store."""
        found = self.bucket.head(self.key)
        if found is None or found.etag != self.etag:
            raise source_changed_error()


def _not_held(answer: S3Answer, condition: If) -> bool:
    """True if a condition failed: 412, 409 during another write, or 404 to If-Match without an object."""
    if answer.status in _TAKEN and condition != ALWAYS:
        return True
    return bool(condition.etag) and answer.code == "NoSuchKey"


def _age_s(written: float, now: float) -> float:
    """Seconds from a time to ``now``; 0 if either is 0."""
    return max(0.0, now - written) if written else 0.0


def _time(text: str) -> float:
    """A time (ISO 8601) in seconds since the epoch; 0 for another text."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
