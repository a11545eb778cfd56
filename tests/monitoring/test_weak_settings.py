"""Settings that make prod weaker than it could be are told by a metric, each by its name."""

import re
from pathlib import Path

from service import Service

WEAK = """\
environment = "prod"
bind = "127.0.0.1"
prod_backend = "age"
allow_age_in_prod = true
[kms.auth]
mode = "none"
"""


def test_weak_settings_of_prod_are_told(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, WEAK, redis_url) as service:
        service.start("api")
        told = service.http.get("/metrics").text

    found = dict(re.findall(r'^kms_setting_weak\{setting="([\w.]+)"\} ([\d.]+)$', told, re.MULTILINE))
    assert found["allow_age_in_prod"] == "1.0"
    assert found["require_context"] == found["cosmian.tls_verify"] == found["auth.mode"] == "0.0"
