"""Files that commands leave behind are on the disk when the command says so: keys, tokens, results."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kms_cli.commands.migrate import Lines, MovedRecord
from kms_cli.options import OutputExists, placed
from kms_core import secure_files
from kms_core.payload.files import FileWriter
from kms_protocol.errors import SpoolFull
from support.audit_logs import room_for
from support.disk_trace import recorded
from support.small_disk import small_disk


def create(path: Path) -> None:
    assert secure_files.create(path, b"AGE-SECRET-KEY-1")


def replace(path: Path) -> None:
    secure_files.write(path, b"AGE-SECRET-KEY-1")


def place(path: Path) -> None:
    with placed(path, overwrite=False) as file:
        file.write(b"AGE-SECRET-KEY-1")


def place_over(path: Path) -> None:
    path.write_bytes(b"older")
    with placed(path, overwrite=True) as file:
        file.write(b"AGE-SECRET-KEY-1")


@pytest.mark.parametrize("write", [create, replace, place, place_over])
def test_a_file_is_private_and_survives_a_power_cut(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = recorded(monkeypatch)
    path = tmp_path / "out.txt"
    write(path)

    assert path.read_bytes() == b"AGE-SECRET-KEY-1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["out.txt"]
    disk.assert_survives(path)


def test_an_output_that_exists_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_bytes(b"older")

    with pytest.raises(OutputExists), placed(path, overwrite=False):
        pytest.fail("the work has begun")
    assert path.read_bytes() == b"older"


def test_an_output_without_room_is_refused_before_the_work(tmp_path: Path) -> None:
    with (
        room_for(58),
        pytest.raises(OSError, match="File too large"),
        placed(tmp_path / "out.txt", overwrite=False, room_bytes=59),
    ):
        pytest.fail("the work has begun")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_by_the_output_on_it(tmp_path: Path) -> None:
    """Threads that write a file raise the error of the spool, whose hint is about the service."""
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        with (
            pytest.raises(OSError, match="No space left") as raised,
            placed(disk / "out", overwrite=False) as file,
        ):
            FileWriter(file.fileno()).write_at(memoryview(bytes(2 * 1024 * 1024)), 0)

        assert (raised.value.filename, list(disk.iterdir())) == (str(disk / "out"), [])


def test_a_full_spool_of_the_service_is_no_full_disk_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(SpoolFull), placed(tmp_path / "out", overwrite=False):
        raise SpoolFull


def test_records_of_a_migration_are_on_the_disk_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = recorded(monkeypatch)
    path = tmp_path / "out.ndjson"
    with path.open("w+b") as file:
        Lines(file).put([MovedRecord(line=1, source="00", ciphertext=b"age")])

        assert disk.synced_bytes[path.stat().st_ino] == path.stat().st_size > 0
