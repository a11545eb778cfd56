"""Every expression of every panel and rule, asked of a real Prometheus that scrapes a service at work."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.metrics import MetricWrapperBase

import dashboards
from kms_core.backends.age_settings import AgeSection
from kms_core.observability import metrics
from support.core_jobs import run_job
from support.openbao import bao
from support.prometheus import Prometheus, rules
from support.service import CONTEXT, Service, b64, core_of
from support.tcp_proxy import TcpProxy
from support.waiting import until
from support.webhooks import Receiver, make_localhost_tls, receiving, secret_file, toml

RULES: Final = [*rules("slo.yml"), *rules("alerts.yml")]
PANELS: Final = [
    (f"{board.uid}: {panel.title}", dashboards.chosen(expr))
    for board in dashboards.BOARDS
    for panel in (*board.figures, *board.graphs)
    for expr, _ in panel.queries
]
"""Panel and query."""


def at_work(service: Service) -> None:
    """A little of everything that has a figure."""
    for _ in range(3):
        sealed = service.encrypt(b"salary")
        service.decrypt(sealed)
        service.post("/decrypt", {"ciphertext": b64(sealed), "context": "env=other"})
        service.post("/encrypt", {"plaintext": "not base64!"})
        service.post("/encrypt", {"plaintext": b64(b"x"), "key_id": "payroll", "context": CONTEXT})
        service.http.get("/api/v1/kms/status", headers={"Origin": "https://elsewhere.example"})
    items = [{"plaintext": b64(b"x")}, {"plaintext": b64(b"y"), "context": "a=b"}]
    service.wait(service.submit({"kind": "encrypt", "items": items, "callback": "ci"}), "succeeded")
    service.wait(service.upload("encrypt", b"x" * 100_000), "succeeded")
    service.post("/jobs", {"kind": "encrypt", "source": "s3://gone/a", "target": "s3://gone/b"})
    service.submit({"kind": "decrypt", "items": [{"ciphertext": b64(b"not a file")}]})


def in_trouble(service: Service, running: Prometheus, relay: TcpProxy, receiver: Receiver) -> None:
    """A backend that is away, no worker, workers that died, a receiver that does not answer."""
    receiver.answers.extend([503, 503])  # the wait for the third attempt is longer than a scrape
    job = {"kind": "encrypt", "items": [{"plaintext": ""}], "callback": "ci"}
    service.wait(service.submit(job), "succeeded")
    until(lambda: running.ask("kms_webhook_outbox > 0"), "a delivery waits")
    sealed = service.post("/encrypt", {"plaintext": b64(b"x"), "key_id": "payroll"}).json()["ciphertext"]
    relay.cut()
    for _ in range(3):
        service.post("/encrypt", {"plaintext": b64(b"x"), "key_id": "payroll"})
        service.post("/decrypt", {"ciphertext": sealed})
    service.kill("worker")
    store, worker_context = core_of(service).worker_context.store, core_of(service).worker_context
    lost, dead = (service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]}) for _ in range(2))
    store.redis.delete("kms:kms.bulk")  # the wake-ups
    for _ in range(5):
        assert store.claim(dead, "w")
        store.redis.hset(f"kms:job:{dead}", "lease_until", 0)
    run_job(dead, worker_context, "w")
    assert store.claim(lost, "w")
    store.redis.hset(f"kms:job:{lost}", "lease_until", 0)
    store.redis.zadd("kms:leased", {lost: 0})
    waiting = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})
    running.await_scrape()
    relay.mend()
    store.redis.delete("kms:once:keys")  # or the new worker would wait for a minute with telling of keys
    service.start("worker")
    for job_id in (lost, waiting):
        service.wait(job_id, "succeeded")
    until(lambda: running.ask("kms_job_resumes_total > 0"), "the lost job is seen")
    until(lambda: running.ask("kms_key_age_seconds"), "the keys are seen again")


def grow_old(service: Service) -> None:
    """The default key was made years ago."""
    file = service.settings.backend(AgeSection).private_key_path
    file.write_text(re.sub(r"(?m)^# created: \d{4}", "# created: 2020", file.read_text()))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after a time of work, some of it with trouble."""
    folder = tmp_path_factory.mktemp("monitored")
    server = bao()
    relay = TcpProxy(server.port)
    authority = make_localhost_tls(folder)
    secret = folder / "s3-secret"
    secret.touch(mode=0o600)
    secret.write_text("unused")
    with receiving(authority) as receiver:
        settings = (
            "[kms.jobs]\nlease_s = 2\n"
            '[kms.jobs.resource_leases]\n"bucket:gone" = 4\n'
            f'[kms.jobs.buckets.gone]\nread = [""]\nwrite = [""]\n'
            f'endpoint = "http://127.0.0.1:1"\nallow_http = true\naccess_key_id = "x"\n'
            f'secret_key_file = "{secret}"\n'
            f'[kms.keys]\npayroll = "transit:{server.new_key()}"\n'
            f'root = {{ uri = "transit:{server.new_key()}", use = "seal" }}\n'
            f"{server.settings(url=relay.url)}"
        ) + toml("ci", receiver, authority, secret_file(folder), "allow_private = true\n")
        with Service(folder, settings) as service:
            grow_old(service)
            service.start()
            running = Prometheus(folder, service)
            try:
                until(lambda: running.ask('up{job=~"kms-.*"} == 1'), "both are scraped")
                for _ in range(4):
                    at_work(service)
                    running.await_scrape()
                until(lambda: running.ask("rate(kms_job_items_total[5m]) > 0"), "the work is seen")
                until(lambda: running.ask("kms_key_age_seconds"), "the keys are seen")
                until(lambda: running.ask("kms_key_rotations_total > 0"), "the old key is rotated")
                until(lambda: running.ask("kms:jobs_failed:ratio_rate15m"), "the rules are evaluated")
                running.alerts_at_work = running.alerts()
                in_trouble(service, running, relay, receiver)
                yield running
            finally:
                running.stop()


def now(expr: str) -> str:
    """The expression without what only time can bring: yesterday, and a choice in a menu."""
    expr = re.sub(r" offset \d+[dh]", "", expr)
    return re.sub(r"\$(backend|kind|install|instance)", ".*", expr.replace("$__rate_interval", "1m"))


@pytest.mark.parametrize(("panel", "expr"), PANELS, ids=[panel for panel, _ in PANELS])
def test_a_panel_shows_something(prometheus: Prometheus, panel: str, expr: str) -> None:
    assert prometheus.ask(now(expr)), f"{panel}: {now(expr)}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_watches_something_that_is_there(prometheus: Prometheus, rule: dict[str, Any]) -> None:
    prometheus.ask(rule["expr"])
    for name in re.findall(r"\bkms[_:][a-z0-9_:]+", rule["expr"]):
        assert prometheus.ask(name) or re.sub("_(?:bucket|count|total)$", "", name) in DECLARED, name


KINDS: Final = {
    family.name: family.type
    for metric in vars(metrics).values()
    if isinstance(metric, MetricWrapperBase)
    for family in metric.describe()
}
DECLARED: Final = KINDS.keys()
MOVED_ELSEWHERE: Final = {
    "kms_auth_failures": "e2e/test_auth.py",
    "kms_client_crl_expires_timestamp_seconds": "e2e/test_auth_revocation.py",
    "kms_document_age_seconds": "e2e/test_token_documents.py",
    "kms_messages_refused": "chaos/test_poison.py",
    "kms_redis_unconfirmed": "peers/test_replicas.py",
    "kms_spool_blobs_refused": "kms_core/jobs/storage/test_spool_attacks.py",
    "kms_setting_weak": "monitoring/test_weak_settings.py",
    "kms_worker_stuck_processes": "chaos/test_hung_mount.py",
}
"""Metrics of what does not happen here, and the test that moves each."""
BY_CHANCE: Final = frozenset({"kms_clock_ahead_seconds", "kms_job_resource_leases"})
"""Up for the time of a job, which a scrape may miss; or on either side of zero."""


def test_a_service_at_work_is_no_reason_for_an_alert(prometheus: Prometheus) -> None:
    assert prometheus.alerts_at_work == set()


def moved(prometheus: Prometheus, name: str) -> bool:
    """Whether it was above zero at any time; a metric that is merely declared, or begun at zero, was not."""
    end = {"counter": "_total", "histogram": "_count"}.get(KINDS[name], "")
    return bool(prometheus.ask(f"max(max_over_time({name}{end}[1h])) > 0"))


def test_every_metric_that_is_declared_moves(prometheus: Prometheus) -> None:
    still = {name for name in DECLARED - BY_CHANCE if not moved(prometheus, name)}

    assert sorted(still) == sorted(MOVED_ELSEWHERE), sorted(still)
    for metric, path in MOVED_ELSEWHERE.items():
        assert metric in (Path(__file__).parents[1] / path).read_text()
