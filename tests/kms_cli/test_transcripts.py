"""Runs each transcript: ``$`` lines are commands, what follows is their output and, if not 0, ``[code]``.

Output is stdout and stderr as they come. ``…`` stands for any text in a line, alone for any lines. ``%``
begins a comment, the first of which names the services to run against; ``! name=value`` sets a fault of the
stand-in.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.cli.fixtures import RunningService, environment
from support.contract_server import ContractServer

HERE: Final = Path(__file__).parent
NOWHERE: Final = "http://127.0.0.1:9"
TIMEOUT_S: Final = 60


@dataclass(frozen=True, slots=True)
class Step:
    line: int
    command: str
    expected: str
    faults: dict[str, object]


def services_of(path: Path) -> list[str]:
    return path.read_text().splitlines()[0].removeprefix("% services: ").split(", ")


def steps(path: Path) -> Iterator[Step]:
    faults: dict[str, object] = {}
    lines = path.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        block = lines[start + 1 : end]
        expected = [line for line in block if not line.startswith(("% ", "! "))]
        yield Step(start + 1, lines[start][2:], "\n".join(expected).strip("\n"), faults)
        faults = {
            name: json.loads(value)
            for name, _, value in (line[2:].partition("=") for line in block if line.startswith("! "))
        }


def pattern(expected: str) -> str:
    lines = [r"(?:.*\n)*" if line == "…" else f"{re.escape(line)}\n" for line in expected.split("\n")]
    return "".join(lines).replace("…", ".*")


CASES: Final = [
    pytest.param(path, service, id=f"{path.stem}-{service}")
    for path in sorted(HERE.glob("*.transcript"))
    for service in services_of(path)
]


@pytest.mark.parametrize(("path", "service"), CASES)
def test_transcript(path: Path, service: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    stand_in: ContractServer | None = None
    env = {"KMS_SERVICE_URL": NOWHERE}
    if service == "stand-in":
        stand_in = request.getfixturevalue("stand_in")
        env = {"KMS_SERVICE_URL": stand_in.url}
    elif service == "real":
        real: RunningService = request.getfixturevalue("real_service")
        env = {"KMS_SERVICE_URL": real.url, "KMS_STATE_DIR": str(real.state_dir)}

    for step in steps(path):
        for name, value in step.faults.items():
            assert hasattr(stand_in and stand_in.faults, name)
            setattr(stand_in and stand_in.faults, name, value)
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1; {step.command}"],
            cwd=tmp_path,
            env=environment(tmp_path, **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        code = f"\n[{done.returncode}]" if done.returncode else ""
        shown = f"{done.stdout}".strip("\n") + code

        assert re.fullmatch(pattern(step.expected), shown.strip("\n") + "\n"), f"line {step.line}: {shown}"
