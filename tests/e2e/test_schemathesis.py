"""Schemathesis explores a live service from its OpenAPI document, with credentials and with none.

It makes up requests that fit the document and others that do not, follows links from answer to request, and
holds every answer to the document: no 5xx, no status, media type, shape, header or problem code that is not
there. ``KMS_EXPLORE_EXAMPLES=500`` makes as many for each operation, for hours of a night.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.credentials import REQUIRED, SecuredService
from support.openapi_check import FILE
from support.service import Service

TESTS: Final = Path(__file__).parent.parent
EXAMPLES: Final = os.environ.get("KMS_EXPLORE_EXAMPLES", "2")
LONGEST_S: Final = 600 if EXAMPLES == "2" else 12 * 3600  # it ends a hang; alone it takes 110 s
DATA_KEYS: Final = "[kms.age]\ndata_keys = true\n"  # else 501, which is no fault
TRIES: Final = "failures_per_minute = 100_000\n"  # it tries wrong credentials


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("open"), DATA_KEYS) as running:
        yield running.start()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[SecuredService]:
    with SecuredService(
        tmp_path_factory.mktemp("secured"), DATA_KEYS + REQUIRED + TRIES, module_redis
    ) as running:
        yield running.start()


def explored(service: Service, folder: Path, *options: str) -> str:
    """What schemathesis reports; fails if it found anything."""
    program = Path(sys.executable).parent / "schemathesis"
    config = TESTS / "support/schemathesis/schemathesis.toml"
    argv: list[str | Path] = [program, "--config-file", config, "run", FILE]
    done = subprocess.run(
        [*argv, "--url", service.url, "--max-examples", EXAMPLES, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    return done.stdout


@pytest.mark.timeout(LONGEST_S + 10)
def test_service_answers_as_documented_to_whoever_has_a_token(
    secured: SecuredService, tmp_path: Path
) -> None:
    every = secured.token_header("*", "wrap,unwrap,rotate")["Authorization"]

    report = explored(secured, tmp_path, "--header", f"Authorization: {every}")

    assert "Coverage" in report
    assert "Stateful" in report


@pytest.mark.timeout(LONGEST_S + 10)
def test_service_answers_as_documented_where_nobody_is_asked(open_to_all: Service, tmp_path: Path) -> None:
    explored(open_to_all, tmp_path, "--phases", "examples,stateful", "--exclude-checks", "ignored_auth")


def test_exploration_notices_an_answer_that_is_not_documented(open_to_all: Service, tmp_path: Path) -> None:
    """Without the token that the document asks for, an open install answers 200."""
    with pytest.raises(AssertionError, match="API accepts requests without authentication"):
        explored(open_to_all, tmp_path, "--include-path", "/api/v1/kms/status", "--phases", "coverage")
