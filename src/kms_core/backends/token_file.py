"""Our token for a server: from the settings, or from a file that is read again when it changes."""

import re
from pathlib import Path
from typing import Final

import structlog

from kms_core.reload import Stamp, stamp_of
from kms_core.secure_files import check_secret
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError

_VISIBLE: Final = re.compile(r"[!-~]{1,8192}")  # what a header may hold
_NEW: Final = "put one there, such as `bao token create -orphan -policy=kms -field=token` prints"
_log = structlog.get_logger(__name__)


class FileToken:
    """A token and its file. Safe for several threads."""

    def __init__(self, given: str | None, file: Path | None, *, strict: bool, new: str = _NEW) -> None:
        """Read the file. ``strict`` (prod): a file that others can read is an error.

        ``new`` says in errors what to put into the file. Raises ConfigurationError.
        """
        self._file = file
        self._new = new
        self._error = ""
        self.changes = 0
        """Number of times that another token was read."""
        self._token, self._stamp = _read(file, new, strict=strict) if file else (given or "", ())
        if not _VISIBLE.fullmatch(self._token):
            raise ConfigurationError("The token in the settings is not one line of visible ASCII")

    def current(self) -> str:
        """The token; while its file is missing or incomplete, the last one that could be read."""
        if not self._file:
            return self._token
        try:
            if stamp_of([self._file]) != self._stamp:
                before = self._token
                self._token, self._stamp = _read(self._file, self._new, strict=False)
                self.changes += self._token != before
                _log.info("token.reloaded", path=str(self._file))
            self._error = ""
        except (ConfigurationError, OSError) as exc:
            error = type(exc).__name__
            if error != self._error:
                _log.warning("token.reload_failed", path=str(self._file), reason=str(exc))
            self._error = error
        return self._token


def _read(file: Path, new: str, *, strict: bool) -> tuple[str, Stamp]:
    """Token and stamp. The stamp is taken first, so that a change in between is read again."""
    try:
        stamp = stamp_of([file])
        token = small_files.text(file).strip()
        check_secret(file, _log.warning, "token.file_open_to_others", strict=strict)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"Cannot read the token in {file}: {new}") from exc
    if not _VISIBLE.fullmatch(token):
        raise ConfigurationError(f"{file} holds no token (one line of visible ASCII): {new}")
    return token, stamp
