"""Tokens for servers, read again when their files change."""

import re
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from kms_core.reload import Reloaded
from kms_core.secure_files import check_secret
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError

_VISIBLE: Final = re.compile(r"[!-~]{1,8192}")  # what a header may hold
_NEW: Final = "put one there, such as `bao token create -orphan -policy=kms -field=token` prints"
_log = structlog.get_logger(__name__)


class FileToken:
    """A token and its file. Safe for several threads.

    While the file is missing or incomplete, the last token that could be read is in use.
    """

    def __init__(self, given: str | None, file: Path | None, *, strict: bool, new: str = _NEW) -> None:
        """Read the file. ``strict`` (prod): a file that others can read is an error.

        ``new`` says in errors what to put into the file. Raises ConfigurationError.
        """
        self.changes = 0
        """Number of times that another token was read."""
        self._new, self._strict = new, strict
        self._token, self._file = given or "", None
        if file:
            read, failed = partial(self._read, file), partial(_note_failure, file)
            self._file = Reloaded([file], read, done=self._note, failed=failed)
            self._token, self._strict = self._file.current(), False  # a running service goes on
        elif not _VISIBLE.fullmatch(self._token):
            raise ConfigurationError("The token in the settings is not one line of visible ASCII")

    def current(self) -> str:
        """The token; checks whether its file has changed."""
        return self._file.current() if self._file else self._token

    def _note(self, token: str) -> None:
        self.changes += token != self._token
        self._token = token
        _log.info("token.reloaded")

    def _read(self, file: Path) -> str:
        try:
            token = small_files.text(file).strip()
            check_secret(file, _log.warning, "token.file_open_to_others", strict=self._strict)
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"Cannot read the token in {file}: {self._new}") from exc
        if not _VISIBLE.fullmatch(token):
            raise ConfigurationError(f"{file} holds no token (one line of visible ASCII): {self._new}")
        return token


def _note_failure(file: Path, exc: Exception) -> None:
    _log.warning("token.reload_failed", path=str(file), reason=str(exc))
