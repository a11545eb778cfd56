"""Runs a tier of the tests, or a part of one, and what failed once more, alone.

A test that fails beside others and passes alone in a new process is flaky: it is printed and noted in
``.cache/flaky.jsonl``, and the run is green. A test that fails twice, more failures than a few, or a run that
ends early makes it red.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET  # nosec B405
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
CACHE: Final = ROOT / ".cache"
PARTS: Final = ("e2e", "peers", "chaos", "deploy", "monitoring", "fuzz", "speed", "others")
PYTEST: Final = (sys.executable, "-m", "pytest")
FILES_AT_A_TIME: Final = ("--dist=loadscope", "--numprocesses")
LONGEST_FIRST: Final = "--no-loadscope-reorder"  # in the order of tests/support/tiers.py
AT_ONCE: Final = 5
TIMED_OUT: Final = 124  # as timeout(1)
NOTHING_RAN: Final = 5  # pytest's
USAGE: Final = """\
scripts/test                    the first tier: what every change must pass
scripts/test PART [PART …]      parts of the second tier: e2e peers chaos deploy monitoring fuzz speed others
scripts/test --all              the first tier, then the second
scripts/test --changed [REV]    the tests near what changed since REV (HEAD): of the first tier,
                                then of the second those that hold the changed modules
scripts/test --repeat N PATH    the same tests N times, beside two busy loops
scripts/test --machines [NAME]  the README's commands and the first tier as on other machines:
                                another Python, a user who is not root, a path with a space
scripts/test PATH …             paths and options of pytest, as they are

--strict, with --all or a part: a missing program fails instead of skipping its tests
"""


@dataclass(frozen=True)
class Run:
    """One run of pytest: its name, arguments, limit in seconds, and the most failures that run again."""

    name: str
    words: tuple[str, ...]
    limit_s: float
    retried: int


@dataclass(frozen=True)
class Outcome:
    """How many tests passed, failed, and failed once but passed alone; whether the run is green."""

    passed: int
    failed: int
    flaky: int
    is_green: bool

    def __str__(self) -> str:
        flaky = f", {self.flaky} flaky" if self.flaky else ""
        return f"{self.passed} passed, {self.failed} failed{flaky}"


FIRST: Final = Run("first tier", ("--tier=1", "-p", "no:randomly", *FILES_AT_A_TIME, "2"), 15 * 60, 3)


def second(parts: Sequence[str]) -> Run:
    """Parts of the second tier, in random order; several files at a time, since its tests mostly wait."""
    where = () if "others" in parts else tuple(f"tests/{part}" for part in parts)
    words = (f"--tier={','.join(parts)}", "-rs", LONGEST_FIRST, *FILES_AT_A_TIME, str(AT_ONCE), *where)
    return Run("second tier" if len(parts) == len(PARTS) else " ".join(parts), words, 60 * 60, 10)


def run(asked: Run) -> Outcome:
    """Run the tests, then alone those that failed, and print a line of what came of it."""
    begun = time.monotonic()
    outcome = _run(asked, begun)
    say(f"{asked.name}: {outcome} in {time.monotonic() - begun:.0f} s")
    return outcome


def _run(asked: Run, begun: float) -> Outcome:
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tests-", dir=CACHE) as name:
        folder = Path(name)
        code = _pytest(asked, folder, "together")
        failures = _failures(folder)
        counts = _counts(folder / "together.xml")
        passed = counts["tests"] - counts["skipped"] - len(failures)
        if counts["skipped"]:
            say(f"{asked.name}: {counts['skipped']} skipped: a program is missing, see the reasons above")
        if code == 0:
            return Outcome(passed, 0, 0, is_green=True)
        if reason := _final(code, failures, asked.retried):
            say(f"{asked.name}: red: {reason}")
            return Outcome(passed, max(1, len(failures)), 0, is_green=False)
        say(f"{asked.name}: {len(failures)} failed; they run again alone")
        alone = "--numprocesses=0", "--last-failed", "--last-failed-no-failures=none", "-p", "no:randomly"
        again = Run(asked.name, asked.words + alone, asked.limit_s, 0)
        is_flaky = _pytest(again, folder, "alone") == 0
        still = [] if is_flaky else _failures(folder)
        flaky = [each for each in failures if each not in still]
        _note(flaky, folder / "together.xml", time.monotonic() - begun)
        failed = 0 if is_flaky else max(1, len(still))
        return Outcome(passed + len(flaky), failed, len(flaky), is_flaky)


def _final(code: int, failures: list[str], retried: int) -> str:
    """Why nothing is run again, if so."""
    if code != 1:
        return f"pytest ended with {code}"
    if not failures:
        return "no failed test is named"
    if len(failures) > retried:
        return f"{len(failures)} failed, which is more than {retried}"
    if broken := [each for each in failures if "::" not in each]:
        return f"not collected: {' '.join(broken)}"
    return ""


def _pytest(asked: Run, folder: Path, name: str) -> int:
    """Run pytest in a process group of its own, and end all of it at the limit or at a signal."""
    reports = f"--junitxml={folder}/{name}.xml", f"--under-way={folder}", "-o", f"cache_dir={folder}/cache"
    process = subprocess.Popen([*PYTEST, *reports, *asked.words], cwd=ROOT, start_new_session=True)
    with _forwarded(process):
        try:
            return process.wait(asked.limit_s)
        except subprocess.TimeoutExpired:
            say(f"{asked.name}: not done in {asked.limit_s:.0f} s; under way:")
            for each in sorted(folder.glob("under-way-*")):
                say(f"  {each.read_text('utf-8')}")
            os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints where each process is
            time.sleep(5)
            return TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP reach pytest, which ends in its way; then this ends too."""
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        os.killpg(process.pid, signal.SIGINT)

    kept = {each: signal.signal(each, forward) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        if received:
            sys.exit(128 + received[0])


def _failures(folder: Path) -> list[str]:
    """The ids of the tests that failed last."""
    found = folder / "cache/v/cache/lastfailed"
    return sorted(json.loads(found.read_text("utf-8"))) if found.exists() else []


def _counts(report: Path) -> dict[str, int]:
    if not report.exists():
        return {"tests": 0, "skipped": 0}
    suite = next(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314  # nosec B314
    return {name: int(suite.get(name, 0)) for name in ("tests", "skipped")}


def _note(flaky: list[str], report: Path, after_s: float) -> None:
    """Print flaky tests with their first failure, and add them to ``.cache/flaky.jsonl``."""
    if not flaky:
        return
    texts = _texts(report)
    argv = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    with (CACHE / "flaky.jsonl").open("a", encoding="utf-8") as notes:
        for test in flaky:
            text = next((text for name, text in texts.items() if test.endswith(name)), "")
            say(f"flaky: {test}: failed beside others, passed alone; the first failure:\n{text}")
            entry = {"test": test, "commit": commit, "at": time.time(), "after_s": after_s}
            print(json.dumps(entry | {"load": os.getloadavg(), "failure": text}), file=notes)


def _texts(report: Path) -> dict[str, str]:
    """The text of each failure, by the name of its test."""
    cases = ET.parse(report).getroot().iter("testcase")  # noqa: S314  # nosec B314
    found = {}
    for case in cases:
        for failure in (*case.findall("failure"), *case.findall("error")):
            found[f"::{case.get('name')}"] = failure.text or ""
    return found


def repeat(times: int, words: list[str]) -> bool:
    """Run the tests again and again while two other processes keep the processors busy."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        codes = [
            subprocess.run([*PYTEST, "-q", *words], cwd=ROOT, check=False).returncode for _ in range(times)
        ]
    finally:
        for each in burners:
            each.kill()
    say(f"{codes.count(0)} of {times} runs passed")
    return not any(codes)


def say(text: str) -> None:
    print(f"kms: {text}", file=sys.stderr, flush=True)  # noqa: T201 -- a program


def run_all(runs: list[Run]) -> bool:
    """Run each, print a line for each and the sum as the last one."""
    outcomes = [run(each) for each in runs]
    if len(runs) > 1:
        for asked, outcome in zip(runs, outcomes, strict=True):
            say(f"{asked.name}: {outcome}")
    passed, failed = (sum(getattr(each, name) for each in outcomes) for name in ("passed", "failed"))
    print(f"{passed} passed, {failed} failed", flush=True)  # noqa: T201 -- a program
    return all(each.is_green for each in outcomes)


def run_changed(since: str, words: list[str]) -> int:
    """Run the tests near what changed: those of the first tier, then of the second those of the modules."""

    def tests(*own: str) -> list[str]:
        argv = [sys.executable, "scripts/changed_tests.py", since, *own]
        return subprocess.run(
            argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()

    codes = [NOTHING_RAN]
    for tier, paths in (("1", tests()), (",".join(PARTS), tests("--own"))):
        if paths and codes[-1] in {0, NOTHING_RAN}:
            argv = [*PYTEST, f"--tier={tier}", *words, *paths]
            codes.append(subprocess.run(argv, cwd=ROOT, check=False).returncode)
    if set(codes) == {NOTHING_RAN}:
        sys.exit("kms: error: no test belongs to what changed")
    return max(code for code in codes if code != NOTHING_RAN)


def main() -> None:
    parser = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--strict", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--changed", nargs="?", const="HEAD", metavar="REV", help=argparse.SUPPRESS)
    parser.add_argument("--machines", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, metavar="N", help=argparse.SUPPRESS)
    asked, words = parser.parse_known_args()
    subprocess.run([sys.executable, "-m", "compileall", "-q", "src", "tests"], cwd=ROOT, check=False)
    if asked.strict:
        os.environ["CI"] = "true"
    if asked.machines:
        os.execv(PYTEST[0], [PYTEST[0], "scripts/machines.py", *words])  # noqa: S606 -- no shell
    if asked.repeat:
        sys.exit(not repeat(asked.repeat, words))
    if asked.changed:
        sys.exit(run_changed(asked.changed, words))
    if words and not set(words) <= set(PARTS):
        os.execv(PYTEST[0], [*PYTEST, *words])  # noqa: S606 -- no shell
    if asked.all:
        sys.exit(not run_all([FIRST, second(PARTS)]))
    sys.exit(not run_all([second(words) if words else FIRST]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
