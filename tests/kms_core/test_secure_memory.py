"""Core files, debuggers and locks of memory, on the kernel that is here; each in a process of its own."""

import ctypes
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support import without_mlock

linux = pytest.mark.skipif(sys.platform != "linux", reason="prctl and mlockall are Linux's")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes capabilities away")
LOCKED_KIB: Final = "int(re.search(r'VmLck:\\s+(\\d+)', open('/proc/self/status').read())[1])"
BEGIN: Final = f"""
import ctypes, os, re, resource, threading
from kms_core import secure_memory
def locked(): return {LOCKED_KIB}
def dumpable(): return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
"""


def told(script: str, *, may_lock: bool = True) -> str:
    """What a program prints that ends well."""
    argv = [sys.executable, "-P", "-c", BEGIN + script]
    argv = argv if may_lock else without_mlock.words(*argv)
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@linux
def test_importing_the_module_changes_nothing() -> None:
    assert told("print(dumpable(), locked())") == "1 0"


@linux
def test_a_fork_inherits_that_it_cannot_be_dumped() -> None:
    script = "secure_memory.forbid_dumps()\nif os.fork() == 0: print(dumpable(), flush=True)\nelse: os.wait()"

    assert told(script) == "0"


@linux
def test_no_core_file_is_written_whatever_the_limit_is(tmp_path: Path) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "/")):
        pytest.skip("core files go elsewhere here")
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("no core file is made here at all")
    raised = f"resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))\n"
    limit = f"{raised}resource.setrlimit = lambda *_: None\n"
    left: dict[str, int] = {}
    for name, protect in {"bare": "", "protected": "secure_memory.forbid_dumps()\n"}.items():
        (tmp_path / name).mkdir()
        ran = subprocess.run(
            [sys.executable, "-P", "-c", f"{BEGIN}{limit}{protect}os.abort()"],
            cwd=tmp_path / name,
            capture_output=True,
            check=False,
        )
        assert ran.returncode == -signal.SIGABRT
        left[name] = len(list((tmp_path / name).iterdir()))

    assert left == {"bare": 1, "protected": 0}


@linux
@needs_root
def test_all_memory_is_locked_and_also_what_comes_later() -> None:
    script = """
print(secure_memory.lock())
before = locked()
more = bytearray(64 << 20)
print(before > 0, locked() - before >= 64 << 10)
"""
    assert told(script).splitlines() == ["None", "True True"]


@linux
@needs_root
def test_a_lock_takes_no_memory_that_is_not_used() -> None:
    """MCL_ONFAULT: else 256 MiB of address space would be 256 MiB of memory."""
    script = """
import mmap
secure_memory.lock()
def resident(): return int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = resident()
room = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(resident() - before < 32 << 10)
"""
    assert told(script) == "True"


@linux
@needs_root
def test_a_fork_has_no_lock_until_it_asks_for_one() -> None:
    script = """
secure_memory.lock()
if os.fork() == 0:
    print(locked() == 0, secure_memory.lock(), locked() > 0, flush=True)
else:
    os.wait()
"""
    assert told(script) == "True None True"


@linux
@needs_root
def test_under_a_limit_nothing_is_locked_and_no_allocation_fails_later() -> None:
    script = """
print(secure_memory.lock(), resource.getrlimit(resource.RLIMIT_MEMLOCK), locked())
kept = [bytearray(32 << 20) for _ in range(8)]
threads = [threading.Thread(target=bytes, args=(1 << 20,)) for _ in range(32)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(kept))
"""
    assert told(script, may_lock=False).splitlines() == ["limit (8388608, 8388608) 0", "8"]


@linux
def test_a_process_that_may_not_forbid_dumps_refuses_to_start(tmp_path: Path) -> None:
    """A seccomp filter that refuses prctl once it is in place."""
    refuse = f"""
import sys
scmp = ctypes.CDLL("libseccomp.so.2")
scmp.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(scmp.seccomp_init(0x7FFF0000))
number = scmp.seccomp_syscall_resolve_name(b"prctl")
scmp.seccomp_rule_add_array(context, 0x00050000 | {errno.EPERM}, number, 0, None)
assert scmp.seccomp_load(context) == 0
sys.argv = ["kms-service", "--config", {str(tmp_path / "none.toml")!r}]
from kms_api.main import main
sys.exit(main())
"""
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not here")
    ran = subprocess.run(
        [sys.executable, "-P", "-c", BEGIN + refuse], capture_output=True, text=True, check=False
    )

    assert ran.returncode == 78, ran.stderr
    assert re.search(r"PR_SET_DUMPABLE: Operation not permitted\): allow prctl", ran.stderr)
