"""``kms up --monitoring``: live figures of API and worker from one command."""

import sys
from pathlib import Path

import httpx2 as httpx

from kms_core.programs import tether
from support.programs import program
from support.service import Service
from support.waiting import until


def test_one_command_brings_a_prometheus_that_scrapes_both(tmp_path: Path) -> None:
    install = Service(tmp_path / "install")
    argv = [sys.executable, "-P", "-m", "kms_cli.main", "up", "--monitoring"]
    assert program("prometheus")
    with (tmp_path / "up.log").open("wb") as log:
        up = tether.spawn(argv, env=install.environ, output=log)
    try:
        url = f"http://127.0.0.1:{install.port + 2}/api/v1/query"

        def up_now() -> dict[str, str]:
            try:
                answer = httpx.get(url, params={"query": "up"}, trust_env=False)
            except httpx.TransportError:
                return {}
            found = answer.json()["data"]["result"] if answer.is_success else []  # 503 while it starts
            return {series["metric"]["job"]: series["value"][1] for series in found}

        until(
            lambda: up_now() == {"kms-api": "1", "kms-worker": "1"} or up.poll() is not None,
            "both are scraped",
        )
        assert up.poll() is None, (tmp_path / "up.log").read_text()
    finally:
        up.terminate()
        up.wait(60)
        install.http.close()
