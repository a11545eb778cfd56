"""Opens the sealed key files of an installation, once for all processes of a program, and checks its peers.

The parent (the leader of the API, the worker before it forks, or a single process) asks the roots at start
and when a file changes, and keeps the contents in memory that its children inherit (``SharedSecrets``). So a
request asks no root. Other programs, such as ``kms doctor``, open the files themselves.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
import structlog

from kms_core import keyring, stores
from kms_core.age.header import is_age_file
from kms_core.audit.keys import CONCEALING, SIGNING
from kms_core.backends import NATIVE, Backend, KeyMissing
from kms_core.backends.age import AgeBackend, parts_of
from kms_core.backends.age_settings import AgeSection
from kms_core.backends.key_files import KeyFiles, make_identity
from kms_core.documents.key_document import KeyDocument
from kms_core.documents.local_copy import LocalCopy
from kms_core.envelope.sealed_files import (
    FileSealer,
    KeySource,
    NotOpenedYet,
    SealedFiles,
    SealingIdentity,
    read_identities,
)
from kms_core.periodic import PeriodicThread, jittered_wait_s
from kms_core.secure_memory import SharedSecrets
from kms_core.settings.lint import leaves_host
from kms_core.settings.model import Settings
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError, KmsError, Unavailable

OWN_PREFIX: Final = "kms:"
SPOOL: Final = "kms:spool"
INTAKE: Final = "kms:intake"
LOOK_S: Final = 0.5
_CHECK_S: Final = 5.0
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 80.0  # a minute on average
_log = structlog.get_logger(__name__)


def own_files(settings: Settings) -> Mapping[str, Path]:
    """The key files of the service itself that may be sealed, by their names."""
    jobs, audit = settings.kms.jobs, settings.kms.audit
    return {
        SPOOL: jobs.spool_identity_path,
        INTAKE: jobs.intake_identity_path,
        CONCEALING: audit.key_path,
        SIGNING: audit.signing_key_path,
    }


def own_key(settings: Settings, name: str) -> AgeBackend:
    """A key of the service itself, ``SPOOL`` or ``INTAKE``. Raises ConfigurationError.

    Files under the spool key have no native stanza: only the service opens them.
    """
    path, sealed = own_files(settings)[name], of_process(settings)
    return AgeBackend(KeyFiles(path, strict=settings.is_prod, name=name, sealed=sealed), native=name != SPOOL)


def key_locations(settings: Settings) -> Mapping[str, Path | str]:
    """The private files of Age keys that take calls, or the URLs of their documents, by key id.

    Raises ConfigurationError.
    """
    section, found = settings.backend(AgeSection), dict[str, Path | str]()
    for key_id, key in settings.kms.all_keys.items():
        for parts in map(urlsplit, key.uris):
            if parts.scheme == NATIVE and key.use == "data":
                found[key_id] = parts_of(parts._replace(query=""), section)[0]
    default_id = keyring.default_key_id(settings)
    if settings.active_backend == NATIVE and default_id not in settings.kms.keys:
        found[default_id] = section.private_key_path
    return found


def documents(settings: Settings) -> Mapping[str, KeyDocument]:
    """The documents of Age keys that take calls, by key id. Raises ConfigurationError."""
    sealer, opened = direct(settings), _inherited(settings)
    return {
        name: _document(settings, name, place, sealer, opened)
        for name, place in key_locations(settings).items()
        if isinstance(place, str)
    }


def sealed_files(settings: Settings) -> Mapping[str, Path]:
    """The key files that are sealed now, by name. Raises ConfigurationError for a wrong URI."""
    paths = {**key_locations(settings), **own_files(settings)}
    files = {name: path for name, path in paths.items() if isinstance(path, Path)}
    return {name: path for name, path in files.items() if is_age_file(_content_of(path))}


def _content_of(path: Path) -> bytes:
    """The content of a file; empty if it cannot be read, which its user reports."""
    with suppress(OSError):
        return small_files.read(path)
    return b""


# -- what the parent shares --------------------------------------------------------------------------


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


# -- of this process -----------------------------------------------------------------------------------

_memory: list[SharedSecrets] = []  # of this process: its own or its parent's; empty or one


def begin(settings: Settings) -> int | None:
    """Open the sealed files of a program that runs several processes, and go on in a thread.

    Makes a missing spool key in dev. Returns the descriptor that children started by an exec pass to
    ``inherit``; None without sealed files. Blocks while a root of the service's own keys is away. Raises
    ConfigurationError.
    """
    _make_spool_key(settings)
    paths = sealed_files(settings)
    if not paths and not any(isinstance(place, str) for place in key_locations(settings).values()):
        return None
    memory = SharedSecrets.create()
    opener = KeyOpener(paths, direct(settings), memory)
    opener.open_all()
    _memory[:] = [memory]
    for name, document in documents(settings).items():  # the spool key, which authenticates them, is open
        with suppress(Unavailable, OSError):  # the log says why, and the processes go on polling
            document.copy.poll()
        opener.add(name, document.private, document.sealed)
    opener.open_all()
    opener.start()
    return memory.fd


def _make_spool_key(settings: Settings) -> None:
    """Make the spool key of a new install in dev that no other host can share. Raises ConfigurationError.

    Hosts that each made their own could not read the jobs of each other.
    """
    jobs, redis = settings.kms.jobs, settings.kms.redis
    is_shared = jobs.spool_bucket or leaves_host(redis.url) or (jobs.spool_dir / "hosts").exists()
    if settings.environment == "dev" and not is_shared and make_identity(jobs.spool_identity_path):
        _log.info("key.made", name=SPOOL, path=str(jobs.spool_identity_path))


def inherit(fd: int) -> None:
    """Use what the parent opened, by the descriptor that ``begin`` returned there."""
    _memory[:] = [SharedSecrets.inherited(fd)]


def of_process(settings: Settings) -> SealedFiles:
    """The opener for this process: the parent's memory if there is one, else the roots themselves."""
    return _inherited(settings) or direct(settings)


def _inherited(settings: Settings) -> InheritedFiles | None:
    return InheritedFiles(_memory[0], direct(settings)) if _memory else None


def direct(settings: Settings) -> FileSealer:
    """Open and seal files in this process, with a call to a root for each."""
    roots = cache(partial(keyring.roots, settings))
    identities = partial(_identities, settings.backend(AgeSection).seal_identity_path)
    return FileSealer(roots, identities, partial(_document, settings))


def _document(
    settings: Settings, name: str, url: str, sealer: FileSealer, opened: SealedFiles | None
) -> KeyDocument:
    """Its MAC key is derived from the oldest secret of the spool key, which all hosts have."""
    secret = own_key(settings, SPOOL).secrets()[0]
    document = stores.key_document(settings, secret, name, url)
    folder = stores.documents_folder(settings)
    copy = LocalCopy(document, folder, math.inf)  # however old it is: identities are not revoked
    return KeyDocument(name, document, copy, sealer, opened)


def _identities(path: Path | None) -> Sequence[SealingIdentity]:
    if path is None:
        raise ConfigurationError(
            "it is sealed for age identities, and none are named: set seal_identity_path under [kms.age]"
        )
    return read_identities(path)


# -- keys of peers -------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Check that each peer has the keys that settings name. Raises ConfigurationError for a missing key.

    A peer that refuses us or does not answer within 5 seconds is logged: the service starts degraded.
    """
    if settings.used_backends <= {NATIVE}:
        return
    keys = keyring.build(settings, of_process(settings)).keys
    peers: dict[str, list[Backend]] = {}
    for key in (*keyring.roots(settings).values(), *keys.values()):
        for backend in key.backends:
            if backend.blocks:
                peers.setdefault(backend.name, []).append(backend)
    missing: list[KeyMissing] = []
    # daemon threads: a peer that never answers must not delay the end of the process
    threads = [Thread(target=_check_peer, args=(each, missing), daemon=True) for each in peers.values()]
    for thread in threads:
        thread.start()
    until = time.monotonic() + _CHECK_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if missing:
        raise ConfigurationError(missing[0].detail)


def _check_peer(backends: Sequence[Backend], missing: list[KeyMissing]) -> None:
    """Check the keys of one peer in turn, until it fails to answer."""
    for backend in backends:
        try:
            backend.versions()
        except KeyMissing as exc:
            missing.append(exc)
        except BackendUnavailable as exc:
            _log.warning("backend.unavailable", backend=backend.name, reason=exc.detail)
            return
