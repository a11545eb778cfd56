"""Spans of requests, operations, calls to backends, and jobs, by OpenTelemetry. Off by default.

A span has only the attributes of ``SpanDetails``: no text of callers, no context, no error message. The
tracer provider is not the global one, so libraries send no spans through it. The SDK, of the extra ``otel``,
is imported only if traces are enabled.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, TypedDict, Unpack

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kms_protocol import __version__
from kms_protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

PARENT: Final = "traceparent"
"""The header and field of W3C Trace Context: https://www.w3.org/TR/trace-context/."""
_NAMES: Final = {  # HTTP attributes by the semantic conventions; all others begin with kms.
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
}
_FAILED: Final = 500
_TIMEOUT_MS: Final = 5000
_context: Final = TraceContextTextMapPropagator()
_provider: "TracerProvider | None" = None
_NO_SPAN: Final = nullcontext(trace.INVALID_SPAN)
_tracer: trace.Tracer = trace.NoOpTracer()


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


def check(*, enabled: bool) -> None:
    """Raise ConfigurationError if traces are enabled and OpenTelemetry's SDK is not installed."""
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

    ``endpoint`` None: it is in the ``OTEL_*`` variables, as other options. Raises ConfigurationError.
    """
    global _provider, _tracer  # noqa: PLW0603 -- one for the process, as for metrics and logs
    check(enabled=enabled)
    stop()
    if not enabled:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 -- costs time and memory only where traces are enabled
    from opentelemetry.sdk import resources  # noqa: PLC0415 -- as above
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 -- as above
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 -- as above

    named = {
        resources.SERVICE_NAME: service,
        resources.SERVICE_VERSION: __version__,
        **resources.OTELResourceDetector().detect().attributes,
    }
    _provider = TracerProvider(resource=resources.Resource.create(named), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    _tracer = _provider.get_tracer("kms-service", __version__)


def stop() -> None:
    """Export the waiting spans, for 5 seconds at most, and end tracing."""
    global _provider  # noqa: PLW0603 -- as above
    if _provider is not None:
        _provider.force_flush(_TIMEOUT_MS)
        _provider.shutdown()
        _provider = None


def span(name: str, kind: SpanKind = SpanKind.INTERNAL, parent: str = "") -> AbstractContextManager[Span]:
    """A span, as a context. Its parent is ``parent`` (a ``traceparent``), else the current span.

    Exceptions are not recorded: their texts may have secrets.
    """
    if _provider is None:
        return _NO_SPAN
    around = _context.extract({PARENT: parent}) if parent else None
    remote = trace.get_current_span(around).get_span_context()
    links = [Link(remote)] if around and remote.is_valid and kind is SpanKind.CONSUMER else None
    return _tracer.start_as_current_span(
        name, around, kind, links=links, record_exception=False, set_status_on_exception=False
    )


def note(name: str = "", **notes: Unpack[SpanDetails]) -> None:
    """Set attributes of the current span; a name replaces that of the span."""
    if _provider is None:  # a current span is not ours
        return
    made = trace.get_current_span()
    if name:
        made.update_name(name)
    for key, value in notes.items():
        if isinstance(value, str | int) and value != "":
            made.set_attribute(_NAMES.get(key, f"kms.{key}"), value)
    if notes.get("status", 0) >= _FAILED or notes.get("result", "ok") != "ok":
        made.set_status(Status(StatusCode.ERROR))


def headers() -> Mapping[str, str]:
    """The headers with the ``traceparent`` of the current span, for a request to a peer; else empty."""
    carrier: dict[str, str] = {}
    if _provider is not None:
        _context.inject(carrier)
    return carrier


def parent() -> str:
    """The ``traceparent`` of the current span, for work of other processes; empty without a span."""
    return headers().get(PARENT, "")
