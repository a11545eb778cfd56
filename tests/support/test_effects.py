"""The recorder of effects: what it intercepts and reports as missed; a dead process changes nothing."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import pytest
import redis

import kms_core
import kms_protocol
from kms_core.jobs.store.scripts import SCRIPTS
from support.effects import TARGETS, Process, installed
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


CORE: Final = Path(kms_core.__file__).parent
METHODS: Final = frozenset(
    {"chmod", "hardlink_to", "mkdir", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text"}
)
"""Of a path, of which no other class of the core has one."""
MAY_CHANGE: Final = re.compile(rf"\bos\.|\bshutil\.|\.(?:{'|'.join(METHODS)})\(")
CHANGING: Final = {
    "audit/keys.py": "the folder of keys",
    "audit/log.py": "the folder of the log",
    "audit/maintenance.py": "the log",
    "audit/segment_writer.py": "the log",
    "audit/sinks.py": "an anchor in a file",
    "container.py": "the folder of the spool",
    "documents/local_copy.py": "a copy of a document",
    "jobs/execution/attendance.py": "a pipe",
    "jobs/storage/commit_marks.py": "the mark of a target",
    "jobs/storage/local.py": "targets",
    "jobs/storage/spool_folder.py": "the spool",
    "observability/multiprocess_metrics.py": "metrics, in memory",
    "payload/files.py": "what its callers have open",
    "programs/supervisor.py": "the log of a child program",
    "secure_files.py": "private files",
    "secure_memory.py": "memory",
    "whole_files.py": "private files",
    "settings/files.py": "the note of which settings are in use",
}
"""Modules that change files, and which. Of jobs, all are in ``jobs/storage`` and intercepted here."""
READING: Final = frozenset(
    {
        *("DirEntry", "close", "cpu_count", "dup", "environ", "fsdecode", "fsencode", "fstat", "fstatvfs"),
        *("getpid", "getppid", "geteuid", "getxattr", "listdir", "lseek", "major", "minor", "open", "path"),
        *("pread", "preadv", "read", "scandir", "set_blocking", "set_inheritable", "stat", "stat_result"),
        *("statvfs", "strerror", "urandom", "walk"),
    }
)
"""What ``os`` has that changes no file; how a file is opened is intercepted."""
OTHERS: Final = {
    "age/plugin_identity.py": {"killpg"},
    "jobs/execution/attendance.py": {"kill", "pipe2"},
    "observability/multiprocess_metrics.py": {"kill", "memfd_create"},
    "programs/supervisor.py": {"killpg", "waitid"},
    "programs/tether.py": {"execv"},
    "secure_memory.py": {"memfd_create"},
}
"""What changes processes and memory."""


def named_of_os(tree: ast.AST) -> set[str]:
    """The attributes of ``os`` that a module names, but for constants."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    names = {each.attr for each in found if isinstance(each.value, ast.Name) and each.value.id == "os"}
    return {name for name in names if not name.isupper() and not name.startswith("O_")}


def changing_calls(tree: ast.AST) -> set[str]:
    """The calls of a module that change files."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    methods = (each for each in calls if isinstance(each, ast.Attribute))
    found = {each.attr for each in methods if each.attr in METHODS or ast.unparse(each) == "shutil.rmtree"}
    return found | (named_of_os(tree) & TARGETS.keys())


def test_each_module_that_changes_files_is_known() -> None:
    """And each function of ``os`` that the core calls is intercepted, or changes no file."""
    texts = {
        str(path.relative_to(folder)): path.read_text("utf-8")
        for folder in (CORE, Path(kms_protocol.__file__).parent)
        for path in folder.rglob("*.py")
    }
    modules = {name: ast.parse(text) for name, text in texts.items() if MAY_CHANGE.search(text)}
    unknown = {name: named_of_os(tree) - TARGETS.keys() - READING for name, tree in modules.items()}

    assert {name for name, tree in modules.items() if changing_calls(tree)} == CHANGING.keys()
    assert {name: found for name, found in unknown.items() if found} == OTHERS
