"""Rules, alerts, runbooks and dashboards, checked without a server: by promtool, and by each other."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

import dashboards
from peers import program

ROOT: Final = Path(__file__).parents[2]
MONITORING: Final = ROOT / "monitoring"
ALERTS: Final[list[dict[str, Any]]] = [
    rule
    for group in yaml.safe_load((MONITORING / "rules/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
SCREEN_UNITS: Final = 24  # of grid height: about what a large screen shows at once
BOARDS: Final = {board.uid: board for board in dashboards.BOARDS}


def promtool(*words: str) -> str:
    done = subprocess.run([program("promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_configuration_and_rules() -> None:
    promtool("check", "config", str(MONITORING / "prometheus.yml"))


def test_each_alert_fires_when_it_should_and_is_silent_when_it_should_not() -> None:
    promtool("test", "rules", *map(str, sorted((MONITORING / "rules/tests").glob("*.yml"))))


def test_no_alert_is_without_both_cases() -> None:
    cases = [
        (case["alertname"], bool(case["exp_alerts"]))
        for path in (MONITORING / "rules/tests").glob("*.yml")
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]

    assert sorted(cases) == sorted((rule["alert"], fires) for rule in ALERTS for fires in (True, False))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alert_has_a_severity_a_summary_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^### (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in headings


@pytest.mark.parametrize("uid", BOARDS)
def test_the_dashboards_are_what_their_source_makes(uid: str) -> None:
    assert (MONITORING / f"grafana/dashboards/{uid}.json").read_text() == dashboards.render(BOARDS[uid])


@pytest.mark.parametrize("uid", BOARDS)
def test_panels_lie_within_the_grid_and_on_no_other(uid: str) -> None:
    panels = json.loads(dashboards.render(BOARDS[uid]))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert [panel["title"] for panel in panels if panel["gridPos"]["y"] == 0], "figures stand on top"
    assert sum(panel["gridPos"]["y"] < SCREEN_UNITS for panel in panels) <= 12


@pytest.mark.parametrize("uid", BOARDS)
def test_a_panel_says_its_unit_and_a_dashboard_its_question(uid: str) -> None:
    made = json.loads(dashboards.render(BOARDS[uid]))

    assert made["description"].endswith("?")
    for panel in made["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["title"]
    assert len({panel["title"] for panel in made["panels"]}) == len(made["panels"])
