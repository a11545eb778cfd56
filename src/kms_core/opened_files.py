"""Contents of sealed key files, which one process opens and its children read.

The parent asks the roots at start and when a file changes, and keeps the contents in memory that its children
inherit (``SharedSecrets``). So a request asks no root.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from kms_core.age.header import is_age_file
from kms_core.backoff import jittered_wait_s
from kms_core.envelope.sealed_files import FileSealer, NotOpenedYet
from kms_core.key_source import KeySource
from kms_core.periodic import PeriodicThread
from kms_core.secure_memory import SharedSecrets
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError, KmsError

OWN_PREFIX: Final = "kms:"
LOOK_S: Final = 0.5
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 80.0  # a minute on average
_log = structlog.get_logger(__name__)


class OpenedFile(msgspec.Struct, frozen=True, array_like=True):
    """The outcome of opening a file with this SHA-256. ``detail`` says why it is not open."""

    digest: bytes
    state: Literal["open", "away", "refused"]
    content: bytes = b""
    detail: str = ""

    def __repr__(self) -> str:
        return f"OpenedFile({self.state})"


class InheritedFiles:
    """The memory as ``SealedFiles``: reads what the parent opened, and seals in this process."""

    def __init__(self, memory: SharedSecrets, sealer: FileSealer) -> None:
        self._memory, self._sealer = memory, sealer
        self._generation, self._files = -1, dict[str, OpenedFile]()

    def open(self, name: str, sealed: bytes) -> bytes:
        """The content that the parent opened. Raises NotOpenedYet for a file that it has not seen."""
        generation = self._memory.generation()
        if generation != self._generation:
            text = self._memory.read()
            self._files = msgspec.msgpack.decode(text, type=dict[str, OpenedFile]) if text else {}
            self._generation = generation
        found = self._files.get(name)
        if found is None or found.digest != _digest(sealed):
            raise NotOpenedYet(
                "A sealed key file is new and not opened yet: if this stays, restart the service"
            )
        if found.state == "open":
            return found.content
        raise (BackendUnavailable if found.state == "away" else ConfigurationError)(found.detail)

    def seal_again(self, name: str, content: bytes, sealed: bytes) -> bytes:
        return self._sealer.seal_again(name, content, sealed)

    def document(self, name: str, url: str) -> KeySource:
        return self._sealer.document(name, url, self)


def _digest(sealed: bytes) -> bytes:
    return hashlib.sha256(sealed).digest()


class KeyOpener(PeriodicThread):
    """Opens the sealed files of ``paths`` into ``memory``, again when they change, and after a failure.

    Its rounds take no fork lock: a root may take many seconds, and heartbeats need the lock.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        sealer: FileSealer,
        memory: SharedSecrets,
        *,
        look_s: float = LOOK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``look_s``: seconds between two looks at the files; ``clock`` gives seconds."""
        super().__init__("key-opener", look_s, failed="key.opener_failed")
        self._sources: dict[str, tuple[Path | str, Callable[[], bytes]]] = {}
        self._sealer, self._memory = sealer, memory
        self._look_s, self._clock = look_s, clock
        self._tries: dict[str, tuple[int, float]] = {}
        """Failed tries of each file, and the time (monotonic) of the next one."""
        self.found: dict[str, OpenedFile] = {}
        for name, path in paths.items():
            self.add(name, path, partial(small_files.read, path))

    def add(self, name: str, place: Path | str, read: Callable[[], bytes]) -> None:
        """Open the key ``name`` as well: ``read`` returns its sealed content, or raises why it cannot."""
        self._sources[name] = place, read

    def round(self) -> None:
        """Open what is new or due, and share it."""
        before = dict(self.found)
        for name, (place, read) in self._sources.items():
            try:
                sealed = read()
            except (OSError, KmsError):
                continue  # the user of the file reports it
            known = self.found.get(name)
            if known is None or known.digest != _digest(sealed):
                self._tries[name] = 0, -math.inf
            elif known.state == "open" or self._clock() < self._tries[name][1]:
                continue
            self.found[name] = self._opened(name, place, sealed)
        if self.found != before:
            self._memory.write(msgspec.msgpack.encode(self.found))

    def _opened(self, name: str, place: Path | str, sealed: bytes) -> OpenedFile:
        digest = _digest(sealed)
        if not is_age_file(sealed):  # it was replaced by a plain one, which needs no opening
            return OpenedFile(digest, "open", sealed)
        try:
            content = self._sealer.open(name, sealed)
        except KmsError as exc:
            tries = self._tries[name][0] + 1
            wait_s = jittered_wait_s(_FIRST_WAIT_S, tries, at_most_s=_LONGEST_WAIT_S)
            self._tries[name] = tries, self._clock() + wait_s
            is_away = isinstance(exc, BackendUnavailable)
            log = _log.warning if is_away else _log.error
            log("key.not_opened", name=name, path=str(place), reason=exc.detail)
            return OpenedFile(digest, "away" if is_away else "refused", detail=exc.detail)
        _log.info("key.opened", name=name, path=str(place))
        return OpenedFile(digest, "open", content)

    def open_all(self) -> None:
        """Open all files once, and the service's own until they are open.

        Raises ConfigurationError for a file that its root does not open.
        """
        while True:
            self.round()
            for name, found in self.found.items():
                if found.state == "refused":
                    raise ConfigurationError(f"The key file {self._sources[name][0]}: {found.detail}")
            if all(
                found.state == "open" for name, found in self.found.items() if name.startswith(OWN_PREFIX)
            ):
                break
            time.sleep(self._look_s)
