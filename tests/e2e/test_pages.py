"""The README and the pages of docs/ and docs/integrations/, read from top to bottom at one terminal.

They run against a running service.

A block of commands stands below ``<!-- run -->``, or below ``<!-- not run: why -->``.
"""

import re
from pathlib import Path
from typing import Final

import pytest

from support import pages
from support.pages import BLOCK, ROOT, blocks_to_run
from support.service import Service

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
    "docs/integrations/generated-clients.md": "peers/test_openapi_generators.py",
    "docs/integrations/go.md": "peers/test_vault_api_languages.py",
    "docs/integrations/parquet.md": "peers/test_integration_pages.py",
    "docs/integrations/rust-node-java.md": "peers/test_vault_api_languages.py",
    "docs/integrations/seaweedfs.md": "peers/test_seaweedfs_kms.py",
    "docs/nushell.md": "peers/test_nushell.py",
    "docs/recipes.md": "e2e/test_recipes.py",
    "docs/releases.md": "repository/test_release.py",
    "docs/sealed-keys.md": "e2e/test_sealed_keys_page.py",
}
HERE: Final = [page for page in PAGES if page not in RUN_BY and blocks_to_run(page, "sh")]


@pytest.mark.parametrize("page", HERE)
def test_a_page_works_from_top_to_bottom(workspace: Service, page: str, tmp_path: Path) -> None:
    scripts = enumerate(blocks_to_run(page, "sh"), start=1)
    numbered = "\n".join(f"echo '== block {number}' >&2\n{text}" for number, text in scripts)

    ran = pages.run(numbered, tmp_path, workspace)

    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "urn:kms-service:problem" not in ran.stdout
    if page == "README.md":
        left = [*(tmp_path / "here").iterdir(), *(tmp_path / "temporary").iterdir()]
        assert left == []


def test_the_readme_shows_the_service_and_is_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    headings = [line for line in lines if line.startswith("## ")]

    assert headings == [
        "## When to take something else",
        "## Start",
        "## A secret",
        "## A file",
        "## A job",
        "## Documentation",
    ]
    assert len(blocks_to_run("README.md", "sh")) >= 3
    assert lines.index("```console") < lines.index(headings[0])
    assert len(lines) <= 110
    assert len([line for line in lines[lines.index(headings[-1]) :] if line.startswith("| ")]) == len(
        ["to", "fits", "use", "run", "trust", "change", "rest"]
    )


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
