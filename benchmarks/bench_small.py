"""What a small secret costs: calls in one process, and headers made to be slow.

Peers: pyrage in the same process, age and pyrage as programs for the headers. A run of calls is a batch of
some 100 ms. pyrage parses a header in time quadratic in its size, so it gets a time limit.
"""

import dataclasses
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyrage
from benchmarks import drive_kms, report
from benchmarks.children import PYTHON, installed, run
from benchmarks.drive_kms import CONTEXT, KEY, Local
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Scale

from kms_core.age import armor, header, stream
from kms_core.age.header import FILE_LIMITS, SYNC_LIMITS, HeaderLimits
from kms_core.age.x25519 import X25519Identity
from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import AuditLog
from kms_core.auth.policy import AllowAll, Principal
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import sealing
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_core.settings.model import AuditSection
from kms_protocol.errors import KmsError

SIZES: Final = (32, 1024, 64 * 1024)
RECIPIENTS: Final = 1000
HOSTILE_BYTES: Final = 64 * 1024
_BATCH_S: Final = 0.1
_WHO: Final = Principal("bench")
_MICRO: Final = Scale(unit="µs a call", factor=1e6, digits=1)
_MILLI: Final = Scale(unit="ms", factor=1e3, digits=2)


@dataclass(frozen=True, slots=True)
class Scene:
    """One key, known to everybody."""

    local: Local
    kms: Kms
    theirs: pyrage.x25519.Identity
    identity_file: Path
    limit_s: float

    @classmethod
    def at(cls, folder: Path, limit_s: float) -> "Scene":
        file = folder / "identity"
        identity = X25519Identity.generate()
        file.touch(0o600)
        file.write_text(f"{identity.export()}\n")
        key = Key("default", AgeBackend(KeyFiles(file)), accept_foreign=True)
        section = AuditSection(
            path=folder / "audit", key_path=folder / "a.key", signing_key_path=folder / "s.key"
        )
        concealer, signer = Concealer.at(section.key_path), Signer.at(section.signing_key_path)
        trail = AuditLog(section, "bench", concealer, signer)
        kms = Kms(Keyring({"default": key}, key), AllowAll(), trail, SelectionRules())
        return cls(
            drive_kms.wrapper(file), kms, pyrage.x25519.Identity.from_str(identity.export()), file, limit_s
        )


def main() -> None:
    options = report.options(
        "small",
        "Small secrets and slow headers, ours and theirs in turn.",
        runs=11,
        budget_s=60.0,
        limit_s=15.0,
    )
    budget = options.budget(len(SIZES) * 2 + 2)
    parts = []
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as folder:
        scene = Scene.at(Path(folder), options.given.limit_s)
        for size in SIZES:
            for operation, contenders in (("seal", _sealing(scene, size)), ("open", _opening(scene, size))):
                title = f"{operation} {size:,} bytes in memory"
                found = options.keep(title, in_turn(contenders, options.plan, budget.share()))
                parts.append(report.table(title, found, _MICRO))
        few = dataclasses.replace(options.plan, runs=min(2, options.plan.runs), warms=False)
        for title, (ours, programs) in (
            (f"refuse an endless header of {HOSTILE_BYTES:,} bytes", _hostile(scene, Path(folder))),
            (f"open a file of {RECIPIENTS:,} recipients by the last", _many(scene, Path(folder))),
        ):
            seconds = budget.share()  # of which calls take a hundredth, and programs all that is left
            found = [*in_turn(ours, options.plan, seconds), *in_turn(programs, few, seconds)]
            parts.append(report.table(title, options.keep(title, found), _MILLI))
    options.write([*parts, f"A program that took {scene.limit_s * 1e3:,.0f} ms was stopped then."])


# -- calls -------------------------------------------------------------------------------------------


def calls(name: str, function: Callable[[], object]) -> Contender:
    """A batch of calls; seconds are of one call."""
    function()  # fill caches
    started = time.perf_counter()
    function()
    count = max(1, int(_BATCH_S / (time.perf_counter() - started)))

    def batch() -> Reading:
        started = time.perf_counter()
        for _ in range(count):
            function()
        return {"seconds": (time.perf_counter() - started) / count}

    return Contender(name, batch)


def _sealing(scene: Scene, size: int) -> list[Contender]:
    plaintext = os.urandom(size)
    recipients = [scene.theirs.to_public()]
    return [
        calls("Kms.encrypt, audited", lambda: scene.kms.encrypt(_WHO, plaintext, CONTEXT)),
        calls("sealing.seal", lambda: sealing.seal(plaintext, [(scene.local, KEY)], CONTEXT)),
        calls("pyrage.encrypt", lambda: pyrage.encrypt(plaintext, recipients)),
    ]


def _opening(scene: Scene, size: int) -> list[Contender]:
    plaintext = os.urandom(size)
    ours = scene.kms.encrypt(_WHO, plaintext, CONTEXT).ciphertext
    local = sealing.seal(plaintext, [(scene.local, KEY)], CONTEXT)
    plain = plain_file(scene.local, plaintext, 1)
    theirs = pyrage.encrypt(plaintext, [scene.theirs.to_public()])
    return [
        calls("Kms.decrypt, audited", lambda: scene.kms.decrypt(_WHO, ours, CONTEXT)),
        calls("envelope, bound file", lambda: open_(local, scene.local)),
        calls("envelope, plain age file", lambda: open_(plain, scene.local)),
        calls("pyrage.decrypt, plain age file", lambda: pyrage.decrypt(plain, [scene.theirs])),
        calls("pyrage.decrypt, its own file", lambda: pyrage.decrypt(theirs, [scene.theirs])),
    ]


def open_(ciphertext: bytes, by: Local, limits: HeaderLimits = SYNC_LIMITS) -> bytes:
    head = header.parse(ciphertext, limits)
    return sealing.open_(ciphertext, head, drive_kms.file_key_of(head, by))


def plain_file(by: Local, plaintext: bytes, recipients: int) -> bytes:
    """What age itself would write; ``by`` is the last of the recipients."""
    file_key, nonce = os.urandom(header.FILE_KEY_BYTES), os.urandom(header.NONCE_BYTES)
    others = [X25519Identity.generate().recipient for _ in range(recipients - 1)]
    stanzas = [recipient.wrap(file_key) for recipient in (*others, by.identity.recipient)]
    payload = stream.seal(stream.payload_key(file_key, nonce), plaintext)
    return header.render(stanzas, file_key) + nonce + payload


# -- headers -----------------------------------------------------------------------------------------


Both = tuple[Sequence[Contender], Sequence[Contender]]
"""Calls in this process, and whole programs."""


def _hostile(scene: Scene, folder: Path) -> Both:
    """One stanza whose body goes on and on: made without any key."""
    file = folder / "hostile"
    start = armor.VERSION_LINE + b"-> X25519 " + b"A" * 43 + b"\n"
    lines = (b"A" * 64 + b"\n") * (HOSTILE_BYTES // 65)
    file.write_bytes((start + lines)[:HOSTILE_BYTES])
    data = file.read_bytes()
    ours = [
        calls("envelope, limits of a call", functools.partial(_refuse, scene.local, data, SYNC_LIMITS)),
        calls("envelope, limits of a file", functools.partial(_refuse, scene.local, data, FILE_LIMITS)),
    ]
    return ours, _programs(scene, file, refuse=True)


def _refuse(by: Local, data: bytes, limits: HeaderLimits) -> None:
    with suppress(KmsError):
        open_(data, by, limits)
        raise RuntimeError("a hostile header was accepted")


def _many(scene: Scene, folder: Path) -> Both:
    file = folder / "many"
    file.write_bytes(plain_file(scene.local, bytes(1024), RECIPIENTS))
    data = file.read_bytes()
    ours = [calls("envelope, in process", lambda: open_(data, scene.local, FILE_LIMITS))]
    return ours, _programs(scene, file, refuse=False)


def _programs(scene: Scene, file: Path, *, refuse: bool) -> list[Contender]:
    """The same as whole programs."""
    identity, output = str(scene.identity_file), str(file.with_suffix(".out"))
    programs = {
        "envelope, driver": [*PYTHON, "benchmarks.drive_kms", "open", identity, str(file), output],
        "age": ["age", "-d", "-i", identity, "-o", output, str(file)],
        "pyrage.decrypt, driver": [*PYTHON, "benchmarks.drive_pyrage", "read", identity, str(file), output],
    }
    return [
        Contender(name, functools.partial(_ended, argv, scene.limit_s, refuse=refuse))
        for name, argv in programs.items()
        if installed(argv)
    ]


def _ended(argv: Sequence[str], limit_s: float, *, refuse: bool) -> Reading:
    """The time until it ended as it should; the limit if it did not end."""
    started = time.perf_counter()
    try:
        reading = run(argv, limit_s=limit_s)
    except subprocess.TimeoutExpired:
        return {"seconds": limit_s}
    except RuntimeError:
        if not refuse:
            raise
        return {"seconds": time.perf_counter() - started}
    if refuse:
        raise RuntimeError("a hostile header was accepted")
    return reading


if __name__ == "__main__":
    main()
