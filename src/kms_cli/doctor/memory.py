"""Whether keys in memory may reach the swap of this machine."""

from pathlib import Path
from typing import Final

from kms_cli.doctor.findings import Finding
from kms_core import secure_memory

_SWAPS: Final = Path("/proc/swaps")


def memory(swaps: Path = _SWAPS) -> Finding:
    """What a service does that is started with the limits of this command; ``swaps`` is as /proc/swaps."""
    dumps = "core files and debuggers are kept away"
    if secure_memory.may_lock():
        return Finding("ok", "memory", f"{dumps}, and memory is locked")
    if not _is_there(swaps):
        return Finding("ok", "memory", f"{dumps}; memory is not locked, and there is no swap")
    told = f"{dumps}; memory is not locked, and this machine swaps"
    return Finding("warn", "memory", told, secure_memory.ADVICE["limit"])


def _is_there(swaps: Path) -> bool:
    """True also where nobody can tell."""
    try:
        return len(swaps.read_text().splitlines()) > 1
    except OSError:
        return True
