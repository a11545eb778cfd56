"""What the gates on our dependencies say: the SBOM names what is locked, and nothing unchecked passes."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
LOCKED: Final = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)
PINNED: Final = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+).*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
VULNERABLE: Final = 1
UNCHECKED: Final = 75


def sbom(lock: str) -> bytes:
    done = subprocess.run([ROOT / "scripts/sbom", lock], capture_output=True, check=True, cwd=ROOT)
    return done.stdout


@pytest.mark.parametrize("lock", ["requirements/runtime.lock", "requirements/image.lock"])
def test_the_sbom_names_exactly_what_is_locked_with_its_hashes(lock: str) -> None:
    text = (ROOT / lock).read_text()
    found: dict[str, Any] = json.loads(sbom(lock))
    named = {(each["name"], each["version"]): hashes_of(each) for each in found["components"]}

    assert named == {(pin[1], pin[2]): set(HASH.findall(pin[0])) for pin in PINNED.finditer(text)}
    assert len(named) == len(LOCKED.findall(text))
    assert found["bomFormat"] == "CycloneDX"
    assert found["metadata"]["component"]["name"] == "kms-service"


def hashes_of(component: dict[str, Any]) -> set[str]:
    return {each["content"] for link in component["externalReferences"] for each in link.get("hashes", ())}


def test_the_sbom_of_a_lock_file_is_the_same_bytes_each_time() -> None:
    assert sbom("requirements/runtime.lock") == sbom("requirements/runtime.lock")


GOOD: Final = {"name": "a", "version": "1", "vulns": []}
VULNERABLE_ONE: Final = GOOD | {"vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
UNKNOWN: Final = {"name": "b", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("dependencies", "code", "words"),
    [
        ([], UNCHECKED, "NOTHING WAS CHECKED"),
        ([UNKNOWN], UNCHECKED, "NOTHING WAS CHECKED"),
        ([GOOD], 0, "1 packages, no known vulnerability"),
        ([VULNERABLE_ONE], VULNERABLE, "a 1: PYSEC-1, mended in 2"),
        ([GOOD, UNKNOWN], VULNERABLE, "not checked, since the service does not know them: b"),
    ],
    ids=["nothing", "all passed over", "good", "vulnerable", "one passed over"],
)
def test_only_what_was_looked_up_and_is_clean_passes(
    dependencies: list[dict[str, Any]], code: int, words: str
) -> None:
    done = judged(json.dumps({"dependencies": dependencies, "fixes": []}))

    assert (done.returncode, words in done.stderr) == (code, True)
    assert judged("Traceback").returncode == UNCHECKED


def judged(said: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "scripts/vulnerabilities.py")]
    return subprocess.run(argv, input=said, capture_output=True, text=True, check=False)


def test_what_bandit_leaves_out_is_held_by_a_rule_of_ruff() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    left_out = {f"S{rule.removeprefix('B')}" for rule in tools["bandit"]["skips"]}
    by_review = {"S404", "S603"}

    assert tools["ruff"]["lint"]["select"] == ["ALL"]
    assert left_out & set(tools["ruff"]["lint"]["ignore"]) == by_review
