"""A real Prometheus over the rules of this repository, and a real Alertmanager with its configuration."""

from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import yaml

from kms_core.programs import tether
from support.ports import free_port
from support.programs import built_with_go, program
from support.service import Service
from support.waiting import until

MONITORING: Final = Path(__file__).parents[2] / "monitoring"


class Prometheus:
    """The real server, over the repository's own rules, with scrapes a second apart."""

    def __init__(self, folder: Path, service: Service, alertmanager: str = "") -> None:
        """``alertmanager``: host and port of one that is told of alerts."""
        self._port = free_port()
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
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = tether.spawn(argv, env={"HOME": str(folder)}, output=log)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}/api/v1", trust_env=False)
        until(self._is_ready, "Prometheus is ready")

    def _is_ready(self) -> bool:
        try:
            return self._http.get(f"http://127.0.0.1:{self._port}/-/ready").is_success
        except httpx.TransportError:
            return False

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

    def stop(self) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()


class Alertmanager:
    """The real server with the configuration of this repository, but for its waits and addresses."""

    def __init__(self, folder: Path, url: str) -> None:
        """``url``: critical alerts go to ``/critical`` below it, warnings to ``/warning``."""
        folder.mkdir()
        port = free_port()
        self.address = f"127.0.0.1:{port}"
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
        with (folder / "alertmanager.log").open("wb") as log:
            self._process = tether.spawn(argv, env={"HOME": str(folder)}, output=log)
        self._http = httpx.Client(base_url=f"http://{self.address}", trust_env=False)
        until(self._is_ready, "Alertmanager is ready")

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def tell(self, *alerts: dict[str, Any]) -> None:
        """As Prometheus does."""
        assert self._http.post("/api/v2/alerts", json=alerts).is_success

    def stop(self) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()
