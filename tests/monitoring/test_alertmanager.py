"""monitoring/alertmanager.yml: what amtool says of it, and alerts that arrive at a webhook."""

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from support.programs import BUILD_LIMIT_S, built_with_go
from support.prometheus import MONITORING, Alertmanager, Prometheus, rules
from support.service import Service
from support.waiting import until
from support.webhooks import Receiver, receiving

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)  # the first run builds Alertmanager
FILE: Final = MONITORING / "alertmanager.yml"
CONFIG: Final = yaml.safe_load(FILE.read_text())
ALERTS: Final = {rule["alert"]: rule for rule in rules("alerts.yml")}


def amtool(*words: object) -> str:
    argv = [built_with_go("amtool"), *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alertmanager_takes_the_configuration() -> None:
    assert "SUCCESS" in amtool("check-config", FILE)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_goes_to_the_receiver_of_its_severity(alert: str) -> None:
    severity = ALERTS[alert]["labels"]["severity"]

    route = amtool(
        "config", "routes", "test", "--config.file", FILE, f"severity={severity}", f"alertname={alert}"
    )

    assert route.split() == [severity]


def test_receivers_are_told_of_ends_and_their_addresses_are_files_that_compose_mounts() -> None:
    services = yaml.safe_load((MONITORING.parent / "docker-compose.yml").read_text())["services"]
    hooks = {each["name"]: each["webhook_configs"] for each in CONFIG["receivers"]}

    for (hook,) in hooks.values():
        assert hook["send_resolved"] is True
        assert hook.keys() == {"url_file", "send_resolved"}, "an address is a secret"
    assert {Path(hook["url_file"]).name for (hook,) in hooks.values()} == set(
        services["alertmanager"]["secrets"]
    )


def matched(matchers: list[str]) -> set[str]:
    """The alerts that a rule of inhibition names."""
    (matcher,) = matchers
    found = re.fullmatch(r'alertname =~? "?([^"]+)"?', matcher)
    assert found, matcher
    return set(found[1].split("|"))


def test_an_inhibition_names_alerts_that_there_are_and_holds_no_critical_one_back() -> None:
    for rule in CONFIG["inhibit_rules"]:
        (source,), targets = matched(rule["source_matchers"]), matched(rule["target_matchers"])
        assert ALERTS[source]["labels"]["severity"] == "critical"
        assert {ALERTS[each]["labels"]["severity"] for each in targets} == {"warning"}
        assert "kms_url" in rule["equal"], "of the same install"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(None) as found:
        yield found


@pytest.fixture
def alertmanager(receiver: Receiver, tmp_path: Path) -> Iterator[Alertmanager]:
    running = Alertmanager(tmp_path / "alertmanager", f"http://127.0.0.1:{receiver.port}")
    try:
        yield running
    finally:
        running.stop()


def came(receiver: Receiver, severity: str) -> list[dict[str, Any]]:
    """The alerts of all messages of a severity."""
    bodies = [json.loads(each.body) for each in list(receiver.requests) if each.path == f"/{severity}"]
    return [alert for body in bodies for alert in body["alerts"]]


def test_a_changed_audit_log_wakes_somebody(
    alertmanager: Alertmanager, receiver: Receiver, tmp_path: Path, redis_url: str
) -> None:
    """The rule as it is shipped; only scrapes, evaluations and waits are a second apart."""
    with Service(tmp_path / "install", redis=redis_url) as service:
        service.start("api")
        running = Prometheus(tmp_path, service, alertmanager.address)
        try:
            service.encrypt(b"on record")
            until(lambda: running.ask('kms_audit_ok{what="chain"} == 1'), "the audit log is checked")
            assert came(receiver, "critical") == []
            (file,) = (service.state / "audit").glob("*.jsonl")
            file.write_bytes(file.read_bytes().replace(b'"encrypt"', b'"decrypt"', 1))

            until(lambda: came(receiver, "critical"), "the alert arrives")
        finally:
            running.stop()

    (told, *_) = came(receiver, "critical")
    assert (told["status"], told["labels"]["alertname"]) == ("firing", "KmsAuditBroken")
    assert "found lines of the audit log changed" in told["annotations"]["summary"]
    assert told["annotations"]["runbook_url"] == "http://localhost:8082/ui/runbooks#kmsauditbroken"
    assert told["labels"]["kms_url"] == "http://localhost:8082"


def alert(name: str, **labels: str) -> dict[str, Any]:
    """One that fires, as Prometheus tells of it."""
    known = {
        "alertname": name,
        "severity": ALERTS[name]["labels"]["severity"],
        "kms_url": "https://one.example",
    }
    return {"labels": known | labels, "startsAt": datetime.now(UTC).isoformat()}


def test_a_cause_holds_its_effects_back_and_those_of_no_other(
    alertmanager: Alertmanager, receiver: Receiver
) -> None:
    alertmanager.tell(
        alert("KmsBackendDown", backend="transit"),
        alert("KmsBackendSlow", backend="transit"),
        alert("KmsBackendSlow", backend="cosmian"),
        alert("KmsBackendSlow", backend="transit", kms_url="https://two.example"),
    )
    until(lambda: len(came(receiver, "warning")) >= 2, "the others arrive")
    until(lambda: came(receiver, "critical"), "and the cause")

    slow = {(each["labels"]["kms_url"], each["labels"]["backend"]) for each in came(receiver, "warning")}
    assert slow == {("https://one.example", "cosmian"), ("https://two.example", "transit")}


def test_the_end_of_an_alert_is_told(alertmanager: Alertmanager, receiver: Receiver) -> None:
    firing = alert("KmsDown", instance="kms-1")
    alertmanager.tell(firing)
    until(lambda: came(receiver, "critical"), "it arrives")

    alertmanager.tell(firing | {"endsAt": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()})

    until(lambda: came(receiver, "critical")[-1]["status"] == "resolved", "its end arrives")


def test_alerts_of_one_kind_are_one_message(alertmanager: Alertmanager, receiver: Receiver) -> None:
    alertmanager.tell(*(alert("KmsDown", instance=f"kms-{number}") for number in range(10)))

    until(lambda: receiver.requests, "they arrive")

    assert len(json.loads(receiver.requests[0].body)["alerts"]) == 10
