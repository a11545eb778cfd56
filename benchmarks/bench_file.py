"""How fast a large file is sealed and opened, from file to file and from pipe to pipe.

Peers: age, pyrage, cp, and the bare cipher over the same slabs. Whole processes, start included. Every tool
opens the same file, and every opened file is compared with the source before anything is timed.
"""

import filecmp
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import drive_kms, report
from benchmarks.children import KMS, PYTHON, installed, run, run_between_cats
from benchmarks.measure import Contender, Reading, Series, in_turn, memory, say

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS
from kms_core.age.x25519 import X25519Identity
from kms_core.envelope import sealing

_MIB: Final = 1024 * 1024
_IN_MEMORY: Final = "tmpfs"
Commands = dict[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A directory with an identity, a source and its ciphertext, and where they lie."""

    folder: Path
    kind: str
    size: int

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def sealed(self) -> Path:
        return self.folder / "sealed"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def identity(self) -> Path:
        return self.folder / "identity"

    def drive(self, module: str, operation: str, *paths: str | Path) -> Sequence[str]:
        return [*PYTHON, f"benchmarks.{module}", operation, *map(str, (self.identity, *paths))]


def main() -> None:
    options = report.options(
        "file",
        "Seals and opens a large file, ours and theirs in turn.",
        runs=9,
        budget_s=260.0,
        size_mib=1024,
        memory_dir="/dev/shm",  # noqa: S108 -- a file system in memory is the point
        disk_dir="/var/tmp",  # noqa: S108 -- page cache over a disk is the point
    )
    size = options.given.size_mib * _MIB
    budget = options.budget(6)
    options.note("size", "file", {"mib": options.given.size_mib})
    parts = []
    for place in (options.given.memory_dir, options.given.disk_dir):
        if not _has_room(Path(place), size):
            continue
        with stage(Path(place), size) as on:
            for operation, commands in (("seal", seal_commands(on)), ("open", open_commands(on))):
                found = in_turn(_files(on, commands), options.plan, budget.share())
                options.keep(f"{operation}, {'memory' if on.kind == _IN_MEMORY else 'disk'}", found)
                parts.append(_table(f"{operation}, file to file on {_where(on)}", found, size))
            if on.kind == _IN_MEMORY:
                parts += [_piped(on, operation, options, budget.share()) for operation in ("seal", "open")]
    options.write([*parts, _thresholds(size)])


def _thresholds(size: int) -> str:
    """Below the first of them the kernel writes nothing while a program runs; above the second it waits."""
    limits = []
    for name in ("dirty_background", "dirty"):
        set_to, percent = (int(Path(f"/proc/sys/vm/{name}_{of}").read_text()) for of in ("bytes", "ratio"))
        limits.append(set_to or memory("MemAvailable") * percent // 100)
    if size > limits[0]:
        say(f"LARGER than what may wait: the disk takes part; see --size-mib {limits[0] // _MIB}")
    return (
        f"The kernel begins to write files to the disk when {limits[0] // _MIB:,} MiB of them wait, and lets "
        f"programs wait from {limits[1] // _MIB:,} MiB on. Before each run nothing waits."
    )


def _where(on: Stage) -> str:
    if on.kind == _IN_MEMORY:
        return on.kind
    return f"{on.kind} in the page cache (`kms` and `cp, synced` wait for the disk, the others do not)"


def _table(title: str, found: Sequence[Series], size: int) -> str:
    return report.table(f"{title}, {size // _MIB} MiB", found, report.speed(size), more=report.WHOLE_PROCESS)


# -- the stage ---------------------------------------------------------------------------------------


@contextmanager
def stage(parent: Path, size: int) -> Iterator[Stage]:
    """Source and ciphertext on disk and in the page cache; everything is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=parent) as folder:
        on = Stage(Path(folder), _file_system(parent), size)
        on.identity.write_text(f"{X25519Identity.generate().export()}\n")
        on.identity.chmod(0o600)
        with on.source.open("wb") as out:
            for _ in range(size // _MIB):
                out.write(os.urandom(_MIB))
            os.fsync(out.fileno())
        drive_kms.seal(drive_kms.wrapper(on.identity), str(on.source), str(on.sealed))
        os.sync()
        yield on


def _has_room(place: Path, size: int) -> bool:
    if not place.is_dir() or shutil.disk_usage(place).free < 4 * size:
        say(f"SKIPPED {place}: it is not a directory with {4 * size // _MIB} MiB free")
        return False
    return True


def _file_system(path: Path) -> str:
    found = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", path], capture_output=True, text=True, check=False
    )
    return (found.stdout.split() or ["?"])[-1]  # the last of what is mounted over each other


# -- contenders --------------------------------------------------------------------------------------


def seal_commands(on: Stage) -> Commands:
    begun = sealing.begin([(drive_kms.wrapper(on.identity), drive_kms.KEY)], drive_kms.CONTEXT, padded=True)
    bare = [*PYTHON, "benchmarks.drive_bare", "seal", begun.payload_key.hex(), str(len(begun.head))]
    recipient = drive_kms.wrapper(on.identity).identity.recipient.text
    kms = ["seal", "-i", str(on.identity), "--context", "env=bench", "-o", str(on.output), str(on.source)]
    paths = (on.source, on.output)
    return {
        "envelope, driver": on.drive("drive_kms", "seal", *paths),
        "`kms seal`": [*KMS, *kms],
        "bare cipher, same slabs": [*bare, *map(str, paths)],
        "age": ["age", "-r", recipient, "-o", str(on.output), str(on.source)],
        "pyrage.encrypt_file": on.drive("drive_pyrage", "seal", *paths),
        **_copies(on.source, on),
    }


def open_commands(on: Stage) -> Commands:
    with on.sealed.open("rb") as file:
        head = header.parse(file.read(FILE_LIMITS.header_bytes + header.NONCE_BYTES), FILE_LIMITS)
    file_key = drive_kms.file_key_of(head, drive_kms.wrapper(on.identity))
    key = stream.payload_key(file_key, head.nonce).hex()
    identity, output, sealed = str(on.identity), str(on.output), str(on.sealed)
    return {
        "envelope, driver": on.drive("drive_kms", "open", sealed, output),
        "`kms open`": [*KMS, "open", "-i", identity, "--break-glass", "-o", output, sealed],
        "bare cipher, same slabs": [
            *(*PYTHON, "benchmarks.drive_bare", "open", key, str(head.payload_offset), sealed, output)
        ],
        "age": ["age", "-d", "-i", identity, "-o", output, sealed],
        "pyrage.decrypt_file": on.drive("drive_pyrage", "open", sealed, output),
        **_copies(on.sealed, on),
    }


def _copies(source: Path, on: Stage) -> Commands:
    copy = ["cp", "--reflink=never", "--sparse=never", str(source), str(on.output)]
    if on.kind == _IN_MEMORY:
        return {"cp": copy}
    return {"cp": copy, "cp, synced": ["sh", "-c", '"$@" && sync "$0"', str(on.output), *copy]}


def _files(on: Stage, commands: Commands) -> list[Contender]:
    return [
        Contender(name, _file_run(on, argv), on.size, _rounds(name))
        for name, argv in commands.items()
        if installed(argv)
    ]


def _rounds(name: str) -> int:
    """Two for those that no goal is about."""
    return 2 if name.startswith(("`kms", "pyrage")) or name == "cp, synced" else sys.maxsize


def _file_run(on: Stage, argv: Sequence[str]) -> Callable[[], Reading]:
    checked = False

    def once() -> Reading:
        nonlocal checked
        try:
            reading = run(argv)
            if not checked:
                _check(on, argv)
                checked = True
        finally:
            on.output.unlink(missing_ok=True)
        return reading

    return once


def _check(on: Stage, argv: Sequence[str]) -> None:
    """An output is the source itself, or a file of another size that begins as age does, or bare cipher."""
    whole = on.output.stat().st_size
    if whole == on.size:
        if not filecmp.cmp(on.source, on.output, shallow=False):
            raise RuntimeError("the output is not the source")
    elif whole < on.size or ("drive_bare" not in str(argv) and on.output.open("rb").read(4) != b"age-"):
        raise RuntimeError("the output is not a ciphertext")


def _piped(on: Stage, operation: str, options: report.Options, seconds: float) -> str:
    """``cat | tool | cat`` on the same processors."""
    recipient = drive_kms.wrapper(on.identity).identity.recipient.text
    identity = str(on.identity)
    ways: dict[str, Commands] = {
        "seal": {
            "envelope, driver": on.drive("drive_kms", "seal", "-", "-"),
            "`kms seal`": [*KMS, "seal", "-i", identity, "--context", "env=bench"],
            "age": ["age", "-r", recipient],
            "pyrage.encrypt_io": on.drive("drive_pyrage", "seal", "-", "-"),
        },
        "open": {
            "envelope, driver": on.drive("drive_kms", "open", "-", "-"),
            "`kms open`": [*KMS, "open", "-i", identity, "--break-glass"],
            "age": ["age", "-d", "-i", identity],
            "pyrage.decrypt_io": on.drive("drive_pyrage", "open", "-", "-"),
        },
    }
    source = on.source if operation == "seal" else on.sealed
    contenders = [
        Contender(name, functools.partial(run_between_cats, argv, source), rounds=_rounds(name))
        for name, argv in (ways[operation] | {"cat": ["cat"]}).items()
        if installed(argv)
    ]
    found = options.keep(f"{operation}, pipe", in_turn(contenders, options.plan, seconds))
    return _table(f"{operation}, `cat` to tool to `cat`", found, on.size)


if __name__ == "__main__":
    main()
