"""The Python client beside hvac on the Vault API of the same service, and what each costs to install.

One thread, one connection, one call after the other: an encryption and a decryption of 16 B each. Wheels are
fetched before any installation is timed.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import hvac
from benchmarks import report, running
from benchmarks.measure import Contender, Reading, Series, in_turn, say
from benchmarks.report import Scale

from kms_client import Client
from support.wheels import build, copy_sources

Ways = Mapping[str, Callable[[], Reading]]
PAIRS: Final = 500
CONTEXT: Final = "env=prod,service=api"
SECRET: Final = b"sixteen bytes ok"
_CALLS: Final = Scale(key="rate", unit="calls a second", digits=0, more_is_better=True)
_INSTALLS: Final = Scale(unit="s")
_PEERS: Final = ("hvac", "boto3")


def main() -> None:
    options = report.options("client", "The Python client beside hvac and boto3.", runs=7, budget_s=180.0)
    budget = options.budget(2)
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir="/dev/shm") as name:
        folder = Path(name)
        with (
            running.service(folder) as service,
            Client(service.url) as ours,
        ):
            theirs = hvac.Client(url=service.url, token="none")  # noqa: S106 -- dev needs no token
            ways = {
                "kms_client, the API": functools.partial(_by_client, ours),
                "hvac, the Vault API": functools.partial(_by_hvac, theirs),
            }
            called = _in_turn(ways, options, budget.share())
        title = "encrypt and decrypt, 16 B, one thread"
        calls = report.table(title, options.keep(title, called), _CALLS)
        parts = [calls, *_installs(folder, options, budget.share())]
    options.write(parts)


def _in_turn(
    ways: Mapping[str, Callable[[], Reading]], options: report.Options, seconds: float
) -> list[Series]:
    return in_turn([Contender(name, run) for name, run in ways.items()], options.plan, seconds)


def _by_client(kms: Client) -> Reading:
    began = time.perf_counter()
    for _ in range(PAIRS):
        sealed = kms.encrypt(SECRET, context=CONTEXT)
        if kms.decrypt(sealed.ciphertext, context=CONTEXT).plaintext != SECRET:
            raise RuntimeError("a plaintext is wrong")
    return {"rate": 2 * PAIRS / (time.perf_counter() - began)}


def _by_hvac(client: hvac.Client) -> Reading:
    """The context is bound as associated data, which is what Vault calls it."""
    transit, plain, bound = client.secrets.transit, _text(SECRET), _text(CONTEXT.encode())
    began = time.perf_counter()
    for _ in range(PAIRS):
        made = transit.encrypt_data(name="default", plaintext=plain, associated_data=bound)
        sealed = made["data"]["ciphertext"]
        opened = transit.decrypt_data(name="default", ciphertext=sealed, associated_data=bound)
        if opened["data"]["plaintext"] != plain:
            raise RuntimeError("a plaintext is wrong")
    return {"rate": 2 * PAIRS / (time.perf_counter() - began)}


def _text(data: bytes) -> str:
    return b64encode(data).decode()


# -- installations ----------------------------------------------------------------------------------------


def _installs(folder: Path, options: report.Options, seconds: float) -> Sequence[str]:
    sources = copy_sources(folder / "sources")
    (wheel,) = build(sources / "client", folder / "dist")
    wanted = {"kms-service-client": str(wheel), "the same with async": f"{wheel}[async]"}
    wanted |= {name: name for name in _PEERS}
    wheels = folder / "wheels"
    try:
        _pip("download", "--only-binary", ":all:", "--dest", str(wheels), *wanted.values())
    except subprocess.CalledProcessError as exc:
        say(f"SKIPPED installations: wheels cannot be fetched: {exc.stderr[-300:]}")
        return []
    ways = {name: functools.partial(_installed, wheels, what) for name, what in wanted.items()}
    found = _in_turn(ways, options, seconds)
    title = "pip install into an empty folder, from wheels on this machine"
    more = {"packages": _median("packages", 0), "MiB": _median("mib", 1)}
    return [report.table(title, options.keep(title, found), _INSTALLS, more=more)]


def _installed(wheels: Path, what: str) -> Reading:
    with tempfile.TemporaryDirectory(dir=wheels.parent) as name:
        began = time.perf_counter()
        _pip("install", "--no-index", "--find-links", str(wheels), "--target", name, what)
        seconds = time.perf_counter() - began
        sizes = [path.stat().st_size for path in Path(name).rglob("*") if path.is_file()]
        packages = len(list(Path(name).glob("*.dist-info")))
    return {"seconds": seconds, "mib": sum(sizes) / 1024**2, "packages": packages}


def _pip(*words: str) -> None:
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run(argv, check=True, capture_output=True, text=True, env=os.environ)


def _median(key: str, digits: int) -> report.Cell:
    def cell(series: Series) -> str:
        middle = series.median(key)
        return report.NONE if middle is None else f"{middle:.{digits}f}"

    return cell


if __name__ == "__main__":
    main()
