"""Small wheels, an index of them on 127.0.0.1, and lock files that name them: what pip is tested with.

And the distributions of this project, built from a copy of its sources.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from support.http_servers import served_files

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = ("pyproject.toml", "README.md", "NOTICE", "client", "src")
BUILT_AT: Final = "1767225600"


def make_wheel(folder: Path, name: str, version: str, *metadata: str, source: Path | None = None) -> Path:
    """Write a wheel with one module of its name; ``metadata`` are lines such as ``Requires-Dist: b``.

    With the path of its ``source`` it is an editable one, as hatchling writes them.
    """
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata]
    files = {
        f"{name}.py": f"version = {version!r}\n",
        **({} if source is None else {f"_{name}.pth": str(source)}),
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(path, text)
    return made


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def lock(path: Path, *wheels: Path) -> Path:
    """Write a lock file that names these wheels by version and SHA-256."""
    pins = ([*wheel.name.split("-")[:2], hashlib.sha256(wheel.read_bytes()).hexdigest()] for wheel in wheels)
    path.write_text("".join(f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in pins))
    return path


@contextmanager
def index_environ(folder: Path) -> Iterator[dict[str, str]]:
    """Serve ``folder``/<project>/<wheels> by PEP 503; the environment in which pip uses this index only."""
    with served_files(folder) as url:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "KMS_"))}
        own = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "no_proxy": "127.0.0.1"}
        yield kept | own | {"PIP_INDEX_URL": f"{url}/"}


# -- the distributions of this project --------------------------------------------------------------------


def copy_sources(folder: Path, *names: str) -> Path:
    """Copy what the distributions are built from, or ``names`` of it, without caches and version control."""
    folder.mkdir()
    for name in names or SOURCES:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(sources: Path, folder: Path, *targets: str, built_at: str = BUILT_AT) -> list[Path]:
    """Build the project in ``sources`` as hatchling does for pip: ``targets`` are ``wheel`` and ``sdist``."""
    argv = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    for target in targets or ("wheel",):
        done = subprocess.run(
            [*argv, "--target", target],
            cwd=sources,
            env=os.environ | {"SOURCE_DATE_EPOCH": built_at},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.iterdir())
