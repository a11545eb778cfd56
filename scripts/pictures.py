"""Writes what README.md shows of the service, taken from an install that runs: the terminal and ``/ui``.

``scripts/pictures`` runs it, with the tests' helpers on the path. The commands of the terminal are those of
README.md; their output is replaced. The pictures are docs/ui-light.png and docs/ui-dark.png.
"""

import os
import re
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from support.chromium import SCHEMES, chromium
from support.credentials import SecuredService

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
TERMINAL: Final = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)
WIDTH: Final = 1280  # pixels of a picture, as is HEIGHT
HEIGHT: Final = 720
PICTURE_BYTES: Final = 150_000
JOBS: Final[Mapping[str, Sequence[int]]] = {"archive": [400], "billing": [40, 12, 250], "web": [3, 8]}
"""The tenants, and the number of items of each of their jobs."""
OPEN_JOBS: Final[Mapping[str, Sequence[int]]] = {"archive": [300] * 30, "web": [300] * 6}
"""Likewise, of jobs that take longer than the pictures."""
Shell = Callable[[str], str]


def shell(folder: Path, environ: Mapping[str, str]) -> Shell:
    """Run a command as at a terminal in ``folder``; returns stdout and stderr as they came."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"HOME": str(folder), "LANG": "C.UTF-8", **environ, "PATH": path}

    def output_of(command: str) -> str:
        argv = ["bash", "-c", f"exec 2>&1; {command}"]
        return subprocess.run(
            argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        ).stdout

    return output_of


def terminal(text: str, run: Shell) -> str:
    """The lines of a terminal again: each command of ``text``, followed by what it prints now."""
    commands = [line for line in text.splitlines() if line.startswith("$ ")]
    return "".join(f"{line}\n{run(line.removeprefix('$ '))}" for line in commands)


def _submit(service: SecuredService, jobs: Mapping[str, Sequence[int]]) -> list[tuple[str, dict[str, str]]]:
    """Submit jobs; returns the id of each with the credential of its tenant."""
    item = {"plaintext": b64encode(b"x").decode(), "context": "env=prod"}
    submitted = []
    for tenant, sizes in jobs.items():
        own = service.token_header("*", tenant=tenant)
        for size in sizes:
            job = {"kind": "encrypt", "items": [item] * size}
            submitted.append((service.post("/jobs", job, headers=own).json()["job_id"], own))
    return submitted


def _run(service: SecuredService, jobs: Mapping[str, Sequence[int]]) -> None:
    """Submit jobs, and wait until all have ended."""
    for job_id, own in _submit(service, jobs):
        while service.get(f"/jobs/{job_id}?wait=10", headers=own).json()["state"] in {"queued", "running"}:
            pass


def _pictures(service: SecuredService, folder: Path) -> None:
    """Take the overview as an operator of all tenants sees it, in both colours."""
    token = service.new_token("*,metrics", tenant="billing")[1]
    with chromium(folder) as browser:
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.resize(WIDTH, HEIGHT)
        browser.open(f"{service.url}/ui/login")
        browser.evaluate(f"document.getElementById('token').value = {token!r}")
        browser.submit("form.login")
        _submit(service, OPEN_JOBS)
        for scheme in SCHEMES:
            browser.appear(scheme)
            browser.open(f"{service.url}/ui")
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
            taken = b64decode(browser.call("Page.captureScreenshot", clip=clip)["data"])
            target = ROOT / f"docs/ui-{scheme}.png"
            target.write_bytes(taken)
            if len(taken) > PICTURE_BYTES:
                sys.exit(f"kms: error: {target} has {len(taken)} bytes, above {PICTURE_BYTES}")


def main(*words: str) -> None:
    """Write the terminal of README.md, and the pictures unless ``--terminal`` is given."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kms-pictures-")))
        service = stack.enter_context(SecuredService(folder / "install")).start()
        here, token = folder / "here", folder / "token"
        here.mkdir()
        token.write_text(service.new_token("*")[1])
        token.chmod(0o600)
        run = shell(here, {"KMS_SERVICE_URL": service.url, "KMS_TOKEN_FILE": str(token)})
        text = README.read_text("utf-8")
        README.write_text(TERMINAL.sub(lambda found: terminal(found[1], run), text, count=1), "utf-8")
        if "--terminal" not in words:
            _run(service, JOBS)
            _pictures(service, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
