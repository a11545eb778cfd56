"""Contract of the places where the age backend keeps identities."""

from pathlib import Path
from typing import NamedTuple, Protocol


class StoredKeys(NamedTuple):
    """The identities, opened, and the recipient in use, None for the last identity. ``stamp`` names both."""

    stamp: object
    identities: bytes
    recipient: bytes | None


class KeySource(Protocol):
    """A place of identities, which are added before they are used.

    ``private`` and ``public`` name it in messages. ``publish_s`` is the wait (s) before an identity that was
    added is used: twice the time in which all processes read a change.
    """

    @property
    def private(self) -> Path | str: ...
    @property
    def public(self) -> Path | str | None: ...
    @property
    def publish_s(self) -> float: ...

    def stamp(self) -> object:
        """A value that changes with the content. Raises OSError, BackendUnavailable."""

    def read(self) -> StoredKeys:
        """The content. Raises ConfigurationError, BackendUnavailable, OSError."""

    def add(self, block: bytes) -> bool:
        """Append lines with an identity. Returns True if processes must open it before it is used.

        Nothing is written if the old content cannot be opened. Raises OSError, BackendUnavailable,
        TooManyVersions.
        """

    def use(self, recipient: str) -> None:
        """Have new files sealed for a recipient whose identity was added. Raises as ``add``."""

    def behind(self, stamp: object) -> str:
        """The reason why the content of this stamp may lack a version that seals; empty if it cannot."""

    @property
    def is_late(self) -> bool:
        """True if changes by other hosts were not read for ten seconds."""
