"""Rules, alerts, runbooks and dashboards, checked without a server: by promtool, and by each other."""

import json
import re
import subprocess
from typing import Any, Final

import pytest
import yaml

import dashboards
from kms_api.ui import render
from support.programs import program
from support.prometheus import MONITORING, rules

ROOT: Final = MONITORING.parent
ALERTS: Final = rules("alerts.yml")
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
    assert page == "{{ $externalLabels.kms_url }}/ui/runbooks"
    assert [each.alert for each in render.load_runbooks() if each.alert.lower() == anchor] == [rule["alert"]]


def test_every_runbook_is_of_an_alert_and_says_something() -> None:
    books = render.load_runbooks()

    assert sorted(each.alert for each in books) == sorted(rule["alert"] for rule in ALERTS)
    assert all(each.paragraphs for each in books)


def test_the_address_that_alerts_lead_to_is_set_and_is_the_one_of_the_dashboards() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    named = {
        variable["query"]
        for uid in BOARDS
        for variable in json.loads(dashboards.render(BOARDS[uid]))["templating"]["list"]
        if variable["name"] == "kms_url"
    }

    assert named == {config["global"]["external_labels"]["kms_url"]}
    other = json.loads(dashboards.render(dashboards.OVERVIEW, "https://kms.example.com"))
    assert "https://kms.example.com" in {each.get("query") for each in other["templating"]["list"]}
    assert [link["url"] for link in other["links"] if link["type"] == "link"] == ["${kms_url}/ui/runbooks"]


# -- what Grafana is provisioned with --------------------------------------------------------------------


def provisioned(kind: str) -> dict[str, Any]:
    paths = list((MONITORING / "grafana/provisioning" / kind).iterdir())
    assert [path.suffix for path in paths] == [".yml"]
    found: dict[str, Any] = yaml.safe_load(paths[0].read_text())
    assert found["apiVersion"] == 1
    return found


def test_the_dashboards_begin_with_the_datasource_that_is_provisioned() -> None:
    (source,) = provisioned("datasources")["datasources"]
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())

    assert source.keys() == {
        *("name", "uid", "type", "access", "url", "isDefault", "editable", "jsonData"),
    }
    assert (source["type"], source["access"], source["editable"]) == ("prometheus", "proxy", False)
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    for uid in BOARDS:
        made = json.loads(dashboards.render(BOARDS[uid]))
        menus = [each for each in made["templating"]["list"] if each["type"] == "datasource"]
        assert [(menu["query"], menu["current"]["value"]) for menu in menus] == [
            ("prometheus", source["uid"])
        ]
        assert {panel["datasource"]["uid"] for panel in made["panels"]} == {"${datasource}"}


def test_grafana_looks_for_dashboards_where_compose_mounts_them_and_lets_nobody_edit_them() -> None:
    (provider,) = provisioned("dashboards")["providers"]

    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert (provider["type"], provider["folder"]) == ("file", "KMS")
    assert (provider["allowUiUpdates"], provider["editable"], provider["disableDeletion"]) == (
        False,
        False,
        True,
    )
    assert {path.stem for path in (MONITORING / "grafana/dashboards").iterdir()} == BOARDS.keys()


@pytest.mark.parametrize(
    ("service", "mounts"),
    [
        (
            "prometheus",
            {"./monitoring/prometheus.yml": "/prometheus.yml", "./monitoring/rules": "/rules"},
        ),
        ("alertmanager", {"./monitoring/alertmanager.yml": "/alertmanager.yml"}),
        (
            "grafana",
            {
                "./monitoring/grafana/provisioning": "/etc/grafana/provisioning",
                "./monitoring/grafana/dashboards": "/var/lib/grafana/dashboards",
            },
        ),
    ],
)
def test_compose_mounts_what_is_here(service: str, mounts: dict[str, str]) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    volumes = [str(volume).split(":") for volume in services[service]["volumes"]]

    for source, target in mounts.items():
        places = [volume[1] for volume in volumes if volume[0].rstrip("/") == source]
        assert len(places) == 1, source
        assert places[0].rstrip("/").endswith(target), source
        assert (ROOT / source).exists()


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
        assert re.fullmatch(r"\S.{20,}\.", panel["description"]), panel["title"]
    assert len({panel["title"] for panel in made["panels"]}) == len(made["panels"])


CHOSEN: Final = 'namespace=~"$install",instance=~"$instance"'
SERIES: Final = re.compile(r"(?<![\w:$])(?:kms_|process_|scrape_|up\b)\w*")


@pytest.mark.parametrize("uid", BOARDS)
def test_a_menu_chooses_install_and_instance_in_every_panel(uid: str) -> None:
    made = json.loads(dashboards.render(BOARDS[uid]))
    menus = {each["name"]: each for each in made["templating"]["list"]}

    for name, label in {"install": "namespace", "instance": "instance"}.items():
        assert menus[name]["query"].endswith(f", {label})")
        assert (menus[name]["multi"], menus[name]["includeAll"], menus[name]["allValue"]) == (
            True,
            True,
            ".*",
        )
    for panel in made["panels"]:
        for target in panel["targets"]:
            bare = re.sub(r"{[^}]*}", lambda found: "{}" if CHOSEN in found[0] else "{all}", target["expr"])
            bare = re.sub(r"\b(?:by|on) \([^)]*\)", "", bare)
            for found in SERIES.finditer(bare):
                assert bare[found.end() :].startswith("{}"), f"{panel['title']}: {target['expr']}"
            assert SERIES.search(bare) or "all instances" in panel["description"].lower(), panel["title"]
