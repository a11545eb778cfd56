"""A start with a key that its backend does not have is refused; a backend that is away only degrades."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kms_core import key_opening
from kms_protocol.errors import EXIT_CONFIGURATION, ConfigurationError
from support.openbao import bao
from support.ports import free_port
from support.service import PROGRAMS, Service

SETTINGS: Final = """
[kms.transit]
address = "{address}"
token = "{token}"
[kms.keys]
remote = "transit:{key}"
"""


def install(folder: Path, key: str | None = None, address: str | None = None) -> Service:
    """One whose second key is in OpenBao, by default under a name that it has."""
    server = bao()
    settings = SETTINGS.format(
        address=address or server.url, token=server.token(), key=key or server.new_key()
    )
    return Service(folder, settings, "unix:///nonexistent/valkey.sock")


def test_a_missing_key_stops_the_check(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no-such-key"):
        key_opening.check(install(tmp_path, "no-such-key").settings)


def test_keys_that_are_there_pass_and_so_does_a_backend_that_is_away(tmp_path: Path) -> None:
    key_opening.check(install(tmp_path / "there").settings)
    key_opening.check(install(tmp_path / "away", address=f"http://127.0.0.1:{free_port()}").settings)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_starts_with_a_missing_key(tmp_path: Path, program: str) -> None:
    service = install(tmp_path, "no-such-key")
    argv = [sys.executable, "-P", "-m", PROGRAMS[program]]
    done = subprocess.run(argv, env=service.environ, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == EXIT_CONFIGURATION
    assert "no-such-key" in done.stderr
