"""``kms migrate sops`` with the real sops program, and what others can do with the files afterwards."""

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from kms_cli.commands.migrate_sops import blocks_of
from kms_core.age import armor, x25519
from support.cli.fixtures import RunningService, environment
from support.cli.migrate import Ran, Workspace, report
from support.openbao import ROOT_TOKEN, bao
from support.programs import venv_program
from support.waiting import RealTime

SECRET: Final = "hunter2"
STRANGER: Final = str(x25519.X25519Identity.generate().recipient)
FORMATS: Final = {
    "a.yaml": f"db:\n  password: {SECRET}\n  hosts: [a, b]\n",
    "a.json": json.dumps({"password": SECRET, "nested": {"n": 1}}),
    "a.env": f"PASSWORD={SECRET}\nOTHER=x\n",
    "a.ini": f"[db]\npassword = {SECRET}\n",
    "a.bin": f"{SECRET}\0bytes",
}


@pytest.fixture
def workspace(tmp_path: Path, real_service: RunningService) -> Workspace:
    old = x25519.X25519Identity.generate()
    (tmp_path / "old.txt").write_text(old.export() + "\n")
    (tmp_path / "old.txt").chmod(0o600)
    (tmp_path / "old.pub").write_text(str(old.recipient))
    return Workspace(tmp_path, real_service)


def sops(workspace: Workspace, *words: str, **env: str) -> bytes:
    done = subprocess.run(
        [venv_program("sops"), *words],
        cwd=workspace.folder,
        env=environment(workspace.folder, **env),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    return done.stdout


def sealed(workspace: Workspace, name: str, *recipients: str, **env: str) -> bytes:
    """A SOPS file of the old owner's; its plaintext as sops shows it."""
    (workspace.folder / name).write_text(FORMATS[name])
    to = recipients or ("--age", (workspace.folder / "old.pub").read_text())
    (workspace.folder / name).write_bytes(sops(workspace, "encrypt", *to, name, **env))
    return sops(workspace, "decrypt", name, **old(workspace), **env)


def old(workspace: Workspace) -> dict[str, str]:
    """The environment in which files open now."""
    return {"SOPS_AGE_KEY_FILE": str(workspace.folder / "old.txt")}


def service(workspace: Workspace) -> dict[str, str]:
    """The environment of whoever has the service's identity and nothing else."""
    return {"SOPS_AGE_KEY_FILE": str(workspace.place.state_dir / "age/private_key.txt")}


def public_key(workspace: Workspace) -> str:
    return str(workspace.place.state_dir / "age/public_key.txt")


def migrated(workspace: Workspace, *words: str, **env: str) -> Ran:
    return workspace.kms(
        "migrate", "sops", "--json", "-R", public_key(workspace), *words, env={**old(workspace), **env}
    )


@pytest.mark.parametrize("name", FORMATS)
def test_the_key_of_the_service_alone_opens_a_migrated_file(workspace: Workspace, name: str) -> None:
    before = sealed(workspace, name)
    (workspace.folder / name).chmod(0o640)

    done = migrated(workspace, name)

    assert (done.returncode, done.stderr) == (0, b"")
    assert report(done) == {"lines": 1, "moved": 1, "already_there": 0, "failed": 0}
    assert sops(workspace, "decrypt", name, **service(workspace)) == before
    assert sops(workspace, "decrypt", name, **old(workspace)) == before
    assert (workspace.folder / name).stat().st_mode & 0o777 == 0o640
    assert {path.name for path in workspace.folder.iterdir()} == {name, "old.txt", "old.pub"}


def test_a_file_of_vault_transit_comes_over_too(workspace: Workspace) -> None:
    key = f"{bao().url}/v1/transit/keys/{bao().new_key()}"
    before = sealed(workspace, "a.yaml", "--hc-vault-transit", key, VAULT_TOKEN=ROOT_TOKEN)

    done = migrated(workspace, "a.yaml", VAULT_TOKEN=ROOT_TOKEN)

    assert done.returncode == 0, done.stderr
    assert sops(workspace, "decrypt", "a.yaml", **service(workspace)) == before


def test_a_second_run_leaves_migrated_files_alone(workspace: Workspace) -> None:
    for name in ("a.yaml", "a.json"):
        sealed(workspace, name)
    first = migrated(workspace, "a.yaml")
    after = (workspace.folder / "a.yaml").read_bytes()
    second = migrated(workspace, "a.yaml", "a.json")

    assert report(first)["moved"] == 1
    assert report(second) == {"lines": 2, "moved": 1, "already_there": 1, "failed": 0}
    assert (workspace.folder / "a.yaml").read_bytes() == after


def test_a_file_that_does_not_open_is_told_and_stops_nothing(workspace: Workspace) -> None:
    (workspace.folder / "plain.yaml").write_text("a: b\n")
    for name, recipient in (("a.yaml", STRANGER), ("a.json", (workspace.folder / "old.pub").read_text())):
        (workspace.folder / name).write_text(FORMATS[name])
        (workspace.folder / name).write_bytes(sops(workspace, "encrypt", "--age", recipient, name))
    untouched = (workspace.folder / "a.yaml").read_bytes()

    done = migrated(workspace, "a.yaml", "plain.yaml", "a.json")

    assert done.returncode == 65
    assert report(done) == {"lines": 3, "moved": 1, "already_there": 0, "failed": 2}
    assert b"a.yaml: sops_failed" in done.stderr
    assert b"plain.yaml: sops_failed" in done.stderr
    assert (workspace.folder / "a.yaml").read_bytes() == untouched


@pytest.mark.parametrize(
    ("words", "env", "code", "told"),
    [
        (["-r", STRANGER], {}, 65, "is this the recipient of its key"),
        (["--url", "http://127.0.0.1:9"], {}, 69, "service_unreachable"),
        ([], {"PATH": "/nowhere"}, 78, "install it"),
    ],
    ids=["a recipient that the service does not hold", "no service", "no sops"],
)
def test_what_cannot_be_migrated_stays_as_it_is(
    workspace: Workspace, words: list[str], env: dict[str, str], code: int, told: str
) -> None:
    sealed(workspace, "a.yaml")
    before = (workspace.folder / "a.yaml").read_bytes()
    to = [] if "-r" in words else ["-R", public_key(workspace)]

    done = workspace.kms("migrate", "sops", "--json", *to, *words, "a.yaml", env={**old(workspace), **env})

    assert done.returncode == code
    assert told in done.stderr.decode()
    assert (workspace.folder / "a.yaml").read_bytes() == before


def test_a_rehearsal_changes_nothing(workspace: Workspace) -> None:
    sealed(workspace, "a.yaml")
    before = (workspace.folder / "a.yaml").read_bytes()

    done = migrated(workspace, "--dry-run", "a.yaml")

    assert report(done) == {"lines": 1, "would_move": 1, "already_there": 0, "failed": 0}
    assert (workspace.folder / "a.yaml").read_bytes() == before


def test_beginnings_without_an_end_take_no_long_look() -> None:
    """A quadratic one would take a minute for the last of these."""
    seconds: list[float] = []
    for count in (300, 3_000, 30_000):
        begun = RealTime.processor_s()
        assert list(blocks_of(armor.BEGIN * count)) == []
        seconds.append(RealTime.processor_s() - begun)
        assert seconds[-1] <= max(seconds[0], 2e-3) * count / 300 * 3, seconds
