"""Results of a benchmark: tables, machine, versions, and its place in RESULTS.md; measures nothing."""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.measure import FOREIGN, Budget, Plan, Series, say
from cryptography.hazmat.backends.openssl import backend

RESULTS: Final = Path(__file__).with_name("RESULTS.md")
NONE: Final = "-"
_GIB: Final = 1024**3
_HEAD: Final = (
    "# Results\n\n"
    "Written by the scripts beside this file ([README.md](README.md) says how they measure); do not edit.\n"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What every script takes. ``name`` is its block in the results, ``given`` all arguments by name."""

    name: str
    plan: Plan
    budget_s: float
    results: Path
    given: argparse.Namespace
    kept: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def budget(self, groups: int) -> Budget:
        return Budget(self.budget_s, groups)

    def keep(self, table: str, found: Sequence[Series]) -> Sequence[Series]:
        """Leave the medians of a table to ``goals.py``, by contender and by what was measured."""
        for series in found:
            self.note(table, series.name, series.medians())
        return found

    def note(self, table: str, name: str, figures: Mapping[str, float]) -> None:
        """Leave other figures to ``goals.py``."""
        self.kept.setdefault(table, {})[name] = dict(figures)

    def write(self, parts: Sequence[str]) -> None:
        """Print the parts, and put them between this script's markers, with command, date and machine."""
        head = (
            f"`{shlex.join(['scripts/bench', self.name, *sys.argv[1:]])}`, {run_at()}. {machine()}. "
            f"{versions()}. Runs with more than {self.plan.foreign:g} processors of foreign load were "
            "dropped."
        )
        text = "\n\n".join([head, *parts])
        sys.stdout.write(f"{text}\n")
        put(self.results, self.name, text)
        folder = kept_in(self.results)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(
            json.dumps({"run": run_at(), "figures": self.kept}, indent=1)
        )


def kept_in(results: Path) -> Path:
    """Where scripts leave the figures of their last run for ``goals.py``: a folder that git ignores."""
    return results.parent / ".cache" / results.stem


def put(results: Path, name: str, text: str) -> None:
    """Put a text between the markers of a block of the results."""
    old = results.read_text() if results.exists() else _HEAD
    results.write_text(placed(old, name, text))


def run_at() -> str:
    """Date and commit."""
    return f"{datetime.now(UTC):%Y-%m-%d}{_commit()}"


def options(name: str, about: str, *, runs: int, budget_s: float, **more: float | str) -> Options:
    """Read the command line. ``more`` are further flags (``size_mib`` is --size-mib) with their defaults."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=about)
    parser.add_argument("--runs", type=int, default=runs, help="clean runs of each contender [%(default)s]")
    parser.add_argument("--budget-s", type=float, default=budget_s, help="seconds in all [%(default)s]")
    parser.add_argument("--foreign", type=float, default=FOREIGN, help="tolerated foreign load [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write into [%(default)s]")
    for flag, default in more.items():
        parser.add_argument(
            f"--{flag.replace('_', '-')}", type=type(default), default=default, help="[%(default)s]"
        )
    given = parser.parse_args()
    plan = Plan(runs=given.runs, foreign=given.foreign)
    return Options(name, plan, given.budget_s, given.results, given)


def placed(document: str, name: str, text: str) -> str:
    """The document with ``text`` between the markers ``name``, added if missing: ``goals`` on top."""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    found = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if found.search(document):
        return found.sub(lambda _: block, document, count=1)
    if name == "goals":
        head, mark, rest = document.partition("\n## ")
        return f"{head.rstrip()}\n\n## {name}\n\n{block}\n{mark}{rest}"
    return f"{document.rstrip()}\n\n## {name}\n\n{block}\n"


# -- tables ------------------------------------------------------------------------------------------

Cell = Callable[[Series], str]


@dataclass(frozen=True, slots=True)
class Scale:
    """How a measured value is shown: ``amount / value`` if ``amount`` is given, else ``value * factor``."""

    key: str = "seconds"
    unit: str = "s"
    amount: float = 0.0
    factor: float = 1.0
    digits: int = 2
    more_is_better: bool = False

    def of(self, value: float) -> float:
        return self.amount / value if self.amount else value * self.factor

    def median(self, series: Series) -> str:
        middle = series.median(self.key)
        return NONE if middle is None else f"{self.of(middle):,.{self.digits}f}"

    def spread(self, series: Series) -> str:
        shown = sorted(map(self.of, series.values(self.key)))
        return f"{shown[0]:,.{self.digits}f} to {shown[-1]:,.{self.digits}f}" if shown else NONE

    def ratio(self, ours: Series, theirs: Series) -> str:
        """How many times better ``ours`` is."""
        mine, other = ours.median(self.key), theirs.median(self.key)
        if ours is theirs or not mine or not other:
            return ""
        better = self.of(mine) / self.of(other) if self.amount or self.more_is_better else other / mine
        return f"{better:.2f} x"


def speed(size_bytes: int) -> Scale:
    return Scale(unit="GB/s", amount=size_bytes / 1e9)


def table(title: str, found: Sequence[Series], scale: Scale, *, more: dict[str, Cell] | None = None) -> str:
    """Medians, spread and ratios; the first series is ours. Notes what was dropped and what failed."""
    ours = found[0]
    columns: dict[str, Cell] = {
        "": lambda series: series.name,
        f"{scale.unit}, median": scale.median,
        "spread": scale.spread,
        "first row is": lambda series: scale.ratio(ours, series),
        **(more or {}),
        "runs (dropped)": _runs,
    }
    rows = [[cell(series) for cell in columns.values()] for series in found]
    failed = [f"- {series.name} failed: {series.failure}" for series in found if series.failure]
    return "\n\n".join([grid(title, list(columns), rows), *(["\n".join(failed)] if failed else [])])


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def processor_s(series: Series) -> str:
    middle = series.median("cpu_s")
    return NONE if middle is None else f"{middle:.2f}"


def peak_mb(series: Series) -> str:
    middle = series.median("peak_bytes")
    return NONE if middle is None else f"{middle / 1e6:.0f}"


WHOLE_PROCESS: Final[dict[str, Cell]] = {"user+sys s": processor_s, "peak MB": peak_mb}


def _runs(series: Series) -> str:
    return f"{len(series.readings)} ({series.dropped})"


def place(wanted: str) -> str:
    """The directory, or the usual one for temporary files if it is not there."""
    if Path(wanted).is_dir():
        return wanted
    say(f"{wanted} is NOT THERE: files go to {tempfile.gettempdir()}, which may be a disk")
    return tempfile.gettempdir()


# -- where and with what -------------------------------------------------------------------------------


def versions() -> str:
    """Versions of everything that may take part."""
    libraries = [
        f"{name} {metadata.version(name)}" for name in ("cryptography", "pyrage", "fastapi", "uvicorn")
    ]
    tools = [f"{name} {found}" for name in ("age", "wrk") if (found := _tool_version(name))]
    linked = backend.openssl_version_text().removeprefix("OpenSSL ").split(" ")[0]
    return ", ".join([f"Python {platform.python_version()}", f"OpenSSL {linked}", *libraries, *tools])


def _tool_version(name: str) -> str:
    program = shutil.which(name)
    if not program:
        return ""
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+(\.\d+)?", answer.stdout + answer.stderr)
    return found[0] if found else "?"


def machine() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    kind = found[1] if found else platform.machine()
    return f"{os.cpu_count()} x {kind}, {memory:.0f} GiB, Linux {platform.release()}"


def _commit() -> str:
    git = shutil.which("git")
    if not git:
        return ""
    answer = subprocess.run(
        [git, "-C", RESULTS.parent, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f", at {answer.stdout.strip()}" if answer.returncode == 0 else ""
