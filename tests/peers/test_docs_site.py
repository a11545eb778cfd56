"""The site of the documents, built strictly and seen in a real browser: whole, readable, of one host."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest

from support.chromium import SCHEMES, Chromium
from support.http_servers import served_files
from support.waiting import until

ROOT: Final = Path(__file__).parents[2]
LOADING: Final = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
ONLY_NAMED: Final = {"canonical", "next", "prev"}  # links of pages to others; browsers load nothing
LOADED: Final = "performance.getEntriesByType('resource').map((entry) => entry.name)"
HIDDEN: Final = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT: Final = """
Array.from(document.querySelectorAll("text"))
  .filter((text) => {
    const inner = text.getBBox();
    const boxes = Array.from(document.querySelectorAll("rect:not(.page)")).map((rect) => rect.getBBox());
    const box = boxes.find((box) => box.x < inner.x && inner.x < box.x + box.width
      && box.y < inner.y && inner.y < box.y + box.height);
    return box && (inner.x + inner.width > box.x + box.width || inner.y + inner.height > box.y + box.height);
  })
  .map((text) => text.textContent)
"""
SEARCHED: Final = """
Array.from(document.querySelectorAll("*")).map((place) => place.shadowRoot?.textContent ?? "").join("")
"""
pytestmark = pytest.mark.timeout(600)


class Addresses(HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in LOADING and named.get("rel") not in ONLY_NAMED and (address := named.get(LOADING[tag])):
            self.found.append(address)


def build(target: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    argv: list[str | Path] = [sys.executable, root / "scripts/docs_site.py", target]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("docs") / "site"
    done = build(target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with served_files(site) as found:
        yield found


def test_every_document_is_a_page_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    expected = {path.with_suffix(".html").name for path in ROOT.glob("docs/*.md")}
    expected = (expected - {"README.html"}) | {"index.html"}
    expected |= {f"adr/{path.stem}.html" for path in ROOT.glob("docs/adr/0*.md")}

    assert len(expected) > 60
    assert {name for name in expected if f'docs/{name}"' not in home} == set()
    for part in ("Use", "Run", "Understand", "Compare"):
        assert re.search(rf"^\s*{part}\s*$", home, re.MULTILINE)


def test_no_page_loads_anything_of_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 80
    for page in pages:
        read = Addresses()
        read.feed(page.read_text("utf-8"))
        assert [each for each in read.found if re.match(r"(?:[a-z]+:)?//", each)] == [], page
    for style in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import )\s*[\"']?([^\"')\s;]+)", style.read_text("utf-8"))
        assert [each for each in fetched if re.match(r"(?:https?:)?//", each)] == [], style


@pytest.mark.parametrize("link", ["no-such.md", "auth.md#no-such-heading"])
def test_a_dead_link_fails_the_build(tmp_path: Path, link: str) -> None:
    copy = tmp_path / "tree"
    (copy / "docs").mkdir(parents=True)
    (copy / "scripts").mkdir()
    (copy / "scripts/docs_site.py").write_bytes((ROOT / "scripts/docs_site.py").read_bytes())
    (copy / "src/kms_api/ui").mkdir(parents=True)
    (copy / "src/kms_api/ui/static").symlink_to(ROOT / "src/kms_api/ui/static")
    (copy / "src/kms_api/openapi").mkdir()
    (copy / "src/kms_api/openapi/openapi.json").write_text('{"paths": {}}')
    (copy / "docs/auth.md").write_text("# Authentication\n")
    (copy / "README.md").write_text("# Home\n\n[All pages](docs/README.md)\n")
    text = "# Documents\n\n## Use\n\n| page | |\n|---|---|\n| [a](auth.md) | [b](LINK) |\n"

    (copy / "docs/README.md").write_text(text.replace("LINK", "auth.md#authentication"))
    good = build(tmp_path / "site", copy)
    assert good.returncode == 0, good.stdout + good.stderr
    (copy / "docs/README.md").write_text(text.replace("LINK", link))
    assert build(tmp_path / "site", copy).returncode != 0


def test_pages_can_be_read_in_a_browser_in_both_colours(url: str, browser: Chromium) -> None:
    backgrounds = {}
    for scheme in SCHEMES:
        browser.appear(scheme)
        for name in ("index", "docs/cli", "docs/api", "docs/viewer/index"):
            shown = f"site-{name.replace('/', '-')}-{scheme}"
            browser.open(f"{url}/{name}.html")
            browser.resize(1280, 900)
            if "viewer" in name:
                until(lambda: browser.evaluate("!!document.querySelector('.opblock')"), "the API is shown")
            browser.picture(shown)
            fetched = browser.evaluate(LOADED)
            assert fetched
            assert [each for each in fetched if not each.startswith(url)] == []
            browser.resize(400, 800)
            browser.picture(f"{shown}-narrow")
            assert browser.evaluate(HIDDEN) <= 0, name
        browser.open(f"{url}/docs/cli.html")
        backgrounds[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert backgrounds["light"] != backgrounds["dark"]
    assert browser.complaints == []


def test_the_search_finds_pages_without_another_host(url: str, browser: Chromium) -> None:
    browser.open(f"{url}/index.html")
    browser.evaluate("document.querySelector('.md-search__button').click()")
    until(lambda: browser.evaluate("document.activeElement.shadowRoot !== null"), "the search opens")
    browser.call("Input.insertText", text="rewrap")
    until(lambda: re.search(r"[1-9]\d* results.*rewrap", browser.evaluate(SEARCHED)), "it finds pages")

    assert [each for each in browser.evaluate(LOADED) if not each.startswith(url)] == []
    assert browser.complaints == []


@pytest.mark.parametrize(("name", "page"), [("architecture", "docs/design"), ("overview", "index")])
def test_a_picture_is_drawn_in_both_colours(url: str, browser: Chromium, name: str, page: str) -> None:
    colours = set()
    for scheme in SCHEMES:
        browser.appear(scheme)
        browser.resize(1280, 900)
        browser.open(f"{url}/docs/{name}.svg")
        browser.picture(f"{name}-{scheme}")
        assert browser.evaluate(CUT) == []
        ground = "getComputedStyle(document.querySelector('.page')).fill"
        text = "getComputedStyle(document.querySelector('text')).fill"
        colours |= {browser.evaluate(ground), browser.evaluate(text)}
        browser.open(f"{url}/{page}.html")
        browser.picture(f"{page.replace('/', '-')}-{scheme}")
        assert browser.evaluate(f"document.querySelector('img[src$=\"{name}.svg\"]').naturalWidth") > 0
    assert len(colours) == len({"ground", "text"}) * len(SCHEMES)
