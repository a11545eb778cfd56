"""The examples of docs/recipes.md and docs/age-plugin.md, as they stand there, against a running service."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.age_plugin import plugin_dir, sops
from support.programs import program
from support.service import Service

DOCS: Final = Path(__file__).parents[2] / "docs"
RUN: Final = re.compile(r"<!-- run -->\n```sh\n(.*?)```", re.DOTALL)
EXAMPLES: Final = [
    pytest.param(text, id=f"{name} {number}")
    for name in ("recipes.md", "age-plugin.md")
    for number, text in enumerate(RUN.findall((DOCS / name).read_text()), start=1)
]


def test_the_documents_have_examples() -> None:
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works_as_written(service: Service, example: str, tmp_path: Path) -> None:
    for name in ("age", "ssh-agent", "ssh-keygen", "curl"):
        if name in example:
            program(name)
    tools = plugin_dir(tmp_path / "bin")
    (tools / "sops").symlink_to(sops())
    here = tmp_path / "here"
    here.mkdir()
    environ = {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "KMS_SERVICE_URL": service.url,
    }

    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.replace("http://localhost:8082", service.url)],
        cwd=here,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert "urn:kms-service:problem" not in ran.stdout
