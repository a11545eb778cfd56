"""docs/sdk.md, as it stands there, and what it promises of the client, against a running service."""

import io
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import BinaryIO, Final, cast

import pytest

from kms_client import Client
from support.service import Service

DOCUMENT: Final = Path(__file__).parents[2] / "docs/sdk.md"
EXAMPLES: Final = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
MIB: Final = 1024 * 1024
SIZE: Final = 64 * MIB


def test_document_has_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[0])
def test_example_runs_as_written(service: Service, example: str, tmp_path: Path) -> None:
    script = example.replace("http://localhost:8082", service.url)

    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_examples_satisfy_mypy_as_a_user_runs_it(tmp_path: Path) -> None:
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"example_{number}.py").write_text(example)

    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", *map(str, tmp_path.glob("*.py"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout


class Zeros(io.RawIOBase):
    """Many bytes that are nowhere; as a target it keeps their number alone."""

    def __init__(self, size: int = 0) -> None:
        self._left = size
        self.written = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # of what there is
        size = min(self._left, len(buffer))
        self._left -= size
        return size

    def write(self, data: bytes) -> int:  # type: ignore[override]  # as above
        self.written += len(data)
        return len(data)


def test_large_file_passes_through_flat_memory(service: Service) -> None:
    target = Zeros()
    with Client(service.url) as kms:
        tracemalloc.start()
        job = kms.upload_encrypt(io.BufferedReader(Zeros(SIZE), MIB))
        kms.wait(job.job_id)
        size = kms.download(job.job_id, cast("BinaryIO", target))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert size > SIZE
    assert peak_bytes < SIZE / 4
