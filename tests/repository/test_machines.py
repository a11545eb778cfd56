"""``scripts/test --machines``: what each machine is, over a small project; which Python ``.ci/run`` takes."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from support import pages

ROOT: Final = Path(__file__).parents[2]
UP: Final = """#!/bin/sh
touch .venv-up; echo "kms: ready http://127.0.0.1:8082"
exec sleep 60
"""
TEST: Final = """#!/bin/sh
umask; ulimit -n; pwd; echo "HOME=$HOME"; env; mkdir "$HOME/made" && rm -r "$HOME/made"; touch "$TMPDIR/made"
echo "3 passed, {failed} failed"; exit {failed}
"""
README: Final = """# x

<!-- not run: why -->
```sh
exit 7
```

<!-- run -->
```sh
test -e .venv-up
word=said
```

<!-- run -->
```sh
test "$word" = said && {last}
```
"""


def test_the_blocks_of_the_readme_need_curl_alone() -> None:
    """A new machine has it, git and Python: the README says so."""
    text = "\n".join(pages.blocks_to_run("README.md", "sh"))
    called = set(re.findall(r"(?:^|\||&&|\$\()[ \t]*([a-z][\w-]*)(?![\w=-])", text, re.MULTILINE))

    assert called == {"kms", "curl", "cmp", "echo", "head", "mktemp", "rm", "sed"}


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The module, over a project of its own."""
    found = runpy.run_path(str(ROOT / "scripts/machines.py"))
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    monkeypatch.setenv("SECRET_OF_THIS_SHELL", "1")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")  # which other users may enter
    found["_run"].__globals__.update(ROOT=project, LOGS=tmp_path, WHEELS=tmp_path / "wheels")
    (tmp_path / "wheels").mkdir()
    return SimpleNamespace(**found, project=project)


def commit(machines: SimpleNamespace, *, failed: int = 0, last: str = "true") -> None:
    files = {
        "scripts/up": UP,
        "scripts/test": TEST.format(failed=failed),
        "README.md": README.format(last=last),
    }
    for name, text in files.items():
        (machines.project / name).write_text(text)
        (machines.project / name).chmod(0o755)
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "init.defaultBranch=main")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "x")):
        subprocess.run([*git, *words], cwd=machines.project, check=True)


def ran(machines: SimpleNamespace, name: str, *, is_user: bool = False) -> tuple[list[str], list[str]]:
    """The problems of a machine, and the lines of its log."""
    python = machines.Python(Path(sys.executable), sys.version_info[:3])
    problems = machines._run(machines.Machine(name, python, is_user), float("inf"))  # noqa: SLF001 -- of a script
    return problems, (machines.project.parent / f"{name}.log").read_text("utf-8").splitlines()


def test_a_machine_has_an_environment_and_a_home_of_its_own(machines: SimpleNamespace) -> None:
    commit(machines)
    problems, lines = ran(machines, "debian")

    assert (problems, lines[-1]) == ([], "3 passed, 0 failed")
    assert f"PYTHON={sys.executable}" in lines
    assert f"HOME={Path.home()}" not in lines
    assert not any(line.startswith(("SECRET_OF_THIS_SHELL", "CI=")) for line in lines)


def test_the_machine_of_a_user_has_odd_names_and_narrow_limits(machines: SimpleNamespace) -> None:
    commit(machines)
    problems, lines = ran(machines, "user", is_user=True)

    assert problems == []
    assert {"0077", "1024", "LC_ALL=C", "TZ=Asia/Kolkata"} <= set(lines)
    (folder,) = (line for line in lines if line.startswith("/"))
    assert " " in folder
    assert not folder.isascii()
    assert os.geteuid() != 0 or "USER=nobody" in lines


@pytest.mark.parametrize(
    ("ends", "problem"),
    [((1, "true"), "scripts/test ended with 1"), ((0, "exit 3"), "the README's blocks ended with 3")],
)
def test_what_fails_is_told_and_its_folder_stays(
    machines: SimpleNamespace, ends: tuple[int, str], problem: str
) -> None:
    failed, last = ends
    commit(machines, failed=failed, last=last)
    problems, _ = ran(machines, "debian")

    assert problems[0] == problem
    folder = Path(problems[-1].rpartition(" ")[2])
    assert (folder / "kms/README.md").exists()
    shutil.rmtree(folder)


def test_what_takes_too_long_may_end_what_it_started(machines: SimpleNamespace, tmp_path: Path) -> None:
    script = """trap 'touch "$0"; exit' TERM; echo; sleep 60 & wait"""
    argv = ["sh", "-c", script, str(tmp_path / "ended")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout
        process.stdout.readline()
        assert machines._ended(process, float("-inf")) == "no end in time"  # noqa: SLF001 -- of a script

    assert (tmp_path / "ended").exists()


def test_pythons_are_found_on_the_path_the_oldest_first(tmp_path: Path) -> None:
    for name, said in (
        ("a/python3", "echo 3.13.0 /a"),
        ("b c/python3.11", "echo 3.11.0 '/b c'"),
        ("b c/python3.12", "exit 1"),
        ("b c/python3-config", "echo 3.11.0 /not"),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{said}\n")
        file.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b c"), "/bin", "/usr/bin"])

    argv = ["bash", "-euo", "pipefail", "-c", "source scripts/venv.sh && pythons"]
    lines = subprocess.run(
        argv, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, check=True
    ).stdout
    assert lines.splitlines()[0] == "3.11.0 /b c"
    assert "3.13.0 /a" in lines.splitlines()
    assert "/not" not in lines
