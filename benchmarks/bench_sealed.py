"""An Age key whose file a key in OpenBao has sealed, against one with a plain file; calls are counted.

Both services run in this process and share it in turn. OpenBao's own audit log has two lines for each call.
"""

import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Scale

from kms_core import key_opening
from kms_core.auth.policy import Principal
from kms_core.container import build
from kms_core.observability import logs
from kms_core.service import Kms
from kms_protocol.context import Context
from support import sealed_keys
from support.openbao import Bao
from support.service import Service

PAIRS: Final = 5_000  # an encryption and a decryption each
CONTEXT: Final = Context.parse("env=prod,service=api")
WHO: Final = Principal("bench")
_SCALE: Final = Scale(unit="µs a call", factor=1e6, digits=1)


def main() -> None:
    options = report.options("sealed", "A sealed and a plain Age key, in turn.", runs=10, budget_s=120.0)
    logs.configure("error", json=True)
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as name:
        folder, log = Path(name), Path(name, "bao", "audit.log")
        log.parent.mkdir()
        server = Bao(log.parent, audit=log)
        try:
            plain = install(folder / "plain")
            sealed = install(folder / "sealed", sealed_keys.root_settings(server))
            sealed_keys.seal(sealed, "default", sealed_keys.age_file(sealed))
            begun = _calls(log)
            key_opening.begin(sealed.settings)
            opened = _calls(log) - begun
            services = {"sealed": kms_of(sealed), "plain": kms_of(plain)}
            found = in_turn(
                [Contender(name, lambda kms=kms: run(kms)) for name, kms in services.items()],  # type: ignore[misc]  # the default is the service
                options.plan,
                options.budget_s,
            )
            later = _calls(log) - begun - opened
        finally:
            server.close()
    runs = max(len(series.readings) + series.dropped for series in found)
    title = "encrypt and decrypt, 16 B, in process"
    table = report.table(title, options.keep(title, found), _SCALE)
    options.note("calls", "after the start", {"calls": later})
    about = (
        f"{2 * PAIRS:,} operations a run. Calls to OpenBao: {opened} at start, {later} in the at least "
        f"{2 * PAIRS * runs:,} operations after it."
    )
    options.write([table, about])


def install(folder: Path, settings: str = "") -> Service:
    """An install without processes, and without Redis."""
    return Service(folder, settings, "unix:///nonexistent/valkey.sock")


def kms_of(service: Service) -> Kms:
    """The service of an install in this process."""
    return build(service.settings, "bench", None).kms


def run(kms: Kms) -> Reading:
    """The time of one call, over an encryption and a decryption each; RuntimeError for a wrong plaintext."""
    began = time.perf_counter()
    for _ in range(PAIRS):
        sealed = kms.encrypt(WHO, b"sixteen bytes ok", CONTEXT)
        if kms.decrypt(WHO, sealed.ciphertext, CONTEXT).plaintext != b"sixteen bytes ok":
            raise RuntimeError("a plaintext is wrong")
    return {"seconds": (time.perf_counter() - began) / (2 * PAIRS)}


def _calls(log: Path) -> int:
    """The calls to encrypt and decrypt in OpenBao's audit log."""
    return sum(b'"path":"transit/' in line for line in log.read_bytes().splitlines()) // 2


if __name__ == "__main__":
    main()
