"""From an answer that is not a success to the error it means; knows no transport.

A problem's ``code`` chooses the class of kms_protocol.errors; where two classes share a code, the one deeper
in the tree. Classes that other modules add (a backend's, the job store's) are not looked at. Codes that this
version does not know keep their text and become UnexpectedAnswer, or Unavailable when the status says so.
"""

import email.utils
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from typing import Final

import msgspec

from kms_protocol import wire
from kms_protocol.errors import EXIT_OTHER, KmsError, Unavailable

START_HINT: Final = 'start it with "kms up", or name its address with --url or KMS_SERVICE_URL'
RETRYABLE: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
DEFAULT_RETRY_AFTER_S: Final = 5.0


class ServiceUnreachable(Unavailable):
    """No answer from the address, or one cut short. ``hint`` says what to try."""

    code = "service_unreachable"
    summary = "The service does not answer"

    def __init__(self, detail: str = "", *, hint: str = START_HINT, retry_after_s: float = 0.1) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.hint = hint


class UnexpectedAnswer(KmsError):
    """An answer that is not of this API: another server, a proxy, or another version."""

    code = "unexpected_answer"
    summary = "The address answered, but not as this service does"
    exit_code = EXIT_OTHER


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def retry_after_s(self) -> float | None:
        """Seconds of Retry-After (RFC 9110 §10.2.3: a number or a date), if it is there and readable."""
        value = self.headers.get("retry-after", "").strip()
        if value.isdecimal():
            return float(value)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None


@cache
def by_code() -> Mapping[str, type[KmsError]]:
    """Every code of the tree and the class it becomes; children come after parents, so they win."""
    return {kind.code: kind for kind in tree(KmsError) if kind.__module__ == KmsError.__module__}


def tree(top: type[KmsError]) -> Iterator[type[KmsError]]:
    """The class and all below it, parents first."""
    yield top
    for child in top.__subclasses__():
        yield from tree(child)


def failure(code: str, detail: str = "") -> KmsError:
    """The error of a code, as in a refused item or a failed job."""
    kind = by_code().get(code)
    return kind(detail) if kind else UnexpectedAnswer(detail or f"The service answered with code {code}")


def error_of(reply: Reply) -> KmsError:
    """The error that an answer outside 2xx means; the request id is added as a note."""
    try:
        problem = msgspec.json.decode(reply.body, type=wire.Problem)
    except wire.NOT_JSON:
        return _not_ours(reply)
    kind = by_code().get(problem.code)
    if kind is None:
        fallback = Unavailable if reply.status in RETRYABLE else UnexpectedAnswer
        error: KmsError = fallback(problem.detail)
    else:
        error = kind(problem.detail)
    if isinstance(error, Unavailable):
        error.retry_after_s = reply.retry_after_s() or DEFAULT_RETRY_AFTER_S
    error.add_note(f"request id {problem.request_id}")
    return error


def _not_ours(reply: Reply) -> KmsError:
    if reply.status in RETRYABLE:
        return Unavailable(f"Something before the service answered {reply.status}: is it running")
    return UnexpectedAnswer(
        f"The address answered {reply.status} with something that is not a problem document of this service"
    )
