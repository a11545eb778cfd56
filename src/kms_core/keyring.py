"""Maps key ids to backends, as settings say. Callers and ciphertexts name a key id, never a URI."""

import importlib
import re
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Final, TypeVar
from urllib.parse import SplitResult, urlsplit, urlunsplit

import structlog

from kms_core import http_client
from kms_core.age.header import BUNDLE, BUNDLE_VERSION, b64decode
from kms_core.age.x25519 import NoMatch
from kms_core.backends import NATIVE, SCHEMES, Backend, KeyVersion, age
from kms_core.backends.age import AgeBackend
from kms_core.backends.age_settings import AgeSection
from kms_core.backends.remote import RemoteBackend, SharingBackend
from kms_core.backends.wrap_keys import WrapKeys
from kms_core.envelope.binding import (
    CONTEXT,
    DEFAULT_KEY_ID,
    KEY_ID,
    MAX_WRAPS,
    PAD,
    WRAP,
    BoundStanzas,
    KeyRef,
    Wrap,
)
from kms_core.envelope.sealed_files import SealedFiles
from kms_core.http_client import Unreachable
from kms_core.observability import metrics
from kms_core.settings.model import Settings
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed, UnknownKey
from kms_protocol.units import parse_duration

_NAMED: Final = re.compile(rf"(?:\A|\n)-> {CONTEXT} 1 ({KEY_ID.pattern}) ".encode("ascii"))
_BUNDLED: Final = re.compile(rf"(?:\A|\n)-> {BUNDLE} {BUNDLE_VERSION}\n([A-Za-z0-9+/\n]*)".encode("ascii"))
_SHARED: Final = re.compile(
    rf"age-encryption\.org/v1\n-> {WRAP} (\S+) (\S+) (\S+) (\S+)\n[^\n]{{64}}\n[^\n]{{22}}\n"
    rf"-> {CONTEXT} 1 (\S+) (\S+) (\S+)\n[^\n]{{43}}\n(?:-> {PAD} 0+\n\n)?--- ".encode("ascii")
)
LONGEST_SHARE_S: Final = 3600.0
_OPTIONS: Final = frozenset({"seal", "share"})
_SCANNED_BYTES: Final = 32 * 1024
_UNBOUNDED: Final = nullcontext()
R = TypeVar("R")
_log = structlog.get_logger(__name__)


BackendKey = tuple[Backend, KeyRef]
"""A ``sealing.WrappingKey`` of a backend."""


@dataclass(frozen=True)
class Key:
    """A key id and its backends.

    ``backend`` and ``others`` wrap each new file key, and the file names the version of ``backend``.
    ``retired`` backends only unwrap the files that they sealed earlier.
    """

    key_id: str
    backend: Backend
    accept_foreign: bool = False
    others: tuple[Backend, ...] = ()
    retired: tuple[Backend, ...] = ()

    def ref(self, tenant: str) -> KeyRef:
        """The version that new files of this tenant name: the newest of ``backend``."""
        return KeyRef(tenant, self.key_id, self.backend.versions()[-1].version, self.backend.name)

    def wrapping(self, tenant: str) -> Sequence[BackendKey]:
        """Each backend that wraps a new file key, with its version; the file names that of the first."""
        return [
            (backend, KeyRef(tenant, self.key_id, backend.versions()[-1].version, backend.name))
            for backend in self.sealing
        ]

    def timeout(self) -> AbstractContextManager[None]:
        """Bound all calls to backends within the block by their largest ``timeout_s``."""
        return http_client.within(self._timeout_s) if self._timeout_s else _UNBOUNDED

    def seals_as(self, tenant: str, bound: BoundStanzas, *, native: bool) -> bool:
        """Return whether a new file would name the same version and have the same wraps as this header.

        ``native``: whether the header has a native stanza, which names no version.
        """
        keys = self.wrapping(tenant)
        wanted = {(ref.backend, ref.key_id, ref.version) for backend, ref in keys if not backend.native}
        found = {(wrap.backend, wrap.key_id, wrap.version) for wrap in bound.wraps}
        natives = any(backend.native for backend, _ in keys)
        return bound.key_version == keys[0][1].version and found == wanted and native == natives

    def first_answer(
        self,
        tenant: str,
        bound: BoundStanzas,
        unwrap: Callable[[Backend, KeyRef], R],
        passed_over: type[BackendUnavailable] = Unreachable,
    ) -> tuple[R, KeyRef]:
        """The result of ``unwrap`` with the first backend that answers, and the version that opened the file.

        They are asked in the order of the settings, those that were silent lately last, all within the
        largest ``timeout_s``. A try has half of what is left of it while another backend could open the file.
        An error of the class ``passed_over``, or the end of that time, passes on to the next. Raises
        DecryptFailed without a matching key, and else the last such error.
        """
        if not (self.others or self.retired or self.backend.server):  # one on this host: no time to share out
            with suppress(NoMatch):
                return self._unwrapped(self.backend, tenant, bound, unwrap)
            raise DecryptFailed
        named = {wrap.backend for wrap in bound.wraps} | ({NATIVE} if bound.origin else set())
        backends = [each for each in self.backends if each.name in {*named, NATIVE}]
        backends.sort(key=lambda each: each.was_silent())
        away: BackendUnavailable | None = None
        with self.timeout():
            for position, backend in enumerate(backends, start=1):
                others = any(each.name in named for each in backends[position:])
                with http_client.within(http_client.left_s() / (1 + others)):
                    try:
                        return self._unwrapped(backend, tenant, bound, unwrap)
                    except NoMatch:
                        continue
                    except BackendUnavailable as exc:
                        if not isinstance(exc, passed_over) and http_client.left_s() > 0:
                            raise
                        metrics.BACKEND_FAILOVERS.labels(backend.name).inc()
                        away = exc
        raise away or DecryptFailed

    def _unwrapped(
        self, backend: Backend, tenant: str, bound: BoundStanzas, unwrap: Callable[[Backend, KeyRef], R]
    ) -> tuple[R, KeyRef]:
        """Raises NoMatch if no version of the backend opens the file.

        Native stanzas name no version, so each identity is tried if the context stanza names the version of
        another backend.
        """
        versions = [
            wrap.version for wrap in bound.wraps if (wrap.backend, wrap.key_id) == (backend.name, self.key_id)
        ]
        if isinstance(backend, AgeBackend) and not versions:
            versions = _native_versions(backend, bound)
        for version in versions:
            ref = KeyRef(tenant, self.key_id, version, backend.name)
            with suppress(NoMatch):
                return unwrap(backend, ref), ref
        raise NoMatch

    def is_ready(self, tenant: str, wrap: Wrap | None = None) -> bool:
        """True if a call needs no network to seal a file, or to open one whose only wrap is ``wrap``."""
        if wrap is None:
            return all(backend.is_ready(tenant, self.key_id, None) for backend in self.sealing)
        backends = [backend for backend in self.backends if backend.name == wrap.backend]
        return any(backend.is_ready(tenant, self.key_id, wrap) for backend in backends)

    def for_job(self) -> "Key":
        """Prepare the key for one run of a bulk job (see ``Backend.for_job``)."""
        return replace(
            self,
            backend=self.backend.for_job(),
            others=tuple(backend.for_job() for backend in self.others),
            retired=tuple(backend.for_job() for backend in self.retired),
        )

    def numbers(self) -> Mapping[str, int]:
        """Number the versions from 1 in the order of their creation, by version.

        A backend that numbers versions itself keeps its numbers. Raises BackendUnavailable.
        """
        # a native version has 8 hexadecimal digits, which may look like a number
        return _numbers(tuple(self.backend.versions()), counts=self.backend.name != NATIVE)

    @cached_property
    def _timeout_s(self) -> float:
        return max((each.server.timeout_s for each in self.backends if each.server), default=0.0)

    @cached_property
    def sealing(self) -> tuple[Backend, ...]:
        """The backends that wrap new file keys; a file names the version of the first."""
        return (self.backend, *self.others)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all backends."""
        return tuple(backend.name for backend in self.backends)

    @cached_property
    def native(self) -> AgeBackend | None:
        """The backend that may unwrap a file that stock ``age`` made."""
        return next((backend for backend in self.backends if isinstance(backend, AgeBackend)), None)

    @cached_property
    def blocks(self) -> str | None:
        """The name of the first backend that waits on a network."""
        return next((backend.name for backend in self.backends if backend.server), None)

    @cached_property
    def backends(self) -> tuple[Backend, ...]:
        """All backends: those that wrap new files first."""
        return (*self.sealing, *self.retired)


@lru_cache(maxsize=1024)
def _numbers(versions: tuple[KeyVersion, ...], *, counts: bool) -> Mapping[str, int]:
    """``counts``: whether the backend numbers its versions itself where their names are numbers."""
    if counts and all(version.version.isdecimal() for version in versions):
        return {version.version: int(version.version) for version in versions}
    dated = [(each.created_at.timestamp(), each) for each in versions if each.created_at]
    if len(dated) == len(versions):  # else in the backend's order: the current one last
        versions = tuple(each for _, each in sorted(dated, key=lambda pair: pair[0]))
    return {version.version: number for number, version in enumerate(versions, start=1)}


def _native_versions(backend: Backend, bound: BoundStanzas) -> list[str]:
    known = [version.version for version in reversed(backend.versions())]
    if bound.key_version in known or not bound.wraps:
        return [bound.key_version]
    return known


@dataclass(frozen=True)
class Keyring:
    """The keys of an installation that take calls: none of those that seal key files."""

    keys: Mapping[str, Key]
    default: Key

    def named(self, key_id: str | None) -> Key:
        """The key of this id, or the default key for None. Raises UnknownKey, also for a root."""
        if key_id is None:
            return self.default
        try:
            return self.keys[key_id]
        except KeyError:
            raise UnknownKey from None

    @cached_property
    def blocks(self) -> bool:
        """Return whether any key waits on a network."""
        return any(key.blocks for key in self.keys.values())

    def unusable_key_ids(self) -> list[str]:
        """The ids of keys whose key files cannot be used now: the root that sealed them is away."""
        return [key_id for key_id, native in self.natives.items() if not native.health_check().healthy]

    @cached_property
    def natives(self) -> Mapping[str, AgeBackend]:
        """The Age backends, by key id."""
        return {key_id: key.native for key_id, key in self.keys.items() if key.native}

    @property
    def is_late(self) -> bool:
        """Return whether a document with keys was not read for ten seconds."""
        return any(native.source.is_late for native in self.natives.values())

    def for_job(self) -> "Keyring":
        """Prepare all keys for one run of a bulk job."""
        keys = {key_id: key.for_job() for key_id, key in self.keys.items()}
        return Keyring(keys, keys[self.default.key_id])

    def is_ready(self, tenant: str, key_id: str | None, file: bytes, *, seals: bool) -> bool:
        """Return whether a call is certain to need no network: wrap keys of the server are at hand.

        ``file`` is the ciphertext to open, or empty; ``seals`` says whether the call makes one.
        """
        if file:
            wrap = _shared_wrap(file)
            key = self.keys.get(wrap.key_id) if wrap else None
            if key is None or not key.is_ready(tenant, wrap):
                return False
            key_id = key_id or key.key_id
        target = self.default if key_id is None else self.keys.get(key_id)
        return bool(target and target.is_ready(tenant)) if seals else bool(file)

    def waits_on(self, key_ids: Iterable[str | None], texts: Iterable[bytes] = ()) -> str | None:
        """The backend over a network that operations may call, or None; only for choosing a thread pool.

        ``key_ids`` are those of the requests, None for the default key, which is also that of no names at
        all. Ciphertexts among ``texts`` name keys, without any proof.
        """
        if not self.blocks:
            return None
        names = dict.fromkeys(name or self.default.key_id for name in key_ids)
        names |= dict.fromkeys(name for text in texts for name in _key_ids_in(text))
        named = [self.keys.get(name, self.default) for name in names or [self.default.key_id]]
        return next((key.blocks for key in named if key.blocks), None)


def ask_all(calls: Iterable[Callable[[], R]]) -> list[Future[R]]:
    """Make calls to backends, 32 at a time; returns when all have ended, in their order.

    Servers that are frozen take one ``timeout_s``, not one each.
    """
    with ThreadPoolExecutor(32) as pool:
        return [pool.submit(each) for each in calls]


def _shared_wrap(file: bytes) -> Wrap | None:
    """The wrap of a header whose only wrap was sealed under a shared key; None for any other header.

    The whole header must have this form: another part of it could name another backend.
    """
    found = _SHARED.match(file)
    if found is None or found[2] != found[5]:
        return None
    backend, key_id, version, job = (part.decode("ascii") for part in found.groups()[:4])
    try:
        return Wrap(backend, key_id, version, b"", b64decode(job.encode("ascii")))
    except DecryptFailed:
        return None


def _key_ids_in(text: bytes) -> Iterator[str]:
    """The key ids that a ciphertext names, also in a bundle; not verified."""
    inner = (match[1].replace(b"\n", b"") for match in _BUNDLED.finditer(text, 0, _SCANNED_BYTES))
    for part in (text, *(a2b_base64(base64[: len(base64) // 4 * 4]) for base64 in inner)):
        if match := _NAMED.search(part, 0, _SCANNED_BYTES):
            yield match[1].decode("ascii")


def build(settings: Settings, sealed: SealedFiles | None = None) -> Keyring:
    """Open each key that settings name. Raises ConfigurationError for a wrong URI, scheme or key file.

    ``sealed`` opens sealed key files; without it they are refused.
    """
    default_id, kinds, shared = default_key_id(settings), settings.kms.all_keys, WrapKeys()
    keys = {
        key_id: _key(key_id, key.uris, settings, sealed, shared)
        for key_id, key in kinds.items()
        if key.use == "data"
    }
    if default_id not in keys:
        own = _open(settings.active_backend, None, settings, default_id, sealed)
        keys[default_id] = Key(default_id, own, settings.backend(AgeSection).accept_foreign)
    return Keyring(keys, keys[default_id])


def default_key_id(settings: Settings) -> str:
    """The id of the key for calls that name none."""
    own_id = settings.backends[settings.active_backend].own_key_id()
    return settings.kms.default_key_id or own_id or DEFAULT_KEY_ID


def roots(settings: Settings) -> Mapping[str, Key]:
    """Open the keys that seal key files. Raises ConfigurationError, also for one whose own file is sealed."""
    return {
        key_id: _key(key_id, key.uris, settings, None, WrapKeys())
        for key_id, key in settings.kms.all_keys.items()
        if key.use == "seal"
    }


def _key(
    key_id: str, uris: Sequence[str], settings: Settings, sealed: SealedFiles | None, shared: WrapKeys
) -> Key:
    """Open a key of one or more URIs: each wraps new files unless it says ``seal=false``."""
    sealing: list[Backend] = []
    retired: list[Backend] = []
    for uri in uris:
        rest, options = _split_options(key_id, uri)
        backend = _shared(key_id, _from_uri(key_id, rest, settings, sealed), options.get("share"), shared)
        (retired if options.get("seal") == "false" else sealing).append(backend)
    names = [backend.name for backend in (*sealing, *retired)]
    if not sealing:
        raise ConfigurationError(f"kms.keys.{key_id}: name a URI that encrypts, without seal=false")
    if len(set(names)) != len(names) or len(sealing) > MAX_WRAPS:
        raise ConfigurationError(
            f"kms.keys.{key_id}: name each backend once, and at most {MAX_WRAPS} that encrypt"
        )
    accept_foreign = settings.backend(AgeSection).accept_foreign
    return Key(key_id, sealing[0], accept_foreign, tuple(sealing[1:]), tuple(retired))


def _split_options(key_id: str, uri: str) -> tuple[str, Mapping[str, str]]:
    """The URI without the options that no backend reads, ``seal`` and ``share``, and their values."""
    parts = urlsplit(uri)
    pairs = parts.query.split("&") if parts.query else []
    given = [pair for pair in pairs if pair.partition("=")[0] in _OPTIONS]
    options = {name: value for name, _, value in (pair.partition("=") for pair in given)}
    if options.get("seal", "true") not in {"true", "false"} or len(options) != len(given):
        raise ConfigurationError(f"kms.keys.{key_id}: seal is true or false, and no option is given twice")
    rest = "&".join(pair for pair in pairs if pair not in given)
    return urlunsplit(parts._replace(query=rest)), options


def _shared(key_id: str, backend: Backend, share: str | None, shared: WrapKeys) -> Backend:
    """The backend, with wrap keys for many files if its URI says ``share``. Raises ConfigurationError."""
    if share is None:
        return backend
    if not isinstance(backend, RemoteBackend):
        raise ConfigurationError(
            f"kms.keys.{key_id}: share is for keys on a server; use native=false for an Age key, which "
            "shares nothing, since anybody could make a key for its public recipient"
        )
    try:
        life_s = parse_duration(share).total_seconds()
    except ValueError:
        life_s = 0.0
    if not 1 <= life_s <= LONGEST_SHARE_S:
        raise ConfigurationError(
            f"kms.keys.{key_id}: share takes 1s to 60m, as share=5m: for so long after the server wrapped or "
            "unwrapped it, one key serves many files without a call"
        )
    return SharingBackend(backend, shared, life_s)


def _from_uri(key_id: str, uri: str, settings: Settings, sealed: SealedFiles | None) -> Backend:
    parts = urlsplit(uri)
    if parts.password:
        raise ConfigurationError(f"The URI of key {key_id!r} holds a password: put it into a file instead")
    if parts.scheme not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise ConfigurationError(
            f"key {key_id!r} names the backend {parts.scheme!r}, which is not one of: {known}"
        )
    return _open(parts.scheme, parts, settings, key_id, sealed)


def _open(
    scheme: str, uri: SplitResult | None, settings: Settings, key_id: str, sealed: SealedFiles | None
) -> Backend:
    """Open the key that a URI names; None: the one of the backend's table. ``sealed`` is for Age keys."""
    section = settings.backends[scheme]
    if isinstance(section, AgeSection):
        return age.open_key(uri, section, strict=settings.is_prod, name=key_id, sealed=sealed)
    module = importlib.import_module(section.MODULE)
    opened: Backend = module.open_key(uri, section, strict=settings.is_prod)
    return opened
