"""Where the artefacts of deployment are, and the programs of this environment that judge them."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from kms_core.age import x25519
from support.programs import built_with_go, venv_program

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
CHART: Final = DEPLOY / "helm/kms-service"
EXAMPLES: Final = DEPLOY / "helm/examples"
SYSTEMD: Final = DEPLOY / "systemd"
SEALED: Final = ("openbao", "cosmian", "aws")
"""Examples for production: an Age key that a key server seals, and no shared volume."""
INSTALLS: Final = (*SEALED, "trial")
"""All examples of the chart."""
RECOVERY_RECIPIENT: Final = str(x25519.X25519Identity.generate().recipient)
"""Of an offline key. No example has one: it would be somebody's."""
OLDEST: Final = "1.30"
"""The oldest version of Kubernetes that the chart is for."""
Document = dict[str, Any]


def run(*argv: object, **more: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 -- subprocess's own keywords
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, **more)


def passes(*argv: object, **more: Any) -> str:  # noqa: ANN401 -- as above
    """What the program prints; fails with all that it said if it finds fault."""
    done = run(*argv, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_root() -> None:
    """Skip without root."""
    if os.geteuid() != 0:
        pytest.skip("this needs root")


def composed(
    *profiles: str, files: Sequence[str] = ("docker-compose.yml",), env: dict[str, str] | None = None
) -> Document:
    """Compose files as Compose reads them, which refuses unknown keys and broken references."""
    words = [word for name in files for word in ("-f", ROOT / name)]
    words += [word for name in profiles for word in ("--profile", name)]
    argv = (venv_program("docker-compose"), "--project-directory", ROOT, *words, "config", "--format", "json")
    found: Document = json.loads(passes(*argv, env=env))
    return found


def seconds(text: str) -> int:
    """Of Compose's ``1m0s``."""
    minutes, _, rest = text.rpartition("m")
    return 60 * int(minutes or 0) + int(rest.removesuffix("s"))


def make_secrets(folder: Path) -> Path:
    """A directory of secrets, as the documentation has them made."""
    passes(DEPLOY / "make-secrets", folder)
    return folder


def helm(*words: object) -> str:
    """What ``helm`` prints."""
    return passes(built_with_go("helm"), *words, env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"})


def rendered(
    example: str, *words: object, release: str = "kms-service", chart: Path = CHART
) -> list[Document]:
    """The objects that the chart makes of an example's values, in the namespace ``kms``."""
    values = EXAMPLES / f"{example}.yaml"
    made = helm(
        *("template", release, chart, "--namespace", "kms", "--kube-version", f"{OLDEST}.0"),
        *("--values", values, "--set", f"firstKey.recovery={RECOVERY_RECIPIENT}", *words),
    )
    documents = [document for document in yaml.safe_load_all(made) if document]
    for document in documents:  # where ``helm install`` puts it
        document["metadata"].setdefault("namespace", "kms")
    return documents
