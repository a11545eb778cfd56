"""A real Prometheus over the rules of this repository, and a real Alertmanager with its configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import yaml

from kms_core.programs import tether
from support.ports import free_port
from support.programs import built_with_go, program
from support.service import Service
from support.waiting import answers, until, until_up

MONITORING: Final = Path(__file__).parents[2] / "monitoring"


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of a file of monitoring/rules."""
    groups = yaml.safe_load((MONITORING / "rules" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


class _Server:
    """A program that serves HTTP at ``address`` until ``stop``."""

    def __init__(self, folder: Path, argv: Sequence[str], address: str, base: str) -> None:
        with (folder / "log").open("wb") as log:
            self._process = tether.spawn(argv, env={"HOME": str(folder)}, output=log)
        self._http = httpx.Client(base_url=f"http://{address}{base}", trust_env=False)
        until_up(self._process, lambda: answers(f"http://{address}/-/ready"), (folder / "log").read_text)

    def stop(self) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()


class Prometheus(_Server):
    """The real server, over the repository's own rules, with scrapes a second apart."""

    def __init__(self, folder: Path, service: Service, alertmanager: str = "") -> None:
        """``alertmanager``: host and port of one that is told of alerts."""
        address = f"127.0.0.1:{free_port()}"
        self.alerts_at_work: set[str] = set()
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(MONITORING / "rules/*.yml")]
        config["alerting"] = {
            "alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}] * bool(alertmanager)
        }
        for job, port in zip(config["scrape_configs"], (service.port, service.port + 1), strict=True):
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        argv = [
            program("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
        ]
        super().__init__(folder, argv, address, "/api/v1")

    def ask(self, expr: str) -> list[dict[str, Any]]:
        answer = self._http.get("/query", params={"query": expr})
        assert answer.is_success, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def await_scrape(self) -> None:
        """Rates need work between two scrapes."""
        before = self._scrapes()
        until(lambda: self._scrapes() >= before + 2, "two more scrapes")

    def _scrapes(self) -> int:
        return min(int(found["value"][1]) for found in self.ask('count_over_time(up{job=~"kms-.*"}[10m])'))

    def alerts(self) -> set[str]:
        """Those that fire."""
        found = self._http.get("/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}


class Alertmanager(_Server):
    """The real server with the configuration of this repository, but for its waits and addresses."""

    def __init__(self, folder: Path, url: str) -> None:
        """``url``: critical alerts go to ``/critical`` below it, warnings to ``/warning``."""
        folder.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        text = (MONITORING / "alertmanager.yml").read_text().replace("/run/secrets/", f"{folder}/")
        config = yaml.safe_load(text)
        for route in (config["route"], *config["route"]["routes"]):
            route |= {"group_wait": "1s", "group_interval": "1s"}
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        for severity in ("critical", "warning"):
            (folder / f"alert_{severity}_url").write_text(f"{url}/{severity}\n")
        argv = [
            built_with_go("alertmanager"),
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/data",
            f"--web.listen-address={self.address}",
            "--cluster.listen-address=",
        ]
        super().__init__(folder, argv, self.address, "")

    def tell(self, *alerts: dict[str, Any]) -> None:
        """As Prometheus does."""
        assert self._http.post("/api/v2/alerts", json=alerts).is_success
