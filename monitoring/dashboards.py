"""Writes the Grafana dashboards of ``grafana/dashboards/`` from what each panel asks; run it after a change.

The address of the service, for links to its runbooks, may be given as an argument.

One source: the JSON is never edited by hand, and a test holds it equal to what this program makes. Layout is
by rule: figures of one screen height in rows of 4 units, graphs below in rows of 8, 24 units wide.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from grafana_foundation_sdk.builders import common, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    ConstantVariable,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    GridPos,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

FOLDER: Final = Path(__file__).parent / "grafana" / "dashboards"
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
DATASOURCE: Final = "kms-prometheus"
"""The uid in ``grafana/provisioning``; a Grafana that has none of that name takes its default."""
KMS_URL: Final = "http://localhost:8082"
RUNBOOKS: Final = "${kms_url}/ui/runbooks"
BACKEND: Final = 'backend=~"$backend"'
KIND: Final = 'kind=~"$kind"'
API: Final = 'route!~"/livez|/readyz|/metrics|/docs|/openapi.json|unrouted"'
Kind = Literal["stat", "graph", "timeline", "table"]
AnyPanel = stat.Panel | timeseries.Panel | statetimeline.Panel | table.Panel


@dataclass(frozen=True, slots=True)
class Panel:
    """A question and the queries that answer it, each with its legend. ``bad`` is where red begins."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: Kind = "graph"
    tells: str = ""
    bad: float | None = None
    low_is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """Figures on top, then graphs in pairs; ``choose`` maps a label to a metric that has it."""

    uid: str
    title: str
    tells: str
    figures: Sequence[Panel] = ()
    graphs: Sequence[Panel] = ()
    choose: Mapping[str, str] = field(default_factory=dict)


def figure(
    title: str, query: str, unit: str = "short", *, tells: str = "", bad: float | None = None
) -> Panel:
    return Panel(title, [(query, "")], unit, "stat", tells, bad)


def per(by: str, metric: str, where: str = "") -> str:
    """The rate of a counter, a second, for each of some labels."""
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


def quantiles(metric: str, by: str, legend: str, where: str = "") -> list[tuple[str, str]]:
    """p50 and p99 of a histogram."""
    rate = f"sum by (le, {by}) (rate({metric}_bucket{{{where}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"p{round(q * 100)} {legend}") for q in (0.5, 0.99)]


OVERVIEW: Final = Board(
    "kms-overview",
    "KMS: overview and objectives",
    "Is the service keeping its promise, and if not, what fails?",
    (
        figure(
            "Success",
            "1 - kms:http_errors:ratio_rate1h or vector(1)",
            "percentunit",
            tells="Requests of the last hour that the service did not fail. The objective is 99.9 %.",
        ),
        figure("Requests", "kms:http_requests:rate5m", "reqps"),
        figure("p99 of encrypt", 'kms:operation_seconds:p99_rate5m{operation="encrypt"}', "s", bad=0.5),
        figure("Backends that work", "sum(kms_backend_up) / count(kms_backend_up)", "percentunit"),
        figure("Workers", "max(kms_workers)", tells="Worker processes seen in the last 5 seconds."),
        figure(
            "Dead letters",
            "max(kms_dead_letters)",
            bad=1,
            tells="Jobs that used up their attempts: kms job dead.",
        ),
    ),
    (
        Panel(
            "Operations",
            [(per("operation", "kms_operations_total"), "{{operation}}")],
            "ops",
        ),
        Panel(
            "Refusals and failures by code",
            [(per("result", "kms_operations_total", 'result!="ok"'), "{{result}}")],
            "ops",
            tells="By error code; those that end in unavailable are ours, others the caller's.",
        ),
        Panel(
            "Time of an operation",
            quantiles("kms_operation_duration_seconds", "operation", "{{operation}}", 'mode="sync"'),
            "s",
        ),
        Panel(
            "Error budget burn",
            [
                ("kms:http_errors:ratio_rate5m / 0.001", "5 minutes"),
                ("kms:http_errors:ratio_rate1h / 0.001", "1 hour"),
                ("kms:http_errors:ratio_rate6h / 0.001", "6 hours"),
            ],
            "short",
            tells="1 is the rate at which the month's budget of 0.1 % lasts exactly a month. 14.4 pages.",
        ),
        Panel(
            "Backends",
            [("min by (backend) (kms_backend_up)", "{{backend}}")],
            "short",
            "timeline",
            tells="1: a wrap and an unwrap worked.",
        ),
        Panel(
            "Payload",
            [(per("direction", "kms_payload_bytes_total"), "{{direction}}")],
            "Bps",
        ),
    ),
)
JOBS: Final = Board(
    "kms-jobs",
    "KMS: jobs and queue",
    "Do jobs get done, how long do they wait, and what is stuck?",
    (
        figure(
            "Oldest that waits",
            "max(kms_jobs_oldest_queued_seconds)",
            "s",
            bad=600,
            tells="Since when the oldest job waits that could run.",
        ),
        figure("Queued", 'max(kms_jobs_in_state{state="queued"})'),
        figure("Running", 'max(kms_jobs_in_state{state="running"})'),
        figure("Messages that wait", "sum(max by (queue, priority) (kms_queue_depth))"),
        figure("Failed", "kms:jobs_failed:ratio_rate15m", "percentunit", bad=0.05),
        figure("Dead letters", "max(kms_dead_letters)", bad=1),
    ),
    (
        Panel(
            "Messages by queue and priority",
            [("max by (queue, priority) (kms_queue_depth)", "{{queue}} {{priority}}")],
        ),
        Panel(
            "Jobs by state reached",
            [(per("state", "kms_jobs_total", KIND), "{{state}}")],
            "ops",
        ),
        Panel(
            "Wait until the first claim",
            quantiles("kms_job_queue_wait_seconds", "kind", "{{kind}}", KIND),
            "s",
        ),
        Panel("Run time of an attempt", quantiles("kms_job_duration_seconds", "kind", "{{kind}}", KIND), "s"),
        Panel(
            "Items",
            [(per("kind, result", "kms_job_items_total", KIND), "{{kind}} {{result}}")],
            "ops",
        ),
        Panel("Bytes", [(per("kind", "kms_job_bytes_total", KIND), "{{kind}}")], "Bps"),
        Panel(
            "Taken up again",
            [(per("reason", "kms_job_resumes_total"), "{{reason}}")],
            "ops",
            tells="requeued: a lease ran out; queued: a message was lost; committing: another finished it.",
        ),
        Panel(
            "Webhooks",
            [
                (
                    per("endpoint, result", "kms_webhook_deliveries_total"),
                    "{{endpoint}} {{result}}",
                ),
                ("max(kms_webhook_outbox)", "waiting"),
            ],
            "short",
        ),
    ),
    choose={"kind": "kms_jobs_total"},
)
KEYS: Final = Board(
    "kms-keys",
    "KMS: keys, rotation and backends",
    "Which keys are due, how much have they sealed, and how do their backends do?",
    (
        figure("Keys due", "sum(max by (key_id, backend) (kms_key_rotation_due))", bad=1),
        figure("Oldest version in use", "max(kms_key_age_seconds)", "s"),
        figure("Largest share of a budget", "max(kms_key_budget_ratio)", "percentunit", bad=0.7),
        figure("Rotations in a day", 'sum(increase(kms_key_rotations_total{result="ok"}[1d])) or vector(0)'),
        figure(
            "Rotations that failed",
            'sum(increase(kms_key_rotations_total{result="failed"}[1d])) or vector(0)',
            bad=1,
        ),
        figure("Breakers open", "sum(max by (backend) (kms_backend_breaker_open)) or vector(0)", bad=1),
    ),
    (
        Panel(
            "Age of the version in use",
            [(f"max by (key_id, backend) (kms_key_age_seconds{{{BACKEND}}})", "{{key_id}} ({{backend}})")],
            "s",
        ),
        Panel(
            "Share of the budget",
            [(f"max by (key_id, backend) (kms_key_budget_ratio{{{BACKEND}}})", "{{key_id}} ({{backend}})")],
            "percentunit",
            tells="Messages that the version in use has sealed, of those it may.",
        ),
        Panel(
            "Operations by backend",
            [
                (
                    per("backend, operation", "kms_operations_total", BACKEND),
                    "{{backend}} {{operation}}",
                )
            ],
            "ops",
        ),
        Panel(
            "Time of a call to a backend",
            quantiles("kms_backend_duration_seconds", "backend, call", "{{backend}} {{call}}", BACKEND),
            "s",
        ),
        Panel(
            "Calls to backends by outcome",
            [
                (
                    per("backend, result", "kms_backend_duration_seconds_count", BACKEND),
                    "{{backend}} {{result}}",
                )
            ],
            "ops",
        ),
        Panel(
            "Made again, passed over",
            [
                (
                    per("backend", "kms_backend_retries_total", BACKEND),
                    "retries {{backend}}",
                ),
                (
                    per("backend", "kms_backend_failovers_total", BACKEND),
                    "failovers {{backend}}",
                ),
            ],
            "ops",
        ),
    ),
    choose={"backend": "kms_operations_total"},
)
TRUST: Final = Board(
    "kms-trust",
    "KMS: security and audit",
    "Who is refused, what does not open, and is every operation on record?",
    (
        Panel(
            "Audit trail holds",
            [
                ("min(kms_audit_chain_ok)", "lines"),
                ("min by (place) (kms_audit_anchors_ok)", "anchors: {{place}}"),
            ],
            kind="stat",
            tells="0: lines were changed, cut or removed by another hand (KmsAuditBroken), or anchors name "
            "lines that the trail lacks (KmsAuditOlderThanAnchors).",
        ),
        figure(
            "Audit failures",
            'sum(rate(kms_audit_events_total{result="failed"}[5m])) or vector(0)',
            "ops",
            bad=0.001,
            tells="While records cannot be written, operations are refused.",
        ),
        figure(
            "Refused calls", 'sum(rate(kms_http_requests_total{status=~"401|403"}[5m])) or vector(0)', "reqps"
        ),
        figure(
            "Decrypts that fail",
            'sum(rate(kms_operations_total{operation="decrypt", result="decrypt_failed"}[5m])) or vector(0)',
            "ops",
        ),
        figure(
            "Weak settings",
            "sum(max by (setting) (kms_setting_weak)) or vector(0)",
            bad=1,
            tells="kms config lint tells which, and what to write instead.",
        ),
        figure("Version", "count by (version) (kms_build_info)"),
    ),
    (
        Panel(
            "Refused, by route",
            [
                (
                    per("route, status", "kms_http_requests_total", 'status=~"401|403|429"'),
                    "{{status}} {{route}}",
                )
            ],
            "reqps",
        ),
        Panel(
            "Decrypts by outcome",
            [
                (
                    per("result", "kms_operations_total", 'operation="decrypt"'),
                    "{{result}}",
                )
            ],
            "ops",
        ),
        Panel(
            "Decrypts, today and a week ago",
            [
                ('sum(rate(kms_operations_total{operation="decrypt"}[30m]))', "today"),
                ('sum(rate(kms_operations_total{operation="decrypt"}[30m] offset 7d))', "a week ago"),
            ],
            "ops",
        ),
        Panel(
            "Bad requests",
            [
                (
                    per("route, status", "kms_http_requests_total", 'status=~"400|404|409|413|422"'),
                    "{{status}} {{route}}",
                )
            ],
            "reqps",
        ),
        Panel(
            "Audit records by outcome",
            [(per("result", "kms_audit_events_total"), "{{result}}")],
            "ops",
        ),
        Panel(
            "Audit trail read back",
            [("time() - kms_audit_read_timestamp_seconds", "{{job}} {{instance}}")],
            "s",
            tells="How long ago each process last checked what is new in the trail.",
        ),
        Panel(
            "Audit lines to second places",
            [(per("place, what, result", "kms_audit_copies_total"), "{{place}} {{what}} {{result}}")],
            "ops",
        ),
        Panel(
            "What could be stronger",
            [("max by (setting) (kms_setting_weak)", "{{setting}}")],
            "short",
            "table",
        ),
    ),
)
RUNTIME: Final = Board(
    "kms-runtime",
    "KMS: runtime",
    "How are the processes and Redis?",
    (
        figure("Up", 'sum(up{job=~"kms-.*"}) / count(up{job=~"kms-.*"})', "percentunit"),
        figure("In flight", "sum(kms_inflight)"),
        figure("Redis", "min(kms_redis_up)"),
        figure("Redis memory", "max(kms_redis_memory_ratio)", "percentunit", bad=0.8),
        figure("Largest process", 'max(process_resident_memory_bytes{job=~"kms-.*"})', "bytes"),
        figure("Youngest process", 'min(time() - process_start_time_seconds{job=~"kms-.*"})', "s"),
    ),
    (
        Panel(
            "CPU",
            [('rate(process_cpu_seconds_total{job=~"kms-.*"}[$__rate_interval])', "{{job}} {{instance}}")],
            "percentunit",
        ),
        Panel("Memory", [('process_resident_memory_bytes{job=~"kms-.*"}', "{{job}} {{instance}}")], "bytes"),
        Panel(
            "Open files, of those allowed",
            [('process_open_fds{job=~"kms-.*"} / process_max_fds{job=~"kms-.*"}', "{{job}} {{instance}}")],
            "percentunit",
        ),
        Panel(
            "Requests by route",
            [
                (
                    per("route, method", "kms_http_requests_total", API),
                    "{{method}} {{route}}",
                )
            ],
            "reqps",
        ),
        Panel(
            "Time until the answer was sent",
            quantiles("kms_http_request_duration_seconds", "route", "{{route}}", API),
            "s",
        ),
        Panel("Time of a scrape", [('scrape_duration_seconds{job=~"kms-.*"}', "{{job}} {{instance}}")], "s"),
    ),
)
BOARDS: Final = (OVERVIEW, JOBS, KEYS, TRUST, RUNTIME)


def render(board: Board, kms_url: str = KMS_URL) -> str:
    """The dashboard as the JSON that Grafana provisions. ``kms_url`` is where people reach the service."""
    made = (
        Dashboard(board.title)
        .uid(board.uid)
        .description(board.tells)
        .tags(["kms"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .with_variable(
            DatasourceVariable("datasource")
            .label("Prometheus")
            .type("prometheus")
            .current(VariableOption(text="KMS Prometheus", value=DATASOURCE))
        )
        .with_variable(ConstantVariable("kms_url").label("KMS").value(kms_url))
        .link(
            DashboardLink("KMS dashboards")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["kms"])
            .as_dropdown(as_dropdown=True)
        )
        .link(
            DashboardLink("Runbooks")
            .type(DashboardLinkType.LINK)
            .url(RUNBOOKS)
            .target_blank(target_blank=True)
        )
    )
    for label, metric in board.choose.items():
        made.with_variable(_choice(label, metric))
    for position, panel in _placed(board):
        made.with_panel(_built(panel).grid_pos(position))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _placed(board: Board) -> Iterator[tuple[GridPos, Panel]]:
    width = 24 // max(1, len(board.figures))
    for number, panel in enumerate(board.figures):
        yield GridPos(h=4, w=width, x=number * width, y=0), panel
    for number, panel in enumerate(board.graphs):
        yield GridPos(h=8, w=12, x=12 * (number % 2), y=4 + 8 * (number // 2)), panel


def _choice(label: str, metric: str) -> QueryVariable:
    """A menu of the values of a label, all of them at first."""
    everything = VariableOption(text="All", value="$__all")
    return (
        QueryVariable(label)
        .query(f"label_values({metric}, {label})")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(".*")
        .current(everything)
    )


def _built(panel: Panel) -> AnyPanel:
    made = _of_kind(panel.kind)
    made.title(panel.title).description(panel.tells).unit(panel.unit).datasource(SOURCE)
    made.thresholds(_thresholds(panel))
    for number, (expr, legend) in enumerate(panel.queries):
        query = Dataquery().expr(expr).legend_format(legend or "__auto").ref_id(chr(ord("A") + number))
        made.with_target(query.instant() if panel.kind == "table" else query)
    return made


def _of_kind(kind: Kind) -> AnyPanel:
    match kind:
        case "stat":
            latest = common.ReduceDataOptions().calcs(["lastNotNull"])
            return stat.Panel().graph_mode(BigValueGraphMode.AREA).reduce_options(latest)
        case "timeline":
            return statetimeline.Panel()
        case "table":
            return table.Panel()
        case "graph":
            legend = (
                common.VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(show_legend=True)
            )
            return timeseries.Panel().legend(legend).fill_opacity(10).line_width(1)


def _thresholds(panel: Panel) -> ThresholdsConfig:
    steps = [Threshold(value=None, color="green")]
    if panel.bad is not None:
        steps.append(Threshold(value=panel.bad, color="red"))
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def main(argv: Sequence[str]) -> int:
    """The first argument, if there is one, is the address of the service as people reach it."""
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(render(board, *argv[1:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
