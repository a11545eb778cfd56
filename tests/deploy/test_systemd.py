"""deploy/systemd, judged by systemd-analyze, and at one with the programs."""

import re
import tomllib
from pathlib import Path
from typing import Final

import pytest

from kms_core.backends.cosmian.settings import CosmianSection
from kms_core.settings.load import load as load_settings
from kms_core.settings.validation import check_exposure
from kms_protocol.errors import EXIT_CONFIGURATION
from kms_worker.watchdog import EXIT_IDLE
from support.artefacts import DEPLOY, ROOT, SYSTEMD, make_secrets, passes, run
from support.programs import program
from support.systemd_sandbox import directives

UNITS: Final = ("kms-api.service", "kms-worker.service")
EXPOSURE: Final = 15
"""Tenths: 1.5 of 10. The units have 0.9 or 1.0, as systemd's version counts."""


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_exposes_little(unit: str) -> None:
    passes(
        program("systemd-analyze"), "security", "--offline=true", f"--threshold={EXPOSURE}", SYSTEMD / unit
    )


@pytest.mark.parametrize("unit", [*UNITS, "kms.target"])
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    for path in SYSTEMD.glob("kms*.*"):  # programs are installed elsewhere; `true` is everywhere
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)

    judged = run(program("systemd-analyze"), "verify", "--man=no", tmp_path / unit)

    said = [line for line in judged.stderr.splitlines() if "kms" in line]
    assert (judged.returncode, said) == (0, []), judged.stderr


def test_units_differ_in_what_they_run_and_need_alone() -> None:
    api, worker = (directives(SYSTEMD / unit) for unit in UNITS)
    differ = {name for name in api.keys() | worker.keys() if api.get(name) != worker.get(name)}

    assert differ <= {"Description", "ExecStart", "TimeoutStopSec", "MemoryMax", "TasksMax", "Alias"}


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_runs_a_program_of_ours_and_keeps_secrets_out_of_the_environment(unit: str) -> None:
    found = directives(SYSTEMD / unit)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert found["User"] == ["kms-service"]
    assert Path(found["ExecStart"][0].split()[0]).name in scripts
    assert found["LoadCredential"] == ["kms:/etc/kms-service/credentials"]
    assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", " ".join(found["Environment"]))
    assert found["RestartPreventExitStatus"] == [str(EXIT_CONFIGURATION)]
    assert str(EXIT_IDLE) not in found["RestartPreventExitStatus"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_keeps_memory_off_the_disk(unit: str) -> None:
    found = directives(SYSTEMD / unit)

    assert (found["LimitCORE"], found["LimitMEMLOCK"], found["MemorySwapMax"]) == (["0"], ["infinity"], ["0"])


def test_the_seeds_name_of_the_unit_is_kept() -> None:
    assert directives(SYSTEMD / UNITS[0])["Alias"] == ["kms-service.service"]


def test_its_settings_name_credentials_that_are_made(tmp_path: Path) -> None:
    made = {path.name for path in make_secrets(tmp_path).iterdir()}
    text = (SYSTEMD / "kms.toml").read_text()

    loaded = load_settings(
        SYSTEMD / "kms.toml", {"CREDENTIALS_DIRECTORY": "/run/credentials/kms-worker.service"}
    )
    check_exposure(loaded)

    kms = loaded.kms
    for path in (kms.redis.password_file, kms.jobs.spool_identity_path, kms.jobs.intake_identity_path):
        assert path is not None
        assert path.parent == Path("/run/credentials/kms-worker.service")
        assert path.name.removeprefix("kms_") in made
    assert loaded.backend(CosmianSection).api_key_file == Path(
        "/run/credentials/kms-worker.service/kms_cosmian-api-key"
    )
    assert kms.environment == "prod"
    assert "api_key =" not in text


@pytest.mark.parametrize("name", ["sysusers", "tmpfiles"])
def test_users_and_directories_are_as_their_programs_read_them(name: str, tmp_path: Path) -> None:
    written = (SYSTEMD / f"kms-service.{name}.conf").read_text()
    (tmp_path / "etc").mkdir()
    if name == "tmpfiles":
        (tmp_path / "etc/passwd").write_text(
            "kms-service:x:998:998::/var/lib/kms-service:/usr/sbin/nologin\n"
        )
        (tmp_path / "etc/group").write_text("kms-service:x:998:\n")
    path = tmp_path / "kms-service.conf"
    path.write_text(written)

    argv = (program(f"systemd-{name}"), f"--root={tmp_path}", *(["--create"] if name == "tmpfiles" else []))
    passes(*argv, path)

    if name == "sysusers":
        assert (tmp_path / "etc/passwd").read_text().startswith("kms-service:x:")
    else:
        assert (tmp_path / "etc/kms-service/credentials").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "var/lib/kms-service").stat().st_mode & 0o777 == 0o700


def test_documents_name_every_file_that_is_installed() -> None:
    document = (DEPLOY / "README.md").read_text()

    assert [path.name for path in sorted(SYSTEMD.iterdir()) if path.name not in document] == []
