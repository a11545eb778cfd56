"""Errors from answers outside 2xx.

The ``code`` of a problem selects the class of kms_protocol.errors; if two classes share a code, the one
deeper in the tree. Subclasses in other modules are ignored. A code that this version does not know keeps its
text and becomes UnexpectedAnswer, or Unavailable for a retryable status.
"""

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, TypeVar

import msgspec

from kms_protocol import errors, shapes, wire
from kms_protocol.errors import EXIT_OTHER, KmsError, Unavailable

T = TypeVar("T")

START_HINT: Final = "start it with `kms up`, or name its address with --url or KMS_SERVICE_URL"
RETRYABLE: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


class ServiceUnreachable(Unavailable):
    """No answer from the address, or a truncated one. ``hint`` says what to do."""

    code = "service_unreachable"
    summary = "The service does not answer"

    def __init__(self, detail: str = "", *, hint: str = START_HINT, retry_after_s: float = 0.1) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.hint = hint


class UnexpectedAnswer(KmsError):
    """An answer that does not follow this API: from another server, a proxy, or another version."""

    code = "unexpected_answer"
    summary = "The answer is not one of this service"
    exit_code = EXIT_OTHER


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def retry_after_s(self) -> float | None:
        """Return the seconds of Retry-After (RFC 9110 §10.2.3: a number or a date); None if unusable."""
        value = self.headers.get("retry-after", "").strip()
        if value.isdecimal():
            return float(value)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None


def decoded(data: bytes, shape: type[T], what: str) -> T:
    """Decode an answer. Raises UnexpectedAnswer, which begins with ``what``, for another shape."""
    try:
        return msgspec.json.decode(data, type=shape)
    except wire.NOT_JSON as exc:
        raise UnexpectedAnswer(f"{what} does not have the shape of this API") from exc


BY_CODE: Final[Mapping[str, type[KmsError]]] = {  # a subclass comes later, and replaces its parent
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KmsError)
}


def failure(code: str) -> KmsError:
    """Return the error of a code, as in a failed item or a failed job."""
    kind = BY_CODE.get(code)
    return kind() if kind else UnexpectedAnswer(f"The service answered with code {code}")


def error_of(reply: Reply) -> KmsError:
    """Return the error of an answer outside 2xx, with the request id as a note."""
    try:
        problem = msgspec.json.decode(reply.body, type=shapes.Problem)
    except wire.NOT_JSON:
        return _not_ours(reply)
    kind = BY_CODE.get(problem.code)
    if kind is None:
        fallback = Unavailable if reply.status in RETRYABLE else UnexpectedAnswer
        error: KmsError = fallback(problem.detail)
    else:
        error = kind(problem.detail)
    if isinstance(error, Unavailable):
        error.retry_after_s = reply.retry_after_s() or error.retry_after_s
    error.add_note(f"request id {problem.request_id}")
    return error


def _not_ours(reply: Reply) -> KmsError:
    if reply.status in RETRYABLE:
        return Unavailable(f"A proxy answered {reply.status}: is the service running")
    return UnexpectedAnswer(f"The address answered {reply.status} without a problem document of this service")
