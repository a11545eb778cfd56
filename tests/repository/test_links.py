"""Every relative link of every page leads to a file that is there, and every anchor to a heading of it."""

import re
import urllib.parse
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
FOLDERS: Final = ("benchmarks", "deploy", "docs", "examples", "monitoring", "nu", "src", "tests")
PAGES: Final = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(found for name in FOLDERS for found in (ROOT / name).rglob("*.md")))
    if "node_modules" not in path.parts
)
ELSEWHERE: Final = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
FENCED: Final = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"!?\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
SHOWN: Final = re.compile(r'\bsrc(?:set)?="([^"]+)"')
CODE: Final = re.compile(r"`[^`\n]*`")


def prose(path: Path) -> str:
    return FENCED.sub("", path.read_text("utf-8"))


@cache
def anchors(path: Path) -> frozenset[str]:
    """As GitHub makes them of headings; a heading that stands twice gets a number."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return frozenset(found)


def targets(page: Path) -> list[str]:
    """Where the relative links and pictures of a page lead."""
    text = CODE.sub("`", prose(ROOT / page))
    found = [*LINK.findall(text), *SHOWN.findall(text)]
    return [target for target in found if not ELSEWHERE.match(target)]


def is_dead(page: Path, target: str) -> bool:
    name, _, anchor = urllib.parse.unquote(target).partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    if not path.exists():
        return True
    return bool(anchor) and (path.suffix != ".md" or anchor not in anchors(path))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_link_is_dead(page: Path) -> None:
    assert [target for target in targets(page) if is_dead(page, target)] == []


@pytest.mark.parametrize(
    "target", ["no-such.md", "docs/auth.md#no-such-heading", "#no-such", "pyproject.toml#x"]
)
def test_a_dead_link_is_noticed(target: str) -> None:
    assert is_dead(Path("README.md"), target)
    assert not is_dead(Path("README.md"), "docs/auth.md#scopes")


def test_the_table_of_documents_leads_to_every_page_of_docs() -> None:
    led_to = {target.partition("#")[0] for target in targets(Path("docs/README.md"))}

    assert {path.name for path in (ROOT / "docs").glob("*.md")} - led_to == {"README.md"}
    assert {"integrations/README.md", "adr/README.md", "../deploy/README.md"} <= led_to
    assert "docs/README.md" in targets(Path("README.md"))


def test_the_table_of_integrations_leads_to_every_page_beside_it() -> None:
    folder = Path("docs/integrations")
    led_to = {target.partition("#")[0] for target in targets(folder / "README.md")}

    assert {path.name for path in (ROOT / folder).glob("*.md")} - led_to == {"README.md"}


def test_the_table_of_integrations_names_tests_that_exist() -> None:
    text = (ROOT / "docs/integrations/README.md").read_text("utf-8")
    named = re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", text)

    assert len(named) > 10
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []


def test_the_table_of_integrations_has_the_versions_that_tests_run() -> None:
    """In the page that a row links to, or in the lock file of the development group."""
    folder = ROOT / "docs/integrations"
    locked = (ROOT / "requirements/dev.lock").read_text("utf-8")
    rows = [row for row in (folder / "README.md").read_text("utf-8").splitlines() if "`peers/" in row]
    found = 0
    for row in rows:
        name, *cells = row.strip("|").split("|")
        page = folder / LINK.findall(name)[0].partition("#")[0]
        for version in re.findall(r"\b\d+\.\d+\.\d+\b", cells[2]):
            found += 1
            known = version in page.read_text("utf-8") or f"=={version} " in locked
            assert known or "Debian" in cells[2], row
    assert found > 15
