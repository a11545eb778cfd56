"""SOPS as its users run it, with the façade for its Vault: every flow, every format."""

import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from support.programs import program
from support.vault_api import Facade, run

SECRET: Final = "hunter2"
FORMATS: Final = {
    "a.yaml": f"db:\n    password: {SECRET}\n    hosts:\n        - a\n        - b\n",
    "a.json": json.dumps({"password": SECRET, "nested": {"n": 1}}, indent="\t") + "\n",
    "a.env": f"PASSWORD={SECRET}\nOTHER=x\n",
    "a.ini": f"[db]\npassword = {SECRET}\n",
    "a.bin": f"{SECRET}\0bytes",
}
YAML: Final = FORMATS["a.yaml"]
UNCHANGED: Final = 200  # what sops says when an editor changed nothing


class Workspace:
    """A folder, a user, and the ``sops`` program."""

    def __init__(self, facade: Facade, folder: Path) -> None:
        packaged = Path(sys.executable).parent / "sops"
        self._program = str(packaged) if packaged.is_file() else program("sops")
        self.facade = facade
        self.folder = folder
        self.default, self.remote = (f"{facade.url}/v1/transit/keys/{key}" for key in ("default", "remote"))
        self.identity = x25519.X25519Identity.generate()
        (folder / "age.txt").write_text(self.identity.export() + "\n")

    def sops(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        done = self.tried(*words, **environ)
        assert done.returncode == 0, done.stderr
        return done

    def tried(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """As ``sops``, whatever its end."""
        own = {"VAULT_TOKEN": self.facade.root, "HOME": str(self.folder)}
        return run([self._program, *words], own | environ, self.folder, check=False)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def sealed(self, name: str, *to: str) -> Path:
        """A file of this format, encrypted in place, by default to the key ``default``."""
        path = self.write(name, FORMATS[name])
        self.sops("encrypt", "-i", *(to or ("--hc-vault-transit", self.default)), name)
        return path

    def opened(self, name: str, **environ: str) -> str:
        return self.sops("decrypt", name, **environ).stdout

    def editor(self, script: str) -> dict[str, str]:
        """An EDITOR that runs a line of shell on the file."""
        path = self.write("editor.sh", f'#!/bin/sh\nset -e\n{script} "$1"\n')
        path.chmod(stat.S_IRWXU)
        return {"EDITOR": str(path)}

    def wrapped(self, name: str) -> list[str]:
        """The data keys in a file as the façade sealed them."""
        return re.findall(r"vault:v\d+:[A-Za-z0-9+/=]+", (self.folder / name).read_text())


@pytest.fixture
def workspace(facade: Facade, tmp_path: Path) -> Workspace:
    return Workspace(facade, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_every_format_is_sealed_and_opens(workspace: Workspace, name: str) -> None:
    path = workspace.sealed(name)

    assert SECRET not in path.read_text()
    assert len(workspace.wrapped(name)) == 1
    assert workspace.opened(name) == FORMATS[name]


def test_both_keys_seal_and_either_opens(workspace: Workspace) -> None:
    path = workspace.sealed("a.yaml", "--hc-vault-transit", f"{workspace.default},{workspace.remote}")
    assert len(workspace.wrapped("a.yaml")) == 2

    path.write_text(path.read_text().replace("key_name: default", "key_name: nope"))
    assert workspace.opened("a.yaml") == YAML


def test_an_editor_changes_a_file_in_place(workspace: Workspace) -> None:
    workspace.sealed("a.yaml")

    workspace.sops("edit", "a.yaml", **workspace.editor(f"sed -i s/{SECRET}/swordfish/"))
    unchanged = workspace.tried("edit", "a.yaml", **workspace.editor("true"))

    assert workspace.opened("a.yaml") == YAML.replace(SECRET, "swordfish")
    assert unchanged.returncode == UNCHANGED


def test_an_editor_makes_a_new_file(workspace: Workspace) -> None:
    new = workspace.editor(f"echo 'password: {SECRET}' >")
    workspace.sops("edit", "--hc-vault-transit", workspace.default, "new.yaml", **new)

    assert workspace.opened("new.yaml") == f"password: {SECRET}\n"


def test_values_are_set_taken_out_and_read_by_path(workspace: Workspace) -> None:
    path = workspace.sealed("a.yaml")

    workspace.sops("set", "a.yaml", '["db"]["port"]', "5432")
    workspace.sops("unset", "a.yaml", '["db"]["hosts"]')

    assert "5432" not in path.read_text()
    assert workspace.opened("a.yaml") == f"db:\n    password: {SECRET}\n    port: 5432\n"
    assert workspace.sops("decrypt", "--extract", '["db"]["password"]', "a.yaml").stdout == SECRET


def test_rotate_makes_a_new_data_key_under_the_newest_version(workspace: Workspace, facade: Facade) -> None:
    workspace.sealed("a.yaml")
    (before,) = workspace.wrapped("a.yaml")
    latest = facade.data("PUT", "transit/keys/default/rotate")["latest_version"]
    assert workspace.opened("a.yaml") == YAML

    workspace.sops("rotate", "-i", "a.yaml")

    (after,) = workspace.wrapped("a.yaml")
    assert after.startswith(f"vault:v{latest}:")
    assert not before.startswith(f"vault:v{latest}:")
    assert workspace.opened("a.yaml") == YAML


def test_rotate_adds_and_removes_keys(workspace: Workspace) -> None:
    path = workspace.sealed("a.yaml")

    workspace.sops("rotate", "-i", "--add-hc-vault-transit", workspace.remote, "a.yaml")
    assert len(workspace.wrapped("a.yaml")) == 2
    workspace.sops("rotate", "-i", "--rm-hc-vault-transit", workspace.default, "a.yaml")

    assert len(workspace.wrapped("a.yaml")) == 1
    assert "key_name: remote" in path.read_text()
    assert workspace.opened("a.yaml") == YAML


def test_creation_rules_name_the_keys_and_updatekeys_follows_them(workspace: Workspace) -> None:
    rule = "creation_rules:\n  - path_regex: \\.yaml$\n    hc_vault_transit_uri: "
    workspace.write(".sops.yaml", f"{rule}{workspace.default}\n")
    path = workspace.write("a.yaml", YAML)
    workspace.sops("encrypt", "-i", "a.yaml")
    workspace.write(".sops.yaml", f"{rule}{workspace.remote}\n")

    workspace.sops("updatekeys", "--yes", "a.yaml")
    again = workspace.sops("updatekeys", "--yes", "a.yaml")

    assert "key_name: remote" in path.read_text()
    assert "key_name: default" not in path.read_text()
    assert "up to date" in again.stderr
    assert workspace.opened("a.yaml") == YAML


GROUPS: Final = """
creation_rules:
  - shamir_threshold: 2
    key_groups:
      - hc_vault: ["{default}"]
      - hc_vault: ["{remote}"]
      - age: ["{age}"]
"""


def test_of_shamir_groups_two_of_three_open(workspace: Workspace) -> None:
    rules = GROUPS.format(
        default=workspace.default, remote=workspace.remote, age=workspace.identity.recipient
    )
    workspace.write(".sops.yaml", rules)
    path = workspace.write("a.yaml", YAML)
    workspace.sops("encrypt", "-i", "a.yaml")
    whole = path.read_text()
    assert workspace.opened("a.yaml") == YAML

    path.write_text(whole.replace("key_name: remote", "key_name: nope"))
    alone = workspace.tried("decrypt", "a.yaml")
    with_age = workspace.opened("a.yaml", SOPS_AGE_KEY_FILE=str(workspace.folder / "age.txt"))

    assert alone.returncode == 128
    assert with_age == YAML
    path.write_text(whole)
    workspace.sops("rotate", "-i", "a.yaml", SOPS_AGE_KEY_FILE=str(workspace.folder / "age.txt"))
    assert workspace.opened("a.yaml") == YAML


def test_a_group_is_added(workspace: Workspace) -> None:
    workspace.sealed("a.yaml")

    workspace.sops(
        "groups",
        "add",
        "-i",
        "-f",
        "a.yaml",
        "--hc-vault-transit",
        workspace.remote,
        "--shamir-secret-sharing-threshold",
        "2",
    )

    assert len(workspace.wrapped("a.yaml")) == 2
    assert workspace.opened("a.yaml") == YAML


def test_a_child_gets_the_secrets_in_its_environment_or_as_a_file(workspace: Workspace) -> None:
    workspace.sealed("a.env")
    workspace.sealed("a.yaml")

    in_env = workspace.sops("exec-env", "a.env", "echo $PASSWORD $OTHER").stdout
    as_file = workspace.sops("exec-file", "a.yaml", "cat {}").stdout

    assert in_env == f"{SECRET} x\n"
    assert as_file == YAML


def test_with_age_beside_it_a_file_opens_while_the_service_is_away(workspace: Workspace) -> None:
    path = workspace.sealed(
        "a.yaml", "--hc-vault-transit", workspace.default, "--age", str(workspace.identity.recipient)
    )
    path.write_text(path.read_text().replace(workspace.facade.url, "http://127.0.0.1:9"))

    assert workspace.opened("a.yaml", SOPS_AGE_KEY_FILE=str(workspace.folder / "age.txt")) == YAML


def test_the_mount_may_be_deep_and_the_tenant_is_the_namespace(workspace: Workspace) -> None:
    token = workspace.facade.make("encrypt,decrypt", tenant="acme")[1]
    environ = {"VAULT_TOKEN": token, "VAULT_NAMESPACE": "acme"}
    workspace.write("a.yaml", YAML)
    address = f"{workspace.facade.url}/v1/team/a/transit/keys/default"
    workspace.sops("encrypt", "-i", "--hc-vault-transit", address, "a.yaml", **environ)

    assert workspace.opened("a.yaml", **environ) == YAML
    other = workspace.tried("decrypt", "a.yaml")
    assert other.returncode == 128
    assert "authentication failed" in other.stderr


def damaged(text: str) -> str:
    """With another letter near the end of the sealed data key."""
    return re.sub(
        r"(vault:\S+)(.)(\S{20})$",
        lambda m: f"{m[1]}{'B' if m[2] == 'A' else 'A'}{m[3]}",
        text,
        flags=re.MULTILINE,
    )


Spoil = Callable[[str], str]
FAULTS: Final[dict[str, tuple[dict[str, str], Spoil, str, str]]] = {
    "no token": ({"VAULT_TOKEN": ""}, str, "403", "permission denied"),
    "wrong token": ({"VAULT_TOKEN": "kms_aaaaaaaaaa_" + "A" * 43}, str, "403", "permission denied"),
    "namespace": ({"VAULT_NAMESPACE": "other"}, str, "403", "another tenant"),
    "key": ({}, lambda text: text.replace("key_name: default", "key_name: nope"), "400", "key not found"),
    "prefix": (
        {},
        lambda text: re.sub(r"vault:v\d+:", "vault:v77:", text),
        "400",
        "message authentication failed",
    ),
    "damage": ({}, damaged, "400", "message authentication failed"),
}


@pytest.mark.parametrize(("environ", "spoil", "status", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_once_and_in_words(
    workspace: Workspace, environ: dict[str, str], spoil: Spoil, status: str, words: str
) -> None:
    path = workspace.sealed("a.yaml")
    path.write_text(spoil(path.read_text()))
    before = workspace.facade.answered("decrypt").get(status, 0)

    failed = workspace.tried("decrypt", "a.yaml", **environ)

    assert failed.returncode == 128
    assert words in failed.stderr
    if "VAULT_TOKEN" not in environ:  # strangers are turned away before their path is looked at
        assert workspace.facade.answered("decrypt").get(status, 0) == before + 1


def test_encrypting_for_a_key_that_is_not_there_makes_none(workspace: Workspace, facade: Facade) -> None:
    path = workspace.write("a.yaml", YAML)
    failed = workspace.tried(
        "encrypt",
        "-i",
        "--hc-vault-transit",
        workspace.default.replace("default", "defualt"),
        "a.yaml",
    )

    assert failed.returncode == 1
    assert "[kms.keys]" in failed.stderr
    assert path.read_text() == YAML
    assert facade.data("GET", "transit/keys?list=true") == {"keys": ["default", "remote"]}
