"""Checks of this machine as a user who may not see all of it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kms_cli.commands import doctor
from kms_core.settings.load import load

NOBODY = 65534


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A home that others may enter, and a user for whom modes of files count."""
    home = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", "/tmp")))
    home.chmod(0o777)
    before = os.geteuid()
    os.seteuid(before or NOBODY)
    try:
        yield home
    finally:
        os.seteuid(before)
        (home / "closed").chmod(0o700)
        shutil.rmtree(home)


def test_an_audit_log_below_a_directory_that_may_not_be_entered_ends_no_doctor(unprivileged: Path) -> None:
    closed = unprivileged / "closed"
    closed.mkdir(mode=0)
    (unprivileged / "kms.toml").write_text(f'[kms.audit]\npath = "{closed}/audit"\n')
    settings = load(unprivileged / "kms.toml", {"HOME": str(unprivileged)})

    with click.Context(click.Command("kms")):
        (told,) = [each for each in doctor.findings(settings) if each.subject == "audit log"]
    assert (told.level, told.text) == ("FAIL", f"{closed}/audit: Permission denied")


@pytest.mark.parametrize("key", ["state_dir", "jobs.spool_dir", "audit.signing_key_path"])
def test_a_check_that_may_not_see_its_files_keeps_no_other_from_being_made(
    unprivileged: Path, key: str
) -> None:
    """Such as those of the state directory of the service, for another user."""
    closed = unprivileged / "closed"
    closed.mkdir(mode=0)
    section, _, name = f"kms.{key}".rpartition(".")
    (unprivileged / "kms.toml").write_text(f'[{section}]\n{name} = "{closed}/x"\n')
    settings = load(unprivileged / "kms.toml", {"HOME": str(unprivileged)})

    with click.Context(click.Command("kms")):
        found = list(doctor.findings(settings))
    assert found[-1].subject == "redis"
    assert any(each.level == "FAIL" and "ermission denied" in each.text for each in found)
