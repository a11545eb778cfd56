"""Key backends: each wraps 16-byte file keys under keys that it alone holds. One module each, one line here.

A backend knows nothing of callers, HTTP, jobs, audit, retries or other backends. It authenticates the AAD
that it is given, or proves origin in its own way; it never drops one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from kms_core.envelope.sealing import Wrapper
from kms_protocol.errors import BackendUnavailable

SCHEMES: Final = {
    "age": "kms_core.backends.age",
    "awskms": "kms_core.backends.aws.backend",
    "cosmian": "kms_core.backends.cosmian.backend",
    "transit": "kms_core.backends.vault.transit",
    "vault-kv": "kms_core.backends.vault.kv",
}
"""Scheme of a key URI → module with ``open_key(uri, settings) -> Backend``, imported when a key uses it."""


NATIVE: Final = "age"
"""The backend whose wraps are native stanzas of the age format, which carry no name."""


class KeyMissing(BackendUnavailable):
    """The peer answers, and has no such key: whoever runs the service has to make it, before it starts."""


@dataclass(frozen=True, slots=True)
class Health:
    """The outcome of a real wrap and unwrap. ``detail`` is for the operator's log, not for callers."""

    healthy: bool
    checked_at: datetime
    detail: str = ""


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key; ``created_at`` where the backend knows it."""

    version: str
    created_at: datetime | None = None


class Backend(Wrapper, Protocol):
    """One key of one backend. Methods raise BackendUnavailable when the backend cannot be reached or read."""

    name: str
    """``age``, ``cosmian``, ``transit`` or ``awskms``: as it stands in stanzas and metrics."""
    blocks: bool
    """Whether calls wait on a network: the API then makes them in a thread."""
    data_keys: bool
    """Whether plaintext data keys may be handed out."""

    def current_version(self) -> str:
        """The version that wraps now."""

    def versions(self) -> Sequence[KeyVersion]:
        """All versions that unwrap, the current one last."""

    def rotate(self) -> KeyVersion:
        """Make a new version and wrap with it from now on; old ones unwrap."""

    def for_job(self) -> "Backend":
        """The same key for one run of a bulk job: a peer is then asked a few times, not once an item."""

    def health_check(self) -> Health:
        """Wrap and unwrap once; never raises."""
