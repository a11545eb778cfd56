"""The README and the pages of docs/ and docs/integrations/, read from top to bottom at one terminal.

They run against a running service.

A block of commands stands below ``<!-- run -->``, or below ``<!-- not run: why -->``.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support import nushell
from support.age_plugin import plugin_dir, sops
from support.embedded_valkey import EmbeddedValkey
from support.nushell import Nu
from support.programs import program
from support.service import Service

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    "README.md",
    *sorted(
        f"{folder}/{path.name}"
        for folder in ("docs", "docs/integrations")
        for path in (ROOT / folder).glob("*.md")
    ),
]
RUN_BY: Final = {
    "docs/KMS_SIMPLIFICATION.md": "e2e/test_migration_document.py",
    "docs/age-plugin.md": "e2e/test_recipes.py",
    "docs/backends.md": "e2e/test_backend_pages.py",
    "docs/vault-api.md": "peers/test_vault_api_clients.py",
    "docs/hosts.md": "peers/test_hosts_page.py",
    "docs/integrations/bao.md": "peers/test_integration_pages.py",
    "docs/integrations/commands.md": "peers/test_integration_pages.py",
    "docs/integrations/consul-template.md": "peers/test_integration_pages.py",
    "docs/integrations/go.md": "peers/test_vault_api_languages.py",
    "docs/integrations/parquet.md": "peers/test_integration_pages.py",
    "docs/integrations/rust-node-java.md": "peers/test_vault_api_languages.py",
    "docs/integrations/seaweedfs.md": "peers/test_seaweedfs_kms.py",
    "docs/nushell.md": "peers/test_nushell.py",
    "docs/recipes.md": "e2e/test_recipes.py",
    "docs/releases.md": "repository/test_release.py",
    "docs/sdk.md": "peers/test_openapi_generators.py",
    "docs/sealed-keys.md": "e2e/test_sealed_keys_page.py",
}
BLOCK: Final = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(sh|nu)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOOLS: Final = ("age", "curl")
NEWEST_NU: Final = "0.115.1"
TIMEOUT_S: Final = 120


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page that are run."""
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [text for mark, kind, text in found if mark == "run" and kind == language]


HERE: Final = [page for page in PAGES if page not in RUN_BY and blocks(page, "sh")]


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Service]:
    """A service as ``scripts/up`` starts it; files stand where pages name them."""
    url = valkey.files.url_of(next(database_numbers))
    with Service(tmp_path_factory.mktemp("workspace"), redis=url) as service:
        (service.files / "srv/in/deep").mkdir(parents=True)
        (service.files / "srv/in/a.csv").write_text("1,2\n")
        (service.files / "srv/in/deep/b.csv").write_text("3,4\n")
        yield service.start()


def localized(text: str, service: Service) -> str:
    """A block as it would be written for this service."""
    for written, here in (
        ("http://localhost:8082", service.url),
        ("~/.config/provisioning/age", str(service.state / "age")),
        ("/srv/", f"{service.files}/srv/"),
    ):
        text = text.replace(written, here)
    return text


@pytest.mark.parametrize("page", HERE)
def test_a_page_works_from_top_to_bottom(workspace: Service, page: str, tmp_path: Path) -> None:
    scripts = [localized(text, workspace) for text in blocks(page, "sh")]
    for name in TOOLS:
        if re.search(rf"\b{name} -", "".join(scripts)):
            program(name)
    tools = plugin_dir(tmp_path / "bin")
    (tools / "sops").symlink_to(sops())
    here = tmp_path / "here"
    here.mkdir()
    (here / "examples").symlink_to(ROOT / "examples")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environ = workspace.environ | {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "KMS_SERVICE_URL": workspace.url,
        "KMS_BROKER_URL": workspace.settings.kms.redis.broker_url,
        "TMPDIR": str(temporary),
    }

    numbered = (f"echo '== block {number}' >&2\n{text}" for number, text in enumerate(scripts, start=1))
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(numbered)],
        cwd=here,
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "urn:kms-service:problem" not in ran.stdout
    if page == "README.md":
        assert [path.name for path in here.iterdir()] == ["examples"]
        assert list(temporary.iterdir()) == []


def test_the_readme_works_in_nushell(workspace: Service, tmp_path: Path) -> None:
    nu = Nu(nushell.fetched(NEWEST_NU), tmp_path, {"KMS_SERVICE_URL": workspace.url})
    found = blocks("README.md", "nu")
    ran = nu.run("\n".join(found))

    assert found
    assert ran.returncode == 0, ran.stderr


def test_the_readme_goes_from_a_secret_to_the_audit_trail() -> None:
    assert len(blocks("README.md", "sh")) > 10
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_is_run_or_says_why_not(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    found = BLOCK.findall(text)

    assert len(found) == len(re.findall(r"^ *```(?:sh|nu)$", text, re.MULTILINE))
    unmarked = [block for mark, _, block in found if mark != "run" and not mark.startswith("not run: ")]
    assert unmarked == []


@pytest.mark.parametrize(("page", "runner"), RUN_BY.items())
def test_the_runner_of_a_page_names_it(page: str, runner: str) -> None:
    assert Path(page).name in (ROOT / "tests" / runner).read_text("utf-8")
