"""Our token for a server: given, or in a file that an agent keeps fresh, read again when it changes."""

import re
from pathlib import Path
from typing import Final

import structlog

from kms_core.secure_files import open_to_others
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError

_VISIBLE: Final = re.compile(r"[!-~]{1,8192}")  # what a header may hold
_NEW: Final = "put one there, such as `bao token create -orphan -policy=kms -field=token` prints"
_log = structlog.get_logger(__name__)
Stamp = tuple[int, int, int]


class FileToken:
    """Safe to use from several threads."""

    def __init__(self, given: str | None, file: Path | None, *, strict: bool, new: str = _NEW) -> None:
        """``strict`` (prod): a file that others can read is an error. Raises ConfigurationError.

        ``new`` tells in errors what to put into the file.
        """
        self._file = file
        self._new = new
        self._trouble = ""
        self._token, self._stamp = _read(file, new, strict=strict) if file else (given or "", (0, 0, 0))
        if not _VISIBLE.fullmatch(self._token):
            raise ConfigurationError("The token in the settings is not one line of visible ASCII")

    def current(self) -> str:
        """The token; while its file is missing or half written, the last one that could be read."""
        if not self._file:
            return self._token
        try:
            if _stamp(self._file) != self._stamp:
                self._token, self._stamp = _read(self._file, self._new, strict=False)
                _log.info("token.reloaded", path=str(self._file))
            self._trouble = ""
        except (ConfigurationError, OSError) as exc:
            trouble = type(exc).__name__
            if trouble != self._trouble:
                _log.warning("token.reload_failed", path=str(self._file), reason=str(exc))
            self._trouble = trouble
        return self._token


def _read(file: Path, new: str, *, strict: bool) -> tuple[str, Stamp]:
    """Token and stamp; the stamp comes first, so that a change in between is read again."""
    try:
        stamp = _stamp(file)
        token = small_files.text(file).strip()
        mode = open_to_others(file)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"Cannot read the token in {file}: {new}") from exc
    if not _VISIBLE.fullmatch(token):
        raise ConfigurationError(f"{file} holds no token (one line of visible ASCII): {new}")
    if mode:
        advice = f"{file} can be read by others (mode {mode:04o}): run `chmod 600 {file}`"
        if strict:
            raise ConfigurationError(advice)
        _log.warning("token.file_open_to_others", path=str(file), advice=advice)
    return token, stamp


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
