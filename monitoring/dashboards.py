"""Writes the Grafana dashboards of ``grafana/dashboards/`` from what each panel asks; run it after a change.

The address of the service, for links to its runbooks, may be given as an argument.

One source: the JSON is never edited by hand, and a test holds it equal to what this program makes. Layout is
by rule: figures of one screen height in rows of 4 units, graphs below in rows of 8, 24 units wide.
"""

import re
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
OF_KIND: Final = 'operation=~"$kind"'
OPERATIONS: Final = "kms_operation_duration_seconds_count"
REQUESTS: Final = "kms_http_request_duration_seconds_count"
API: Final = 'route!~"/livez|/readyz|/metrics|/docs|/openapi.json|unrouted"'
ONE: Final = 'namespace=~"$install",instance=~"$instance"'
"""What the menus of install and instance choose; ``.*`` also matches a series without namespace."""
UP: Final = 'up{job=~"kms-.*"}'
_METRIC: Final = re.compile(r"(?<![\w:$])(kms_\w+|process_\w+|up|scrape_duration_seconds)\b(?:{(}?))?")
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


def chosen(expr: str) -> str:
    """The query, of the install and the instance in the menus. Recording rules have no such labels."""

    def select(found: re.Match[str]) -> str:
        name, end = found[1], found[2]
        return f"{name}{{{ONE}," if end == "" else f"{name}{{{ONE}}}"

    return _METRIC.sub(select, expr)


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
            tells="Requests of the last hour that did not fail, to all instances. The objective is 99.9 %.",
        ),
        figure(
            "Requests",
            "kms:http_requests:rate5m",
            "reqps",
            tells="Requests a second to all instances, without probes and scrapes.",
        ),
        figure(
            "p99 of encrypt",
            'kms:operation_seconds:p99_rate5m{operation="encrypt"}',
            "s",
            bad=0.5,
            tells="99 of 100 calls to all instances are faster. The objective is below 0.5 s (KmsLatency).",
        ),
        figure(
            "Backends that work",
            "sum(kms_backend_up == bool 1) / count(kms_backend_up)",
            "percentunit",
            tells="Backends of keys that worked at the last check. Below 100 %: KmsBackendDown, KmsRootDown.",
        ),
        figure("Workers", "max(kms_workers)", tells="Worker processes seen in the last 5 seconds."),
        figure(
            "Dead letters",
            'max(kms_jobs_in_state{state="dead"})',
            bad=1,
            tells="Jobs that used up their attempts: kms job dead.",
        ),
    ),
    (
        Panel(
            "Operations",
            [(per("operation", OPERATIONS), "{{operation}}")],
            "ops",
            tells="Calls and items of jobs a second, by what they do with keys.",
        ),
        Panel(
            "Refusals and failures by code",
            [(per("result", OPERATIONS, 'result!="ok"'), "{{result}}")],
            "ops",
            tells="By error code; those that end in unavailable are ours, others the caller's.",
        ),
        Panel(
            "Time of an operation",
            quantiles("kms_operation_duration_seconds", "operation", "{{operation}}", 'mode="sync"'),
            "s",
            tells="Half, and 99 of 100, of the single calls take less. Jobs do not count.",
        ),
        Panel(
            "Error budget burn",
            [
                ("kms:http_errors:ratio_rate5m / 0.001", "5 minutes"),
                ("kms:http_errors:ratio_rate1h / 0.001", "1 hour"),
                ("kms:http_errors:ratio_rate6h / 0.001", "6 hours"),
            ],
            "short",
            tells="All instances. At 1 the month's budget of 0.1 % lasts a month; 14.4 pages.",
        ),
        Panel(
            "Backends",
            [('min by (key_id, backend) (kms_backend_up{use!="seal"})', "{{key_id}} {{backend}}")],
            "short",
            "timeline",
            tells="Of each key. 1: a wrap and an unwrap worked.",
        ),
        Panel(
            "Roots",
            [('min by (key_id, backend) (kms_backend_up{use="seal"})', "{{key_id}} {{backend}}")],
            "short",
            "timeline",
            tells="Keys that seal key files. 0: calls go on, a restart waits, a rotation fails.",
        ),
        Panel(
            "Payload",
            [(per("direction", "kms_payload_bytes_total"), "{{direction}}")],
            "Bps",
            tells="Bytes a second of plaintexts and ciphertexts, in and out.",
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
        figure(
            "Queued",
            'max(kms_jobs_in_state{state="queued"})',
            tells="Jobs that wait for a worker, for their start time or for a resource.",
        ),
        figure(
            "Running",
            'max(kms_jobs_in_state{state="running"})',
            tells="Jobs that a worker has claimed and not yet ended.",
        ),
        figure(
            "Jobs that are ready",
            "sum(max by (queue, priority) (kms_queue_depth))",
            tells="Jobs that a free worker would take at once. KEDA scales workers by it.",
        ),
        figure(
            "Failed",
            "kms:jobs_failed:ratio_rate15m",
            "percentunit",
            bad=0.05,
            tells="Jobs of all instances that failed, of those that ended. Above 5 %: KmsJobsFail.",
        ),
        figure(
            "Dead letters",
            'max(kms_jobs_in_state{state="dead"})',
            bad=1,
            tells="Jobs that used up their attempts: kms job dead.",
        ),
    ),
    (
        Panel(
            "Messages by queue and priority",
            [("max by (queue, priority) (kms_queue_depth)", "{{queue}} {{priority}}")],
            tells="Ready jobs of each queue. A queue that grows alone has no worker that serves it.",
        ),
        Panel(
            "Jobs by state reached",
            [(per("state", "kms_jobs_total", KIND), "{{state}}")],
            "ops",
            tells="Changes of state a second. Where queued exceeds the ends for long, the queue grows.",
        ),
        Panel(
            "Wait until the first claim",
            quantiles("kms_job_queue_wait_seconds", "kind", "{{kind}}", KIND),
            "s",
            tells="From submission to the first worker. Add workers if it grows.",
        ),
        Panel(
            "Run time of an attempt",
            quantiles("kms_job_duration_seconds", "kind", "{{kind}}", KIND),
            "s",
            tells="From the claim to the end of an attempt, half and 99 of 100 of them.",
        ),
        Panel(
            "Items",
            [(per("kind, result", "kms_job_items_total", KIND), "{{kind}} {{result}}")],
            "ops",
            tells="Items of bulk jobs a second, by outcome. Failed items do not fail their job.",
        ),
        Panel(
            "Bytes",
            [(per("operation", "kms_payload_bytes_total", f'direction="in",{OF_KIND}'), "{{operation}}")],
            "Bps",
            tells="Bytes a second that jobs of these kinds read, and single calls that do the same.",
        ),
        Panel(
            "Taken up again",
            [(per("reason", "kms_job_resumes_total"), "{{reason}}")],
            "ops",
            tells="requeued: a lease ran out; committing: another finished it; stalled: an attempt hung.",
        ),
        Panel(
            "Attempts that hung, and processes without progress",
            [
                (per("reason", "kms_job_resumes_total", 'reason="stalled"'), "{{reason}}"),
                ("max(kms_worker_stuck_processes)", "stuck processes"),
            ],
            tells="A dead mount, for example: the worker's log names the root.",
        ),
        Panel(
            "Running jobs on resources with a bound",
            [("max by (resource) (kms_job_resource_leases)", "{{resource}}")],
            tells="Jobs that run on a root, bucket or backend of [kms.jobs.resource_leases].",
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
            tells="Deliveries a second by outcome, and those that wait. Dead ones are lost for good.",
        ),
    ),
    choose={"kind": "kms_jobs_total"},
)
KEYS: Final = Board(
    "kms-keys",
    "KMS: keys, rotation and backends",
    "Which keys are due, how much have they sealed, and how do their backends do?",
    (
        figure(
            "Keys due",
            "sum(max by (key_id, backend) (kms_key_rotation_due))",
            bad=1,
            tells="Keys whose version in use is older than [kms.rotation] every_days.",
        ),
        figure(
            "Oldest version in use",
            "max(kms_key_age_seconds)",
            "s",
            tells="Age of the oldest version that still encrypts.",
        ),
        figure(
            "Largest share of a budget",
            "max(kms_key_budget_ratio)",
            "percentunit",
            bad=0.7,
            tells="Messages that a version has sealed, of those it may. Above 70 %: KmsKeyBudget.",
        ),
        figure(
            "Rotations in a day",
            'sum(increase(kms_key_rotations_total{result="ok"}[1d])) or vector(0)',
            tells="New versions by the schedule in the last 24 hours.",
        ),
        figure(
            "Rotations that failed",
            'sum(increase(kms_key_rotations_total{result="failed"}[1d])) or vector(0)',
            bad=1,
            tells="In the last 24 hours. The worker's log has the reason.",
        ),
        figure(
            "Breakers open",
            "sum(max by (backend) (kms_backend_breaker_open)) or vector(0)",
            bad=1,
            tells="Backends that are not asked for some seconds, since they failed several times in a row.",
        ),
    ),
    (
        Panel(
            "Age of the version in use",
            [(f"max by (key_id, backend) (kms_key_age_seconds{{{BACKEND}}})", "{{key_id}} ({{backend}})")],
            "s",
            tells="By key and backend. It falls to zero with each rotation.",
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
                    per("backend, operation", OPERATIONS, BACKEND),
                    "{{backend}} {{operation}}",
                )
            ],
            "ops",
            tells="Calls and items a second, by the backend of their key.",
        ),
        Panel(
            "Time of a call to a backend",
            quantiles("kms_backend_duration_seconds", "backend, call", "{{backend}} {{call}}", BACKEND),
            "s",
            tells="One request to the key server, without retries, half and 99 of 100 of them.",
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
            tells="Requests to key servers a second, by what came of them.",
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
            tells="Calls a second that were repeated, and those that another backend of the key answered.",
        ),
    ),
    choose={"backend": OPERATIONS},
)
TRUST: Final = Board(
    "kms-trust",
    "KMS: security and audit",
    "Who is refused, what does not open, and is every operation on record?",
    (
        Panel(
            "Audit log holds",
            [("min by (what) (kms_audit_ok)", "{{what}}")],
            kind="stat",
            tells="chain is 0: lines were changed, cut or removed by another hand (KmsAuditBroken). redis or "
            "directory is 0: anchors there name lines that the log lacks (KmsAuditOlderThanAnchors).",
        ),
        figure(
            "Audit failures",
            'sum(rate(kms_audit_events_total{result="failed"}[5m])) or vector(0)',
            "ops",
            bad=0.001,
            tells="While records cannot be written, operations are refused.",
        ),
        figure(
            "Refused calls",
            f'sum(rate({REQUESTS}{{status=~"401|403"}}[5m])) or vector(0)',
            "reqps",
            tells="Answers 401 and 403 a second. Five times yesterday's: KmsRefusalsSpike.",
        ),
        figure(
            "Decrypts that fail",
            f'sum(rate({OPERATIONS}{{operation="decrypt", result="decrypt_failed"}}[5m])) or vector(0)',
            "ops",
            tells="A second: a wrong context, key or file, or an attack. The audit log has the callers.",
        ),
        figure(
            "Weak settings",
            "sum(max by (setting) (kms_setting_weak)) or vector(0)",
            bad=1,
            tells="kms config lint tells which, and what to write instead.",
        ),
        figure(
            "Version",
            "count by (version) (kms_build_info)",
            tells="Processes by version. Two of them for long: an upgrade has stopped half way.",
        ),
    ),
    (
        Panel(
            "Refused, by route",
            [
                (
                    per("route, status", REQUESTS, 'status=~"401|403|429"'),
                    "{{status}} {{route}}",
                )
            ],
            "reqps",
            tells="401: no valid credential. 403: it may not. 429: too many requests.",
        ),
        Panel(
            "Decrypts by outcome",
            [
                (
                    per("result", OPERATIONS, 'operation="decrypt"'),
                    "{{result}}",
                )
            ],
            "ops",
            tells="Calls and items a second, by error code.",
        ),
        Panel(
            "Decrypts, today and a week ago",
            [
                (f'sum(rate({OPERATIONS}{{operation="decrypt"}}[30m]))', "today"),
                (f'sum(rate({OPERATIONS}{{operation="decrypt"}}[30m] offset 7d))', "a week ago"),
            ],
            "ops",
            tells="A second. Ten times those of last week: KmsDecryptSpike.",
        ),
        Panel(
            "Bad requests",
            [
                (
                    per("route, status", REQUESTS, 'status=~"400|404|409|413|422"'),
                    "{{status}} {{route}}",
                )
            ],
            "reqps",
            tells="Errors of callers a second. Many 400 after a release of a client are its fault.",
        ),
        Panel(
            "Audit records by outcome",
            [(per("result", "kms_audit_events_total"), "{{result}}")],
            "ops",
            tells="Records a second. Where one fails, the operation is refused.",
        ),
        Panel(
            "Audit log read back",
            [("time() - kms_audit_read_timestamp_seconds", "{{job}} {{instance}}")],
            "s",
            tells="How long ago each process last checked what is new in the log.",
        ),
        Panel(
            "What could be stronger",
            [("max by (setting) (kms_setting_weak)", "{{setting}}")],
            "short",
            "table",
            tells="Settings that weaken security and are not accepted, as kms config lint reports them.",
        ),
    ),
)
RUNTIME: Final = Board(
    "kms-runtime",
    "KMS: runtime",
    "How are the processes and Redis?",
    (
        figure(
            "Up",
            'sum(up{job=~"kms-.*"}) / count(up{job=~"kms-.*"})',
            "percentunit",
            tells="Processes that answer Prometheus, of those that it knows.",
        ),
        figure("In flight", "sum(kms_inflight)", tells="Requests that are being answered now."),
        figure(
            "Redis",
            'min(kms_redis_ok{what="answers"})',
            tells="1: all processes reach Redis. 0: one does not, and jobs are refused there.",
        ),
        figure(
            "Redis memory",
            'max(kms_storage_used_ratio{what="redis"})',
            "percentunit",
            bad=0.8,
            tells="Used, of maxmemory. Above 80 %: KmsRedisMemory. When it is full no job is accepted.",
        ),
        figure(
            "Largest process",
            'max(process_resident_memory_bytes{job=~"kms-.*"})',
            "bytes",
            tells="Resident memory of the largest process.",
        ),
        figure(
            "Youngest process",
            'min(time() - process_start_time_seconds{job=~"kms-.*"})',
            "s",
            tells="Time since the last start of a process. It stays low where one restarts again and again.",
        ),
    ),
    (
        Panel(
            "CPU",
            [('rate(process_cpu_seconds_total{job=~"kms-.*"}[$__rate_interval])', "{{job}} {{instance}}")],
            "percentunit",
            tells="Of one processor, by process. An API above 70 % needs another one.",
        ),
        Panel(
            "Memory",
            [('process_resident_memory_bytes{job=~"kms-.*"}', "{{job}} {{instance}}")],
            "bytes",
            tells="Resident memory by process.",
        ),
        Panel(
            "Open files, of those allowed",
            [('process_open_fds{job=~"kms-.*"} / process_max_fds{job=~"kms-.*"}', "{{job}} {{instance}}")],
            "percentunit",
            tells="By process. At 100 % no connection is taken.",
        ),
        Panel(
            "Requests by route",
            [
                (
                    per("route, method", REQUESTS, API),
                    "{{method}} {{route}}",
                )
            ],
            "reqps",
            tells="Requests a second, without probes and scrapes.",
        ),
        Panel(
            "Time until the answer was sent",
            quantiles("kms_http_request_duration_seconds", "route", "{{route}}", API),
            "s",
            tells="Half, and 99 of 100, of the requests take less, uploads and downloads included.",
        ),
        Panel(
            "Time of a scrape",
            [('scrape_duration_seconds{job=~"kms-.*"}', "{{job}} {{instance}}")],
            "s",
            tells="How long Prometheus waits for the metrics of a process.",
        ),
        Panel(
            "Spool, of its limit",
            [('max(kms_storage_used_ratio{what="spool"})', "used")],
            "percentunit",
            tells="Of spool_max_bytes. At 100 % uploads and results are refused with 507.",
        ),
        Panel(
            "Spool by tenant",
            [("max by (tenant) (kms_spool_tenant_bytes)", "{{tenant}}")],
            "bytes",
            tells="Bytes of uploads, items and results.",
        ),
        Panel(
            "Redis takes jobs, and changes that no replica acknowledged",
            [
                ('min(kms_redis_ok{what="writes"})', "takes jobs"),
                ("sum(increase(kms_redis_unconfirmed_total[$__rate_interval]))", "unconfirmed"),
            ],
            tells="1: Redis takes writes. Unconfirmed changes may be lost with the primary.",
        ),
        Panel(
            "Hosts that differ in spool or Redis",
            [("min by (instance) (kms_install_ok)", "{{instance}} fits")],
            tells="0 for a host: KmsInstallSplit. kms doctor names the hosts that it sees.",
        ),
        Panel(
            "Clock ahead of Redis's",
            [("max by (instance) (kms_clock_ahead_seconds)", "{{instance}}")],
            "s",
            tells="By host. More than 2 s: KmsClockOff. Leases go by the clock of Redis.",
        ),
        Panel(
            "Age of documents",
            [("max by (instance, document) (kms_document_age_seconds)", "{{instance}} {{document}}")],
            "s",
            tells="Time since the documents of tokens and keys were read. Above 10 s: KmsTokensLate, "
            "KmsKeyDocumentLate.",
        ),
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
        .with_variable(_choice("install", UP, "namespace"))
        .with_variable(_choice("instance", f'{UP[:-1]},namespace=~"$install"}}', "instance"))
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
        made.with_variable(_choice(label, metric, label))
    for position, panel in _placed(board):
        made.with_panel(_built(panel).grid_pos(position))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _placed(board: Board) -> Iterator[tuple[GridPos, Panel]]:
    width = 24 // max(1, len(board.figures))
    for number, panel in enumerate(board.figures):
        yield GridPos(h=4, w=width, x=number * width, y=0), panel
    for number, panel in enumerate(board.graphs):
        yield GridPos(h=8, w=12, x=12 * (number % 2), y=4 + 8 * (number // 2)), panel


def _choice(name: str, metric: str, label: str) -> QueryVariable:
    """A menu of the values of a label, all of them at first."""
    everything = VariableOption(text="All", value="$__all")
    return (
        QueryVariable(name)
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
        query = (
            Dataquery().expr(chosen(expr)).legend_format(legend or "__auto").ref_id(chr(ord("A") + number))
        )
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
