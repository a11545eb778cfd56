"""scripts/venv.sh on a machine that has nothing, with the oldest pip and an index that has newer releases."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.artefacts import ROOT, passes, run
from support.programs import locked_cache
from support.wheels import index_environ, lock, make_wheel

OLDEST_PIP: Final = Path(__file__).with_name("oldest-pip.lock")
SOURCED: Final = 'set -euo pipefail; source "$1/scripts/venv.sh"; '
INSTALL: Final = f'{SOURCED} venv=$2; install_locked -r "$3"; check_complete "$3"'
RESOLVE: Final = f'{SOURCED} venv=$2; install --require-hashes -r "$3"'
pytestmark = pytest.mark.timeout(600)  # a busy machine takes long to make a virtual environment
BACKEND: Final = """
import pathlib, shutil
def build_editable(folder, settings=None, metadata=None):
    (wheel,) = pathlib.Path("built").iterdir()
    return shutil.copy(wheel, folder).rpartition("/")[2]
"""


def bash(code: str, *words: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run("bash", "-c", code, "bash", *words, env=env)


@pytest.fixture(scope="module")
def oldest_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment whose only package is the oldest pip, fetched once from the configured index."""
    made = tmp_path_factory.mktemp("oldest-pip") / "venv"
    options = ("--quiet", "--no-deps", "--require-hashes", "-r", OLDEST_PIP)
    with locked_cache("oldest-pip") as folder:
        fetch = (sys.executable, "-m", "pip", "download", "--dest", folder, "--find-links", folder)
        done = run(*fetch, *options)
        if done.returncode != 0:
            pytest.skip(f"pip cannot be fetched: {done.stderr}")
        passes(sys.executable, "-m", "venv", "--without-pip", made)
        pip = (sys.executable, "-m", "pip", "--python", made / "bin/python", "install", "--no-index")
        passes(*pip, "--find-links", folder, *options)
    assert "pip 23." in passes(made / "bin/python", "-m", "pip", "--version")
    return made


@pytest.fixture
def venv(oldest_pip: Path, tmp_path: Path) -> Path:
    return shutil.copytree(oldest_pip, tmp_path / "venv", symlinks=True)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The folder of an index: ``c`` needs an extra of ``a``, which in ``a`` 2.0 needs ``b``."""
    extra = ("Provides-Extra: x", 'Requires-Dist: b; extra == "x"')
    folder = tmp_path / "index"
    make_wheel(folder / "a", "a", "1.0", "Provides-Extra: x")
    make_wheel(folder / "a", "a", "2.0", *extra)
    make_wheel(folder / "b", "b", "2.0")
    make_wheel(folder / "c", "c", "1.0", "Requires-Dist: a[x]")
    make_wheel(folder / "c", "c", "2.0", "Requires-Dist: a[x]>=2")
    return folder


@pytest.fixture
def pip_settings(packages: Path) -> Iterator[dict[str, str]]:
    with index_environ(packages) as env:
        yield env


@pytest.fixture
def locked(packages: Path, tmp_path: Path) -> Path:
    return lock(tmp_path / "two.lock", *packages.glob("*/[ac]-1.0-*.whl"))


def versions(venv: Path) -> dict[str, str]:
    lines = passes(venv / "bin/python", "-m", "pip", "list", "--format=freeze").splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines) if name in "abc"}


# -- installing a lock file -------------------------------------------------------------------------------


def test_a_lock_file_installs_beside_newer_releases(
    venv: Path, locked: Path, pip_settings: dict[str, str]
) -> None:
    done = bash(INSTALL, ROOT, venv, locked, env=pip_settings)

    assert done.returncode == 0, done.stdout + done.stderr
    assert versions(venv) == {"a": "1.0", "c": "1.0"}


def test_the_oldest_pip_refuses_the_same_lock_file_where_it_resolves(
    venv: Path, locked: Path, pip_settings: dict[str, str]
) -> None:
    done = bash(RESOLVE, ROOT, venv, locked, env=pip_settings)

    assert done.returncode == 69, (
        "this pip or this index does not show the fault: the test above proves nothing"
    )
    assert "b" in done.stderr


def test_a_lock_file_that_lacks_something_is_refused_with_its_name(
    venv: Path, packages: Path, pip_settings: dict[str, str], tmp_path: Path
) -> None:
    lacking = lock(tmp_path / "lacking.lock", *packages.glob("c/c-1.0-*.whl"))

    done = bash(INSTALL, ROOT, venv, lacking, env=pip_settings)

    assert done.returncode == 69
    assert "c 1.0 requires a, which is not installed" in done.stderr
    assert f"kms: error: {lacking} lacks" in done.stderr
    assert "scripts/lock" in done.stderr


def test_a_file_whose_hash_is_not_locked_is_refused(
    venv: Path, locked: Path, packages: Path, pip_settings: dict[str, str]
) -> None:
    make_wheel(packages / "a", "a", "1.0", "Summary: of another maker")

    done = bash(INSTALL, ROOT, venv, locked, env=pip_settings)

    assert done.returncode == 69
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


def test_the_runtime_and_the_project_install_with_the_oldest_pip(venv: Path) -> None:
    locked = 'locks=$1/requirements; install_locked -r "$locks/runtime.lock" -r "$locks/build.lock"'
    code = f'{SOURCED} venv=$2; {locked}; install_project; check_complete "$locks/runtime.lock"'
    done = bash(code, ROOT, venv, env=dict(os.environ))

    if done.returncode != 0 and "connection" in done.stderr.lower():
        pytest.skip("no index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr


def test_where_no_terminal_is_a_line_now_and_then_says_how_far_it_is() -> None:
    pip = (
        "echo Collecting a==1; echo is cached; sleep 2.5; echo Collecting b; sleep 2.5; echo Installing a, b"
    )
    done = bash(f"{SOURCED} every_s=1; ({pip}; sleep 2.5) | progress", ROOT, env=dict(os.environ))

    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert 5 <= len(lines) <= 8, "one a second"
    assert list(dict.fromkeys(lines)) == ["kms: 1 a", "kms: 2 b", "kms: unpacking 2 packages"]


# -- making .venv -----------------------------------------------------------------------------------------


class Project:
    """A clone of a small project and its client that has our scripts/venv.sh."""

    def __init__(self, folder: Path, packages: Path, env: dict[str, str]) -> None:
        self.root, self.venv, self.packages = folder, folder / ".venv", packages
        self.env = env | {"PYTHON": sys.executable}
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/venv.sh", folder / "scripts")
        settings = 'requires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        (folder / "src").mkdir()
        (folder / "requirements").mkdir()
        (folder / "src/ours.py").touch()
        needs = ("Requires-Dist: c", "Requires-Dist: kms-service-client")
        for each, name, count in ((folder, "kms_service", 2), (folder / "client", "kms_service_client", 1)):
            each.mkdir(exist_ok=True)
            (each / "backend.py").write_text(BACKEND)
            (each / "pyproject.toml").write_text(f"[build-system]\n{settings}")
            make_wheel(each / "built", name, "1.0", *needs[:count], source=folder / "src")
        self.lock("runtime", "a", "c")
        self.lock("build")
        self.lock("dev", "a", "b", "c")

    def lock(self, name: str, *projects: str) -> None:
        newest = [max((self.packages / each).iterdir()) for each in projects]
        lock(self.root / f"requirements/{name}.lock", *newest)

    def ready(self, what: str = "runtime") -> str:
        """Run ``ready``; what was said."""
        done = bash(f"{SOURCED} ready {what}", self.root, env=self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr


@pytest.fixture
def project(tmp_path: Path, packages: Path, pip_settings: dict[str, str]) -> Project:
    (packages / "a/a-2.0-py3-none-any.whl").unlink()
    (packages / "c/c-2.0-py3-none-any.whl").unlink()
    return Project(tmp_path / "my cödé", packages, pip_settings | {"LC_ALL": "C"})


def test_two_at_a_time_make_one_virtual_environment_and_development_adds_to_it(project: Project) -> None:
    argv = ["bash", "-c", f"{SOURCED} ready runtime", "bash", str(project.root)]
    both = [subprocess.Popen(argv, env=project.env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate()[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert sum("making .venv" in text for text in said) == 1
    assert versions(project.venv) == {"a": "1.0", "c": "1.0"}

    added = project.ready("dev")

    assert ("making .venv" in added, "installing into .venv" in added) == (False, True)
    assert versions(project.venv) == {"a": "1.0", "b": "2.0", "c": "1.0"}
    assert (project.ready("dev"), project.ready("runtime")) == ("", "")


def test_a_link_to_the_clone_finds_its_virtual_environment(project: Project, tmp_path: Path) -> None:
    """To make it again would pull .venv from under a service that runs in it."""
    project.ready()
    link = tmp_path / "link"
    link.symlink_to(project.root)
    (project.venv / "in use").touch()

    done = bash(f"{SOURCED} ready runtime", link, env=project.env)

    assert (done.returncode, done.stderr) == (0, "")
    assert (project.venv / "in use").exists()


def test_a_path_with_a_space_and_a_letter_beyond_ascii_is_fine_in_the_c_locale(
    project: Project,
) -> None:
    """Python 3.11 and 3.12 read the path of an editable installation in the encoding of the locale."""
    project.ready()

    passes(project.venv / "bin/python", "-c", "import ours", env=project.env)
    assert project.ready() == ""


def test_an_interrupted_installation_is_begun_again(project: Project) -> None:
    project.ready()
    for stamp in project.venv.glob(".kms-*"):  # written last: an interrupted installation has none
        stamp.unlink()
    (packages,) = project.venv.glob("lib/python*/site-packages")
    (packages / "a.py").unlink()  # pip still takes it for installed
    shutil.rmtree(packages / "pip")

    project.ready()

    passes(project.venv / "bin/python", "-c", "import a, c")


def test_what_is_no_longer_locked_is_no_longer_installed(project: Project) -> None:
    project.ready("dev")
    project.lock("dev", "a", "c")

    project.ready("dev")

    assert versions(project.venv) == {"a": "1.0", "c": "1.0"}


@pytest.mark.parametrize("folder", [".", "client"])
def test_a_dependency_that_is_declared_and_not_locked_is_told_each_time(
    project: Project, folder: str
) -> None:
    project.ready()
    name = "kms_service" if folder == "." else "kms_service_client"
    make_wheel(project.root / folder / "built", name, "1.0", "Requires-Dist: c", "Requires-Dist: b>=3")
    with (project.root / folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")

    for _ in range(2):
        done = bash(f"{SOURCED} ready runtime", project.root, env=project.env)

        assert done.returncode == 69
        assert "requires b, which is not installed" in done.stderr
        assert "run scripts/lock" in done.stderr
