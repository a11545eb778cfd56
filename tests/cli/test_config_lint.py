"""``kms config lint`` and ``kms doctor`` tell the same weak settings, and what was accepted."""

import json
from pathlib import Path

import pytest

from kms_cli.main import run

WEAK = """
[kms]
accept_weak = ["server.allowed_hosts"]
[kms.server]
allowed_hosts = ["*"]
[kms.redis]
url = "rediss://me:hunter2@redis.invalid/0"
broker_url = "amqp://me:hunter2@broker.invalid"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KMS_CONFIG", raising=False)
    file = tmp_path / "kms.toml"
    file.write_text(WEAK)
    return file


def test_a_weak_setting_ends_with_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "lint", "--config", str(config)]) == 1

    out, err = capsys.readouterr()
    assert out.startswith("redis.broker_url: anybody on the way can read the password")
    assert out.count("\n") == 1
    assert "accepted: server.allowed_hosts: " in err
    assert "hunter2" not in out + err


def test_what_is_accepted_ends_with_0(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(WEAK.replace('"server', '"redis.broker_url", "server'))

    assert run(["config", "lint", "--config", str(config)]) == 0
    assert capsys.readouterr().out == ""


def test_json_has_all_and_says_which_are_accepted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["config", "lint", "--config", str(config), "--json"])

    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["setting"]: record["accepted"] for record in records} == {
        "server.allowed_hosts": True,
        "redis.broker_url": False,
    }
    assert all(record["risk"] and record["advice"] for record in records)


def test_doctor_warns_of_what_is_not_accepted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--config", str(config)])

    weak = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "weak"]
    assert len(weak) == 1
    assert weak[0].startswith("warn  weak          redis.broker_url: ")
