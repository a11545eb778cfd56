import gzip
import hashlib
import zipfile
from pathlib import Path
from typing import Final

import pytest
from hatchling.builders.wheel import WheelBuilder

from kms_api.ui.render import STATIC, STATIC_FILES

ROOT: Final = Path(__file__).parents[3]
VENDORED: Final = {  # swagger-ui-dist 5.35.0 of the npm registry: docs/adr/0025-api-viewer.md
    "swagger-ui-bundle.js.gz": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui-bundle.js.LICENSE.txt": "37eb6e7e59aed57b2c1acf076574b818ea07b74265717e0bd67b59e0baf9abbb",
    "swagger-ui.LICENSE.txt": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "swagger-ui.NOTICE.txt": "0d20d1adef18aee3f40dd258172155521ce702ac445cb5f7b7d60ed32dad2fb2",
    "swagger-ui.css.gz": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
}


@pytest.mark.parametrize("name", VENDORED)
def test_vendored_file_is_unchanged(name: str) -> None:
    content = (STATIC / name).read_bytes()
    if name.endswith(".gz"):
        content = gzip.decompress(content)

    assert hashlib.sha256(content).hexdigest() == VENDORED[name]


def test_static_files_are_served_or_licences() -> None:
    texts = {name for name in VENDORED if name.endswith(".txt")}

    assert {path.name for path in STATIC.iterdir()} == STATIC_FILES.keys() | texts | {"docs.html"}


def test_viewer_has_nothing_inline_and_names_no_other_host() -> None:
    page = (STATIC / "docs.html").read_text()

    assert page.count("<script src=") == page.count("<script")
    assert "<style" not in page
    assert "http" not in page + (STATIC / "docs.js").read_text() + (STATIC / "docs.css").read_text()


def test_wheel_contains_pages(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    folder = ROOT / "src/kms_api/ui"
    files = {
        f"kms_api/ui/{path.relative_to(folder)}"
        for path in folder.rglob("*.*")
        if "__pycache__" not in str(path)
    }

    assert files <= set(zipfile.ZipFile(wheel).namelist())
