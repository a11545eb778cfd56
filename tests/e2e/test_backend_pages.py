"""The commands of docs/backends.md, run against a real server, make a key that the settings there can use."""

import os
import re
from pathlib import Path
from typing import Final

import pytest

from kms_core import keyring
from kms_core.settings.load import load
from support import openbao, pages
from support.openbao import Bao

PAGE: Final = Path(__file__).parents[2] / "docs/backends.md"


def blocks_to_run(heading: str, language: str) -> str:
    """The first code block of this language below a heading."""
    section = PAGE.read_text().partition(f"\n## {heading}")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("heading", ["transit", "vault-kv"])
def test_the_page_sets_a_backend_up(tmp_path: Path, heading: str) -> None:
    server, token = Bao(tmp_path, mounts=False), tmp_path / "token"
    environ = {
        "BAO_ADDR": server.url,
        "BAO_TOKEN": openbao.ROOT_TOKEN,
        "TOKEN_FILE": str(token),
        "HOME": str(tmp_path),
        "PATH": f"{Path(openbao.binary()).parent}:{os.environ['PATH']}",
    }
    try:
        pages.said(blocks_to_run(heading, "sh"), tmp_path, environ)
        toml = blocks_to_run(heading, "toml").replace("prod_backend", "dev_backend")
        toml = re.sub(r'address = ".*"', f'address = "{server.url}"', toml)
        toml = re.sub(r'token_file = ".*"', f'token_file = "{token}"', toml)
        (tmp_path / "kms.toml").write_text(toml)
        backend = keyring.build(load(tmp_path / "kms.toml", {"HOME": str(tmp_path)})).default.backend

        assert backend.health_check().healthy
        assert backend.rotate().version == "2"
    finally:
        server.close()
