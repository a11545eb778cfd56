"""Weak settings are told by the metric and by lines at the start, of the API and of the worker."""

import json
import re
from pathlib import Path

import httpx2 as httpx
import pytest

from support.service import Service

WEAK = """\
environment = "prod"
bind = "127.0.0.1"
prod_backend = "age"
allow_age_in_prod = true
accept_weak = ["require_context"]
require_context = false
[kms.auth]
mode = "none"
[kms.server]
allowed_hosts = ["*"]
"""
TOLD = {"allow_age_in_prod", "auth.mode", "server.allowed_hosts", "audit.durability"}


@pytest.mark.parametrize(("program", "port"), [("api", 0), ("worker", 1)])
def test_weak_settings_are_told(tmp_path: Path, redis_url: str, program: str, port: int) -> None:
    with Service(tmp_path, WEAK, redis_url) as service:
        service.start(program)
        url = service.http.base_url.copy_with(port=(service.http.base_url.port or 0) + port, path="/metrics")
        told = httpx.get(url).text
        log = (service.logs / f"{program}.log").read_text()

    found = dict(re.findall(r'^kms_setting_weak\{setting="([\w.]+)"\} ([\d.]+)$', told, re.MULTILINE))
    assert {setting for setting, value in found.items() if value == "1.0"} == TOLD
    assert found["require_context"] == found["cosmian.tls_verify"] == "0.0"
    lines = [json.loads(line) for line in log.splitlines() if "setting.weak" in line]
    assert {line["setting"] for line in lines if line["event"] == "setting.weak"} == TOLD
    assert [line["settings"] for line in lines if line["event"] == "setting.weak_accepted"] == [
        ["require_context"]
    ]
    assert all(line["advice"] and line["risk"] for line in lines if line["event"] == "setting.weak")
