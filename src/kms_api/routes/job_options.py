"""Options of a submission: in headers for a streamed body, and those that all submissions share."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar, get_args
from urllib.parse import unquote

import msgspec

from kms_api.routing import Call
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest

W = TypeVar("W", bound=str | None)
_OBJECT: Final = "is a percent-encoded JSON object:"
_TIME: Final = "is an RFC 3339 time with an offset, as 2026-12-01T08:00:00Z"
_HEADERS: Final[Mapping[str, tuple[Any, str]]] = {
    "X-KMS-Key-Id": (str, "is the id of a key"),
    "X-KMS-Callback": (wire.EndpointName, "names an endpoint of the settings: leave it out for none"),
    "X-KMS-Priority": (wire.Priority, f"is one of {', '.join(wire.PRIORITIES)}"),
    "X-KMS-Start-By": (wire.Moment, _TIME),
    "X-KMS-Run-By": (wire.Moment, _TIME),
    "X-KMS-Keep-For": (wire.KeepFor, "is seconds, 60 or more"),
}
"""The type of each header in ``wire.JobIn``, and its description for a refusal."""
_ENCODED: Final[Mapping[str, tuple[Any, str]]] = {
    "X-KMS-Context": (wire.ContextIn, f"{_OBJECT} of texts"),
    "X-KMS-Release": (wire.Release, f"is one of {', '.join(get_args(wire.Release))}"),
    "X-KMS-Metadata": (wire.Metadata, f"{_OBJECT} of at most 16 texts of up to 512 characters"),
    "X-KMS-Group": (wire.GroupIn, f'{_OBJECT} as {{"name": "run-7", "jobs": 3}}'),
}
"""Headers that may be percent-encoded; an empty one counts as none."""
_JSON: Final = frozenset({"X-KMS-Keep-For", "X-KMS-Metadata", "X-KMS-Group"})


def submission_options(call: Call[None], kind: wire.JobKind) -> SubmissionOptions:
    """The options of a streamed body: in headers, never in the query string, which proxies log."""
    found: dict[str, Any] = {"context": "", "priority": "normal"}
    for header, (shape, form) in (*_HEADERS.items(), *_ENCODED.items()):
        text = _unquoted(call, header) if header in _ENCODED else call.headers.get(header)
        if text is not None:
            found[header.removeprefix("X-KMS-").lower().replace("-", "_")] = _value(header, text, shape, form)
    labels = labels_of(part for part in (_unquoted(call, "X-KMS-Labels") or "").split(",") if part)
    job = wire.JobIn(kind=kind, labels=labels, **found)
    return SubmissionOptions.of(call.caller, job, idempotency=idempotency(call))


def idempotency(call: Call[None]) -> str:
    """Return the Idempotency-Key of a request; empty without one. Raises InvalidRequest."""
    key = call.headers.get("idempotency-key", "")
    if len(key) > 256:  # noqa: PLR2004 -- a UUID fits seven times
        raise InvalidRequest("Idempotency-Key is above 256 characters")
    return key


def one_of(name: str, text: str | None, known: Iterable[W]) -> W:
    """The known value that is ``text``. Raises InvalidRequest, which lists those that are not empty."""
    for each in known:
        if text == each:
            return each
    raise InvalidRequest(f"{name} is one of {', '.join(filter(None, known))}")


def labels_of(pairs: Iterable[str]) -> wire.Labels:
    """The labels in texts of the form ``name=value``. Raises InvalidRequest."""
    found = [pair.partition("=") for pair in pairs]
    try:
        if all(equals for _, equals, _ in found) and len({name for name, _, _ in found}) == len(found):
            return msgspec.convert({name: value for name, _, value in found}, wire.Labels)
    except msgspec.ValidationError:
        pass
    raise InvalidRequest(
        f"Labels are at most {wire.MOST_LABELS} of name=value: names of up to 63 of A-Za-z0-9_./- and "
        "values of up to 128 of A-Za-z0-9_.:/@+-"
    )


def _value(header: str, text: str, shape: Any, form: str) -> object:  # noqa: ANN401 -- a type
    """The value of a header. Raises InvalidRequest, which says its ``form``."""
    try:
        is_json = header in _JSON or text.startswith("{")
        return msgspec.convert(msgspec.json.decode(text) if is_json else text, shape)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(f"{header} {form}") from None


def _unquoted(call: Call[None], header: str) -> str | None:
    """The text of a header; None without it, or if it is empty. Raises InvalidRequest."""
    try:
        return unquote(call.headers.get(header, ""), errors="strict") or None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{header} is percent-encoded UTF-8") from None
