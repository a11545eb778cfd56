"""Key backends. Each wraps 16-byte file keys under keys that only it holds; ``SCHEMES`` lists them.

Callers, HTTP, jobs, audit and retries are not the business of a backend. It authenticates the AAD that it is
given, or proves origin in its own way; it never drops one.

Importing this package loads the tables of the backends and none of their code, since settings need it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

from kms_core.backends.age_settings import AgeSection
from kms_core.backends.aws.settings import AwsKmsSection
from kms_core.backends.cosmian.settings import CosmianSection
from kms_core.backends.vault.settings import TransitSection, VaultKvSection
from kms_core.sections import BackendSection
from kms_protocol.errors import BackendUnavailable

if TYPE_CHECKING:
    from kms_core.age.header import Stanza
    from kms_core.envelope.binding import KeyRef, Wrap
    from kms_core.http_client import PeerServer

SCHEMES: Final[Mapping[str, type[BackendSection]]] = {
    "age": AgeSection,
    "cosmian": CosmianSection,
    "transit": TransitSection,
    "vault-kv": VaultKvSection,
    "awskms": AwsKmsSection,
}
"""Scheme of a key URI → the backend's table in ``kms.toml``, which names the module with its code."""
NATIVE: Final = "age"
"""The backend that unwraps native stanzas of the age format."""


def table_of(scheme: str) -> str:
    """The name of a backend's table below ``[kms]``."""
    return scheme.replace("-", "_")


class KeyMissing(BackendUnavailable):
    """The server answers and has no such key: an operator has to create it before the service starts."""


class NotRotated(BackendUnavailable):
    """A rotation that was refused before the backend was asked to make a version: the key keeps its own."""


@dataclass(frozen=True, slots=True)
class Health:
    """The outcome of a real wrap and unwrap. ``detail`` is for the operator's log, not for callers.

    ``answered``: the server answered, so its other keys may work.
    """

    healthy: bool
    detail: str = ""
    answered: bool = True
    checked_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key; ``created_at`` where the backend knows it."""

    version: str
    created_at: datetime | None = None


class Backend(Protocol):
    """One key of one backend. Methods raise BackendUnavailable when the backend cannot be reached or read."""

    name: str
    """The scheme, such as ``age`` or ``vault-kv``: part of stanzas and metrics."""
    data_keys: bool
    """Whether plaintext data keys may be handed out."""
    native: bool
    """Whether ``wrap`` returns native stanzas of the age format, which name neither key nor version."""

    @property
    def server(self) -> "PeerServer | None":
        """The server of the key, whose ``timeout_s`` bounds a call; None for keys on this host.

        Calls with a server wait on a network; the API runs those in a thread.
        """

    def wrap(self, file_key: bytes, key: "KeyRef", aad: bytes) -> "Stanza":
        """Wrap a 16-byte file key. See ``envelope.sealing.Wrapper``, of which every backend is one."""

    def unwrap(self, stanza: "Stanza", key: "KeyRef", aad: bytes) -> bytes:
        """The file key. Raises NoMatch for the stanza of another key, DecryptFailed for a damaged one."""

    def origin_key(self, key: "KeyRef") -> bytes | None:
        """The MAC key of the origin stanza, or None where the wrap itself authenticates the AAD."""

    def versions(self) -> Sequence[KeyVersion]:
        """All versions that unwrap; the last one wraps."""

    def rotate(self) -> KeyVersion:
        """Make a new version, which wraps from now on. Old versions still unwrap.

        Raises NotRotated if certainly none was made.
        """

    def is_ready(self, tenant: str, key_id: str, wrap: "Wrap | None") -> bool:
        """True if wrapping a new file key, or unwrapping ``wrap``, is certain to need no network now."""

    def for_job(self) -> "Backend":
        """Return this key for one run of a bulk job: a few calls to a server, not one for each item."""

    def was_silent(self) -> bool:
        """Return whether the last call had no answer: other backends of the key are then asked first."""

    def health_check(self) -> Health:
        """Wrap and unwrap a random file key. Never raises."""
