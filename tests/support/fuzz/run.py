"""Fuzzes one target, guided by coverage, until its time is over or something happens that should not.

    python -m support.fuzz.run header --seconds 600

What is new is kept in ``.cache/fuzz/<target>`` and begins the next run. An input that fails is written beside
it, and belongs into ``corpus/<target>`` together with the mend.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Final

import atheris

from support.fuzz.harness import NAMES, Harness, inputs

INSTRUMENTED: Final = ["kms_core", "kms_api", "kms_client", "jwt", "tomllib"]
CACHE: Final = Path(__file__).parents[3] / ".cache/fuzz"
ONE_INPUT_S: Final = 5
"""Seconds that no input may take; it takes a thousandth of that."""

MEMORY_MB: Final = 1024
"""What the whole process may take: the interpreter, the instrumented code and one input."""


def main() -> None:
    given = _arguments()
    with atheris.instrument_imports(include=INSTRUMENTED):
        harness: Harness = importlib.import_module(f"fuzz.fuzz_{given.target}")
    work = given.work or CACHE / given.target
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kms-fuzz-seeds-") as name:
        seeds = Path(name)
        for number, data in enumerate(inputs(given.target, harness)):
            (seeds / f"{number:04}").write_bytes(data)
        words = work / ".words"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in harness.WORDS))
        atheris.Setup(
            [
                sys.argv[0],
                str(work),
                str(seeds),
                f"-dict={words}",
                f"-max_len={harness.MOST_BYTES}",
                f"-max_total_time={given.seconds}",
                f"-timeout={ONE_INPUT_S}",
                f"-rss_limit_mb={MEMORY_MB}",
                f"-artifact_prefix={work}/failed-",
                f"-seed={given.seed}",
                "-verbosity=1" if given.verbose else "-verbosity=0",
                "-print_final_stats=1",
            ],
            harness.check,
        )
        atheris.Fuzz()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Fuzz what reads what others wrote.")
    parser.add_argument("target", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=600, help="how long [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="0 takes another each time [%(default)s]")
    parser.add_argument("--work", type=Path, help="where new inputs are kept [.cache/fuzz/<target>]")
    parser.add_argument("--verbose", action="store_true", help="show what is found on the way")
    return parser.parse_args()


def _escaped(word: bytes) -> str:
    """As libFuzzer's dictionaries want it."""
    return "".join(f"\\x{byte:02X}" for byte in word)


if __name__ == "__main__":
    main()
