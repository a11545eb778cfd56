"""The recorder of effects: what it intercepts and reports as missed; a dead process changes nothing."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import redis

from kms_core.jobs.store.scripts import SCRIPTS
from support.effects import Process, installed
from support.job_stores import connect


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with installed(SCRIPTS):
        yield


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with closing(connect(redis_url)) as found:
        yield found


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def write_durably(folder: Path) -> None:
    """Several effects, with the cleanup that programs have."""
    temporary = folder / "new.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.write(fd, b"whole")
        os.fsync(fd)
        temporary.rename(folder / "new")
    except BaseException:
        temporary.unlink()
        raise
    finally:
        os.close(fd)
        shutil.rmtree(folder / "old", ignore_errors=True)


def test_effects_are_noted_in_order(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with Process(tmp_path) as process:
        write_durably(tmp_path)

    noted = ["open new.tmp #1", "write new.tmp #1", "fsync new.tmp #1", "rename new #1", "rmdir old #1"]
    assert [str(point) for point in process.points] == noted
    assert not process.missed


@pytest.mark.parametrize(
    ("at", "left"),
    [(0, []), (1, ["new.tmp"]), (3, ["new.tmp"]), (4, ["new"])],
    ids=["open", "write", "rename", "rmdir"],
)
def test_a_dead_process_cleans_nothing_up(tmp_path: Path, at: int, left: list[str]) -> None:
    (tmp_path / "old").mkdir()
    open_before = names("/proc/self/fd")
    with Process(tmp_path, at) as process:
        write_durably(tmp_path)

    assert process.is_dead
    assert names(tmp_path) == [*left, "old"]
    assert names("/proc/self/fd") == open_before


def test_commands_before_the_end_were_run(client: redis.Redis) -> None:
    """Of a pipeline those before it, too; and a thread of a dead process sends nothing."""
    for at, expected in enumerate(("0", "1", "2")):
        client.set("kms:number", 0)
        with Process(Path(), at) as process:
            pipeline = client.pipeline(transaction=False)
            for _ in range(3):
                pipeline.incr("kms:number")
            try:
                pipeline.execute()
            finally:
                client.incr("kms:number")
        assert process.is_dead
        assert client.get("kms:number") == expected.encode()


def test_others_go_on_while_a_process_stands_still(client: redis.Redis) -> None:
    with Process(Path(), 0, "pause", meanwhile=lambda: client.set("kms:name", "theirs")) as process:
        assert client.get("kms:name") == b"theirs"

    assert [str(point) for point in process.points] == ["GET kms:name #1"]


def _written(folder: Path) -> None:
    (folder / "file").write_bytes(b"x")


def _sent(_: Path) -> None:
    line, other = socket.socketpair()
    with line, other:
        line.sendall(b"x")


def _started(_: Path) -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.parametrize("act", [_written, _sent, _started])
def test_what_is_not_intercepted_is_reported(tmp_path: Path, act: Callable[[Path], None]) -> None:
    with Process(tmp_path) as process:
        act(tmp_path)

    assert process.missed
    with Process(tmp_path) as process, suppress(FileNotFoundError):
        (tmp_path / "none").read_bytes()
    assert not process.missed
