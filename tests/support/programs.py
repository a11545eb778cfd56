"""What others made and tests compare with: a missing program skips, which fails in CI (``ci_skips``)."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Final

import pytest

from kms_core.programs import tether
from support.waiting import until_up

_CACHE: Final = Path(__file__).parents[2] / ".cache"
_GO: Final = {  # module, version, folder of the command. All of them build with Go 1.24, as Debian 13 has it
    "helm": ("helm.sh/helm/v3", "v3.19.4", "cmd/helm"),
    "alertmanager": ("github.com/prometheus/alertmanager", "v0.28.1", "cmd/alertmanager"),
    "amtool": ("github.com/prometheus/alertmanager", "v0.28.1", "cmd/amtool"),
}
SAME_PACKAGE: Final = {  # a program, and the one that .ci/all names for the same package
    "age-keygen": "age",
    "epmd": "rabbitmq-server",
    "initdb": "pg_dump",
    "java": "javac",
    "mkfs": "mkfs.ext4",
    "promtool": "prometheus",
    "psql": "pg_dump",
    "ssh-agent": "ssh-add",
    "ssh-keygen": "ssh-add",
    "systemd-": "systemd-analyze",  # the rest of the name varies
    "unshare": "nsenter",
}
BUILD_LIMIT_S: Final = 1200
"""For the first test that needs a program of ``built_with_go``: it compiles some thousand packages."""


def program(name: str) -> str:
    """The path of a program on the PATH, or of a server where Debian puts those."""
    found = which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found:
        return found
    pytest.skip(f"{name} is not on the PATH{install_hint(name)}")


def venv_program(name: str) -> str:
    """The path of a program that a package of the development group carries, else of one on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else program(name)


def install_hint(name: str) -> str:
    """How to install a program, as the end of a sentence: what ``.ci/all`` says of it, or nothing."""
    lines = (_CACHE.parent / ".ci/all").read_text("utf-8").splitlines()
    asked = (line.partition("#")[0].split() for line in lines if line.startswith("needs "))
    packages = {command: " ".join(names) for _, command, *names in asked}
    found = packages.get(SAME_PACKAGE.get(name, name))
    return f": apt-get install {found}" if found else ""


def built_with_go(name: str) -> str:
    """The path of a program that Debian has not, or has too old. Built once, by ``go install``."""
    module, version, command = _GO[name]
    with locked_cache(f"{name}-{version}") as home:
        if not (home / name).exists():
            go = program("go")
            done = subprocess.run(
                [go, "install", f"{module}/{command}@{version}"],
                cwd=home,
                env=os.environ | {"GOBIN": str(home), "GOWORK": "off", "CGO_ENABLED": "0"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"{name} cannot be built: {done.stderr}")
    return str(home / name)


def tethered(*argv: object) -> list[str]:
    """The command of a program that dies with this process, even where that is killed (``tether``)."""
    return [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *map(str, argv)]


@contextmanager
def running(
    argv: Sequence[object],
    log: Path,
    is_up: Callable[[], object] = lambda: True,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the end of the block, from the time when it is up; ``log`` has what it says."""
    with log.open("wb") as output:
        process = tether.spawn([str(word) for word in argv], env=env or {}, output=output)
    try:
        until_up(process, is_up, log.read_text)
        yield process
    finally:
        process.kill()
        process.wait()


def from_npm(name: str, file: str, *packages: str) -> Path:
    """What packages of npm bring, by its pattern in the folder ``.cache/<name>``. Fetched once."""
    npm = which("npm")
    with locked_cache(name) as folder:
        if npm and not list(folder.glob(file)):
            words = ("install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *packages)
            subprocess.run([npm, *words], check=False, capture_output=True, timeout=120)
        for found in folder.glob(file):
            return found
    pytest.skip(f"npm could not fetch {' and '.join(packages)}")


@contextmanager
def locked_cache(name: str) -> Iterator[Path]:
    """The folder ``.cache/<name>``, for one test process at a time: others wait while the first fetches."""
    folder = _CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@contextmanager
def image_store_environ() -> Iterator[dict[str, str]]:
    """A kept store of images beside that of the machine, for one test process at a time: its variables.

    It is outside of the tree, since it has devices and files of other users. What killed runs left goes.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kms-service"
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "storage.conf"
    with (home / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings.write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/images"\nrunroot = "{home}/images-run"\n'
        )
        store = {"CONTAINERS_STORAGE_CONF": str(settings)}
        subprocess.run(
            [program("buildah"), "rm", "--all"], env=os.environ | store, check=True, capture_output=True
        )
        yield store
