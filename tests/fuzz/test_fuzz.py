"""Every harness over its seeds and past findings, and a short run of each; long ones are ``scripts/fuzz``."""

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.fuzz.harness import CORPUS, HERE, NAMES, Harness, inputs

SECONDS: Final = "1"
SEED: Final = "7"
CORPUS_BYTES: Final = 200 * 1024
HAS_WHEEL: Final = sys.version_info < (3, 14) and sys.platform == "linux" and platform.machine() == "x86_64"
PLANTED: Final = """
import time
MOST_BYTES = 64
WORDS = (b"magic",)
held = [b"." * (600 << 20)]  # before the clock of an input runs: a busy machine gives memory slowly

def seeds():
    return [b"nothing"]

def check(data):
    if data.startswith(b"magic") and len(data) > 8:
        {fault}
"""


@pytest.fixture
def fuzzer() -> None:
    """Skips where atheris has no wheel, or at home where it is not installed; fails in CI."""
    if importlib.util.find_spec("atheris"):
        return
    if os.environ.get("CI") and HAS_WHEEL:
        pytest.fail("atheris is not installed, and CI must not skip what it finds")
    pytest.skip("NOTHING IS FUZZED: atheris is not installed, or has no wheel for this Python or processor")


def run(target: str, work: Path, *more: Path) -> subprocess.CompletedProcess[str]:
    words = [
        *("sh", "-c", '"$@"; exit $?', "sh"),  # else it begins at this process's peak of memory
        sys.executable,
        "-m",
        "support.fuzz.run",
        target,
        "--seconds",
        SECONDS,
        "--seed",
        SEED,
        "--work",
        str(work),
    ]
    kept = {"TMPDIR": str(work.parent)}  # libFuzzer ends without any clean-up
    environ = {**os.environ, **kept, "PYTHONPATH": os.pathsep.join(map(str, (*more, HERE.parent)))}
    return subprocess.run(words, env=environ, capture_output=True, text=True, check=False)


def test_there_is_a_harness_for_everything_that_others_write() -> None:
    assert {"header", "payload", "envelope", "context", "wire", "credentials", "audit", "settings"} <= set(
        NAMES
    )


@pytest.mark.usefixtures("gc_disabled")
@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_past_findings_pass(name: str) -> None:
    harness: Harness = importlib.import_module(f"fuzz.fuzz_{name}")
    given = inputs(name, harness)
    for data in given:
        harness.check(data)

    assert given


def test_corpora_stay_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= CORPUS_BYTES


@pytest.mark.usefixtures("fuzzer")
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "stat::number_of_executed_units" in done.stderr
    assert not list(tmp_path.glob("failed-*"))


@pytest.mark.usefixtures("fuzzer")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise KeyError('planted')", "planted"),
        ("held.append(b'.' * (400 << 20)); time.sleep(5)", "out-of-memory"),
    ],
    ids=["an error of another kind", "memory"],
)
def test_a_planted_fault_is_found_and_its_input_kept(tmp_path: Path, fault: str, words: str) -> None:
    work, folder = tmp_path / "work", tmp_path / "fuzz"
    folder.mkdir()
    (folder / "fuzz_planted.py").write_text(PLANTED.format(fault=fault))
    done = run("planted", work, tmp_path)

    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert next(work.glob("failed-*")).read_bytes().startswith(b"magic")
