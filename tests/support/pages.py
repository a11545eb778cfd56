"""Pages of the documents: their blocks of commands, and an install and a shell to run them in."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from support.age_plugin import plugin_dir, sops
from support.programs import program
from support.service import Service

ROOT: Final = Path(__file__).parents[2]
BLOCK: Final = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(sh|nu)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOOLS: Final = ("age", "curl", "pg_dump", "ssh-agent", "ssh-keygen")
TIMEOUT_S: Final = 120


def blocks_to_run(page: str, language: str) -> list[str]:
    """The blocks of a page that are run."""
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [text for mark, kind, text in found if mark == "run" and kind == language]


@contextmanager
def workspace(folder: Path, redis: str) -> Iterator[Service]:
    """Run a service as ``scripts/up`` starts it, with files where pages name them."""
    with Service(folder, redis=redis) as service:
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


def run(
    script: str, folder: Path, service: Service, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in ``folder/here``; the home is ``folder``, and ``folder/temporary`` has temporary files.

    First on the PATH are the programs of ``folder/bin``, then those of this tree. Skips, or fails in CI, if a
    program of ``TOOLS`` that the script calls is missing. ``more`` has further variables.
    """
    for name in TOOLS:
        if re.search(rf"\b{name} ", script):
            program(name)
    tools = plugin_dir(folder / "bin")
    (tools / "sops").symlink_to(sops())
    for made in (folder / "here", folder / "temporary"):
        made.mkdir(exist_ok=True)
    environ = service.environ | {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "KMS_SERVICE_URL": service.url,
        "KMS_BROKER_URL": service.settings.kms.redis.broker_url,
        "TMPDIR": str(folder / "temporary"),
    }
    return bash(localized(script, service), folder / "here", environ | dict(more or {}))


def bash(
    script: str, folder: Path, environ: Mapping[str, str], limit_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a script that ends with its first command that fails, without stdin."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def said(script: str, folder: Path, environ: Mapping[str, str], limit_s: float = TIMEOUT_S) -> str:
    """What a script prints; fails with all that it said if it fails."""
    done = bash(script, folder, environ, limit_s)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout
