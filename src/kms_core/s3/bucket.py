"""One bucket: objects by range and condition, and multipart uploads; knows no job, prefix or key backend.

Source: Amazon S3 API reference. Conditions are S3's own: ``If-Match``, ``If-None-Match: *``. Errors:
PathRefused for what the store refuses or has not, Unavailable while it does not answer, InvalidRequest for an
object that changed. Sizes are in bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_plus
from xml.sax.saxutils import escape, unescape  # nosec B406  # text to text: nothing is parsed

import structlog

from kms_core.payload.files import changed
from kms_core.s3.connection import Ask, S3Answer, S3Connection
from kms_protocol.errors import PathRefused

PUT_LIMIT_BYTES: Final = 5 * 1024**3
LEAST_PART_BYTES: Final = 5 * 1024**2
MOST_PARTS: Final = 10_000
MARK: Final = "x-amz-meta-kms-job"
"""User metadata that says which job made an object, so that whoever finishes the job knows its own work."""

_CHANGED: Final = frozenset({HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND})
_TAKEN: Final = frozenset({HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT})
_CANNOT: Final = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED})
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """An object as it is now. ``etag`` changes with every write; ``mark`` names the job that wrote it."""

    size: int
    etag: str
    mark: str


class UploadedPart(NamedTuple):
    """A part of an upload that has arrived; the ETag is without its quotes, which not every answer has."""

    number: int
    etag: str
    size: int


class Completion(Enum):
    """What became of an upload. TAKEN: a condition did not hold. GONE: completed before, or aborted."""

    DONE = "done"
    TAKEN = "taken"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class If:
    """When a write may happen: always, only if nothing is there, or only over the object with this ETag."""

    absent: bool = False
    etag: str = ""

    @property
    def headers(self) -> dict[str, str]:
        if self.absent:
            return {"If-None-Match": "*"}
        return {"If-Match": self.etag} if self.etag else {}


ALWAYS: Final = If()


class Bucket:
    """A bucket on a line."""

    def __init__(self, name: str, line: S3Connection, *, path_style: bool) -> None:
        self.name = name
        self.line = line
        self._subdomain, self._base = ("", f"/{name}") if path_style else (name, "")

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
        return ObjectHead(int(size), answer.headers["etag"], answer.headers.get(MARK, ""))

    def read_into(self, key: str, etag: str, start: int, views: Sequence[memoryview]) -> None:
        """Fill the views from ``start`` on, out of the object of this ETag. InvalidRequest if it changed."""
        size = sum(map(len, views))
        if not size:
            return
        headers = {"If-Match": etag, "Range": f"bytes={start}-{start + size - 1}"}
        answer = self.line.fetch(Ask("GET", self._path(key), headers=headers), views, self._subdomain)
        if answer.status in _CHANGED or answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise changed()
        self._check(answer)

    def put(self, key: str, body: memoryview | bytes, condition: If, mark: str) -> bool:
        """Write a whole object; False, and nothing is written, if the condition does not hold."""
        answer = self._ask("PUT", key, headers=condition.headers | {MARK: mark}, body=body)
        if _not_held(answer, condition):
            return False
        self._check(answer)
        return True

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every key that begins with ``prefix``, with its object's size, in the store's order."""
        query = {"list-type": "2", "prefix": prefix, "encoding-type": "url", "max-keys": "1000"}
        while True:
            text = self._ask_ok("GET", "", query=query).body.decode("utf-8", "replace")
            quoted = _tag(text, "EncodingType") == "url"
            for entry in _elements(text, "Contents"):
                key = _tag(entry, "Key")
                yield unquote_plus(key) if quoted else key, int(_tag(entry, "Size"))
            following = _tag(text, "NextContinuationToken")
            if _tag(text, "IsTruncated") != "true" or not following:
                return
            query["continuation-token"] = following

    # -- multipart uploads ---------------------------------------------------------------------------

    def begin(self, key: str, mark: str) -> str:
        """The id of a new upload."""
        answer = self._ask_ok("POST", key, query={"uploads": ""}, headers={MARK: mark})
        upload = _tag(answer.body.decode("utf-8", "replace"), "UploadId")
        if not upload:
            raise self._refusal(answer)
        return upload

    def put_part(self, key: str, upload: str, number: int, body: memoryview) -> UploadedPart:
        query = {"partNumber": str(number), "uploadId": upload}
        answer = self._ask_ok("PUT", key, query=query, body=body)
        return UploadedPart(number, answer.headers.get("etag", "").strip('"'), len(body))

    def copy_part(self, key: str, upload: str, number: int, run: "Run") -> UploadedPart | None:
        """A part out of an object on the same line, moved by the store itself. None if it cannot do that.

        InvalidRequest if the object has another ETag by now, where the store looks.
        """
        headers = {
            "x-amz-copy-source": quote(f"/{run.bucket}/{run.key}"),
            "x-amz-copy-source-if-match": run.etag,
            "x-amz-copy-source-range": f"bytes={run.start}-{run.start + run.size - 1}",
        }
        query = {"partNumber": str(number), "uploadId": upload}
        answer = self._ask("PUT", key, query=query, headers=headers, slow=True)
        if answer.status == HTTPStatus.PRECONDITION_FAILED:
            raise changed()
        etag = _tag(answer.body.decode("utf-8", "replace"), "ETag").strip('"')
        if answer.status in _CANNOT or answer.code == "NotImplemented" or (answer.ok and not etag):
            return None
        self._check(answer)
        return UploadedPart(number, etag, run.size)

    def complete(self, key: str, upload: str, parts: Sequence[UploadedPart], condition: If) -> Completion:
        """Make the object out of its parts, all at once."""
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
        """What has arrived of an upload, by number; None if there is no such upload any more."""
        found: list[UploadedPart] = []
        query = {"uploadId": upload, "max-parts": "1000"}
        while True:
            answer = self._ask("GET", key, query=query)
            if answer.status == HTTPStatus.NOT_FOUND:
                return None
            self._check(answer)
            text = answer.body.decode("utf-8", "replace")
            for entry in _elements(text, "Part"):
                number, size = int(_tag(entry, "PartNumber")), int(_tag(entry, "Size"))
                found.append(UploadedPart(number, _tag(entry, "ETag").strip('"'), size))
            if _tag(text, "IsTruncated") != "true":
                return found
            query["part-number-marker"] = str(found[-1].number)

    def abort(self, key: str, upload: str) -> None:
        """Throw an upload away; doing it again, or after its completion, changes nothing."""
        answer = self._ask("DELETE", key, query={"uploadId": upload})
        if answer.status != HTTPStatus.NOT_FOUND:
            self._check(answer)

    # -- inside --------------------------------------------------------------------------------------

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
        ask = Ask(method, self._path(key), query or {}, headers or {}, body, slow)
        return self.line.ask(ask, self._subdomain)

    def _ask_ok(
        self,
        method: str,
        key: str,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        body: memoryview | bytes = b"",
    ) -> S3Answer:
        answer = self._ask(method, key, query=query, headers=headers, body=body)
        self._check(answer)
        return answer

    def _check(self, answer: S3Answer) -> None:
        if not answer.ok:
            raise self._refusal(answer)

    def _refusal(self, answer: S3Answer) -> PathRefused:
        said = f"{answer.status} {answer.code}".rstrip()
        _log.warning("s3.refused", bucket=self.name, said=said)
        return PathRefused(_ADVICE.get(answer.status, _OTHER).format(bucket=self.name, said=said))


@dataclass(frozen=True, slots=True)
class Run:
    """Some bytes of an object."""

    bucket: str
    key: str
    etag: str
    start: int
    size: int


_OTHER: Final = "The object store answers {said} for bucket {bucket}"
_MOVED: Final = (
    "Bucket {bucket} is elsewhere ({said}): check endpoint and region in [kms.jobs.buckets.{bucket}]"
)
_ADVICE: Final[Mapping[int, str]] = {
    HTTPStatus.FORBIDDEN: "The object store refuses this for bucket {bucket} ({said}): "
    "check credentials and policy of [kms.jobs.buckets.{bucket}]",
    HTTPStatus.NOT_FOUND: "There is nothing at this place, or no bucket {bucket}",
    HTTPStatus.MOVED_PERMANENTLY: _MOVED,
    HTTPStatus.TEMPORARY_REDIRECT: _MOVED,
    HTTPStatus.PERMANENT_REDIRECT: _MOVED,
}


def _not_held(answer: S3Answer, condition: If) -> bool:
    """S3 answers 412, 409 while another write is under way, and 404 to If-Match where nothing is there."""
    if answer.status in _TAKEN and condition != ALWAYS:
        return True
    return bool(condition.etag) and answer.code == "NoSuchKey"


def _tag(text: str, name: str) -> str:
    """The text of the first element of this name; empty without one."""
    found = next(_elements(text, name), "")
    return unescape(found, {"&quot;": '"', "&#34;": '"', "&apos;": "'", "&#39;": "'"})


def _elements(text: str, name: str) -> Iterator[str]:
    """The texts of the elements of this name, none of which holds another; in one pass over the text."""
    for begun in text.split(f"<{name}>")[1:]:
        inner, end, _ = begun.partition(f"</{name}>")
        if end:
            yield inner
