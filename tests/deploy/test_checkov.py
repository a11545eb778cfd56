"""Checkov on image and manifests. It has an environment of its own, since it pins what we need newer."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest
import yaml

from support.artefacts import DEPLOY, INSTALLS, ROOT, rendered, run
from support.programs import BUILD_LIMIT_S, locked_cache

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)  # the first run installs it
LOCK: Final = Path(__file__).with_name("checkov.lock")
INSTALL: Final = """
set -euo pipefail
source scripts/venv.sh
venv=$1
"$2" -m venv --clear "$venv"
install_locked --only-binary :all: -r "$3"
check_complete "$3"
"""
SKIPPED: Final = {
    "CKV_K8S_43": "who deploys builds the image: its digest is not known here (deploy/README.md pins it)",
    "CKV_K8S_15": "as above: versions are not moved, so a node need not ask for one each time",
    "CKV_DOCKER_7": "the base image is an argument, whose default names a version",
}


@pytest.fixture(scope="module")
def checkov() -> Path:
    """The program; installed once for each lock."""
    with locked_cache("checkov") as home:
        stamp = home / "lock"
        if not stamp.exists() or stamp.read_bytes() != LOCK.read_bytes():
            done = run("bash", "-c", INSTALL, "bash", home, sys.executable, LOCK, cwd=ROOT)
            if done.returncode != 0:
                pytest.skip(f"checkov cannot be installed: {done.stderr}")
            stamp.write_bytes(LOCK.read_bytes())
    return home / "bin/checkov"


def test_nothing_is_found_but_what_has_a_reason(checkov: Path, tmp_path: Path) -> None:
    judged = tmp_path / "judged"
    judged.mkdir()
    shutil.copy(DEPLOY / "Dockerfile", judged)
    for name in INSTALLS:
        (judged / f"{name}.yaml").write_text(yaml.safe_dump_all(rendered(name)))

    argv = (checkov, "--skip-download", "--framework", "kubernetes", "dockerfile", "--output", "json")
    done = run(*argv, "--directory", judged, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})

    reports = json.loads(done.stdout)
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}
    found = [check for report in reports for check in report["results"]["failed_checks"]]
    faults = {f"{check['check_id']} {check['check_name']}: {check['resource']}" for check in found}
    assert {fault for fault in faults if fault.split()[0] not in SKIPPED} == set()
    assert {fault.split()[0] for fault in faults} == SKIPPED.keys(), "a reason that nothing needs"
    assert sum(report["summary"]["passed"] for report in reports) > 300
