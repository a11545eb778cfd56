"""A backup of version 1: read by pyrage and tarfile, and restored by the command of the tree."""

import hashlib
import io
import json
import stat
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest

from support.cli.offline import Workspace, workspace
from support.golden import backup_source, golden_set, install

EXPECTED: Final = {
    **{place: (golden_set.V1 / name).read_bytes() for name, place in install.FILES.items()},
    "age/public_key.txt": b"age1uk4hxtu7739xddalpk0lzujmh8gcjtrqudn8ca9cw0lrymrld57s9qqr5r\n",
    "kms.toml": backup_source.SETTINGS,
    "spool/hosts/install": backup_source.INSTALL_ID,
    f"{backup_source.JOB}/input": backup_source.INPUT,
}
FIELDS: Final = {"version", "service", "made_at", "host", "install_id", "state_dir", "files", "left_out"}


def members(backup: bytes) -> dict[str, bytes]:
    """The members of a backup in their order, by other programs' code."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(golden_set.opened_by_pyrage(backup))) as opened:
        for member in opened:
            content = opened.extractfile(member)
            assert content
            assert (member.type, member.mode) == (tarfile.REGTYPE, 0o600)
            found[member.name] = content.read()
    return found


def manifest_of(found: dict[str, bytes]) -> dict[str, Any]:
    """The manifest, if it is last and says of each other member what is in it."""
    *names, last = found
    assert last == "kms-backup.json"
    said: dict[str, Any] = json.loads(found[last])
    files = {file["name"]: (file["size"], file["sha256"]) for file in said["files"]}
    assert files == {name: (len(found[name]), hashlib.sha256(found[name]).hexdigest()) for name in names}
    return said


def test_backup_is_of_version_1() -> None:
    found = members(backup_source.PATH.read_bytes())
    said = manifest_of(found)

    assert {name: found[name] for name in found if name != "kms-backup.json"} == EXPECTED
    assert [file["name"] for file in said.pop("files") if "origin" in file] == ["kms.toml"]
    assert said == {
        "version": 1,
        "service": "0.2.0",
        "made_at": "2026-11-28T12:30:00Z",
        "host": "alpha.example",
        "install_id": "0f8e6a2c-5a4b-4a57-9e55-2b1c4d5e6f70",
        "state_dir": "/var/lib/kms-service",
        "left_out": ["Redis, which is not the embedded Valkey"],
    }


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace with the identities of the backup in ``golden.txt``, readable by their owner alone."""
    made = workspace(tmp_path)
    (tmp_path / "golden.txt").touch(0o600)
    made.write("golden.txt", backup_source.IDENTITIES.read_bytes())
    return made


def test_backup_is_restored(place: Workspace) -> None:
    place.stdout_of("restore", str(backup_source.PATH), "-i", "golden.txt", "--to", "new")
    new = place.folder / "new"
    restored = {str(path.relative_to(new)): path for path in new.rglob("*") if path.is_file()}

    assert {name: restored[name].read_bytes() for name in EXPECTED} == EXPECTED
    assert {stat.S_IMODE(restored[name].stat().st_mode) for name in EXPECTED} == {0o600}


def test_new_backup_is_of_this_format(place: Workspace) -> None:
    backup_source.put_install(place.folder / "state")
    words = ("backup", "-r", golden_set.recipients("age-x25519")[0], "-o", "new.age")
    place.stdout_of(*words, KMS_STATE_DIR=place.path("state"))
    found = members(place.read("new.age"))
    said = manifest_of(found)

    assert said["version"] == 1
    assert said.keys() == FIELDS
    assert EXPECTED.keys() - found.keys() <= {"kms.toml"}
