"""Runs a program under what a unit of systemd forbids: ``systemd_sandbox.py UNIT STATE -- PROGRAM``.

Applied from the unit's own lines: SystemCallFilter, MemoryDenyWriteExecute, RestrictAddressFamilies, UMask;
and as if they stood there: RestrictNamespaces, RestrictSUIDSGID, NoNewPrivileges, LimitCORE, ProtectHome,
another user, and a file system of which the state directory and private ``/tmp`` and ``/dev/shm`` alone can
be written. Needs root and libseccomp. Not applied: limits by control groups (memory, tasks, addresses), and
what hides parts of /proc.
"""

import ctypes
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

USER: Final = 10001
ROOT: Final = Path(__file__).parents[2]
HIDDEN: Final = {"/tmp": "1777", "/dev/shm": "1777", "/root": "755", "/home": "755"}
_PR_SET_MDWE: Final = 65  # prctl(2); Linux 6.3 and later
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWNS: Final = 0x00020000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_ALLOW: Final = 0x7FFF0000
_EPERM: Final = 0x00050001
_ENOSYS: Final = 0x00050000 | errno.ENOSYS
_CMP_EQ, _CMP_MASKED_EQ = 4, 7
_FAMILIES: Final = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
_NAMESPACES: Final = 0x7E020000  # every CLONE_NEW* but time
_SUID_SGID: Final = 0o6000
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def directives(unit: Path) -> dict[str, list[str]]:
    """Every line of the unit by its name, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found.setdefault(name, []).append(value)
    return found


def system_calls(filters: list[str]) -> set[str]:
    """What is allowed when the first line is an allow list and ``~`` takes away, as in systemd.exec(5)."""
    allowed: set[str] = set()
    for line in filters:
        names = {call for word in line.removeprefix("~").split() for call in _expand(word)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed | {"execve", "exit", "exit_group", "rt_sigreturn"}  # systemd's own, and to get started


def _expand(word: str) -> Iterator[str]:
    if not word.startswith("@"):
        yield word
        return
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines()[1:]:
        if (name := line.strip()) and not name.startswith("#"):
            yield from _expand(name)


def main(words: list[str]) -> None:
    """Become the program. Raises OSError where the kernel refuses a restriction."""
    unit, state = Path(words[0]), Path(words[1])
    asked = directives(unit)
    calls = system_calls(asked["SystemCallFilter"])
    _hide_the_rest(state)
    os.umask(int(asked["UMask"][0], 8))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)  # and with root all capabilities go
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if asked["MemoryDenyWriteExecute"] == ["yes"]:
        _checked(_libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0))
    _filter(calls, asked["RestrictAddressFamilies"][0].split())
    os.chdir(state)
    os.execv(words[3], words[3:])  # noqa: S606 -- the tests' own words


def _hide_the_rest(state: Path) -> None:
    os.umask(0o022)  # mount points are for the other user to pass
    _checked(_libc.unshare(_CLONE_NEWNS))
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount(str(state), str(state), None, _MS_BIND)
    for mounted in (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        if mounted == str(state) or mounted.startswith(("/proc", "/sys", "/dev")):
            continue
        _mount(None, mounted, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
    programs = (ROOT, Path(sys.prefix), Path(sys.base_prefix).resolve())
    kept = [(path, os.open(path, os.O_PATH)) for path in (state, *programs)]
    for place, mode in HIDDEN.items():
        _mount("tmpfs", place, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, f"mode={mode}")
    for path, handle in kept:  # pytest's folder, a checkout or a Python of one's own may lie there
        if not path.exists():
            path.mkdir(parents=True)
            _mount(f"/proc/self/fd/{handle}", str(path), None, _MS_BIND)
        os.close(handle)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def _filter(calls: set[str], families: list[str]) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_EPERM))

    def allow(name: str, *comparisons: _Comparison, action: int = _ALLOW) -> None:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0 or (name not in calls and action == _ALLOW):  # of another architecture; or not allowed
            return
        array = (_Comparison * len(comparisons))(*comparisons)
        _checked(seccomp.seccomp_rule_add_array(context, action, number, len(comparisons), array))

    special = {"socket", "unshare", "setns", "clone", "clone3", "chmod", "fchmod", "fchmodat", "fchmodat2"}
    for name in calls - special:
        allow(name)
    for family in families:
        allow("socket", _Comparison(0, _CMP_EQ, _FAMILIES[family], 0))
    allow("clone", _Comparison(0, _CMP_MASKED_EQ, _NAMESPACES, 0))
    allow("clone3", action=_ENOSYS)  # it keeps its flags in memory; libc then takes clone, as under systemd
    for name, argument in {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2}.items():
        allow(name, _Comparison(argument, _CMP_MASKED_EQ, _SUID_SGID, 0))
    _checked(seccomp.seccomp_load(context))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno() or -result
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main(sys.argv[1:])
