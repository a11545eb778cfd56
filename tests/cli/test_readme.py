"""The README's examples, as they stand there, against a running service."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from service import Service

README: Final = Path(__file__).parents[2] / "README.md"
EXAMPLES: Final = re.findall(r"<!-- run -->\n```sh\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) > 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[0][:40])
def test_an_example_works_as_written(service: Service, example: str, tmp_path: Path) -> None:
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "KMS_SERVICE_URL": service.url,
        "KMS_BROKER_URL": service.settings.kms.redis.broker_url,
        "KMS_REDIS_URL": service.settings.kms.redis.url,
    }
    script = example.replace("http://localhost:8082", service.url).replace(
        " examples/", f" {README.parent}/examples/"
    )

    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert "urn:kms-service:problem" not in ran.stdout
