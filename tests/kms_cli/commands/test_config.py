"""``kms config``: what it shows, and from where; weak settings, which ``kms doctor`` tells too."""

import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


class Said(NamedTuple):
    code: int
    out: str
    err: str


Kms = Callable[..., Said]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KMS_CONFIG", raising=False)
    file = tmp_path / "kms.toml"
    file.write_text(WEAK)
    return file


@pytest.fixture
def kms(config: Path, capsys: pytest.CaptureFixture[str]) -> Kms:
    """Run words with the settings of a text, else with those that are weak."""

    def run_with(words: str, settings: str = WEAK) -> Said:
        config.write_text(settings)
        return Said(run([*shlex.split(words), "--config", str(config)]), *capsys.readouterr())

    return run_with


def test_a_weak_setting_ends_with_1_and_one_that_is_accepted_with_0(kms: Kms) -> None:
    said = kms("config lint")

    assert said.code == 1
    assert said.out.startswith("redis.broker_url: the network can read the password")
    assert said.out.count("\n") == 1
    assert "accepted: server.allowed_hosts: " in said.err
    assert "hunter2" not in said.out + said.err
    accepted = kms("config lint", WEAK.replace('"server', '"redis.broker_url", "server'))
    assert (accepted.code, accepted.out) == (0, "")


def test_json_has_all_and_says_which_are_accepted(kms: Kms) -> None:
    records = [json.loads(line) for line in kms("config lint --json").out.splitlines()]

    assert {record["setting"]: record["accepted"] for record in records} == {
        "server.allowed_hosts": True,
        "redis.broker_url": False,
    }
    assert all(record["risk"] and record["advice"] for record in records)


def test_doctor_warns_of_what_is_not_accepted(kms: Kms) -> None:
    (weak,) = [line for line in kms("doctor").out.splitlines() if line.split()[1] == "weak"]

    assert weak.startswith("warn  weak          redis.broker_url: ")


SHOWN = """
[kms]
port = 9001
[kms.redis]
url = "rediss://me:hunter2@redis.invalid/0"
broker_url = "sentinel://a.invalid/0?master=m&sentinel_password=hunter2"
[kms.cosmian]
api_key = "hunter2"
[kms.tenants.a-b]
keys = ["x*"]
"""


def test_settings_are_shown_with_where_they_come_from(
    config: Path, kms: Kms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMS_BIND", "127.0.0.2")
    state = config.parent / "state"

    code, out, _ = kms(f"config show --changed --state-dir '{state}'", SHOWN)

    assert code == 0
    assert out.splitlines() == [
        "[kms]",
        'bind = "127.0.0.2"  # KMS_BIND',
        f"port = 9001  # {config}",
        f'state_dir = "{state}"  # --state-dir',
        "[kms.redis]",
        f'url = "rediss://(hidden)@redis.invalid/0"  # {config}',
        f'broker_url = "sentinel://a.invalid/0?master=m&sentinel_password=(hidden)"  # {config}',
        "[kms.tenants.a-b]",
        f'keys = ["x*"]  # {config}',
        "[kms.cosmian]",
        f'api_key = "(hidden)"  # {config}',
    ]
    tomllib.loads(out)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://me:hunter2#a/b?c@broker.invalid//", "(hidden)"),
        ("amqp://me:#hunter2@broker.invalid//", "(hidden)"),
        ("rediss://a.invalid/0?access_token=hunter2&db=1", "rediss://a.invalid/0?(hidden)&db=1"),
        ("rediss://a.invalid/0?password=hunt@er2&db=1", "(hidden)"),
        ("rediss://b:a@a.invalid/0?db=1&password=hunt@er2", "(hidden)"),
        ("rediss://a.invalid/0?password=hunt#er2", "rediss://a.invalid/0?password=(hidden)#(hidden)"),
        ("rediss://a.invalid/0?pass%77ord=hunter2&db=1", "rediss://a.invalid/0?(hidden)&db=1"),
        ("rediss://a.invalid/0?sig=hunter2", "rediss://a.invalid/0?(hidden)"),
        ("rediss://a.invalid/0?a=b&pwd=hunter2", "rediss://a.invalid/0?(hidden)&(hidden)"),
        ("rediss://a.invalid/0?password=x&hunter2", "rediss://a.invalid/0?password=(hidden)&(hidden)"),
        ("rediss://a.invalid/0?password=x&hunter2=y", "rediss://a.invalid/0?password=(hidden)&(hidden)"),
        ("rediss://a.invalid/0?password=x\\nhunter2", "rediss://a.invalid/0?password=(hidden)"),
        ("rediss://a.invalid/0?hunter2", "rediss://a.invalid/0?(hidden)"),
        ("rediss://a.invalid/0?db=1%26password=hunter2", "rediss://a.invalid/0?(hidden)"),
        ("rediss://a.invalid/0#hunter2", "rediss://a.invalid/0#(hidden)"),
        ("rediss://a.invalid/0&password=hunter2", "(hidden)"),
        ("rediss://me:hunt\\ner2@a.invalid/0", "rediss://(hidden)@a.invalid/0"),
        ("rediss://me:hunter2@a.invalid@b.invalid/0", "(hidden)"),
        ("rediss://me:hunter2?token=@a.invalid/0", "(hidden)"),
        ("rediss://me:hunter2/0", "(hidden)"),
        ("rediss://:hunter2/0", "(hidden)"),
        ("amqp:me:hunter2@a.invalid", "(hidden)"),
        ("rediss://me:hunter2@[::1]:6379/0", "rediss://(hidden)@[::1]:6379/0"),
        ("redis+socket:///run/redis.sock?virtual_host=1", "redis+socket:///run/redis.sock?virtual_host=1"),
        ("amqps://me:hunter2@a.invalid:5671/%2Fkms", "amqps://(hidden)@a.invalid:5671/%2Fkms"),
        (
            "rediss://a.invalid/0?socket_timeout=2.5&protocol=3&max_connections=hunter2",
            "rediss://a.invalid/0?socket_timeout=2.5&protocol=3&(hidden)",
        ),
        (
            "sentinel://me:hunter2@a.invalid:26379,[::1]/0?master=m&sentinel%5Fpassword=hunter2",
            "sentinel://(hidden)@a.invalid:26379,[::1]/0?master=m&(hidden)",
        ),
        ("https://a.invalid/receiver/v1/otlp/hunter2/v1/traces", "https://a.invalid/(hidden)"),
        ("http://a.invalid:4318/v1/traces", "http://a.invalid:4318/v1/traces"),
    ],
)  # fmt: skip
def test_of_a_url_only_known_parts_are_shown(config: Path, kms: Kms, url: str, shown: str) -> None:
    """Some of these connect; of others, which do not, just then the settings are looked at, and passed on.

    The path of a receiver of spans, by HTTP, may be its credential.
    """
    section, name = ("traces", "endpoint") if url.startswith("http") else ("redis", "broker_url")
    said = kms("config show --changed", f'[kms.{section}]\n{name} = "{url}"\n')

    assert (said.code, said.out.splitlines()[-1]) == (0, f'{name} = "{shown}"  # {config}')


ADDRESSES = """
[kms.keys]
one = "age:///srv/a.txt?public=/srv/b.txt&native=false"
other = [
    "transit:orders?mount=m&share=5m",
    "awskms:arn:aws:kms:eu-1:111122223333:key/1?region=x&token=hunter2",
]
third = "age:file:///srv/keys/invoices"
"a.use" = "transit:orders?token=hunter2"
[kms.keys.root]
uri = "transit:root?token=hunter2"
use = "seal"
[kms.keys."b.c"]
uri = "age:/srv/keys/c"
use = "data"
[kms.transit]
address = "https://vault.invalid"
token = "hunter2"
[kms.cosmian]
server_url = "https://me:hunter2@cosmian.invalid"
[kms.jobs.endpoints.chat]
url = "https://hooks.invalid/services/hunter2?sig=hunter2"
secret_file = "/srv/secret"
[kms.tenants.a]
keys = ["ci@example.com"]
"""


def test_addresses_of_all_kinds_are_shown_without_credentials(
    kms: Kms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "me:hunter2@traces.invalid")

    code, out, _ = kms("config show --json", ADDRESSES)

    assert code == 0
    assert "hunter2" not in out
    shown = {record["setting"]: record["value"] for record in map(json.loads, out.splitlines())}
    assert shown["keys.one"] == "age:///srv/a.txt?public=/srv/b.txt&native=false"
    assert shown["keys.other"] == [
        "transit:orders?mount=m&share=5m",
        "awskms:arn:aws:kms:eu-1:111122223333:key/1?region=x&(hidden)",
    ]
    assert shown["keys.third"] == "age:file:///srv/keys/invoices"
    assert shown['keys."a.use"'] == "transit:orders?(hidden)"
    assert (shown["keys.root.uri"], shown["keys.root.use"]) == ("transit:root?(hidden)", "seal")
    assert (shown['keys."b.c".uri'], shown['keys."b.c".use']) == ("age:/srv/keys/c", "data")
    assert shown["cosmian.server_url"] == "https://(hidden)@cosmian.invalid"
    assert shown["jobs.endpoints.chat.url"] == "https://hooks.invalid/(hidden)?(hidden)"
    assert shown["tenants.a.keys"] == ["ci@example.com"]
    assert shown["traces.endpoint"] == "(hidden)"


NAMED = """
[kms.keys]
"pay.roll" = "age:/srv/payroll.txt"
[kms.tenants."acme.example"]
open_jobs = 7
[kms.jobs]
roots = ["/srv/nas.old"]
[kms.jobs.resource_leases]
"root:/srv/nas.old" = 2
[kms.jobs.buckets."a.b"]
read = ["in/"]
"""


def test_names_with_dots_are_shown_with_where_they_come_from(config: Path, kms: Kms) -> None:
    code, out, _ = kms("config show --changed", NAMED)

    assert code == 0
    assert tomllib.loads(out) == tomllib.loads(NAMED)
    assert out.count(f"  # {config}\n") == 5


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("redis.broker_url", 0, "amqps://broker.invalid//\n"),
        ("port", 0, "9001\n"),
        ("redis.broker", 2, 'no setting "redis.broker" is set, did you mean redis.broker_url?'),
        ("redis.url", 78, "redis.url has a credential, which is not printed: see {config}"),
    ],
)
def test_one_setting_is_its_value_and_nothing_else(
    config: Path, kms: Kms, name: str, code: int, told: str
) -> None:
    """In a script ``(hidden)`` would be taken for the password."""
    redis = 'url = "rediss://me:hunter2@redis.invalid/0"\nbroker_url = "amqps://broker.invalid//"\n'
    said = kms(f"config show {name}", f"[kms]\nport = 9001\n[kms.redis]\n{redis}")

    assert (said.code, said.out) == (code, "" if code else told)
    assert not code or told.format(config=config) in said.err
    assert "hunter2" not in said.err


def test_all_settings_are_shown_as_toml_and_as_json(config: Path, kms: Kms) -> None:
    code, out, _ = kms("config show", "[kms]\nport = 9001\n")
    shown = tomllib.loads(out)["kms"]
    as_json = kms("config show --json", "[kms]\nport = 9001\n")
    records = [json.loads(line) for line in as_json.out.splitlines()]

    assert (code, as_json.code) == (0, 0)
    assert (shown["port"], shown["jobs"]["attempts"], shown["server"]["docs"]) == (9001, 5, True)
    assert {"setting": "port", "value": 9001, "from": str(config)} in records
    assert {"setting": "jobs.lease_s", "value": shown["jobs"]["lease_s"], "from": "default"} in records


@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_a_file_to_begin_with_has_no_weak_setting(
    kms: Kms, environment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "init", "--environment", environment]) == 0
    found = kms("config lint", capsys.readouterr().out)

    assert found == (0, "", f"kms: no setting weakens security ({environment})\n")
