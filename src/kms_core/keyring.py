"""The keyring: key ids to backends, as settings map them. Callers and ciphertexts name an id, never a URI."""

import importlib
import re
import time
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Thread
from typing import Final, Protocol, cast
from urllib.parse import SplitResult, urlsplit, urlunsplit

import structlog

from kms_core.age.header import BUNDLE, BUNDLE_VERSION
from kms_core.backends import NATIVE, SCHEMES, Backend, KeyMissing, KeyVersion
from kms_core.envelope.binding import CONTEXT, DEFAULT_KEY_ID, MAX_WRAPS, BoundStanzas, KeyRef
from kms_core.envelope.sealing import Wrap
from kms_core.settings.model import Settings
from kms_protocol.errors import BackendUnavailable, ConfigurationError, UnknownKey

_NAMED: Final = re.compile(rf"(?:\A|\n)-> {CONTEXT} 1 ([A-Za-z0-9_.-]{{1,80}}) ".encode("ascii"))
_BUNDLED: Final = re.compile(rf"(?:\A|\n)-> {BUNDLE} {BUNDLE_VERSION}\n([A-Za-z0-9+/\n]*)".encode("ascii"))
_CHECK_S: Final = 5.0
_LOOK_BYTES: Final = 32 * 1024
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """A key id and the backends behind it: ``backend`` names the file, ``others`` wrap it too.

    ``retired`` ones only unwrap: what they sealed opens until it has been rewrapped.
    """

    key_id: str
    backend: Backend
    accept_foreign: bool = False
    others: tuple[Backend, ...] = ()
    retired: tuple[Backend, ...] = ()

    def ref(self, tenant: str) -> KeyRef:
        """The version that seals now, for this tenant."""
        return self._ref(tenant, self.backend)

    def refs(self, tenant: str) -> Sequence[KeyRef]:
        """Every version of the native backend, or else of ``backend``, the current one first."""
        backend = self.native or self.backend
        return [
            KeyRef(tenant, self.key_id, version.version, backend.name)
            for version in reversed(backend.versions())
        ]

    def wraps(self, tenant: str) -> Sequence[Wrap]:
        """Who else wraps a new file, under which versions."""
        return [(backend, self._ref(tenant, backend)) for backend in self.others]

    def seals_as(self, tenant: str, bound: BoundStanzas, *, native: bool) -> bool:
        """Whether a new file would name the same version, and have the same wraps, as this header says.

        ``native``: whether it has a native stanza, which names no version.
        """
        refs = [self._ref(tenant, backend) for backend in self.sealing]
        wanted = {(ref.backend, ref.key_id, ref.version) for ref in refs if ref.backend != NATIVE}
        found = {(wrap.backend, wrap.key_id, wrap.version) for wrap in bound.wraps}
        natives = any(ref.backend == NATIVE for ref in refs)
        return bound.key_version == refs[0].version and found == wanted and native == natives

    def openers(self, tenant: str, bound: BoundStanzas) -> Iterator[Wrap]:
        """Who may unwrap a file of ours, in the order of the settings, each under the version it names.

        Native stanzas name no version. Where another backend wrapped first, the context stanza holds that
        one's, and every identity is tried.
        """
        for backend in self._all:
            versions = [
                wrap.version
                for wrap in bound.wraps
                if (wrap.backend, wrap.key_id) == (backend.name, self.key_id)
            ]
            if backend.name == NATIVE:
                versions = _native_versions(backend, bound)
            for version in versions:
                yield backend, KeyRef(tenant, self.key_id, version, backend.name)

    def for_job(self) -> "Key":
        """The same key for one run of a bulk job (see ``Backend.for_job``)."""
        return replace(
            self,
            backend=self.backend.for_job(),
            others=tuple(backend.for_job() for backend in self.others),
            retired=tuple(backend.for_job() for backend in self.retired),
        )

    def numbers(self) -> Mapping[str, int]:
        """Its versions, in the order in which they were made, and a number from 1 on for each.

        Where the backend counts versions itself, its numbers are these. Raises BackendUnavailable.
        """
        # the names of native versions are hexadecimal digits, which may look like a number
        return _numbers(tuple(self.backend.versions()), counts=self.backend.name != NATIVE)

    @property
    def sealing(self) -> tuple[Backend, ...]:
        """Who wraps new files, the one that names them first."""
        return (self.backend, *self.others)

    @property
    def names(self) -> tuple[str, ...]:
        """Its backends."""
        return tuple(backend.name for backend in self._all)

    @property
    def native(self) -> Backend | None:
        """Who may unwrap a file that stock ``age`` made."""
        return next((backend for backend in self._all if backend.name == NATIVE), None)

    @property
    def blocks(self) -> str | None:
        """The first backend that waits on a network, if any does."""
        return next((backend.name for backend in self._all if backend.blocks), None)

    @property
    def remote(self) -> tuple[Backend, ...]:
        """Who waits on a network."""
        return tuple(backend for backend in self._all if backend.blocks)

    @property
    def _all(self) -> tuple[Backend, ...]:
        return (*self.sealing, *self.retired)

    def _ref(self, tenant: str, backend: Backend) -> KeyRef:
        return KeyRef(tenant, self.key_id, backend.current_version(), backend.name)


@lru_cache(maxsize=1024)
def _numbers(versions: tuple[KeyVersion, ...], *, counts: bool) -> Mapping[str, int]:
    """``counts``: whether names that are numbers mean that the backend counts."""
    if counts and all(version.version.isdecimal() for version in versions):
        return {version.version: int(version.version) for version in versions}
    dated = [(each.created_at.timestamp(), each) for each in versions if each.created_at]
    if len(dated) == len(versions):  # else as the backend has them: the one in use is last
        versions = tuple(each for _, each in sorted(dated, key=lambda pair: pair[0]))
    return {version.version: number for number, version in enumerate(versions, start=1)}


def _native_versions(backend: Backend, bound: BoundStanzas) -> list[str]:
    known = [version.version for version in reversed(backend.versions())]
    if bound.key_version in known or not bound.wraps:
        return [bound.key_version]
    return known


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

    def for_job(self) -> "Keyring":
        """The same keys for one run of a bulk job."""
        keys = {key_id: key.for_job() for key_id, key in self.keys.items()}
        return Keyring(keys, keys[self.default.key_id])

    def waits_on(self, key_id: str | None, *texts: bytes) -> str | None:
        """The backend over a network that a call may ask, or None: for choosing a thread, nothing else.

        A ciphertext among ``texts`` names its key, as it will when it is opened; rewrap uses both.
        """
        found = [name for text in texts for name in _named_in(text)]
        named = [self.keys.get(name, self.default) for name in (key_id, *found) if name is not None]
        return next((key.blocks for key in named or [self.default] if key.blocks), None)


def _named_in(text: bytes) -> Iterator[str]:
    """The key ids that a ciphertext names, also in a bundle; nothing of it is verified."""
    inner = (match[1].replace(b"\n", b"") for match in _BUNDLED.finditer(text, 0, _LOOK_BYTES))
    for part in (text, *(a2b_base64(base64[: len(base64) // 4 * 4]) for base64 in inner)):
        if match := _NAMED.search(part, 0, _LOOK_BYTES):
            yield match[1].decode("ascii")


def build(settings: Settings) -> Keyring:
    """Open every key that settings name. Raises ConfigurationError for a wrong URI, scheme or key file."""
    default_id = settings.kms.default_key_id or _own_key_id(settings) or DEFAULT_KEY_ID
    accept_foreign = settings.accept_foreign
    keys = {key_id: _key(key_id, uris, settings) for key_id, uris in settings.kms.keys.items()}
    if default_id not in keys:
        own = _module(settings.active_backend, "the active backend").open_key(None, settings)
        keys[default_id] = Key(default_id, own, accept_foreign)
    return Keyring(keys, keys[default_id])


def check(settings: Settings) -> None:
    """Ask each peer for the keys that settings name, before a start. Raises ConfigurationError without one.

    A peer that does not answer within seconds, or not to us, degrades the service and does not stop it.
    """
    if settings.used_backends <= {NATIVE}:
        return
    asked: dict[str, list[Backend]] = {}
    for key in build(settings).keys.values():
        for backend in key.remote:
            asked.setdefault(backend.name, []).append(backend)
    missing: list[KeyMissing] = []
    # daemons: a peer that never answers must not hold up the end of a process either
    threads = [Thread(target=_ask, args=(each, missing), daemon=True) for each in asked.values()]
    for thread in threads:
        thread.start()
    until = time.monotonic() + _CHECK_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if missing:
        raise ConfigurationError(missing[0].detail)


def _ask(backends: Sequence[Backend], missing: list[KeyMissing]) -> None:
    """Keys of one peer, one after the other; silence ends it."""
    for backend in backends:
        try:
            backend.versions()
        except KeyMissing as exc:
            missing.append(exc)
        except BackendUnavailable as exc:
            _log.warning("backend.unavailable", backend=backend.name, reason=exc.detail)
            return


def _own_key_id(settings: Settings) -> str | None:
    return settings.kms.cosmian.default_key_id if settings.active_backend == "cosmian" else None


def _key(key_id: str, uris: str | tuple[str, ...], settings: Settings) -> Key:
    """One URI, or several: the first names new files, each wraps them, unless it says ``seal=false``."""
    sealing: list[Backend] = []
    retired: list[Backend] = []
    for uri in (uris,) if isinstance(uris, str) else uris:
        rest, seals = _take_seal(key_id, uri)
        (sealing if seals else retired).append(_from_uri(key_id, rest, settings))
    names = [backend.name for backend in (*sealing, *retired)]
    if not sealing:
        raise ConfigurationError(f"kms.keys.{key_id}: name a URI that encrypts, without seal=false")
    if len(set(names)) != len(names) or len(sealing) > MAX_WRAPS:
        raise ConfigurationError(
            f"kms.keys.{key_id}: name each backend once, and at most {MAX_WRAPS} that encrypt"
        )
    return Key(key_id, sealing[0], settings.accept_foreign, tuple(sealing[1:]), tuple(retired))


def _take_seal(key_id: str, uri: str) -> tuple[str, bool]:
    """The URI without its ``seal``, which is ours and no backend's, and what it says."""
    parts = urlsplit(uri)
    options = parts.query.split("&") if parts.query else []
    given = [option for option in options if option.startswith("seal=")]
    if any(option not in {"seal=true", "seal=false"} for option in given) or len(given) > 1:
        raise ConfigurationError(f"kms.keys.{key_id}: seal is true or false")
    rest = "&".join(option for option in options if option not in given)
    return urlunsplit(parts._replace(query=rest)), given != ["seal=false"]


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
