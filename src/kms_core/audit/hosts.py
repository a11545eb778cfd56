"""Logs of several hosts: the log of this host, and copies of the logs of others below one directory.

``<copies>/<host>/`` has the files of a host, ``<copies>/<host>.pub`` the public keys that sign its lines.
The program that makes the copies may write to the first, never to the second. A copy is a little older
than its log, and its files were copied one after the other.
"""

import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from kms_core.audit.chain import text_of
from kms_protocol.units import time_or_none

RUN: Final = timedelta(minutes=10)
"""The longest run of the program that copies: two files of one copy differ in age by at most this."""
KEYS_SUFFIX: Final = ".pub"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_PLACE: Final = "copies"


@dataclass(frozen=True, slots=True)
class HostLog:
    """The log of a host. ``host`` is empty where only one log is read."""

    host: str
    folder: Path
    is_copy: bool = False

    @property
    def keys_path(self) -> Path:
        """The file with the public keys of a copy."""
        return self.folder.with_name(self.folder.name + KEYS_SUFFIX)


class HostLogs(NamedTuple):
    """The logs that can be read, this host's first; and the reason for each that cannot, by host."""

    logs: Sequence[HostLog]
    unread: dict[str, str]


def local_log() -> str:
    """The name of this host."""
    return socket.gethostname()[:80]


def host_logs(own: Path, copies: Path | None) -> HostLogs:
    """The log in ``own``, and the copies of other hosts; a copy of this host's log is left out."""
    if copies is None:
        return HostLogs([HostLog("", own)], {})
    logs, unread = [HostLog(local_log(), own)], {}
    try:
        names = sorted(path.name for path in copies.iterdir() if path.is_dir())
    except OSError as exc:
        return HostLogs(logs, {_PLACE: f"the directory of copies cannot be read ({exc.strerror})"})
    for name in names:
        if name == local_log() or not _NAME.fullmatch(name):
            continue
        if why := copy_trouble(copies / name):
            unread[name] = why
        else:
            logs.append(HostLog(name, copies / name, is_copy=True))
    return HostLogs(logs, unread)


def copy_trouble(folder: Path) -> str:
    """The reason why a copy cannot be read; empty if it can. A link could lead to files of this host."""
    try:
        with os.scandir(folder) as entries:
            link = next((entry.name for entry in entries if entry.is_symlink()), "")
    except OSError as exc:
        return f"the copy cannot be read ({exc.strerror})"
    return f"the copy has a link, which is not followed: {link[:80]!r}" if link else ""


def complete_to(times: Iterable[str]) -> str:
    """The time up to which a copy has all lines, given the times of its last lines; empty for none.

    The last line of a file may have any text as its time, since no key signed it.
    """
    found = [at for at in map(time_or_none, times) if at is not None and at.year > 1]
    return text_of(min(max(found), datetime.now(UTC)) - RUN) if found else ""
