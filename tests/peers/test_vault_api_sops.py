"""SOPS as its users run it, with the façade for its Vault: what it has sealed, rotated and opened there."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from support.age_plugin import sops
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


class Workspace:
    """A folder, a user, and the ``sops`` program."""

    def __init__(self, facade: Facade, folder: Path) -> None:
        self.facade = facade
        self.folder = folder
        self.default, self.remote = (f"{facade.url}/v1/transit/keys/{key}" for key in ("default", "remote"))

    def sops(self, *words: str, **environ: str) -> str:
        done = self.tried(*words, **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tried(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """As ``sops``, whatever its end."""
        own = {"VAULT_TOKEN": self.facade.root, "HOME": str(self.folder)}
        return run([sops(), *words], own | environ, self.folder, check=False)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def sealed(self, name: str, to: str = "", **environ: str) -> Path:
        """A file of this format, encrypted in place, by default to the key ``default``."""
        path = self.write(name, FORMATS[name])
        self.sops("encrypt", "-i", "--hc-vault-transit", to or self.default, name, **environ)
        return path

    def opened(self, name: str, **environ: str) -> str:
        return self.sops("decrypt", name, **environ)

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


def test_creation_rules_name_the_keys_and_updatekeys_follows_them(workspace: Workspace) -> None:
    rule = "creation_rules:\n  - path_regex: \\.yaml$\n    hc_vault_transit_uri: "
    workspace.write(".sops.yaml", f"{rule}{workspace.default}\n")
    path = workspace.write("a.yaml", YAML)
    workspace.sops("encrypt", "-i", "a.yaml")
    workspace.write(".sops.yaml", f"{rule}{workspace.remote}\n")

    workspace.sops("updatekeys", "--yes", "a.yaml")

    assert re.findall(r"key_name: (\w+)", path.read_text()) == ["remote"]
    assert workspace.opened("a.yaml") == YAML


def test_the_mount_may_be_deep_and_the_tenant_is_the_namespace(workspace: Workspace) -> None:
    token = workspace.facade.new_token("encrypt,decrypt", tenant="acme")[1]
    environ = {"VAULT_TOKEN": token, "VAULT_NAMESPACE": "acme"}
    workspace.sealed("a.yaml", f"{workspace.facade.url}/v1/team/a/transit/keys/default", **environ)

    assert workspace.opened("a.yaml", **environ) == YAML
    other = workspace.tried("decrypt", "a.yaml")
    assert other.returncode == 128
    assert "authentication failed" in other.stderr


def with_another_version(text: str) -> str:
    return re.sub(r"vault:v\d+:", "vault:v77:", text)


Spoil = Callable[[str], str]
FAULTS: Final[dict[str, tuple[dict[str, str], Spoil, str, str]]] = {
    "token": ({"VAULT_TOKEN": "kms_aaaaaaaaaa_" + "A" * 43}, str, "403", "permission denied"),
    "namespace": ({"VAULT_NAMESPACE": "other"}, str, "403", "another tenant"),
    "key": ({}, lambda text: text.replace("key_name: default", "key_name: nope"), "400", "key not found"),
    "version": ({}, with_another_version, "400", "message authentication failed"),
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
    misspelt = workspace.default.replace("default", "defualt")
    failed = workspace.tried("encrypt", "-i", "--hc-vault-transit", misspelt, "a.yaml")

    assert failed.returncode == 1
    assert "[kms.keys]" in failed.stderr
    assert path.read_text() == YAML
    assert facade.data("GET", "transit/keys?list=true") == {"keys": ["default", "remote"]}
