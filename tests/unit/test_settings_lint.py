"""What is told to be weaker than need be, and that the metric and the command know the same names."""

from pathlib import Path

import pytest

from kms_core.settings import load
from kms_core.settings_lint import SETTINGS, weaknesses

PROD = """
[kms]
environment = "prod"
prod_backend = "age"
allow_age_in_prod = true
require_context = true
[kms.auth]
mode = "none"
[kms.audit]
durability = "fsync"
"""


def told(tmp_path: Path, text: str) -> set[str]:
    file = tmp_path / "kms.toml"
    file.write_text(text)
    found = load(file, {"HOME": str(tmp_path), "KMS_STATE_DIR": str(tmp_path / "state")})
    names = {weakness.setting for weakness in weaknesses(found)}
    assert names <= set(SETTINGS), "the metric must know every name"
    return names


def test_the_defaults_of_dev_are_no_weakness(tmp_path: Path) -> None:
    assert told(tmp_path, "[kms]") == set()


def test_age_in_prod_is_told_although_it_is_allowed(tmp_path: Path) -> None:
    assert told(tmp_path, PROD) == {"allow_age_in_prod"}


@pytest.mark.parametrize(
    ("line", "other", "setting"),
    [
        ("require_context = true", "require_context = false", "require_context"),
        ('durability = "fsync"', 'durability = "write"', "audit.durability"),
        ('environment = "prod"', 'environment = "prod"\nbind = "0.0.0.0"', "auth.mode"),
        ("[kms.auth]", "[kms.age]\naccept_foreign = true\n[kms.auth]", "age.accept_foreign"),
    ],
)
def test_each_weakness_is_told(tmp_path: Path, line: str, other: str, setting: str) -> None:
    assert told(tmp_path, PROD.replace(line, other)) == {"allow_age_in_prod", setting}


def test_a_server_that_is_not_verified_is_told_in_dev_too(tmp_path: Path) -> None:
    text = '[kms]\ndev_backend = "cosmian"\n[kms.cosmian]\nserver_url = "https://k"\ntls_verify = false\n'

    assert told(tmp_path, text) == {"cosmian.tls_verify"}
