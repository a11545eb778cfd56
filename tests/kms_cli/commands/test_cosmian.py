"""``kms cosmian init-key``, and how API and worker start with keys on a Cosmian KMS server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kms_core.age.x25519 import X25519Identity
from support.age_kms import write_identities
from support.audit_logs import AuditFolder
from support.contract.cosmian_double import CosmianDouble
from support.contract.faults import unused_url
from support.service import Service

SETTINGS: Final = """dev_backend = "cosmian"
[kms.cosmian]
server_url = "{url}"
default_key_id = "master"
[kms.keys]
{keys}
"""


@pytest.fixture
def double() -> Iterator[CosmianDouble]:
    with CosmianDouble() as made:
        yield made


def installed(folder: Path, url: str, keys: str = 'payroll = "cosmian:pay"') -> Service:
    return Service(folder, SETTINGS.format(url=url, keys=keys), "unix:///nonexistent/valkey.sock")


def run(install: Service, *words: str) -> tuple[int, str, str]:
    """Exit code, results, words."""
    done = install.run_kms(*words)
    return done.returncode, done.stdout, done.stderr


def test_keys_are_made_once(double: CosmianDouble, tmp_path: Path) -> None:
    install, where = installed(tmp_path, double.url), f"Cosmian KMS at {double.url.removeprefix('http://')}"
    made = f"created master, version 1, on {where}\ncreated pay, version 1, on {where}\n"
    there = f"master exists, version 1, on {where}\npay exists, version 1, on {where}\n"

    assert run(install, "cosmian", "init-key") == (0, made, "")
    assert run(install, "cosmian", "init-key") == (0, there, "")
    code, said, _ = run(install, "--json", "cosmian", "init-key")
    assert (code, json.loads(said.splitlines()[0])) == (0, {"name": "master", "version": "1", "made": False})
    lines = AuditFolder(install.state).operations()[-12:]  # after those of the install's own keys
    recorded = [(line["effect"].rpartition("-")[0], line["stage"]) for line in lines]
    each = [(name, stage) for name in ("master", "pay") for stage in ("intent", "outcome")]
    assert sorted(recorded) == sorted(each * 3)


def test_a_key_that_only_opens_old_files_is_not_made(double: CosmianDouble, tmp_path: Path) -> None:
    write_identities(tmp_path / "age.txt", X25519Identity.generate())
    keys = f'moved = ["age://{tmp_path}/age.txt", "cosmian:before?seal=false"]'

    code, said, _ = run(installed(tmp_path, double.url, keys), "cosmian", "init-key")
    assert (code, len(said.splitlines())) == (0, 1)
    assert "master" in said


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    code, _, words = run(installed(tmp_path, unused_url()), "cosmian", "init-key")

    assert code == 69
    assert "no connection to Cosmian KMS" in words
    *_, intent, outcome = AuditFolder(tmp_path / "state").operations()
    assert (intent["operation"], outcome["result"]) == ("key.create", "backend_unavailable")


@pytest.mark.parametrize(("name", "program"), [("api", "kms-service"), ("worker", "kms-worker")])
def test_nothing_starts_without_its_key_and_the_error_says_how_to_make_it(
    double: CosmianDouble, tmp_path: Path, name: str, program: str
) -> None:
    words = installed(tmp_path, double.url).refusal(name)

    assert words.splitlines()[-1].startswith(f"{program}: error: The key pay on Cosmian KMS at ")
    assert words.endswith("is not there: make it with `kms cosmian init-key`\n")


def test_a_server_that_is_away_degrades_and_does_not_stop_a_start(
    double: CosmianDouble, tmp_path: Path
) -> None:
    with installed(tmp_path, double.url) as service:
        run(service, "cosmian", "init-key")
        double.stop()
        health = service.start("api").get("/health")

    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
