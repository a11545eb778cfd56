"""Options of a submission: in headers for a streamed body, and those that all submissions share."""

from collections.abc import Iterable
from typing import Final, TypeVar, get_args
from urllib.parse import unquote

import msgspec

from kms_api.routing import Call
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest

T = TypeVar("T")
W = TypeVar("W", bound=str | None)
_RELEASES: Final[tuple[wire.Release, ...]] = get_args(wire.Release)
_OBJECTS: Final = {
    "X-KMS-Context": "of texts",
    "X-KMS-Metadata": "of at most 16 texts of up to 512 characters",
    "X-KMS-Group": 'as {"name": "run-7", "jobs": 3}',
}


def submission_options(call: Call[None], kind: wire.JobKind) -> SubmissionOptions:
    """The options of a streamed body: in headers, never in the query string, which proxies log."""
    headers, context = call.headers, _unquoted(call, "X-KMS-Context")
    if headers.get("x-kms-callback") == "":
        raise InvalidRequest("X-KMS-Callback names an endpoint of the settings: leave it out for none")
    times = _deadlines(call)
    job = wire.JobIn(
        kind=kind,
        context=_object(call, "X-KMS-Context", dict[str, str]) if context.startswith("{") else context,
        key_id=headers.get("x-kms-key-id"),
        start_by=times.start_by,
        run_by=times.run_by,
        keep_for=times.keep_for,
        callback=headers.get("x-kms-callback"),
        priority=one_of("X-KMS-Priority", headers.get("x-kms-priority", "normal"), wire.PRIORITIES),
        release=one_of("X-KMS-Release", headers.get("x-kms-release") or None, (None, *_RELEASES)),
        labels=labels_of(part for part in _unquoted(call, "X-KMS-Labels").split(",") if part),
        metadata=_object(call, "X-KMS-Metadata", wire.Metadata),
        group=_object(call, "X-KMS-Group", wire.GroupIn),
    )
    return SubmissionOptions.of(call.caller, job, idempotency=idempotency(call))


class _DeadlineHeaders(msgspec.Struct):
    """The headers of deadlines, in the types of ``JobIn``."""

    start_by: wire.Moment | None = msgspec.field(name="x-kms-start-by", default=None)
    run_by: wire.Moment | None = msgspec.field(name="x-kms-run-by", default=None)
    keep_for: wire.KeepFor | None = msgspec.field(name="x-kms-keep-for", default=None)


def _deadlines(call: Call[None]) -> _DeadlineHeaders:
    names = _DeadlineHeaders.__struct_encode_fields__
    asked = {name: call.headers[name] for name in names if name in call.headers}
    try:
        return msgspec.convert(asked, _DeadlineHeaders, strict=False)
    except msgspec.ValidationError:
        raise InvalidRequest(
            "X-KMS-Start-By and X-KMS-Run-By are RFC 3339 times, X-KMS-Keep-For is seconds, 60 or more"
        ) from None


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


def _object(call: Call[None], name: str, shape: type[T]) -> T | None:
    """The JSON object in a header; None without it. Raises InvalidRequest."""
    text = _unquoted(call, name)
    try:
        return msgspec.json.decode(text, type=shape) if text else None
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(f"{name} is a percent-encoded JSON object: {_OBJECTS[name]}") from None


def _unquoted(call: Call[None], name: str) -> str:
    """The text of a header; empty without it. Raises InvalidRequest."""
    try:
        return unquote(call.headers.get(name, ""), errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is percent-encoded UTF-8") from None
