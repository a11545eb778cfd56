"""Commands say which settings file they read if nobody named it."""

from pathlib import Path

import pytest

from kms_cli.main import run

FOUND = Path("provisioning/config/kms.toml")
EXPOSED = '[kms]\nbind = "0.0.0.0"\n'  # so that no command starts anything
LINES = [["up"], ["config", "lint"], ["token", "list"]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KMS_CONFIG", "KMS_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    FOUND.parent.mkdir(parents=True)
    FOUND.write_text(EXPOSED)
    return tmp_path


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_found_file_is_told(line: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(line)

    said = capsys.readouterr()
    assert f"kms: settings: {here / FOUND}, found in the working directory\n" in said.err
    assert str(FOUND) not in said.out


@pytest.mark.parametrize("line", LINES, ids=" ".join)
@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_named_file_is_not_told(
    line: list[str], how: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if how == "variable":
        monkeypatch.setenv("KMS_CONFIG", str(here / FOUND))

    run([*line, *(("--config", str(here / FOUND)) if how == "flag" else ())])

    assert "found in the working directory" not in capsys.readouterr().err
