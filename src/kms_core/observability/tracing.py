"""Spans of requests, operations, calls to backends, and jobs. Off by default.

A span has only the attributes of ``SpanDetails``: no text of callers, no context, no error message.
``configure`` imports ``kms_core.observability.otel``, and OpenTelemetry with it, only if traces are enabled.
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
    """The attributes of spans."""

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
    """The interface of ``kms_core.observability.otel``."""

    def span(self, name: str, kind: Kind, parent: str) -> AbstractContextManager[object]: ...
    def note(self, name: str, notes: SpanDetails) -> None: ...
    def parent(self) -> str: ...
    def stop(self) -> None: ...


_tracer: Tracer | None = None


def check(*, enabled: bool) -> None:
    """Raise ConfigurationError if traces are enabled and OpenTelemetry is not installed."""
    if not enabled:
        return
    try:
        there = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        there = None
    if not there:
        raise ConfigurationError(
            "[kms.traces] enabled needs OpenTelemetry: pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http, or set it to false"
        )


def configure(service: str, *, enabled: bool, endpoint: str | None = None) -> None:
    """Begin tracing this process if ``enabled``. Call it after a fork, since a thread exports the spans.

    Raises ConfigurationError.
    """
    global _tracer  # noqa: PLW0603 -- one for the process, as for metrics and logs
    check(enabled=enabled)
    stop()
    if enabled:
        from kms_core.observability.otel import OpenTelemetry  # noqa: PLC0415 -- costs time and memory only where traces are enabled

        _tracer = OpenTelemetry(service, endpoint)


def stop() -> None:
    """Export the waiting spans, for 5 seconds at most, and end tracing."""
    global _tracer  # noqa: PLW0603 -- as above
    if _tracer is not None:
        _tracer.stop()
        _tracer = None


def is_on() -> bool:
    """Return whether spans are recorded."""
    return _tracer is not None


def span(name: str, kind: Kind = "inside", parent: str = "") -> AbstractContextManager[object]:
    """A span, as a context. Its parent is ``parent`` (a ``traceparent``), else the current span."""
    return _OFF if _tracer is None else _tracer.span(name, kind, parent)


def note(name: str = "", **notes: Unpack[SpanDetails]) -> None:
    """Set attributes of the current span; a name replaces that of the span."""
    if _tracer is not None:
        _tracer.note(name, notes)


def parent() -> str:
    """The ``traceparent`` of the current span, for work of other processes; empty without a span."""
    return "" if _tracer is None else _tracer.parent()


def headers() -> Mapping[str, str]:
    """The headers with the ``traceparent``, for a request to a peer."""
    found = parent()
    return {PARENT: found} if found else {}
