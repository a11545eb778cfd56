"""Runs both commands of the README, its blocks and the first tier of the tests as on other machines.

Each machine is a fresh clone of HEAD with a new HOME, one after another:

- ``debian``: root on Debian's own Python, /usr/bin/python3.
- ``user``: a user who is not root, in a path with a space and a letter that is not ASCII, with the
  environment of ``USER_ENVIRON``, umask 077, temporary files in memory and at most 1,024 open files.
- ``3.12``, ``3.13``, …: each other Python that is found. One above ``NEWEST`` is reported and makes
  nothing red.

A machine that this one cannot be is skipped by name. By hand, before a release: it takes up to an hour.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

ROOT: Final = Path(__file__).parents[1]
LOGS: Final = ROOT / ".cache/machines"
WHEELS: Final = ROOT / ".cache/wheels"
DEBIAN: Final = Path("/usr/bin")
MEMORY: Final = Path("/dev/shm")  # noqa: S108 -- a file system, and no name of a file
OLDEST: Final = (3, 11)
NEWEST: Final = (3, 13)
MOST: Final = 5
LIMIT_S: Final = 60 * 60
READY_S: Final = 10 * 60
BLOCKS_S: Final = 2 * 60
END_S: Final = 60
PORT: Final = 8082
OPEN_FILES: Final = 1024
USER: Final = "nobody"  # where root runs this
USER_FOLDERS: Final = "Ana María/my code"
USER_ENVIRON: Final = {"LC_ALL": "C", "TZ": "Asia/Kolkata"}
KEPT: Final = re.compile(r"PATH|PIP_\w+|\w+_(?:CERT|CERT_FILE|CERT_DIR|CA_BUNDLE|CA_CERTS|PROXY)|\w+_proxy")
BLOCK: Final = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOOLS: Final = ("curl",)


@dataclass(frozen=True)
class Python:
    """An interpreter that can make a virtual environment."""

    path: Path
    version: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Machine:
    """An interpreter, and whether a user who is not root runs it in folders with unusual names."""

    name: str
    python: Python
    is_user: bool = False

    @property
    def is_required(self) -> bool:
        return self.python.version[:2] <= NEWEST


@dataclass(frozen=True)
class Place:
    """The home, the clone and the folder for temporary files of a machine, and its environment."""

    home: Path
    clone: Path
    environ: dict[str, str]
    is_user: bool
    user: str | None
    """The user who runs the programs, if that is not who runs this."""

    def start(self, *argv: str, log: BinaryIO) -> subprocess.Popen[bytes]:
        """Start a program in the clone, in a session of its own."""
        return subprocess.Popen(
            ["bash", "-c", f'{f"ulimit -n {OPEN_FILES};" if self.is_user else ""} exec "$@"', "bash", *argv],
            cwd=self.clone,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            user=self.user,
            group=pwd.getpwnam(self.user).pw_gid if self.user else None,
            extra_groups=[] if self.user else None,
            umask=0o077 if self.is_user else -1,
        )


def pythons() -> list[Python]:
    """The interpreters on the PATH, in /usr/bin and of pyenv, oldest first."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin")
    path = os.pathsep.join([os.environ["PATH"], *map(str, pyenv)])
    argv = ["bash", "-c", "source scripts/venv.sh && pythons"]
    done = subprocess.run(
        argv, cwd=ROOT, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return [Python(Path(name), tuple(map(int, version.split(".")))) for version, _, name in lines]


def machines() -> Iterator[Machine]:
    """The machines that this one can be; what it cannot be is printed with the reason."""
    found = pythons()
    debian = next((each for each in found if each.path.parent.resolve() == DEBIAN), None)
    is_root = os.geteuid() == 0
    if is_root and debian:
        yield Machine("debian", debian)
    else:
        say(f"skipped: debian: {'no Python in /usr/bin can make a .venv' if is_root else 'not root'}")
    if shared := debian or (found[0] if found and not is_root else None):
        yield Machine("user", shared, is_user=True)
    else:
        say("skipped: user: no Python in /usr/bin, which other users may run")
    versions = {each.version[:2]: each for each in reversed(found)}
    for version in sorted({*versions, *((OLDEST[0], minor) for minor in range(OLDEST[1], NEWEST[1] + 1))}):
        name = ".".join(map(str, version))
        if version not in versions:
            say(f"skipped: {name}: not found")
        elif not (is_root and debian and debian.version[:2] == version):
            yield Machine(name, versions[version])


def main(names: Sequence[str]) -> int:
    """Run the machines of these names, or all. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    LOGS.mkdir(parents=True, exist_ok=True)
    WHEELS.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", PORT))
        except OSError:
            sys.exit(f"kms: error: port {PORT} is in use, which the README's blocks need: stop what holds it")
    asked = [each for each in machines() if not names or each.name in names]
    if unknown := set(names) - {each.name for each in asked}:
        sys.exit(f"kms: error: no such machine here: {', '.join(sorted(unknown))}")
    until, red = time.monotonic() + LIMIT_S, []
    for machine in asked[:MOST]:
        begun, problems = time.monotonic(), _run(machine, until)
        took_s = time.monotonic() - begun
        say(f"{machine.name}: Python {machine.python}: {'; '.join(problems) or 'green'} in {took_s:.0f} s")
        if problems and machine.is_required:
            red.append(machine.name)
    for machine in asked[MOST:]:
        say(f"skipped: {machine.name}: at most {MOST} machines in one run; name it to run it")
    passed = len(asked[:MOST]) - len(red)
    print(f"{passed} passed, {len(red)} failed", flush=True)  # noqa: T201 -- a program
    return 1 if red else 0


def _run(machine: Machine, until: float) -> list[str]:
    """What went wrong on a machine. Its folder stays for a look if anything did."""
    folder = Path(tempfile.mkdtemp(prefix=f"kms-{machine.name}-"))
    folder.chmod(0o755)
    memory = _temporary(machine)
    log_path = LOGS / f"{machine.name}.log"
    problems = ["it did not end"]
    try:
        with log_path.open("wb") as log:
            place = _settled(machine, folder, memory)
            problems = _readme(place, log, until)
            code = _ended(place.start("scripts/test", log=log), until)
        if code != 0:
            problems.append(f"scripts/test ended with {code}")
        say(f"{machine.name}: {_last_line(log_path)}")
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        if problems:
            problems.append(f"see {log_path} and {folder}")
        else:
            shutil.rmtree(folder)
    return problems


def _temporary(machine: Machine) -> Path:
    """A folder for temporary files, which other users may enter as /tmp; of a user's machine in memory."""
    is_mounted = os.path.ismount(MEMORY)
    if machine.is_user and not is_mounted:
        say(f"skipped: {machine.name}: temporary files in memory: no {MEMORY}")
    folder = Path(tempfile.mkdtemp(prefix="kms-", dir=MEMORY if machine.is_user and is_mounted else None))
    folder.chmod(0o711)
    return folder


def _settled(machine: Machine, folder: Path, memory: Path) -> Place:
    """A fresh clone and an empty home, owned by the user who runs them, as is the cache of wheels."""
    user = USER if machine.is_user and os.geteuid() == 0 else None
    home = folder / USER_FOLDERS.partition("/")[0] if machine.is_user else folder / "home"
    clone = folder / USER_FOLDERS / "kms" if machine.is_user else folder / "kms"
    home.mkdir()
    clone.parent.mkdir(exist_ok=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environ = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    environ |= {"HOME": str(home), "PYTHON": str(machine.python.path), "TMPDIR": str(memory)}
    environ |= {"PIP_CACHE_DIR": str(WHEELS), "LANG": "C.UTF-8"}
    if machine.is_user:
        environ |= USER_ENVIRON
    if user:
        environ |= {"USER": user, "LOGNAME": user}
        environ["PATH"] += os.pathsep + os.defpath  # where no folder of ours is open to others
    for each in (folder, memory, WHEELS) if os.geteuid() == 0 else ():
        subprocess.run(["chown", "-R", f"{user or 'root'}:", str(each)], check=True)
    return Place(home, clone, environ, machine.is_user, user)


def _readme(place: Place, log: BinaryIO, until: float) -> list[str]:
    """Run ``scripts/up`` and, while it serves, the blocks of the README in one shell, as they are written."""
    output_path = place.clone.parent / "up.log"
    with output_path.open("wb") as output:
        process = place.start("scripts/up", log=output)
    try:
        if not _is_ready(process, output_path, min(until, time.monotonic() + READY_S)):
            return ["scripts/up did not get ready"]
        blocks = BLOCK.findall((place.clone / "README.md").read_text("utf-8"))
        missing = {tool for tool in TOOLS if not shutil.which(tool, path=place.environ["PATH"])}
        runnable = [text for text in blocks if not missing & set(re.findall(r"\w+", text))]
        if len(runnable) < len(blocks):
            count, names = len(blocks) - len(runnable), ", ".join(sorted(missing))
            say(f"skipped: {count} blocks of the README: {names} is missing")
        script = "\n".join(['set -euo pipefail; export PATH="$PWD/.venv/bin:$PATH"', *runnable])
        code = _ended(place.start("bash", "-c", script, log=log), min(until, time.monotonic() + BLOCKS_S))
        return [f"the README's blocks ended with {code}"] if code else []
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _ended(process, time.monotonic() + 60)
        log.write(output_path.read_bytes())
        log.flush()


def _is_ready(process: subprocess.Popen[bytes], output_path: Path, until: float) -> bool:
    while time.monotonic() < until and process.poll() is None:
        if b"kms: ready" in output_path.read_bytes():
            return True
        time.sleep(0.2)
    return False


def _ended(process: subprocess.Popen[bytes], until: float) -> int | str:
    """The exit code of a program. When the time is over, or at a signal, it is asked to end, then killed."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "no end in time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # what scripts/test runs is in a group of its own
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = re.findall(rb"^\d+ passed, \d+ failed.*$", log.read_bytes(), re.MULTILINE)
    return lines[-1].decode() if lines else "no test ran"


def say(text: str) -> None:
    print(f"kms: {text}", file=sys.stderr, flush=True)  # noqa: T201 -- a program


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
