"""The commands of docs/sealed-keys.md, in their order, with a real OpenBao, a service and stock age."""

import os
import re
from pathlib import Path
from typing import Final

from kms_core.settings.load import load as load_settings
from kms_core.settings.model import KeySection
from support import openbao, pages, programs
from support.cli.fixtures import BIN
from support.openbao import Bao
from support.ports import free_port

PAGE: Final = "docs/sealed-keys.md"
SETTINGS: Final = re.findall(r"```toml\n(.*?)```", (pages.ROOT / PAGE).read_text(), re.DOTALL)


def log(folder: Path) -> str:
    """The end of what the service printed, if it was started."""
    path = folder / "up.log"
    return path.read_text()[-2000:] if path.exists() else ""


def test_the_page_works_as_written(tmp_path: Path) -> None:
    programs.program("age")
    folder, token, state = tmp_path / "bao", tmp_path / "token", tmp_path / "state"
    folder.mkdir()
    server = Bao(folder, mounts=False)
    toml, _ = SETTINGS
    for setting, value in {"address": server.url, "token_file": token, "state_dir": state}.items():
        toml, count = re.subn(rf'^{setting} = ".*"', f'{setting} = "{value}"', toml, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "kms.toml").write_text(toml)
    port = free_port()
    environ = {
        "BAO_ADDR": server.url,
        "BAO_TOKEN": openbao.ROOT_TOKEN,
        "TOKEN_FILE": str(token),
        "HOME": str(tmp_path),
        "KMS_CONFIG": str(tmp_path / "kms.toml"),
        "KMS_STATE_DIR": str(state),
        "KMS_PORT": str(port),
        "KMS_SERVICE_URL": f"http://127.0.0.1:{port}",
        "PATH": f"{Path(openbao.binary()).parent}:{BIN}:{os.environ['PATH']}",
    }
    script = "\n".join(
        ["trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT", *pages.blocks_to_run(PAGE, "sh")]
    )
    here = tmp_path / "here"
    here.mkdir()
    try:
        done = pages.bash(script, here, environ, 240)
    finally:
        server.close()

    assert done.returncode == 0, f"{done.stderr}\n{log(here)}"
    assert "default (age, sealed by root) wraps and unwraps" in done.stdout
    assert "spool.key is sealed by root and opens" in done.stdout


def test_the_settings_of_a_root_in_cosmian_are_accepted(tmp_path: Path) -> None:
    with_transit, with_cosmian = SETTINGS
    path = tmp_path / "kms.toml"
    path.write_text(with_transit.split("[kms.transit]")[0] + with_cosmian)

    kms = load_settings(path, {"PROVISIONING_ENV": "prod"}).kms

    root = kms.keys["root"]
    assert isinstance(root, KeySection)
    assert (kms.prod_backend, root.use) == ("age", "seal")
