"""Builds the site of the documents with Zensical, strictly: a link or an anchor that leads nowhere fails.

``scripts/docs`` runs it, with the folder for the site as its only argument. The site has every page and
picture that README.md leads to; other files that a page links to become pages. Its navigation is that of
docs/README.md.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
STATIC: Final = ROOT / "src/kms_api/ui/static"
HOME: Final = Path("README.md")
INDEX: Final = Path("docs/README.md")
DOCUMENT: Final = Path("src/kms_api/openapi/openapi.json")
VIEWER: Final = Path("docs/viewer")
LINK: Final = re.compile(r"(?<=\]\()([^)\s#:]+)((?:#[^)\s]*)?)(?=\))")
SHOWN: Final = re.compile(r'\bsrc(?:set)?="([^":]+)"')
ROW: Final = re.compile(r"^\| (\[.*?) \| .* \|$", re.MULTILINE)
PART: Final = re.compile(r"^## (.+)\n", re.MULTILINE)
CODE: Final = re.compile(r"`[^`\n]+`")
LANGUAGES: Final = {".py": "python", ".toml": "toml", ".json": "json"}
AS_THEY_ARE: Final = {".md", ".png", ".svg"}
"""Suffixes of files that keep their name on the site."""
STYLE: Final = ".md-typeset table code { word-break: normal; }\n"  # no names cut in two: tables scroll
CONFIG: Final[dict[str, Any]] = {
    "site_name": "KMS",
    "site_description": "A key management service: documents for users, operators and developers",
    "docs_dir": "pages",
    "use_directory_urls": False,  # pages can be read from a disk; the search needs a server
    "extra_css": ["site.css"],
    "theme": {
        "font": False,  # those of the browser: none is fetched
        "features": ["content.code.copy", "navigation.indexes", "navigation.top", "search.highlight"],
        "palette": [  # as the browser prefers, until a reader chooses
            {"media": f"(prefers-color-scheme{preferred})", "scheme": scheme}
            | {"toggle": {"icon": f"lucide/{icon}", "name": f"Switch to {following}"}}
            for preferred, scheme, icon, following in (
                ("", "default", "sun-moon", "light"),
                (": light", "default", "sun", "dark"),
                (": dark", "slate", "moon", "the colours of the system"),
            )
        ],
    },
    "plugins": ["search"],
}


def stage(pages: Path) -> None:
    """Write the pages, as the site has them, and what the viewer of the API needs."""
    found = [HOME]
    for source in found:  # grows: each page adds those that it links to
        target = pages / staged(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".png":
            shutil.copy(ROOT / source, target)
            continue
        text = (ROOT / source).read_text("utf-8")
        if source == DOCUMENT:
            text = api_page(json.loads(text))
        elif source.suffix not in AS_THEY_ARE:
            text = f"# {source}\n\n~~~~~~{LANGUAGES.get(source.suffix, 'text')}\n{text}~~~~~~\n"
        elif source.suffix == ".md":
            more = dict.fromkeys([*linked(source, text), *companions(source)])
            found += [each for each in more if each not in found]
            text = CODE.sub(
                lambda span: span[0].replace(r"\|", "|"), text
            )  # in tables GitHub wants \|, Zensical |
            text = LINK.sub(partial(rewritten, source), text)
        target.write_text(text, "utf-8")
    (pages / "site.css").write_text(STYLE, "utf-8")
    stage_viewer(pages / VIEWER)


def linked(page: Path, text: str) -> Iterator[Path]:
    """The files of the repository that a page links to or shows. Zensical reports what is missing."""
    for name in [*(name for name, _ in LINK.findall(text)), *SHOWN.findall(text)]:
        path = Path(os.path.normpath(page.parent / name))
        if (ROOT / path).is_file():
            yield path


def rewritten(page: Path, link: re.Match[str]) -> str:
    name, anchor = link.groups()
    path = Path(os.path.normpath(page.parent / name))
    if not (ROOT / path).is_file():
        return link[0]
    return os.path.relpath(staged(path), page.parent) + anchor


def staged(source: Path) -> Path:
    """Where the page of a file is."""
    if source == DOCUMENT:
        return Path("docs/api.md")
    return source if source.suffix in AS_THEY_ARE else source.with_name(f"{source.name}.md")


# -- the API ----------------------------------------------------------------------------------------------


def api_page(document: dict[str, Any]) -> str:
    """A table of the routes, which search finds, and the way to the viewer."""
    rows = [
        f"| `{method.upper()}` | `{path}` | {operation.get('summary', '')} |"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return "\n".join(
        [
            "# The HTTP API\n",
            "Every route of the service. [Open the reference](viewer/index.html) with parameters, bodies,",
            "answers and errors of each, or download [openapi.json](viewer/openapi.json) for tools.\n",
            "| method | path | |\n|---|---|---|",
            *rows,
            "",
        ]
    )


def stage_viewer(folder: Path) -> None:
    """The files that the service serves at /docs, with addresses relative to this folder."""
    folder.mkdir()
    for packed in STATIC.glob("swagger-ui*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    for path in (*STATIC.glob("swagger-ui*.txt"), STATIC / "docs.css", STATIC / "icon.svg", ROOT / DOCUMENT):
        shutil.copy(path, folder)
    script = (STATIC / "docs.js").read_text("utf-8").replace("/openapi.json", "openapi.json")
    script = script.replace("deepLinking", "supportedSubmitMethods: [],\n  deepLinking")  # no service is here
    (folder / "docs.js").write_text(script, "utf-8")
    page = (STATIC / "docs.html").read_text("utf-8").replace("/ui/static/", "").replace('.gz"', '"')
    page = page.replace('<a href="/ui">Operators</a>', '<a href="../api.html">Documents</a>')
    (folder / "index.html").write_text(page.replace('"/openapi.json"', '"openapi.json"'), "utf-8")


# -- navigation -------------------------------------------------------------------------------------------


def navigation() -> list[Any]:
    """The parts of the table of documents, each with its pages."""
    _, *parts = PART.split((ROOT / INDEX).read_text("utf-8"))
    nav: list[Any] = [{"Overview": str(HOME)}, {"Documents": str(INDEX)}]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        pages = linked(INDEX, "\n".join(ROW.findall(text)))
        nav.append({name: [entry(page) for page in dict.fromkeys(pages)]})
    return nav


def entry(page: Path) -> str | dict[str, list[str]]:
    """A page, or the pages of its folder below that."""
    if not (beside := list(companions(page))):
        return str(staged(page))
    title = (ROOT / page).read_text("utf-8").partition("\n")[0].removeprefix("# ")
    return {title: [str(page), *map(str, beside)]}


def companions(page: Path) -> Iterator[Path]:
    """The other pages of a folder of documents, for its README.md."""
    if page.parts[0] == "docs" and page.name == HOME.name and page != INDEX:
        found = sorted((ROOT / page).parent.glob("*.md"))
        yield from (each.relative_to(ROOT) for each in found if each.name != HOME.name)


def main(target: Path) -> int:
    """Build the site in place of what ``target`` has. Returns the exit code of Zensical."""
    with tempfile.TemporaryDirectory() as top:
        stage(Path(top, "pages"))
        config = Path(top, "mkdocs.yml")  # JSON is YAML
        config.write_text(json.dumps(CONFIG | {"site_dir": "site", "nav": navigation()}), "utf-8")
        zensical = Path(sys.executable).with_name("zensical")
        code = subprocess.run(
            [zensical, "build", "--strict", "--config-file", config], check=False
        ).returncode
        if code == 0:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(top, "site"), target)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
