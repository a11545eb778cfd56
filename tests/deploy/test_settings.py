"""Each settings file of the tree that is shipped is one in which ``kms config lint`` finds nothing."""

import json
import tomllib
from pathlib import Path
from typing import Final

import pytest

from support.artefacts import EXAMPLES, ROOT, rendered
from support.cli.fixtures import kms
from support.programs import BUILD_LIMIT_S

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)  # the first run builds Helm
FILES: Final = [
    path.relative_to(ROOT)
    for folder in sorted(ROOT.iterdir())
    if folder.is_dir() and folder.name not in {"src", "tests"} and not folder.name.startswith(".")
    for path in sorted(folder.rglob("*.toml"))
    if "kms" in tomllib.loads(path.read_text("utf-8"))
]


def lint(folder: Path, file: Path, **environ: str) -> None:
    """Nothing is weak but what the file accepts, and it accepts nothing that is not."""
    accepted = tomllib.loads(file.read_text("utf-8"))["kms"].get("accept_weak", [])
    done = kms(folder, "--config", str(file), "config", "lint", "--json", given=b"", **environ)
    found = [json.loads(line) for line in done.stdout.splitlines()]

    assert (done.returncode, sorted(each["setting"] for each in found)) == (0, sorted(accepted)), done.stderr


def test_the_files_of_each_kind_of_deployment_are_found() -> None:
    assert {str(path.parent) for path in FILES} >= {"deploy/compose", "deploy/systemd", "docs"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_has_no_weak_setting(file: Path, tmp_path: Path) -> None:
    lint(tmp_path, ROOT / file)


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.iterdir()))
def test_the_chart_makes_no_weak_setting(example: str, tmp_path: Path) -> None:
    """With the variables of the pod, and the file of the ConfigMap that it mounts."""
    documents = rendered(example)
    (text,) = [each["data"]["kms.toml"] for each in documents if "kms.toml" in each.get("data", {})]
    (variables,) = [
        container["env"]
        for each in documents
        if each["kind"] in {"Deployment", "StatefulSet"}
        for container in each["spec"]["template"]["spec"]["containers"]
        if container["name"] == "kms-service"
    ]
    (tmp_path / "kms.toml").write_text(text)

    lint(tmp_path, tmp_path / "kms.toml", **{each["name"]: each["value"] for each in variables})
