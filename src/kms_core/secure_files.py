"""Whether a file with a secret can be read by others. Knows no file's content."""

import os
import stat
from pathlib import Path
from typing import Final

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_ALL_BUT_GROUP_READ: Final = _OTHERS & ~stat.S_IRGRP


def open_to_others(path: Path) -> int:
    """The permission bits (``0o640``) if more than its owner may use the file, else 0. Raises OSError."""
    found = path.stat()
    return stat.S_IMODE(found.st_mode) if is_open(found, os.geteuid()) else 0


def is_open(found: os.stat_result, uid: int) -> bool:
    """Whether others than the process of user ``uid`` may use the file.

    A file of root that its group may read is private too, to a service that is not root: so it gets a Secret
    of Kubernetes (``fsGroup``) and a credential of systemd (whose access list shows as the group's bits).
    PostgreSQL reads its key file by the same rule (``ssl_key_file``).
    """
    handed_by_root = found.st_uid == 0 and uid != 0
    return bool(found.st_mode & (_ALL_BUT_GROUP_READ if handed_by_root else _OTHERS))
