"""What calls may cost: budgets.toml, which ``scripts/budgets`` writes, and what to say of a figure beside it.

``python -m support.speed.budgets`` measures and writes; ``… json`` prints all figures, ``… <path>`` the calls
of one.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from support.contract_server import running
from support.embedded_valkey import EmbeddedValkey
from support.job_stores import connect
from support.speed import growth, ratios
from support.speed.counting import SUMS, Meter, figures
from support.speed.hot_paths import CONTEXT, ON_DISK, Install, paths

FILE: Final = Path(__file__).parents[2] / "speed/budgets.toml"
TOLERANCE: Final = 0.03  # of the sums: Python 3.11, 3.12 and 3.13 are within 2 %
RATIO: Final = 2.0  # how many times today's ratio of processor times may be chance
_HEAD: Final = """\
# Written by scripts/budgets; the names are those of counting.py, hot_paths.py, ratios.py in support/speed.
# Sums (calls, lines, modules) may be 3 % off, a ratio twice as much; all else is exact, and 0 if not here.
"""
_START: Final = "kms encrypt, its start"
_HEAVY: Final = (  # modules that take milliseconds to import, or import many others
    *(
        "asyncio",
        "celery",
        "cryptography",
        "email",
        "fastapi",
        "h11",
        "httpcore2",
        "httpx2",
        "jinja2",
        "kombu",
    ),
    *("logging", "msgspec", "prometheus_client", "pyrage", "redis", "rich", "ssl", "structlog", "tomllib"),
)
_KMS: Final = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
from kms_cli.main import main
main()
"""
Figures = Mapping[str, float]


def read() -> dict[str, dict[str, Any]]:
    return tomllib.loads(FILE.read_text())


def complaints(name: str, found: Figures, budget: Figures) -> Iterator[str]:
    """One for each figure that is not as the budget says."""
    for what in sorted(found.keys() | budget.keys()):
        is_now, was = found.get(what, 0), budget.get(what, 0)
        slack = was * TOLERANCE if what in SUMS else 0
        if is_now > was + slack:
            yield (
                f"{name}: {is_now} {what}, budget {was}. `scripts/budgets {name!r}` tells what is called how "
                "often; if it is worth that, `scripts/budgets` writes a new budget: say why in the commit"
            )
        elif is_now < was - slack:
            yield f"{name}: {is_now} {what}, budget {was}. Run `scripts/budgets`, so that it stays that cheap"


def measured() -> dict[str, dict[str, Any]]:
    """Counts, growth and ratios, by a process of its own: what tests left in theirs would be counted, too."""
    argv = [sys.executable, "-P", "-m", "support.speed.budgets", "json"]
    environ = {**os.environ, "PYTHONPATH": str(FILE.parents[1])}
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, env=environ)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@contextmanager
def _installs() -> Iterator[tuple[Meter, Install, Install]]:
    """A meter that sees their Redis, and two installs, of which the second has its records on disk."""
    with tempfile.TemporaryDirectory(prefix="kms-speed-") as name, EmbeddedValkey(Path(name)) as valkey:
        yield (
            Meter(connect(valkey.url)),
            Install(Path(name) / "one", valkey.url),
            Install(Path(name) / "two", valkey.url, ON_DISK),
        )


def _measure() -> dict[str, dict[str, Any]]:
    with _installs() as (meter, install, on_disk):
        counts = {name: figures(meter.count(way)) for name, way in paths(install, on_disk).items()}
        return {
            "counts": {**counts, _START: _modules()},
            "growth": growth.measure(meter, install),
            "ratios": ratios.measure(install),
        }


def _modules() -> dict[str, int]:
    """What the command has imported at its end."""
    with running() as service:
        argv = [sys.executable, "-P", "-c", _KMS, "encrypt", "--context", CONTEXT, "--url", service.url]
        done = subprocess.run(argv, input=b"secret", capture_output=True, check=True, env={})
    found = done.stderr.decode().split()
    return {"modules": len(found), **{f"import {name}": 1 for name in _HEAVY if name in found}}


def _rendered(counts: Mapping[str, Figures], of_ratios: Figures) -> str:
    tables = {f'counts."{name}"': of for name, of in counts.items()} | {"ratios": of_ratios}
    return _HEAD + "".join(
        f"\n[{table}]\n" + "".join(f'"{name}" = {of[name]}\n' for name in sorted(of, key=_sums_first))
        for table, of in tables.items()
    )


def _sums_first(name: str) -> tuple[bool, str]:
    return name not in SUMS, name


def main() -> None:
    match sys.argv[1:]:
        case []:
            found = measured()
            FILE.write_text(_rendered(found["counts"], found["ratios"]))
        case ["json"]:
            json.dump(_measure(), sys.stdout)
        case [name]:
            with _installs() as (meter, install, on_disk):
                for what, count in meter.count(paths(install, on_disk)[name]).most_common():
                    sys.stdout.write(f"{count:9,}  {what}\n")


if __name__ == "__main__":
    main()
