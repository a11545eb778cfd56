"""docker-compose.yml: read by Compose itself, hardened, and its secrets are made by deploy/make-secrets."""

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from kms_core.settings.load import load as load_settings
from kms_core.settings.validation import check_exposure
from kms_worker.app import CONFIGURATION
from support import artefacts
from support.artefacts import DEPLOY, ROOT, make_secrets, seconds
from support.ports import free_port, listens
from support.programs import program, running

PROFILES: Final = ("openbao", "cosmian")
SERVICES: Final = ("api", "worker", "valkey", "prometheus", "alertmanager", "grafana", *PROFILES)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The file with every profile."""
    return artefacts.composed(*PROFILES)


def test_there_are_these_services_and_the_key_servers_only_when_asked_for(composed: dict[str, Any]) -> None:
    assert composed["services"].keys() == set(SERVICES)
    asked = {name for name, service in composed["services"].items() if service.get("profiles")}
    assert asked == set(PROFILES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_must(composed: dict[str, Any], name: str) -> None:
    service = composed["services"][name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period", "restart"} <= service.keys()
    assert re.fullmatch(r"\S+:v?\d[\w.-]*(@sha256:[0-9a-f]{64})?", service["image"]), "a version, not latest"
    assert re.match(r"(docker|ghcr)\.io/|provisioning/kms-service:", service["image"]), "and whose it is"
    assert all("docker.sock" not in volume["source"] for volume in service.get("volumes", ()))


@pytest.mark.parametrize(
    "name", sorted(set(SERVICES) - {"cosmian"})
)  # no program to ask with is in its image
def test_a_service_is_asked_whether_it_lives(composed: dict[str, Any], name: str) -> None:
    image_has_one = name == "api"

    assert image_has_one or composed["services"][name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_published_is_for_this_host_alone(composed: dict[str, Any], name: str) -> None:
    assert {port["host_ip"] for port in composed["services"][name].get("ports", ())} <= {"127.0.0.1"}


def test_the_queue_is_reached_by_the_service_alone_and_grafana_does_not_reach_the_service(
    composed: dict[str, Any],
) -> None:
    on = {
        network: {name for name, service in composed["services"].items() if network in service["networks"]}
        for network in composed["networks"]
    }

    assert on["queue"] == {"api", "worker", "valkey"}
    assert composed["networks"]["queue"]["internal"] is True
    assert not any({"grafana", "api"} <= members for members in on.values())


@pytest.mark.parametrize("name", ["api", "worker"])
def test_memory_stays_off_the_disk(composed: dict[str, Any], name: str) -> None:
    service = composed["services"][name]

    text = (ROOT / "docker-compose.yml").read_text()

    assert service["ulimits"]["memlock"] == -1
    assert "ulimits: {core: 0, memlock: -1}" in text  # Compose writes a zero as nothing
    assert service["memswap_limit"] == service["mem_limit"]


def test_no_secret_stands_in_a_variable(composed: dict[str, Any]) -> None:
    for service in composed["services"].values():
        for name in service.get("environment") or {}:
            assert not re.search(r"PASSWORD|TOKEN|SECRET|API_KEY", name) or name.endswith("_FILE")


def test_every_secret_is_made(composed: dict[str, Any], tmp_path: Path) -> None:
    made = {path.name for path in make_secrets(tmp_path).iterdir()}

    assert {Path(secret["file"]).name for secret in composed["secrets"].values()} == made


def test_secrets_are_private_and_made_once(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in make_secrets(tmp_path / "s").iterdir()}
    make_secrets(tmp_path / "s")

    assert before == {path: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert {path.name for path in before if path.stat().st_mode & 0o077} == {
        "age_public_key.txt",
        "users.acl",
    }
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_the_redis_of_the_distribution_takes_the_list_as_the_page_says(tmp_path: Path) -> None:
    """That of Debian 12 is older than two of its rights, and does not start with a list that has them."""
    secrets, port = make_secrets(tmp_path), free_port()
    command = re.search(r"`(sed -i [^`]+ users\.acl)`", (DEPLOY / "README.md").read_text())
    assert command
    subprocess.run(["sh", "-c", command[1]], cwd=secrets, check=True)
    words = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(tmp_path), "--save", ""]
    argv = [program("redis-server"), *words, "--aclfile", str(secrets / "users.acl")]
    password = (secrets / "redis_password").read_text()
    with (
        running(argv, tmp_path / "log", lambda: listens(port)),
        redis.Redis(port=port, username="kms", password=password) as kms,
    ):
        assert kms.set("kms:a", "1")


def test_a_service_is_given_the_time_that_it_takes_to_stop(composed: dict[str, Any]) -> None:
    services = composed["services"]

    assert seconds(services["api"]["stop_grace_period"]) > 20  # what the API gives requests
    assert seconds(services["worker"]["stop_grace_period"]) > 2 * int(
        str(CONFIGURATION["worker_soft_shutdown_timeout"])
    )


def test_its_settings_are_ones_that_the_service_takes_but_for_the_files() -> None:
    loaded = load_settings(DEPLOY / "compose/kms.toml", {"KMS_STATE_DIR": "/var/lib/kms-service"})

    check_exposure(loaded)
    assert loaded.kms.redis.url == "redis://kms@valkey:6379/0"
