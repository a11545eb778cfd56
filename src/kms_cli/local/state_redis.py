"""The Redis of the service on this machine: of the settings, or the embedded one of a running ``kms up``."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from kms_cli.local import valkey
from kms_core.settings.load import DEFAULT_REDIS_URL
from kms_core.settings.model import RedisSection, Settings


def section_of(settings: Settings, environ: Mapping[str, str]) -> RedisSection:
    """``[kms.redis]``, with the address of the embedded server where the settings name none and one runs."""
    section = settings.kms.redis
    if section.url != DEFAULT_REDIS_URL:
        return section
    for socket_path in _sockets(settings.state_dir, environ):
        return msgspec.structs.replace(section, url=f"unix://{quote(str(socket_path))}?db=0")
    return section


def is_named(section: RedisSection) -> bool:
    """Whether this is a server that settings name or that runs here, and not the default address."""
    return section.url != DEFAULT_REDIS_URL


def _sockets(state_dir: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    """The sockets that exist; also those of the owner of the state directory, for root."""
    try:
        owner = state_dir.stat().st_uid
    except OSError:
        return
    mine = valkey.runtime_dir(state_dir, environ)
    tag = mine.name.rpartition("-")[2]
    theirs = (Path(f"/run/user/{owner}/kms-{tag}"), Path("/tmp") / f"kms-{owner}-{tag}")  # noqa: S108  # owner checked
    for folder in (mine, *theirs):
        socket_path = folder / "valkey.sock"
        if _is_private(folder, {owner, os.geteuid()}) and socket_path.exists():
            yield socket_path


def _is_private(folder: Path, owners: set[int]) -> bool:
    """Whether others than these users can have put something there."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not others
