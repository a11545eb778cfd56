"""Memory that one process writes and its children only read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kms_core.secure_memory import SIZE_BYTES, SharedSecrets
from kms_protocol.errors import ConfigurationError

READER = """
import mmap, os, sys
from kms_core.secure_memory import SharedSecrets
fd = int(sys.argv[1])
memory = SharedSecrets.inherited(fd)
print(memory.read().decode())
for name, act in {
    "write": lambda: os.pwrite(fd, b"x", 0),
    "map": lambda: mmap.mmap(fd, 4096),
    "grow": lambda: os.ftruncate(fd, 2 ** 30),
    "shrink": lambda: os.ftruncate(fd, 0),
}.items():
    try:
        act()
    except OSError:
        print("refused", name)
"""


def test_a_started_program_reads_and_cannot_write() -> None:
    memory = SharedSecrets.create()
    memory.write(b"from the parent")

    done = subprocess.run(
        [sys.executable, "-P", "-c", READER, str(memory.fd)],
        pass_fds=[memory.fd],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert done.stdout.split("\n")[:-1] == ["from the parent", *(f"refused {n}" for n in ACTS)]
    assert memory.read() == b"from the parent"


ACTS = ("write", "map", "grow", "shrink")


def test_a_fork_sees_later_writes() -> None:
    memory = SharedSecrets.create()
    memory.write(b"before")
    written, told = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        first = memory.read()
        os.write(told[1], first)
        os.read(written[0], 1)
        os.write(told[1], b"+" + memory.read())
        os._exit(0)
    assert os.read(told[0], 100) == b"before"
    memory.write(b"after")
    os.write(written[1], b"x")

    assert os.read(told[0], 100) == b"+after"
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (*written, *told):
        os.close(fd)


def test_it_begins_empty_and_counts_writes() -> None:
    memory = SharedSecrets.create()

    assert (memory.generation(), memory.read()) == (0, b"")
    memory.write(b"1")
    memory.write(b"")
    assert (memory.generation(), memory.read()) == (2, b"")


def test_a_hundred_keys_fit_with_as_many_versions_as_they_may_have() -> None:
    memory = SharedSecrets.create()
    memory.write(b"v" * (100 * (2**19 + 1024)))

    assert len(memory.read()) == 100 * (2**19 + 1024)


def test_more_than_its_size_is_refused_and_nothing_lost() -> None:
    memory = SharedSecrets.create()
    memory.write(b"kept")

    with pytest.raises(ConfigurationError):
        memory.write(bytes(SIZE_BYTES))
    assert memory.read() == b"kept"


def test_it_has_no_name() -> None:
    memory = SharedSecrets.create()

    assert Path(f"/proc/self/fd/{memory.fd}").readlink().name == "memfd:kms-keys (deleted)"
