"""Prometheus beside the service, for ``kms up --monitoring``: the program from the PATH, our rules."""

import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kms_cli.local import private_files
from kms_core.programs.supervisor import Child
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

RULES: Final = Path(__file__).parents[3] / "monitoring" / "rules"  # of a checkout, where `scripts/up` runs
_PROBE_S: Final = 0.5
OFFSET: Final = 2  # from the API's port: its own comes first, then the worker's


def port_of(settings: Settings) -> int:
    return settings.kms.port + OFFSET


def child(settings: Settings, host: str, env: Mapping[str, str]) -> Child:
    """Raises ConfigurationError without the program or the rules. ``host`` is where the service answers."""
    binary = shutil.which("prometheus", path=env.get("PATH"))
    if binary is None:
        raise ConfigurationError("--monitoring needs the program prometheus on the PATH: install it first")
    if not RULES.is_dir():
        raise ConfigurationError(
            "--monitoring needs the folder monitoring/ of a checkout: use scripts/up there"
        )
    folder = private_files.directory(settings.state_dir / "prometheus")
    private_files.replace_file(folder / "prometheus.yml", json.dumps(_configuration(settings, host)))
    argv = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={settings.kms.bind}:{port_of(settings)}",
        "--log.level=warn",
    ]
    return Child("prometheus", argv, ready=lambda: _is_ready(host, port_of(settings)), env=env)


def _is_ready(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_PROBE_S):
            return True
    except OSError:
        return False


def _configuration(settings: Settings, host: str) -> dict[str, object]:
    """JSON is YAML. The same jobs as ``monitoring/prometheus.yml``, where this service listens."""
    targets = {"kms-api": settings.kms.port, "kms-worker": settings.kms.port + 1}
    return {
        "global": {
            "scrape_interval": "5s",
            "evaluation_interval": "5s",
            "external_labels": {"kms_url": f"http://{host}:{settings.kms.port}"},
        },
        "rule_files": [str(RULES / "*.yml")],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [f"{host}:{port}"]}]}
            for name, port in targets.items()
        ],
    }
