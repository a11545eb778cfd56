"""Spans of requests, operations, calls to backends and jobs; nothing, and nothing imported, unless asked for.

What a span may say is the closed set ``SpanDetails``: no text of callers, no context, no message of an error.
``kms_core.observability.otel`` speaks to OpenTelemetry, and is imported by ``configure`` alone.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Final, Literal, Protocol, TypedDict, Unpack

from kms_protocol.errors import ConfigurationError

Kind = Literal["server", "inside", "client", "consumer"]
PARENT: Final = "traceparent"
"""The header and field of W3C Trace Context: https://www.w3.org/TR/trace-context/."""
_OFF: Final = nullcontext()


class SpanDetails(TypedDict, total=False):
    """All that spans say besides name, kind and time."""

    operation: str
    key_id: str
    backend: str
    bytes_in: int
    bytes_out: int
    result: str
    kind: str
    attempt: int
    method: str
    route: str
    status: int


class Tracer(Protocol):
    """What ``kms_core.observability.otel`` has."""

    def span(self, name: str, kind: Kind, parent: str) -> AbstractContextManager[object]: ...
    def note(self, name: str, notes: SpanDetails) -> None: ...
    def parent(self) -> str: ...
    def stop(self) -> None: ...


_tracer: Tracer | None = None


def check(*, enabled: bool) -> None:
    """Raises ConfigurationError if traces are asked for and cannot be had."""
    if not enabled:
        return
    try:
        there = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        there = None
    if not there:
        raise ConfigurationError(
            "[kms.traces] enabled needs OpenTelemetry: pip install 'kms-service[otel]', or set it to false"
        )


def configure(service: str, *, enabled: bool, endpoint: str | None = None) -> None:
    """Trace this process from now on, if asked for. After a fork, not before: a thread sends the spans.

    Raises ConfigurationError.
    """
    global _tracer  # noqa: PLW0603 -- one for the process, as for metrics and logs
    check(enabled=enabled)
    stop()
    if enabled:
        from kms_core.observability.otel import OpenTelemetry  # noqa: PLC0415 -- costs time and memory, which others save

        _tracer = OpenTelemetry(service, endpoint)


def stop() -> None:
    """Send what waits, for some seconds at most; no spans any more."""
    global _tracer  # noqa: PLW0603 -- as above
    if _tracer is not None:
        _tracer.stop()
        _tracer = None


def is_on() -> bool:
    return _tracer is not None


def span(name: str, kind: Kind = "inside", parent: str = "") -> AbstractContextManager[object]:
    """Entered for the time of something. ``parent`` is where it belongs, else the span around it."""
    return _OFF if _tracer is None else _tracer.span(name, kind, parent)


def note(name: str = "", **notes: Unpack[SpanDetails]) -> None:
    """Say something of the innermost span; a name replaces its own."""
    if _tracer is not None:
        _tracer.note(name, notes)


def parent() -> str:
    """Where work belongs that somebody else does: a ``traceparent``, empty outside of spans."""
    return "" if _tracer is None else _tracer.parent()


def headers() -> Mapping[str, str]:
    """The same, for a request to a peer."""
    found = parent()
    return {PARENT: found} if found else {}
