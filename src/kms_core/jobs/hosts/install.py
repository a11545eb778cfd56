"""The install of a process: one id in the spool and in Redis, and one spool for all hosts.

The id is random, made once, and create-only in both places. Each host leaves a mark in the spool; another
host that cannot read it has another spool. At start both are compared, and a difference refuses the start;
later each process compares them every two seconds.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from kms_core.jobs.hosts.notes import Host, HostNote, HostNotes, SpoolMarks
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import ConfigurationError, JobsUnavailable, KmsError, WrongInstall

EVERY_S: Final = 2.0
MARKS_EVERY_S: Final = 60.0
"""Marks of hosts that were found are looked for again so often (s); missing ones in each round."""
USERS_EVERY_S: Final = 600.0
"""Each host renews its own mark so often (s), and looks for those of hosts that this Redis does not know."""
YOUNG_S: Final = 3 * USERS_EVERY_S
"""A mark that is at most so old (s) is of a host that runs."""
MISSING_S: Final = 10.0
"""A mark that cannot be read for so long is missing (s): a file system of a network may show it late."""
CLOCK_BOUND_S: Final = 2.0
"""The bound on the difference of clocks (s): far above that of NTP, far below the leeway of tokens (30 s)."""
_POLL_S: Final = 0.5
_TRIES: Final = 4
_MOST_LOOKS: Final = 100  # at marks in one round: others may write any number of notes
_HELP: Final = "See docs/hosts.md"
_DIFFERS: Final = (
    "install_mismatch: the spool belongs to the install {own}, Redis to {other}. Two installs share this "
    "Redis: give each a server or a database number of its own; or another directory is mounted as spool; or "
    "Redis was replaced by that of another install. If both belong together, stop all processes and delete "
    f"the key kms:install in Redis. {_HELP}"
)
_LOST: Final = (
    "install_mismatch: the spool has no install id, and Redis has {jobs} jobs or results of the install "
    "{other}: another directory, or none, is mounted as spool. If its files are lost for good, stop all "
    "processes and delete the key kms:install in Redis: jobs without their files then end with "
    f"result_expired. {_HELP}"
)
_NOT_SHARED: Final = (
    "spool_not_shared: this host's spool is not the one that host {name} uses. Mount the same directory, or "
    f"name the same bucket, on all hosts; or stop that host. {_HELP}"
)
_EMPTY: Final = (
    "Redis had no install id, and the spool has one. If the other hosts use another Redis, correct "
    f"[kms.redis] url here; files of jobs that this Redis does not know are kept for a day. {_HELP}"
)
_STRANGERS: Final = (
    "Hosts that this Redis does not know use the same spool: another install. Give each a directory, or a "
    f"bucket and prefix, of its own. Until then no file of an unknown job is deleted. {_HELP}"
)
_log = structlog.get_logger(__name__)


class Facts(NamedTuple):
    """Places of the key files of this host, by key id; and values that all hosts must share, by name."""

    key_places: dict[str, str]
    shared: dict[str, str]


@dataclass(frozen=True, slots=True)
class InstallCondition:
    """The findings of the last look. ``wrong`` says why no job may be accepted or run; empty if one may.

    ``strangers`` are the names of hosts that use the same spool with another Redis.
    """

    install_id: str = ""
    wrong: str = ""
    strangers: tuple[str, ...] = ()
    is_shared: bool = True
    ahead_s: float = 0.0
    others: Mapping[str, HostNote] = field(default_factory=dict)

    @property
    def states(self) -> dict[str, bool]:
        """Whether each part that all hosts share is degraded, by its name in ``degraded`` of the status."""
        ahead = (self.ahead_s, *(each.clock_s for each in self.others.values()))
        return {
            "install": bool(self.wrong or self.strangers),
            "spool_not_shared": not self.is_shared,
            "clock": any(abs(one) > CLOCK_BOUND_S for one in ahead),
        }


class Install:
    """The install as one process sees it. Safe in several threads."""

    def __init__(
        self,
        notes: HostNotes,
        marks: SpoolMarks,
        host: Host,
        facts: Callable[[], Facts] = lambda: Facts({}, {}),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``monotonic`` gives seconds."""
        self.host = host
        self.condition = InstallCondition()
        self.is_watched = False
        """True if a thread calls ``round``: then ``elsewhere`` does not ask Redis."""
        self._notes, self._marks, self._facts = notes, marks, facts
        self._monotonic = monotonic
        self._lock = threading.Lock()  # of the condition, which ``require`` changes in other threads
        self._looked = self._compared = self._users_at = float("-inf")
        self._at: dict[str, float] = {}
        self._suspects: set[str] = set()
        self._unread: dict[str, float] = {}
        self._read: set[str] = set()
        self._is_marked = self._lost = False

    # -- at start -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Compare id and spool. Raises ConfigurationError; JobsUnavailable while Redis does not answer."""
        if wrong := mismatch(self._marks.install_id(), self._notes.install_id()):
            raise ConfigurationError(wrong)
        self._marks.create_host(self.host.id, self.host.name)
        try:
            self._prove_spool()
            self._refuse()
        except ConfigurationError:
            with suppress(JobsUnavailable):
                self._notes.withdraw(self.host)
            raise

    def _refuse(self) -> None:
        """Raise ConfigurationError if the ids differ, after a moment for a process that writes them now."""
        for _ in range(_TRIES):
            self._compare()
            if not self.condition.wrong:
                return
            time.sleep(_POLL_S)
        raise ConfigurationError(self.condition.wrong)

    def _prove_spool(self) -> None:
        """Read the mark of each other live host; wait for those that may be gone until their note is old."""
        first: dict[str, float] = {}
        while True:
            now, _ = self._notes.now()
            self._notes.write(HostNote(self.host.id, self.host.name, now, serving=False))
            others = self._others(now)
            unread = [each for each in others.values() if self._marks.lacks_host(each.id)]
            if not unread:
                self.condition = replace(self.condition, others=others)
                return
            for note in unread:
                if note.seen > first.setdefault(note.id, note.seen):
                    raise ConfigurationError(_NOT_SHARED.format(name=note.name))
            time.sleep(_POLL_S)

    # -- while running --------------------------------------------------------------------------------

    def round(self) -> None:
        """Look at id, marks, clocks and hosts, and renew the note of this host. Raises JobsUnavailable."""
        before = self.condition
        with self._lock:
            self._compare()
        now, ahead_s = self._notes.now()
        others = {each: note for each, note in self._others(now).items() if note.serving}
        missing = self._missing(others)
        is_missed = any(self.host.id in each.missing for each in others.values())
        is_shared = not (self._lost_mark() or missing or is_missed)
        self._update(is_shared=is_shared, ahead_s=ahead_s, others=others)
        self._looked = self._monotonic()
        note = HostNote(self.host.id, self.host.name, now, clock_s=round(ahead_s, 3), missing=tuple(missing))
        self._notes.write(msgspec.structs.replace(note, **self._facts()._asdict()))
        self._look_for_strangers()
        self._report(before, [others[each].name for each in missing])

    def _report(self, before: InstallCondition, missing: Sequence[str]) -> None:
        found = self.condition
        metrics.INSTALL_OK.labels("id").set(not (found.wrong or found.strangers))
        metrics.INSTALL_OK.labels("spool").set(found.is_shared)
        metrics.CLOCK_AHEAD.set(found.ahead_s)
        if found.install_id != before.install_id:
            _log.info("install.known", install=found.install_id, host=self.host.id)
        if found.wrong and found.wrong != before.wrong:
            _log.error("install.mismatch", advice=found.wrong)
        if found.strangers and found.strangers != before.strangers:
            _log.error("install.spool_of_others", hosts=found.strangers, advice=_STRANGERS)
        if before.is_shared and not found.is_shared:
            _log.error("install.spool_not_shared", hosts=missing, advice=_HELP)
        if found.states["clock"] and not before.states["clock"]:
            far = {each.name: each.clock_s for each in found.others.values()}
            _log.warning("install.clocks_differ", ahead_s=round(found.ahead_s, 3), others=far)

    def require(self) -> None:
        """Raise WrongInstall if the jobs of this Redis belong to another spool; JobsUnavailable.

        Compares in this call where no thread did so in the last seconds, and waits for no spool that is away.
        """
        if self._monotonic() - self._compared > 2 * EVERY_S and self._lock.acquire(timeout=_POLL_S):
            try:
                self._compare(reads=not self.is_watched)
            finally:
                self._lock.release()
        if self.condition.wrong:
            raise WrongInstall(self.condition.wrong)

    def may_sweep(self) -> bool:
        """True if files of jobs that Redis does not know are orphans.

        False before the first round, under a new Redis, and where hosts that Redis does not know use the
        spool, or may do. Raises JobsUnavailable.
        """
        is_known = self._monotonic() - self._users_at < YOUNG_S
        return is_known and not self._suspects and not self._notes.is_new_redis()

    def elsewhere(self, key_id: str, *, asks: bool) -> list[str]:
        """Names of live hosts that read this key from files of their own, ten at most.

        As the last round found them. Asks Redis now with ``asks``, or where no thread calls ``round``.
        """
        is_old = self._monotonic() - self._looked > EVERY_S
        if asks or (is_old and not self.is_watched):
            with suppress(JobsUnavailable):
                now, _ = self._notes.now()
                self._update(others=self._others(now))
                self._looked = self._monotonic()
        own, others = self._facts().key_places.get(key_id), self.condition.others.values()
        return sorted({each.name for each in others if each.key_places.get(key_id, own) != own})[:10]

    def _update(self, **found: Any) -> None:  # noqa: ANN401 -- fields of the condition
        with self._lock:
            self.condition = replace(self.condition, **found)

    # -- the id ---------------------------------------------------------------------------------------

    def _compare(self, *, reads: bool = True) -> None:
        """Compare the ids, and write them where there is none: first in Redis, where one writer wins.

        While the spool does not answer nothing is compared, and while it takes no writes no id is made.
        """
        stored, wrong, jobs = self._notes.install_id(), "", 0
        own = self._own_id(stored, reads=reads)
        self._compared = self._monotonic()
        if own is None:
            return
        if stored is None:
            if own:
                self._notes.note_new_redis()
                _log.warning("install.redis_was_empty", advice=_EMPTY)
            elif not self._is_writable():
                return
            self._notes.offer_install_id(own or os.urandom(16).hex())
            stored = self._notes.install_id()
        elif not own and (self.condition.wrong or not self.condition.others):  # no host makes it right
            jobs = self._notes.jobs()
        if jobs:
            wrong = _LOST.format(jobs=jobs, other=stored)
        elif not own and stored is not None:
            self._marks.create_id(stored)
            own = self._marks.install_id()
        wrong = wrong or mismatch(own, stored)
        self.condition = replace(self.condition, install_id=own or "", wrong=wrong)

    def _is_writable(self) -> bool:
        """Return whether the spool takes a mark: an id in Redis only would be that of another spool later."""
        self._marks.create_host(self.host.id, self.host.name)
        return self._marks.lacks_host(self.host.id) is False

    def _own_id(self, stored: str | None, *, reads: bool) -> str | None:
        """The id in the spool; None while that does not answer, empty if there never was one.

        While it is that of Redis it is read again once a minute, if ``reads``.
        """
        known = self.condition.install_id
        if not (reads and self._is_due("id", MARKS_EVERY_S)) and known and known == stored:
            return known
        found = self._marks.install_id()
        return found or known if found is not None else None

    # -- marks ----------------------------------------------------------------------------------------

    def _look_for_strangers(self) -> None:
        """Look every ten minutes whether hosts that this Redis does not know use the spool.

        One that is found is reported after a minute: a host that starts leaves its mark before its note.
        """
        now = self._monotonic()
        every_s = MARKS_EVERY_S if self._suspects else USERS_EVERY_S
        if now - self._users_at < every_s or self._marks.lacks_host(self.host.id) is not False:
            return  # a mark that has gone is a sign of another directory: it is not made again
        self._marks.renew_host(self.host.id, self.host.name)
        with suppress(KmsError, OSError):
            known = {*self._notes.known(), self.host.id}
            found = self._marks.users(self.host.id, YOUNG_S, known)
            self._update(strangers=tuple(sorted(found[each] for each in found.keys() & self._suspects)))
            self._suspects, self._users_at = set(found), now

    def _missing(self, others: Mapping[str, HostNote]) -> list[str]:
        """The ids of hosts whose marks could not be read for ``MISSING_S``."""
        now = self._monotonic()
        if self._is_due("marks", MARKS_EVERY_S):
            self._read.clear()
            self._notes.forget_old(self._notes.now()[0])
        unknown = sorted(others.keys() - self._read)[:_MOST_LOOKS]
        looked = {each: self._marks.lacks_host(each) for each in unknown}
        self._read |= {each for each, lacks in looked.items() if lacks is False}
        unread = [each for each, lacks in looked.items() if lacks or (lacks is None and each in self._unread)]
        self._unread = {each: self._unread.get(each, now) for each in unread}
        return sorted(each for each, since in self._unread.items() if now - since >= MISSING_S)

    def _lost_mark(self) -> bool:
        """True if this host's own mark has gone from the spool: another directory is there, or none.

        Looks every ``MISSING_S``, and leaves the mark if that could not be done before.
        """
        if self._is_due("own mark", MISSING_S):
            if not self._is_marked:
                self._marks.create_host(self.host.id, self.host.name)
            lacks = self._marks.lacks_host(self.host.id)
            if lacks is not None:
                self._lost = self._is_marked and lacks
                self._is_marked |= not lacks
        return self._lost

    def _is_due(self, look: str, every_s: float) -> bool:
        """Return whether the last look of this name was so long ago; it is at this time now."""
        now = self._monotonic()
        if now - self._at.get(look, float("-inf")) < every_s:
            return False
        self._at[look] = now
        return True

    def _others(self, now: float) -> dict[str, HostNote]:
        return {each: note for each, note in self._notes.live(now).items() if each != self.host.id}


class InstallWatch(PeriodicThread):
    """Calls ``Install.round`` every two seconds, and ``report`` with whether no job may be run.

    Nothing is reported before Redis has answered: until then each process compares by itself.
    """

    def __init__(self, install: Install, report: Callable[[bool], None] = lambda _: None) -> None:
        super().__init__("install", EVERY_S, failed="install.round_failed")
        self._install, self._report = install, report
        install.is_watched = True
        self.wake()  # the first round is at once

    def round(self) -> None:
        with suppress(JobsUnavailable):
            self._install.round()
            self._report(bool(self._install.condition.wrong))


def differences(facts: Facts, note: HostNote) -> list[str]:
    """Settings and keys of that host that must be as here, and differ."""
    return [
        f"{name} is {there} there and {facts.shared[name]} here"
        for name, there in sorted(note.shared.items())
        if facts.shared.get(name, there) != there
    ]


def mismatch(own: str | None, stored: str | None) -> str:
    """Say that the ids in the spool and in Redis differ; empty if they do not, or one is not known."""
    return _DIFFERS.format(own=own, other=stored) if own and stored and own != stored else ""
