"""Where signed documents and sealed key files come from, for tests in which that is away or slow."""

from collections.abc import Callable
from pathlib import Path

from kms_core.age import x25519
from kms_core.documents.storage import FileStorage
from kms_core.envelope.sealed_files import FileSealer
from kms_core.key_source import KeySource
from kms_core.keyring import Key
from kms_protocol.errors import KmsError, Unavailable
from support.age_kms import age_backend


def no_documents(name: str, *_: object) -> KeySource:
    """For a ``FileSealer`` of key files alone."""
    raise AssertionError(f"{name} is in a file")


class FaultyStorage(FileStorage):
    """A file that counts what it is asked, and may be away; others may act before it answers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self.asked = 0
        self.is_away = False
        self.before_read: Callable[[], object] = lambda: None
        self.before_write: Callable[[], object] = lambda: None

    def read(self, unless: str = "") -> tuple[bytes | None, str]:
        self.asked += 1
        self.before_read()
        self._answer()
        return super().read(unless)

    def write(self, data: bytes, tag: str) -> bool:
        self._answer()
        before, self.before_write = self.before_write, lambda: None
        before()
        return super().write(data, tag)

    def _answer(self) -> None:
        if self.is_away:
            raise Unavailable("the store is away")


class FaultySealer(FileSealer):
    """A sealer with one root. It counts what it opens, and fails while there is ``trouble``."""

    def __init__(self, folder: Path) -> None:
        backend = age_backend(folder, x25519.X25519Identity.generate())
        super().__init__(lambda: {"root": Key("root", backend)}, list, no_documents)
        self.calls: list[str] = []
        self.trouble: KmsError | None = None

    def open(self, name: str, sealed: bytes) -> bytes:
        self.calls.append(name)
        if self.trouble:
            raise self.trouble
        return super().open(name, sealed)
