import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kms_core import audit
from kms_core.audit import JsonLines, Record
from kms_core.errors import AuditUnavailable

APPEND_MANY = """
import sys
from pathlib import Path
from kms_core.audit import JsonLines, Record, now

trail = JsonLines(Path(sys.argv[1]))
sys.stdin.read()  # both begin at once
for number in range(300):
    trail.append(Record(
        time=now(), operation="encrypt", principal=f"{sys.argv[2]}-{number}", tenant="", credential=""
    ))
"""


def record(number: int = 0) -> Record:
    return Record(
        time=audit.now(),
        operation="encrypt",
        principal=f"ada-{number}",
        tenant="acme",
        credential="test",
        result="ok",
    )


def lines(path: Path) -> list[dict[str, object]]:
    """Every line of a trail, empty ones left out; fails on a line that is not JSON."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond a size: how a full disk looks to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit" / "api.jsonl"


# -- lines -------------------------------------------------------------------------------------------


def test_a_record_is_one_line(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    trail.append(record(2))

    assert [line["principal"] for line in lines(path)] == ["ada-1", "ada-2"]
    assert path.read_bytes().count(b"\n") == 2


def test_what_is_not_known_is_left_out(path: Path) -> None:
    JsonLines(path).append(record())

    assert lines(path)[0].keys() == {"time", "operation", "principal", "tenant", "credential", "result"}


def test_a_line_break_in_a_name_does_not_begin_a_line(path: Path) -> None:
    forged = record()
    forged.principal = 'ada\n{"principal":"eve"}'
    JsonLines(path).append(forged)

    assert [line["principal"] for line in lines(path)] == [forged.principal]


def test_the_file_is_private(path: Path) -> None:
    JsonLines(path).append(record())

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_fsync_writes_the_same(path: Path) -> None:
    JsonLines(path, fsync=True).append(record(1))

    assert lines(path)[0]["principal"] == "ada-1"


def test_the_time_is_utc_to_the_microsecond() -> None:
    before = datetime.now(UTC)
    text = audit.now()

    assert len(text) == len("2026-11-24T16:00:00.000000Z")
    assert before <= datetime.fromisoformat(text) <= datetime.now(UTC)


# -- several writers ---------------------------------------------------------------------------------


def test_two_processes_share_a_file(path: Path) -> None:
    start, gun = os.pipe()
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND_MANY, str(path), name], stdin=start)
        for name in ("ada", "bob")
    ]
    os.close(start)
    os.close(gun)
    for writer in writers:
        writer.wait()

    assert [writer.returncode for writer in writers] == [0, 0]
    assert sorted(str(line["principal"]) for line in lines(path)) == sorted(
        f"{name}-{number}" for name in ("ada", "bob") for number in range(300)
    )


def test_threads_share_a_trail(path: Path) -> None:
    trail = JsonLines(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: trail.append(record(number)), range(200)))

    assert {line["principal"] for line in lines(path)} == {f"ada-{number}" for number in range(200)}


# -- torn lines --------------------------------------------------------------------------------------


def test_a_torn_tail_is_closed_before_the_next_record(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"time":"2026-11-24T16:00')
    JsonLines(path).append(record(1))
    torn, whole = path.read_text().splitlines()

    assert torn == '{"time":"2026-11-24T16:00'
    assert json.loads(whole)["principal"] == "ada-1"


def test_a_tail_that_another_process_tore_is_closed_too(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    with path.open("a") as other:
        other.write('{"time":"20')
    trail.append(record(2))
    first, torn, last = path.read_text().splitlines()

    assert torn == '{"time":"20'
    assert [json.loads(line)["principal"] for line in (first, last)] == ["ada-1", "ada-2"]


# -- files that go away ------------------------------------------------------------------------------


def test_a_deleted_file_is_begun_anew(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    path.unlink()
    trail.append(record(2))

    assert [line["principal"] for line in lines(path)] == ["ada-2"]


def test_a_rotated_file_keeps_its_lines_and_gets_no_more(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    rotated = path.rename(path.with_suffix(".1"))
    trail.append(record(2))
    trail.append(record(3))

    assert [line["principal"] for line in lines(rotated)] == ["ada-1"]
    assert [line["principal"] for line in lines(path)] == ["ada-2", "ada-3"]


def test_a_file_put_in_its_place_is_used(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    path.rename(path.with_suffix(".1"))
    path.touch()
    trail.append(record(2))

    assert [line["principal"] for line in lines(path)] == ["ada-2"]


def test_a_deleted_directory_is_made_again(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    path.unlink()
    path.parent.rmdir()
    trail.append(record(2))

    assert [line["principal"] for line in lines(path)] == ["ada-2"]


def test_no_descriptor_is_left_behind(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record())
    before = open_descriptors()
    for _ in range(5):
        path.unlink()
        trail.append(record())

    assert open_descriptors() == before


# -- what cannot be written --------------------------------------------------------------------------


def test_a_full_device_is_an_error() -> None:
    with pytest.raises(AuditUnavailable, match="No space left on device"):
        JsonLines(Path("/dev/full")).append(record())


def test_a_disk_that_fills_up_within_a_line_is_an_error(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record(1))
    size = path.stat().st_size
    with room_for(size + 20), pytest.raises(AuditUnavailable, match="disk is full"):
        trail.append(record(2))

    assert path.stat().st_size == size + 20


def test_a_full_disk_is_an_error_for_as_long_as_it_is_full(path: Path) -> None:
    trail = JsonLines(path)
    with room_for(20):
        for _ in range(3):
            with pytest.raises(AuditUnavailable):
                trail.append(record())

    assert path.stat().st_size <= 20


@pytest.mark.parametrize("writer", ["the same", "another"])
def test_after_a_full_disk_records_stand_on_lines_of_their_own(path: Path, writer: str) -> None:
    trail, another = JsonLines(path), JsonLines(path)
    trail.append(record(1))
    another.append(record(2))
    with room_for(path.stat().st_size + 20), pytest.raises(AuditUnavailable):
        trail.append(record(3))
    (trail if writer == "the same" else another).append(record(4))
    *whole, torn, last = path.read_text().splitlines()

    assert [json.loads(line)["principal"] for line in (*whole, last)] == ["ada-1", "ada-2", "ada-4"]
    assert len(torn) == 20


def test_a_directory_in_the_place_of_the_file_is_an_error(path: Path) -> None:
    path.mkdir(parents=True)

    with pytest.raises(AuditUnavailable, match="Is a directory"):
        JsonLines(path).append(record())


def test_a_file_in_the_place_of_the_directory_is_an_error(path: Path) -> None:
    trail = JsonLines(path)
    trail.append(record())
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()

    with pytest.raises(AuditUnavailable):
        trail.append(record())


def test_it_recovers_when_it_can_be_written_again(path: Path) -> None:
    trail = JsonLines(path)
    path.mkdir(parents=True)
    with pytest.raises(AuditUnavailable):
        trail.append(record(1))
    path.rmdir()
    trail.append(record(2))

    assert [line["principal"] for line in lines(path)] == ["ada-2"]
