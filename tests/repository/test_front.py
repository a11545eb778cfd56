"""What README.md shows of the service: a terminal as commands print it now, pictures in both colours."""

import re
import runpy
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from support.cli.fixtures import RunningService

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text("utf-8")
PICTURE_BYTES: Final = 150_000
PNG: Final = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/pictures.py")))


def test_the_terminal_of_the_readme_is_what_the_commands_print(
    script: SimpleNamespace, real_service: RunningService, tmp_path: Path
) -> None:
    (block,) = re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert 5 <= len(block.splitlines()) <= 8

    assert script.terminal(block, script.shell(tmp_path, {"KMS_SERVICE_URL": real_service.url})) == block


def test_the_page_is_shown_in_both_colours_by_small_pictures() -> None:
    shown = re.findall(r'\bsrc(?:set)?="([^"]+)"', README)
    sizes = set()
    for name in shown:
        data = (ROOT / name).read_bytes()
        assert data.startswith(PNG)
        assert len(data) <= PICTURE_BYTES, name
        sizes.add(struct.unpack(">II", data[16:24]))

    assert sorted(shown) == ["docs/ui-dark.png", "docs/ui-light.png"]
    assert len(sizes) == 1
