"""An age tool's side of the plugin protocol, against a plugin that stock age uses as well."""

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from kms_core.age.header import FILE_LIMITS, Stanza, parse
from kms_core.age.plugin_identity import PluginIdentity
from kms_core.age.x25519 import NoMatch
from kms_protocol.errors import BackendUnavailable
from support import programs, sealing_plugin

FILE_KEY: Final = bytes(range(16))


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sealing_plugin.install(tmp_path / "plugins")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def identity(mode: str = "good", key: bytes = bytes(32), timeout_s: float = 30.0) -> PluginIdentity:
    parsed = PluginIdentity.parse(sealing_plugin.identity(mode, key))
    return PluginIdentity(parsed.name, parsed.text, timeout_s)


def wrapped() -> list[Stanza]:
    return identity().wrap(FILE_KEY)


@pytest.mark.parametrize("mode", ["good", "talks"])
def test_a_file_key_comes_back(mode: str) -> None:
    assert identity(mode).unwrap_first(wrapped()) == FILE_KEY


def test_stock_age_makes_what_the_identity_opens(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("from age")
    sealed = subprocess.run(
        [programs.program("age"), "-r", sealing_plugin.recipient(), str(tmp_path / "plain")],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    head = parse(sealed, FILE_LIMITS)

    head.check_mac(identity().unwrap_first(head.stanzas))


def test_stanzas_for_others_are_no_match() -> None:
    others = [Stanza(("X25519", "x" * 43), bytes(32)), *identity(key=b"\x01" * 32).wrap(FILE_KEY)]

    with pytest.raises(NoMatch):
        identity().unwrap_first(others)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("pin", "asks for a PIN or a confirmation"),
        ("confirm", "asks for a PIN or a confirmation"),
        ("dies", "it has exited"),
        ("garbage", "malformed"),
        ("error", "reports: the token was removed"),
    ],
)
def test_a_plugin_that_fails_is_unavailable(mode: str, said: str) -> None:
    stanzas = wrapped()

    with pytest.raises(BackendUnavailable) as raised:
        identity(mode).unwrap_first(stanzas)

    assert f"age-plugin-{sealing_plugin.NAME}" in raised.value.detail
    assert said in raised.value.detail
    assert raised.value.detail.isprintable()


def test_a_plugin_that_hangs_is_killed() -> None:
    stanzas = wrapped()

    with pytest.raises(BackendUnavailable, match=r"gave no answer for 0\.5 s"):
        identity("hangs", timeout_s=0.5).unwrap_first(stanzas)

    found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _is_plugin_of_this_process(path)]
    assert found == []


def _is_plugin_of_this_process(cmdline: Path) -> bool:
    try:
        parent = (cmdline.parent / "stat").read_text().rpartition(")")[2].split()[1]
        return parent == str(os.getpid()) and b"sealing_plugin" in cmdline.read_bytes()
    except OSError:
        return False


def test_a_plugin_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(BackendUnavailable, match="age-plugin-kmstest is not on the PATH"):
        identity().unwrap_first([])


def test_a_plugin_gets_no_secrets_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "age-plugin-kmstest"
    script.write_text(f"#!/bin/sh\nenv > '{tmp_path}/seen'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("VAULT_TOKEN", "s.secret")

    with pytest.raises(BackendUnavailable):
        identity().unwrap_first([])

    assert "HOME=" in (tmp_path / "seen").read_text() or "PATH=" in (tmp_path / "seen").read_text()
    assert "s.secret" not in (tmp_path / "seen").read_text()


@pytest.mark.parametrize(
    "text", ["AGE-SECRET-KEY-1", "age1kmstest1qqqq", "AGE-PLUGIN-A/B-1QQQQ", "", "AGE-PLUGIN-1QQQQQQQQ"]
)
def test_no_other_text_is_an_identity(text: str) -> None:
    with pytest.raises(ValueError, match=r"\A(?!.*QQQQ)"):
        PluginIdentity.parse(text)
