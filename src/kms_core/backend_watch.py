"""Asks the backends of all keys, roots included, whether they work; all processes of a host see the answers.

Of the processes that share a state directory the first that finds the answers 30 seconds old asks, under a
lock, and puts the new ones into a file there. So another one goes on when a process ends. Each server is
asked in a thread of its own: no call waits for it, and a server that hangs delays the check of no other.
``check_keys`` does so once, at the start of a process.
"""

import functools
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog

from kms_core import keyring, secure_files
from kms_core.backends import NATIVE, Backend, Health, KeyMissing
from kms_core.envelope.sealed_files import SealedFiles
from kms_core.keyring import Key, Keyring
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_core.settings.model import Settings
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError

EVERY_S: Final = 30.0
FRESH_S: Final = 90.0
"""Seconds for which answers are believed."""
_LOOK_S: Final = 5.0
_ROUND_S: Final = 20.0
_CHECK_S: Final = 5.0
ROOT: Final = "seal"
"""The use of a root, as in the settings; that of other keys is ``data``."""
_log = structlog.get_logger(__name__)

WatchedBackend = tuple[str, str, str]
"""Key id, backend and use."""


class BackendState(msgspec.Struct, frozen=True):
    """Whether a backend works, None if that is not known, and since when (Unix seconds)."""

    backend: WatchedBackend
    healthy: bool | None
    since: float


class _Answers(msgspec.Struct, frozen=True):
    """The content of the file: the answers of the round that ended at ``asked_at`` (``time.monotonic``)."""

    asked_at: float = -math.inf
    states: tuple[BackendState, ...] = ()


class BackendWatch(PeriodicThread):
    """Asks every 30 seconds, where no other process does, and reads the answers for this process."""

    def __init__(
        self,
        path: Path,
        keys: Iterable[Key],
        roots: tuple[list[WatchedBackend], Callable[[], Mapping[str, Key]]],
        clock: Callable[[], float] = time.monotonic,
        round_s: float = _ROUND_S,
    ) -> None:
        """``path`` is the file of the answers, ``round_s`` the longest wait for the answers of a round (s).

        ``roots``: the backends of the keys that seal key files, and a function that opens these keys, called
        in each round. It may raise ConfigurationError.
        """
        super().__init__("backend-watch", _LOOK_S, failed="backend.watch_failed")
        self._path, self._clock, self._made_at, self._round_s = path, clock, clock(), round_s
        self._backends, (self._root_names, self._roots) = dict(_named(keys, "data")), roots
        self._asking: dict[object, Thread] = {}
        self.wake()  # the first round is at once

    def round(self) -> None:
        """Ask, if the answers are old and no other process asks. Raises OSError."""
        secure_files.make_folders(self._path.parent)
        lock = secure_files.lock(self._path.with_suffix(".lock"), wait=False)
        with suppress(BlockingIOError), lock:
            if not 0 <= self._clock() - self._read().asked_at < EVERY_S:
                self._note(self._ask_all())

    def condition(self) -> list[BackendState]:
        """The state of each backend. Nothing is known once the answers are 90 seconds old."""
        answers, now = self._read(), self._clock()
        is_fresh = 0 <= now - answers.asked_at <= FRESH_S
        known = {each.backend: each for each in answers.states if is_fresh}
        since = time.time() - now + min(now, max(self._made_at, answers.asked_at))
        every = (*self._backends, *self._root_names)
        return [known.get(name) or BackendState(name, None, since) for name in every]

    def down(self) -> list[BackendState]:
        """The backends that do not work, and those of which nothing is known for 90 seconds."""
        long_ago, found = time.time() - FRESH_S, self.condition()
        return [
            each for each in found if not each.healthy and (each.healthy is False or each.since < long_ago)
        ]

    def export(self) -> None:
        """Set the metric of each backend."""
        for each in self.condition():
            metrics.BACKEND_UP.labels(*each.backend).set(math.nan if each.healthy is None else each.healthy)

    def _ask_all(self) -> dict[WatchedBackend, Health]:
        """The health of each backend. One that has not answered within the round is not healthy."""
        silent = Health(healthy=False, detail="No answer, or it cannot be opened")
        found, backends = dict.fromkeys((*self._backends, *self._root_names), silent), dict(self._backends)
        with suppress(ConfigurationError):  # an Age root whose file was taken away
            backends.update(_named(self._roots().values(), ROOT))
        by_server: dict[object, dict[WatchedBackend, Backend]] = {}
        for name, backend in backends.items():
            by_server.setdefault(backend.server or name, {})[name] = backend
        for server, asked in by_server.items():
            if server not in self._asking or not self._asking[server].is_alive():  # else it hangs
                self._asking[server] = Thread(target=_ask, args=(asked, found), daemon=True)
                self._asking[server].start()
        _join(self._asking.values(), self._round_s)
        return dict(found)

    def _note(self, found: Mapping[WatchedBackend, Health]) -> None:
        """Write the answers, and log what has changed. Raises OSError."""
        known, states = {each.backend: each for each in self._read().states}, list[BackendState]()
        for name, health in found.items():
            state = known.get(name) or BackendState(name, healthy=True, since=time.time())
            if state.healthy != health.healthy:
                state = BackendState(name, health.healthy, time.time())
                log, event = (_log.info, "backend.up") if health.healthy else (_log.warning, "backend.down")
                log(event, key_id=name[0], backend=name[1], use=name[2], reason=health.detail)
            states.append(state)
        answers = _Answers(self._clock(), tuple(states))
        secure_files.write(self._path, msgspec.json.encode(answers), locked=True)

    def _read(self) -> _Answers:
        try:
            return msgspec.json.decode(small_files.read(self._path), type=_Answers)
        except (OSError, msgspec.DecodeError):  # there is none yet, or that of another version
            return _Answers()


def _named(keys: Iterable[Key], use: str) -> Iterator[tuple[WatchedBackend, Backend]]:
    return (((key.key_id, backend.name, use), backend) for key in keys for backend in key.backends)


def _ask(asked: Mapping[WatchedBackend, Backend], found: dict[WatchedBackend, Health]) -> None:
    """Ask for the keys of one server in turn, until it does not answer: then it is away for the rest."""
    for name, backend in asked.items():
        found[name] = backend.health_check()
        if not found[name].answered:
            return


def build(settings: Settings, keys: Keyring) -> BackendWatch:
    """The watch of the backends of this host. It is not started."""
    roots = [(key_id, key) for key_id, key in settings.kms.all_keys.items() if key.use == ROOT]
    names = [(key_id, urlsplit(uri).scheme, ROOT) for key_id, key in roots for uri in key.uris]
    path = settings.state_dir / "run" / f"backends-{socket.gethostname()}.json"
    opened = functools.cache(functools.partial(keyring.roots, settings))
    return BackendWatch(path, keys.keys.values(), (names, opened))


def check_keys(settings: Settings, sealed: SealedFiles) -> None:
    """Check that each server has the keys that settings name. Raises ConfigurationError for a missing key.

    A server that refuses us or does not answer within 5 seconds is logged: the service starts degraded.
    ``sealed`` opens sealed key files.
    """
    if settings.used_backends <= {NATIVE}:
        return
    keys = keyring.build(settings, sealed).keys
    by_server: dict[object, list[Backend]] = {}
    for key in (*keyring.roots(settings).values(), *keys.values()):
        for backend in key.backends:
            if backend.server:
                by_server.setdefault(backend.server, []).append(backend)
    missing: list[KeyMissing] = []
    # daemon threads: a server that never answers must not delay the end of the process
    threads = [Thread(target=_find_missing, args=(each, missing), daemon=True) for each in by_server.values()]
    for thread in threads:
        thread.start()
    _join(threads, _CHECK_S)
    if missing:
        raise ConfigurationError(missing[0].detail)


def _find_missing(backends: Sequence[Backend], missing: list[KeyMissing]) -> None:
    """Ask for the keys of one server in turn, until it fails to answer."""
    for backend in backends:
        try:
            backend.versions()
        except KeyMissing as exc:
            missing.append(exc)
        except BackendUnavailable as exc:
            _log.warning("backend.unavailable", backend=backend.name, reason=exc.detail)
            return


def _join(threads: Iterable[Thread], wait_s: float) -> None:
    """Wait at most ``wait_s`` seconds for all of them to end."""
    until = time.monotonic() + wait_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
