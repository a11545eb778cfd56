"""docs/sdk.md, as it stands there, and what it promises of the client, against a running service."""

import io
import re
import subprocess
import sys
import tracemalloc
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final, cast

import pytest

from kms_client import Client, errors
from kms_protocol.wire import PREFIX
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


def test_file_is_rewrapped_without_its_payload(service: Service, tmp_path: Path) -> None:
    source, sealed = tmp_path / "source", tmp_path / "sealed.age"
    source.write_bytes(bytes(3 * MIB))
    with Client(service.url) as kms:
        kms.encrypt_file(source, sealed, context="env=dev")
        sealed.chmod(0o640)
        payload = sealed.read_bytes()[-2 * MIB :]
        answer = kms.rewrap_file(sealed, sealed, context="env=dev", new_context="env=prod", overwrite=True)
        with pytest.raises(errors.DecryptFailed):
            kms.decrypt_file(sealed, tmp_path / "opened", context="env=dev")
        kms.decrypt_file(sealed, tmp_path / "opened", context="env=prod")

    assert sealed.stat().st_mode & 0o777 == 0o640
    assert sealed.read_bytes().startswith(answer.ciphertext)
    assert sealed.read_bytes().endswith(payload)
    assert (tmp_path / "opened").read_bytes() == bytes(3 * MIB)


@pytest.mark.parametrize("size", [0, 1, 3 * MIB])
def test_digest_of_a_result_is_that_of_its_bytes(service: Service, size: int) -> None:
    job_id = service.upload("encrypt", bytes(size))
    service.wait(job_id, "succeeded")
    path = f"{PREFIX}/jobs/{job_id}/result"
    wanted = service.http.head(path, headers={"Want-Repr-Digest": "sha-512=3, sha-256=10"})

    digest = b64encode(sha256(service.result(job_id)).digest()).decode()
    assert wanted.headers["repr-digest"] == f"sha-256=:{digest}:"
    for other in ({}, {"Want-Repr-Digest": "sha-256=0"}, {"Want-Repr-Digest": "sha-512=1"}):
        assert "repr-digest" not in service.http.head(path, headers=other).headers


def test_digest_of_a_result_is_on_record(service: Service) -> None:
    """It confirms a guess of a plaintext."""
    job_id = service.upload("encrypt", b"x")
    service.wait(job_id, "succeeded")
    for wanted in ("", "sha-256=1"):
        service.http.head(f"{PREFIX}/jobs/{job_id}/result", headers={"Want-Repr-Digest": wanted})

    assert len(service.audited(operation="job.result", job_id=job_id)) == 1
