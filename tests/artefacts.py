"""Where the artefacts of deployment are, and the programs of this environment that judge them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from peers import program

ROOT: Final = Path(__file__).parents[1]
DEPLOY: Final = ROOT / "deploy"
KUBERNETES: Final = DEPLOY / "kubernetes"
SYSTEMD: Final = DEPLOY / "systemd"
OVERLAYS: Final = ("production", "trial")
Document = dict[str, Any]


def tool(name: str) -> str:
    """The path of a program that a package of ours carries, else of one on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else program(name)


def run(*argv: object, **more: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 -- subprocess's own keywords
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, **more)


def passes(*argv: object, **more: Any) -> str:  # noqa: ANN401 -- as above
    """What the program prints; fails with all that it said if it finds fault."""
    done = run(*argv, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_root() -> None:
    """Skip without root; fail in CI."""
    if os.geteuid() == 0:
        return
    if os.environ.get("CI"):
        pytest.fail("this needs root, and CI must not skip what stands in for systemd and containers")
    pytest.skip("this needs root")


def make_secrets(folder: Path) -> Path:
    """A directory of secrets, as the documentation has them made."""
    passes(DEPLOY / "make-secrets", folder)
    return folder


def kustomized(overlay: str, folder: Path) -> list[Document]:
    """The objects that an overlay makes, from a copy, since the trial needs secrets beside it."""
    for part in ("deploy/kubernetes", "monitoring"):
        shutil.copytree(ROOT / part, folder / part)
    make_secrets(folder / "deploy/kubernetes/overlays/trial/secrets")
    built = passes(tool("kubectl"), "kustomize", folder / "deploy/kubernetes/overlays" / overlay)
    return [document for document in yaml.safe_load_all(built) if document]
