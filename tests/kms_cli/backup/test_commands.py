"""``kms backup`` and ``kms restore`` as an operator runs them, without a service."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kms_cli.local import directories
from kms_cli.local.up import make_dev_keys
from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import AuditLog
from kms_core.settings import files, load
from kms_core.settings.model import AuditSection
from support.audit_logs import AuditFolder
from support.cli.at_terminal import at_terminal
from support.cli.fixtures import environment
from support.cli.offline import Done, Workspace, workspace
from support.programs import program
from support.small_disk import small_disk


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace with an install in ``state`` and a file of 3 MB in its spool."""
    made = workspace(tmp_path)
    make_dev_keys(load.load(None, {"KMS_STATE_DIR": str(tmp_path / "state"), "HOME": str(tmp_path)}))
    (tmp_path / "state/spool/job").mkdir(parents=True)
    made.write("state/spool/job/input", os.urandom(3_000_000))
    return made


def backup(place: Workspace, *more: str) -> Done:
    words = ("backup", "-r", place.recipient, "-o", place.path("b.age"), *more)
    return place.kms(*words, KMS_STATE_DIR=place.path("state"))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the plain files below a folder, except for what ``kms backup`` adds to the audit log."""
    found = ((path, str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_file())
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in found
        if not name.startswith(("audit/", "kms-backup.json", ".", "audit."))
    }


def test_stock_age_and_tar_open_a_backup(place: Workspace) -> None:
    assert backup(place).returncode == 0
    opened = place.folder / "opened"
    opened.mkdir()
    key, file = str(place.key), place.path("b.age")
    decrypted = subprocess.run([program("age"), "-d", "-i", key, file], capture_output=True, check=True)
    subprocess.run([program("tar"), "-x", "-C", str(opened)], input=decrypted.stdout, check=True)

    assert digests(opened) == digests(place.folder / "state")
    assert place.kms("restore", "b.age", "-i", "key.txt", "--to", "new").returncode == 0
    assert digests(place.folder / "new") == digests(opened)


def test_a_backup_by_stdout_is_the_same_and_both_say_what_is_not_included(place: Workspace) -> None:
    made = place.kms("backup", "-r", place.recipient, "-o", "-", KMS_STATE_DIR=place.path("state"))
    place.write("b.age", made.stdout)
    checked = place.kms("restore", "b.age", "-i", "key.txt", "--check", "--json")

    assert (made.returncode, checked.returncode) == (0, 0)
    assert b"not included: Redis, which is not the embedded Valkey" in made.stderr
    assert b'"left_out": ["Redis, which is not the embedded Valkey' in checked.stdout


def test_a_backup_and_its_check_show_how_far_they_are(place: Workspace) -> None:
    env = environment(place.folder, KMS_STATE_DIR=place.path("state"))
    words = f"kms backup -r {place.recipient} -o b.age && kms restore b.age -i key.txt --check"
    code, shown = at_terminal(words, place.folder, env, columns=40)

    assert code == 0, shown
    drawn = re.findall(r"\r\x1b\[K([a-z][^\r]*)", shown)
    assert {"backing", "verifying"} <= {text.split()[0] for text in drawn}
    assert all(len(text) < 40 for text in drawn if not text.startswith("kms: "))


def test_a_file_is_not_overwritten_unasked(place: Workspace) -> None:
    place.write("b.age", b"mine")

    assert backup(place).returncode == 73
    assert place.read("b.age") == b"mine"
    assert backup(place, "--force").returncode == 0
    assert (place.folder / "b.age").stat().st_mode & 0o777 == 0o600


def test_a_backup_needs_a_recipient_and_a_place_elsewhere_and_a_restore_a_target(place: Workspace) -> None:
    without = place.kms("backup", "-o", "b.age", KMS_STATE_DIR=place.path("state"))
    within = backup(place, "-o", place.path("state/b.age"))
    assert not place.has("b.age")
    assert not place.has("state/b.age")
    assert backup(place).returncode == 0
    nowhere = place.kms("restore", "b.age", "-i", "key.txt")

    assert (without.returncode, within.returncode, nowhere.returncode) == (2, 2, 2)
    assert b"-r age1" in without.stderr
    assert b"--to DIR" in nowhere.stderr


def test_a_backup_that_fails_leaves_no_file_and_its_outcome_on_record(place: Workspace) -> None:
    with small_disk(place.folder / "disk", 1_000_000):
        done = backup(place, "-o", place.path("disk/b.age"))

        assert done.returncode != 0
        assert list((place.folder / "disk").iterdir()) == []
    lines = AuditFolder(place.folder / "state").operations()
    found = [(line["operation"], line["stage"], line.get("result")) for line in lines]
    assert found == [("backup.create", "intent", None), ("backup.create", "outcome", "internal")]


def test_a_restore_to_a_full_disk_leaves_nothing(place: Workspace) -> None:
    assert backup(place).returncode == 0
    with small_disk(place.folder / "disk", 1_000_000) as disk:
        for target in (disk, disk / "below"):
            done = place.kms("restore", "b.age", "-i", "key.txt", "--to", str(target))

            assert done.returncode == 1
            assert b"no space left" in done.stderr
            assert list(disk.iterdir()) == []


def test_a_mount_point_is_filled_and_never_replaced(place: Workspace) -> None:
    assert backup(place).returncode == 0
    with small_disk(place.folder / "disk", 20_000_000) as disk:
        (disk / "lost+found").mkdir()
        assert place.kms("restore", "b.age", "-i", "key.txt", "--to", str(disk)).returncode == 0
        assert digests(disk) == digests(place.folder / "state")

        assert place.kms("restore", "b.age", "-i", "key.txt", "--to", str(disk), "--force").returncode == 73


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
def test_root_restores_for_the_owner_of_the_folder(place: Workspace) -> None:
    assert backup(place).returncode == 0
    (place.folder / "new").mkdir()
    os.chown(place.folder / "new", 4711, 4712)

    assert place.kms("restore", "b.age", "-i", "key.txt", "--to", "new").returncode == 0
    found = [place.folder / "new", *(place.folder / "new").rglob("*")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in found} == {(4711, 4712)}


# -- over what is there ------------------------------------------------------------------------------------


@contextmanager
def writing_log(audit: AuditSection) -> Iterator[None]:
    """A process of a service that has begun its chain, and serves no call."""
    keys = Concealer.at(audit.key_path), Signer.at(audit.signing_key_path)
    log = AuditLog(audit, "api", *keys)
    log.begin()
    yield
    log.close()


@contextmanager
def serving(place: Workspace, how: str) -> Iterator[None]:
    """What a service that runs with the state directory ``state`` holds in this process."""
    state = place.folder / "state"
    if how == "kms up":
        (state / "run").mkdir()
        with directories.locked(state / "run/lock", ""):
            yield
        return
    if how == "log elsewhere":
        log = f'[kms]\nstate_dir = "{state}"\n[kms.audit]\npath = "{place.path("elsewhere")}"\n'
        place.write("kms.toml", log.encode())
        files.write_note(Path(place.path("kms.toml")), {"KMS_STATE_DIR": str(state)})
    file = Path(place.path("kms.toml")) if how == "log elsewhere" else None
    settings = load.load(file, {"KMS_STATE_DIR": str(state), "HOME": str(place.folder)})
    with writing_log(settings.kms.audit):
        yield


@pytest.mark.parametrize("how", ["kms up", "log", "log elsewhere"])
def test_the_state_of_a_service_that_runs_is_not_replaced(place: Workspace, how: str) -> None:
    assert backup(place).returncode == 0
    words = ("restore", "b.age", "-i", "key.txt", "--to", "state", "--force")
    with serving(place, how):
        names, before = place.names(), digests(place.folder / "state")
        done = place.kms(*words)

        assert (done.returncode, done.stdout) == (73, b"")
        assert f"(process {os.getpid()})".encode() in done.stderr
        assert b": stop it" in done.stderr
        assert (place.names(), digests(place.folder / "state")) == (names, before)

    assert place.kms(*words).returncode == 0


def test_a_cut_archive_replaces_nothing(place: Workspace) -> None:
    assert backup(place).returncode == 0
    whole, before = place.read("b.age"), digests(place.folder / "state")
    names = place.names()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        place.write("b.age", whole[:size])
        done = place.kms("restore", "b.age", "-i", "key.txt", "--to", "state", "--force")

        assert (done.returncode, b"kms: error: " in done.stderr) == (65, True), done.stderr
        assert (place.names(), digests(place.folder / "state")) == (names, before)


def test_the_state_of_another_install_is_kept_and_named(place: Workspace) -> None:
    assert backup(place).returncode == 0
    (place.folder / "other/spool/hosts").mkdir(parents=True)
    place.write("other/spool/hosts/install", b"4711")

    done = place.kms("restore", "b.age", "-i", "key.txt", "--to", "other", "--force")

    (kept,) = place.folder.glob("other.replaced-*")
    assert (done.returncode, (kept / "spool/hosts/install").read_bytes()) == (0, b"4711")
    assert f"kept what was there as {kept}, of another install (4711)".encode() in done.stderr
    assert digests(place.folder / "other") == digests(place.folder / "state")


def at(place: Workspace, folder: str, *words: str, code: int = 0) -> bytes:
    """What a command says that reads ``kms.toml`` and the state directory ``folder``."""
    variables = {"KMS_CONFIG": place.path("kms.toml"), "KMS_STATE_DIR": place.path(folder)}
    done = place.kms(*words, given=b"", **variables)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_token_that_was_revoked_since_comes_back_and_is_told(place: Workspace) -> None:
    """Nothing but the file knows of a revocation, so the operator has to."""
    place.write("kms.toml", b"[kms]\n")
    at(place, "state", "token", "create", "--name", "ci", "--scope", "encrypt", "-o", place.path("ci"))
    assert backup(place).returncode == 0
    token = json.loads(at(place, "state", "token", "list", "--json").splitlines()[0])["id"].encode()
    at(place, "state", "token", "revoke", token.decode())
    assert token not in at(place, "state", "token", "list")

    done = place.kms("restore", "b.age", "-i", "key.txt", "--to", "new")

    assert token in at(place, "new", "token", "list")
    assert b"Tokens that were revoked since are valid again" in done.stderr


def test_a_restored_audit_log_is_older_than_its_anchors(place: Workspace) -> None:
    """What was recorded since the backup is missing, and anchors elsewhere tell so."""
    anchors = f'anchor_redis = false\nanchor_dir = "{place.path("anchors")}"\n'
    place.write("kms.toml", f"[kms]\n[kms.audit]\n{anchors}".encode())
    at(place, "state", "backup", "-r", place.recipient, "-o", place.path("b.age"))
    at(place, "state", "audit", "verify")

    assert place.kms("restore", "b.age", "-i", "key.txt", "--to", "new").returncode == 0

    assert (place.folder / "new/kms.toml").read_text().endswith(anchors)
    assert b"damaged" in at(place, "new", "audit", "verify", code=65)
