"""The examples of docs/recipes.md and docs/age-plugin.md, as they stand there, against a running service."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support import nushell, pages
from support.credentials import SecuredService
from support.nushell import Nu
from support.pages import ROOT, blocks_to_run
from support.postgresql import postgresql_environ
from support.programs import locked_cache
from support.service import Service
from support.vault_api import NO_REDIS

RECIPES: Final = "docs/recipes.md"
EXAMPLES: Final = [
    pytest.param(text, id=f"{name} {number}")
    for name in ("recipes.md", "age-plugin.md")
    for number, text in enumerate(blocks_to_run(f"docs/{name}", "sh"), start=1)
]
ANSIBLE: Final = "2.19.14"
NEWEST_NU: Final = "0.115.1"
PEOPLE: Final = (
    "CREATE TABLE people AS SELECT name FROM (VALUES ('ada'), ('grace'), ('joan')) AS names (name)"
)
EXPECTED: Final = [
    "A secret in CI",
    "A database dump",
    "A tree of files",
    "SOPS",
    "Terraform",
    "Ansible",
    "A Python service",
    "A Celery workflow",
    "Nushell",
    "Break-glass",
]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server with the database ``app``, and the variables of its clients."""
    with postgresql_environ(tmp_path_factory.mktemp("pg")) as clients:
        for asked in (["createdb", "app"], ["psql", "--quiet", "--dbname=app", f"--command={PEOPLE}"]):
            subprocess.run(asked, env=os.environ | clients, check=True, capture_output=True)
        yield clients


@pytest.fixture(scope="session")
def ansible() -> Path:
    """The folder of the programs of ansible-core, installed once."""
    with locked_cache(f"ansible-{ANSIBLE}") as folder:
        programs = folder / "venv/bin"
        if not (programs / "ansible-playbook").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
            fetch = [str(programs / "python"), "-m", "pip", "install", "--quiet", f"ansible-core=={ANSIBLE}"]
            subprocess.run(fetch, check=True)
    return programs


def test_each_thing_that_people_come_for_has_a_recipe() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / RECIPES).read_text("utf-8"), re.MULTILINE)

    assert headings[: len(EXPECTED)] == [
        f"{number}. {title}" for number, title in enumerate(EXPECTED, start=1)
    ]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works_as_written(
    request: pytest.FixtureRequest, workspace: Service, example: str, tmp_path: Path
) -> None:
    environ = {"CHECKPOINT_DISABLE": "1"}  # Terraform asks no other host for its newest version
    (tmp_path / "here").mkdir()
    if "examples/" in example:
        (tmp_path / "here/examples").symlink_to(ROOT / "examples")
    if "terraform " in example and not shutil.which("terraform"):
        pytest.skip("terraform is not on the PATH, and no registry has it")
    if "pg_dump" in example:
        environ |= request.getfixturevalue("database")
    if "ansible-" in example:
        (tmp_path / "bin").mkdir()
        for name in ("ansible-playbook", "ansible-vault"):
            (tmp_path / "bin" / name).symlink_to(request.getfixturevalue("ansible") / name)

    ran = pages.run(example, tmp_path, workspace, environ)

    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "urn:kms-service:problem" not in ran.stdout


def test_the_example_of_nushell_works_as_written(workspace: Service, tmp_path: Path) -> None:
    (script,) = blocks_to_run(RECIPES, "nu")
    nu = Nu(nushell.fetched(NEWEST_NU), tmp_path, {"KMS_SERVICE_URL": workspace.url})

    ran = nu.run(script)

    assert ran.returncode == 0, ran.stderr


def test_the_token_of_a_ci_job_only_decrypts(tmp_path: Path) -> None:
    own = tmp_path / "own.token"
    attempts = f"""
        printf x | KMS_TOKEN_FILE={own} kms encrypt --context env=prod > prod.enc
        if printf x | kms encrypt --context env=ci; then exit 1; fi
        if kms decrypt --context env=prod < prod.enc; then exit 1; fi
    """
    with SecuredService(tmp_path / "secured", redis=NO_REDIS) as secured:
        secured.start("api")
        own.touch(0o600)
        own.write_text(secured.new_token("encrypt,decrypt")[1])

        script = blocks_to_run(RECIPES, "sh")[0] + attempts
        ran = pages.run(script, tmp_path, secured, {"KMS_TOKEN_FILE": str(own)})

    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("ask the operator for a token whose scope allows this operation") == len(
        ["encrypt", "decrypt"]
    )
