"""Traces of real processes, as a receiver of OTLP over HTTP gets them; and nothing unless asked for."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.trace import SpanKind

from kms_core.http_client import Peer, PeerServer, Tls
from kms_core.observability import tracing
from support.contract.faults import answer, faulty
from support.http_servers import QuietHandler, served
from support.openbao import bao
from support.service import B64_CANARY, CANARY, Service, b64
from support.waiting import until

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER: Final = "00f067aa0ba902b7"
TRACEPARENT: Final = f"00-{TRACE}-{CALLER}-01"
CONTEXT: Final = f"env=prod,who={CANARY}"
SAID: Final = {
    *("http.request.method", "http.route", "http.response.status_code"),
    *("kms.operation", "kms.key_id", "kms.backend", "kms.bytes_in", "kms.bytes_out", "kms.result"),
    *("kms.kind", "kms.attempt"),
}


@dataclass
class Collector:
    """What came, as it came and decoded."""

    port: int = 0
    bodies: list[bytes] = field(default_factory=list)
    spans: list[tuple[str, Span]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(named["service.name"], span) for span in scope.spans]

    def of(self, trace: str) -> dict[str, Span]:
        """The spans of a trace, by the process and their name."""
        return {f"{who}: {span.name}": span for who, span in list(self.spans) if span.trace_id.hex() == trace}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(QuietHandler):
        def do_POST(self) -> None:  # noqa: N802 -- the library's name
            assert self.path == "/v1/traces"
            found.take(self.rfile.read(int(self.headers["Content-Length"])))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.reply(200, answer, "application/x-protobuf")

    with served(Handler) as found.port:
        yield found


class Traced(Service):
    """An install whose spans are sent at once, or nearly so."""

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_RESOURCE_ATTRIBUTES": "team=keys"}


@pytest.fixture(scope="module")
def traced(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory, valkey: object
) -> Iterator[Traced]:
    del valkey
    server = bao()
    settings = (
        f'[kms.traces]\nenabled = true\nendpoint = "{collector.url}"\n'
        f'[kms.keys]\npayroll = "transit:{server.new_key()}"\n'
        f"{server.settings()}"
    )
    with Traced(tmp_path_factory.mktemp("traced"), settings) as service:
        yield service.start()


def attributes(span: Span) -> dict[str, object]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
        for each in span.attributes
    }


def test_a_job_is_one_trace_from_the_caller_to_the_call_of_its_backend(
    traced: Traced, collector: Collector
) -> None:
    body = {
        "kind": "encrypt",
        "items": [{"plaintext": b64(b"x"), "context": CONTEXT}],
        "key_id": "payroll",
    }
    job_id = traced.submit(body, traceparent=TRACEPARENT)
    traced.wait(job_id, "succeeded")

    until(lambda: "kms-worker: job encrypt" in collector.of(TRACE), "the span of the job")
    spans = collector.of(TRACE)
    route, job = spans["kms-service: POST /jobs"], spans["kms-worker: job encrypt"]
    operation, wrap = spans["kms-worker: kms.encrypt"], spans["kms-worker: transit wrap"]
    assert route.parent_span_id.hex() == CALLER
    assert job.parent_span_id == route.span_id
    assert [link.span_id for link in job.links] == [route.span_id]
    by_id = {span.span_id: span for span in spans.values()}
    assert by_id[operation.parent_span_id] == job
    assert by_id[wrap.parent_span_id] == operation
    assert (route.kind, job.kind, operation.kind, wrap.kind) == (
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_CONSUMER,
        Span.SPAN_KIND_INTERNAL,
        Span.SPAN_KIND_CLIENT,
    )
    assert attributes(route) == {
        "http.request.method": "POST",
        "http.route": "/jobs",
        "http.response.status_code": 202,
    }
    assert attributes(operation)["kms.key_id"] == "payroll"
    assert attributes(wrap) == {"kms.backend": "transit", "kms.operation": "wrap", "kms.result": "ok"}
    assert attributes(job) == {"kms.kind": "encrypt", "kms.attempt": 1}


def test_a_single_call_says_its_sizes_and_its_end_and_nothing_else(
    traced: Traced, collector: Collector
) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
    sealed = traced.post("/encrypt", {"plaintext": B64_CANARY, "context": CONTEXT}, headers=headers)
    wrong = {"ciphertext": sealed.json()["ciphertext"], "context": f"{CONTEXT}2"}
    assert traced.post("/decrypt", wrong, headers=headers).status_code == 400
    assert traced.post("/encrypt", {"plaintext": "", "key_id": CANARY}, headers=headers).status_code == 404

    until(lambda: "kms-service: kms.decrypt" in collector.of(trace), "the span of the refusal")
    done, refused = (
        next(span for _, span in collector.spans if span.trace_id.hex() == trace and span.name == name)
        for name in ("kms.encrypt", "kms.decrypt")
    )
    assert attributes(done) == {
        "kms.operation": "encrypt",
        "kms.key_id": "default",
        "kms.backend": "age",
        "kms.bytes_in": len(CANARY),
        "kms.bytes_out": len(sealed.json()["ciphertext"]) * 3 // 4 - sealed.json()["ciphertext"].count("="),
        "kms.result": "ok",
    }
    assert attributes(refused)["kms.result"] == "decrypt_failed"
    assert refused.status.code == Status.STATUS_CODE_ERROR
    assert not refused.events
    assert not refused.status.message


def test_no_span_carries_what_a_caller_sent(traced: Traced, collector: Collector) -> None:
    headers = {"X-Request-Id": CANARY, "User-Agent": CANARY, "tracestate": f"a={CANARY}"}
    traced.post("/encrypt", {"plaintext": B64_CANARY, "context": CONTEXT}, headers=headers)
    traced.http.get(f"/{CANARY}", headers=headers)
    traced.get(f"/jobs/{CANARY}")
    until(lambda: "kms-service: GET unrouted" in [f"{a}: {b.name}" for a, b in list(collector.spans)], "it")

    names = {key for _, span in collector.spans for key in attributes(span)}
    assert names <= SAID
    for body in collector.bodies:
        assert CANARY.encode() not in body
        assert B64_CANARY.encode() not in body
        assert b"team" in body or b"here" in body  # what our programs send, and what this process did


def test_a_malformed_traceparent_begins_a_trace_of_its_own(traced: Traced, collector: Collector) -> None:
    answer = traced.post("/encrypt", {"plaintext": ""}, headers={"traceparent": "00-nonsense"})
    assert answer.status_code == 200

    until(
        lambda: any(not span.parent_span_id for _, span in list(collector.spans) if span.kind == 2),
        "a trace without parent",
    )


def test_a_backend_is_told_the_trace_that_its_call_belongs_to(collector: Collector) -> None:
    tracing.configure("test", enabled=True, endpoint=collector.url)
    try:
        with faulty(answer(200, b"{}")) as server, tracing.span("here", SpanKind.SERVER, TRACEPARENT):
            Peer(PeerServer(server.url, "Something", "kms.something.address", 10.0, Tls())).call("GET", "/")
            expected = tracing.parent()
    finally:
        tracing.stop()

    assert expected.split("-")[1] == TRACE
    assert expected.split("-")[2] != CALLER
    assert f"traceparent: {expected}" in server.requests[0].decode().splitlines()
    assert "test: here" in collector.of(TRACE), "what waited was sent at the end"
    assert (tracing.parent(), dict(tracing.headers())) == ("", {})


OFF: Final = """
import json, sys
from kms_api import app
from kms_core.settings.load import load
import kms_worker.app
app.build(load(None, dict(json.loads(sys.argv[1]))))
heavy = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "google.protobuf")
print([name for name in heavy if name in sys.modules])
"""


def test_nothing_of_it_is_loaded_unless_it_is_asked_for(tmp_path: Path, redis_url: str) -> None:
    # FastAPI and redis-py import parts of OpenTelemetry by themselves: its interface, its SDK for metrics
    install = Service(tmp_path, redis=redis_url)
    argv = [sys.executable, "-P", "-c", OFF, json.dumps(install.environ)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    install.http.close()

    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("program", ["kms_api.main", "kms_worker.main"])
def test_without_the_extra_a_service_that_shall_trace_refuses_to_start(
    tmp_path: Path, redis_url: str, program: str
) -> None:
    install = Service(tmp_path, "[kms.traces]\nenabled = true\n", redis_url)
    hide = (
        "import importlib.util as u, runpy, sys; found = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name.startswith('opentelemetry') else found(name, *more)\n"
        f"sys.argv = ['x']; runpy.run_module('{program}', run_name='__main__')"
    )
    argv = [sys.executable, "-P", "-c", hide]
    done = subprocess.run(argv, env=install.environ, capture_output=True, text=True, check=False)
    install.http.close()

    assert done.returncode == 78
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in done.stderr
