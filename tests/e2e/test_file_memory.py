"""How much memory files take: as much for a large one as for one an eighth its size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.service import Service

MIB: Final = 1024 * 1024
SMALL: Final = 64 * MIB
LARGE: Final = 512 * MIB
BOUND_BYTES: Final = 48 * MIB
"""A tenth of what the larger file has more: garbage collectors and thread pools are never quite alike."""


def pieces(size: int) -> Iterator[bytes]:
    yield from (bytes(MIB) for _ in range(size // MIB))


def peak_bytes(*pids: int) -> int:
    """The most memory that one of these processes had resident so far (proc(5), VmHWM)."""
    texts = (Path(f"/proc/{pid}/status").read_text() for pid in pids)
    lines = (line for text in texts for line in text.splitlines() if line.startswith("VmHWM:"))
    return max(int(line.split()[1]) * 1024 for line in lines)


def peaks(folder: Path, size: int) -> dict[str, int]:
    """Of API and worker after an upload, its result, and a job from file to file, of so many bytes."""
    folder.mkdir()
    with Service(folder) as service:
        service.start()
        upload = service.upload("encrypt", pieces(size))
        service.wait(upload, "succeeded")
        with service.http.stream("GET", f"/api/v1/kms/jobs/{upload}/result") as answer:
            assert sum(map(len, answer.iter_raw())) > size
        source, target = service.files / "in", service.files / "out"
        with source.open("wb") as file:
            file.truncate(size)
        job = {"kind": "encrypt", "source": source.as_uri(), "target": target.as_uri()}
        service.wait(service.submit(job), "succeeded")
        assert target.stat().st_size > size
        return {"api": peak_bytes(service.pid("api")), "worker": peak_bytes(*service.pool_pids())}


@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, large = peaks(tmp_path / "small", SMALL), peaks(tmp_path / "large", LARGE)

    assert {
        name: large[name] - small[name] for name in small if large[name] - small[name] > BOUND_BYTES
    } == {}
