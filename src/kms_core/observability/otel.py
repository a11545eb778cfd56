"""Exports the spans of ``tracing`` to OpenTelemetry by OTLP over HTTP. Needs the extra ``otel``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kms_core.observability.tracing import PARENT, Kind, SpanDetails
from kms_protocol import __version__

_KINDS: Final = {
    "server": SpanKind.SERVER,
    "inside": SpanKind.INTERNAL,
    "client": SpanKind.CLIENT,
    "consumer": SpanKind.CONSUMER,
}
_NAMES: Final = {  # HTTP attributes by the semantic conventions; all others begin with kms.
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
}
_FAILED: Final = 500
_TIMEOUT_MS: Final = 5000
_context: Final = TraceContextTextMapPropagator()


class OpenTelemetry:
    """The tracer of one process. ``endpoint`` None: it is in the ``OTEL_*`` variables, as other options."""

    def __init__(self, service: str, endpoint: str | None) -> None:
        named = {
            SERVICE_NAME: service,
            SERVICE_VERSION: __version__,
            **OTELResourceDetector().detect().attributes,
        }
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("kms-service", __version__)

    @contextmanager
    def span(self, name: str, kind: Kind, parent: str) -> Iterator[object]:
        """Exceptions are not recorded: their texts may have secrets."""
        around = _context.extract({PARENT: parent}) if parent else None
        remote = trace.get_current_span(around).get_span_context() if around else None
        links = [Link(remote)] if remote is not None and remote.is_valid and kind == "consumer" else None
        with self._tracer.start_as_current_span(
            name,
            around,
            _KINDS[kind],
            links=links,
            record_exception=False,
            set_status_on_exception=False,
        ) as made:
            yield made

    def note(self, name: str, notes: SpanDetails) -> None:
        made = trace.get_current_span()
        if name:
            made.update_name(name)
        for key, value in notes.items():
            if isinstance(value, str | int) and value != "":
                made.set_attribute(_NAMES.get(key, f"kms.{key}"), value)
        if notes.get("status", 0) >= _FAILED or notes.get("result", "ok") != "ok":
            made.set_status(Status(StatusCode.ERROR))

    def parent(self) -> str:
        carrier: dict[str, str] = {}
        _context.inject(carrier)
        return carrier.get(PARENT, "")

    def stop(self) -> None:
        self._provider.force_flush(_TIMEOUT_MS)
        self._provider.shutdown()
