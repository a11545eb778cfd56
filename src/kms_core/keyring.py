"""The keyring: key ids to backends, as settings map them. Callers and ciphertexts name an id, never a URI."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import SplitResult, urlsplit

from kms_core.backends import SCHEMES, Backend
from kms_core.envelope.binding import KeyRef
from kms_core.errors import ConfigurationError, UnknownKey
from kms_core.settings import Settings

DEFAULT_KEY_ID: Final = "default"


@dataclass(frozen=True, slots=True)
class Key:
    """A key id and the backend that holds its versions."""

    key_id: str
    backend: Backend
    accept_foreign: bool = False

    def ref(self, tenant: str) -> KeyRef:
        """The version that seals now, for this tenant."""
        return KeyRef(tenant, self.key_id, self.backend.current_version(), self.backend.name)

    def refs(self, tenant: str) -> Sequence[KeyRef]:
        """Every version, the current one first."""
        return [
            KeyRef(tenant, self.key_id, version.version, self.backend.name)
            for version in reversed(self.backend.versions())
        ]


class BackendModule(Protocol):
    """What each module in ``SCHEMES`` offers."""

    def open_key(self, uri: SplitResult | None, settings: Settings) -> Backend:
        """The key that a URI names; None means the backend's own settings section."""


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys of this install."""

    keys: Mapping[str, Key]
    default: Key

    def named(self, key_id: str | None) -> Key:
        """The key of this id, or the default. Raises UnknownKey."""
        if key_id is None:
            return self.default
        try:
            return self.keys[key_id]
        except KeyError:
            raise UnknownKey from None


def build(settings: Settings) -> Keyring:
    """Open every key that settings name. Raises ConfigurationError for a wrong URI, scheme or key file."""
    default_id = settings.kms.default_key_id or _own_key_id(settings) or DEFAULT_KEY_ID
    accept_foreign = settings.accept_foreign
    keys = {
        key_id: Key(key_id, _from_uri(key_id, uri, settings), accept_foreign)
        for key_id, uri in settings.kms.keys.items()
    }
    if default_id not in keys:
        own = _module(settings.active_backend, "the active backend").open_key(None, settings)
        keys[default_id] = Key(default_id, own, accept_foreign)
    return Keyring(keys, keys[default_id])


def _own_key_id(settings: Settings) -> str | None:
    return settings.kms.cosmian.default_key_id if settings.active_backend == "cosmian" else None


def _from_uri(key_id: str, uri: str, settings: Settings) -> Backend:
    parts = urlsplit(uri)
    if parts.password:
        raise ConfigurationError(f"The URI of key {key_id!r} holds a password: put it into a file instead")
    return _module(parts.scheme, f"key {key_id!r}").open_key(parts, settings)


def _module(scheme: str, where: str) -> BackendModule:
    if scheme not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise ConfigurationError(f"{where} names the backend {scheme!r}, which is not one of: {known}")
    return cast("BackendModule", importlib.import_module(SCHEMES[scheme]))
