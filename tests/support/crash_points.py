"""Plays of a job in which a process dies, or stands still, at one effect, and others go on as in life.

A play begins with an empty Redis, spool and root of files. Processes are cores in this one
(``effects.Process``). Time passes when ``Install.advance`` says so, for this machine and for the scripts of
Redis. The name of a worker is ``w<number>``.
"""

import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import pytest

from kms_core.audit.keys import PublicKeys
from kms_core.audit.verification.verify import verify
from kms_core.container import Core
from kms_core.container import build as build_core
from kms_core.jobs.execution import lease
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_claimed, run_next, tidy
from kms_core.jobs.model import Attempt, Following
from kms_core.jobs.recovery.reaper import due, forget, reap_all
from kms_core.jobs.recovery.spool_cleanup import SpoolCleanup
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store import job_redis
from kms_core.jobs.store.scripts import SCRIPTS
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.wake_ups import list_key
from kms_core.jobs.submission import submitter
from support import effects
from support.effects import Moment, Point, Process, plain
from support.job_stores import connect
from support.service import Service
from support.synced_disk import SyncedDisk

WakeUps = Literal["none", "two", "late"]
"""Wake-ups after a death: none but those of the reaper, two processes for each, or one more in the end."""
CutMoment = Moment | Literal["power"]
"""``power``: after the effect, and the disk has nothing but what was synced."""
Kinds = Sequence[tuple[CutMoment, WakeUps]]
_AHEAD: Final = "kms:ahead"
_CLOCK: Final = "redis.call('TIME')"
_MOST_ROUNDS: Final = 8
_TRANSIENT: Final = frozenset(
    {_AHEAD, *(f"kms:{name}" for name in ("probed", "room", "full", "half", "waited"))}
)
_OF_LOST_LEASES: Final = frozenset({"history", "began_at", "not_before"})
"""Fields of a record that has lost a lease."""


def _with_clock(text: str) -> str:
    """A script whose clock is ahead by the seconds that Redis holds for that."""
    clock = f"{_CLOCK}\nclock[1] = string.format('%d', clock[1] + (redis.call('GET', '{_AHEAD}') or 0))"
    assert text.count(_CLOCK) <= 1
    return text.replace(_CLOCK, clock)


class Install:
    """Processes of one install. ``ahead_s`` is how far its time is ahead of the machine's.

    Use it within ``installed``.
    """

    def __init__(self, folder: Path, url: str, settings: str = "") -> None:
        self.service = Service(folder, settings, url)
        self.settings = self.service.settings
        self.redis: Any = connect(url)
        self.disk = folder / "synced"
        self.ahead_s = 0
        self._cores: list[Core] = []
        self._numbers, self._ids = itertools.count(1), itertools.count(1)

    def begin(self) -> None:
        """Forget all that was before."""
        self.redis.flushdb()
        self.ahead_s, self._numbers, self._ids = 0, itertools.count(1), itertools.count(1)
        for folder in (self.service.spool, self.service.files, self.service.state / "audit"):
            shutil.rmtree(folder, ignore_errors=True)
        self.service.files.mkdir(mode=0o700)

    def core(self, role: str = "worker") -> Core:
        """The core of a new process, which knows nothing of others."""
        made = build_core(self.settings, role, None)
        self._cores.append(made)
        return made

    def job_id(self) -> str:
        """The id of a new job: the same in each play, since jobs of one age are taken by their ids."""
        return f"00000000-0000-4000-8000-{next(self._ids):012}"

    def worker_name(self) -> str:
        return f"w{next(self._numbers)}/1"

    def end(self) -> None:
        """End all processes that live."""
        for core in self._cores:
            core.kms.audit_log.close()  # type: ignore[attr-defined]  # of AuditLog
            core.worker_context.store.redis.close()
        self._cores.clear()

    def bury(self, core: Core) -> None:
        """Forget the core of a process that died."""
        self._cores.remove(core)
        core.worker_context.store.redis.close()

    def advance(self, seconds: float) -> None:
        """Let time pass. Keys of Redis expire."""
        self.ahead_s += round(seconds)
        self.redis.set(_AHEAD, self.ahead_s)
        names, now_ms = list(self.redis.scan_iter(count=1000)), time.time() * 1000
        terms = self.asked(*(("PEXPIRETIME", name) for name in names))
        if over := [name for name, term in zip(names, terms, strict=True) if 0 < term < now_ms]:
            self.redis.delete(*over)

    @cached_property
    def own(self) -> Core:
        """The core of the reaper, and of who looks at what is left. Its audit log is another one."""
        kms = self.settings.kms
        audit = msgspec.structs.replace(kms.audit, path=self.disk.with_name("own-audit"))
        kms = msgspec.structs.replace(kms, audit=audit)
        return build_core(msgspec.structs.replace(self.settings, kms=kms), "own", None)

    def asked(self, *commands: tuple[object, ...]) -> list[Any]:
        """The answers of Redis to commands that are sent together."""
        pipeline = self.redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = pipeline.execute()
        return answers

    def take_messages(self) -> int:
        """Take the wake-ups of all queues out of the broker; how many there were."""
        return sum(
            len(found or ()) for found in self.asked(*(("LPOP", list_key(each), 100) for each in QUEUES))
        )


@contextmanager
def installed(install: Install) -> Iterator[None]:
    """Intercept effects, and let time be that of the install. No lease is renewed: plays are over at once."""
    scripts = {name: _with_clock(text) for name, text in SCRIPTS.items()}
    clock = time.time
    with pytest.MonkeyPatch.context() as patch, effects.installed(scripts):
        patch.setattr(job_redis, "SCRIPTS", scripts)
        patch.setattr(submitter, "new_id", install.job_id)
        patch.setattr(time, "time", lambda: clock() + install.ahead_s)
        patch.setattr(JobStore, "now", lambda _: time.time())
        patch.setattr(lease, "_REPORT_EVERY_S", 3600.0)
        for text in scripts.values():
            install.redis.script_load(text)
        yield


# -- workers -----------------------------------------------------------------------------------------------


def drain(context: WorkerContext, worker: str, *, woken: bool = True) -> None:
    """Do what a process of a worker does that a wake-up brings: take jobs until none is ready."""
    following = Following(worker, QUEUES, lambda: True)
    while run_next(context, following, woken=woken):
        woken = False


def _two_at_once(install: Install) -> None:
    """Two processes are woken: one claims, and does nothing before the other has done all that it finds."""
    first, second = install.core().worker_context, install.core().worker_context
    name = install.worker_name()
    found = first.store.next(name, QUEUES, woken=True)
    drain(second, install.worker_name())
    if isinstance(found, Attempt):
        run_claimed(found, first)
    elif found:
        tidy(first.store.accepted(found), first)
    drain(first, name, woken=False)


def go_on(install: Install, wake_ups: WakeUps = "none") -> None:
    """Let time pass until all jobs rest, with the reaper, and workers that know nothing of what was before.

    A worker looks for work only if the reaper has woken it. Raises AssertionError if there is no rest.
    """
    store = install.own.worker_context.store
    install.take_messages()
    for _ in range(_MOST_ROUNDS):
        install.advance(store.rules.lease_s + 1)
        reap_all(store, due(store))
        store.wake()
        if not install.take_messages():
            break
        if wake_ups == "two":
            _two_at_once(install)
        else:
            drain(install.core().worker_context, install.worker_name())
    else:
        raise AssertionError(f"no rest in {_MOST_ROUNDS} rounds of the reaper")
    if wake_ups == "late":
        drain(install.core().worker_context, install.worker_name())


# -- what is left ------------------------------------------------------------------------------------------


_LISTED: Final[dict[bytes, tuple[object, ...]]] = {
    b"zset": ("ZRANGE", 0, -1),
    b"set": ("SMEMBERS",),
    b"hash": ("HKEYS",),
}
"""How the members of a key of each type are listed, beside its name."""


def keys(install: Install) -> dict[str, list[str]]:
    """All keys of Redis by what they are of: type, whether they expire, members or fields.

    But for locks that expire: one of a process that stood still is taken again.
    """
    found: dict[str, set[str]] = {}
    left_out = _TRANSIENT | {list_key(queue) for queue in QUEUES}
    names = [raw for raw in install.redis.scan_iter(count=1000) if raw.decode() not in left_out]
    kinds = install.asked(*(("TYPE", name) for name in names))
    terms = install.asked(*(("TTL", name) for name in names))
    listings = ((_LISTED.get(kind, ("EXISTS",)), name) for kind, name in zip(kinds, names, strict=True))
    members = install.asked(*((first, name, *more) for (first, *more), name in listings))
    for name, kind, term, found_members in zip(names, kinds, terms, members, strict=True):
        if term < 0 or not name.startswith(b"kms:lock:"):
            found.setdefault(plain(name.decode()), set()).add(_shape(kind, term, found_members))
    return {name: sorted(shapes) for name, shapes in sorted(found.items())}


def _shape(kind: bytes, term: int, members: Iterable[bytes] | int) -> str:
    listed = () if isinstance(members, int) else (each.decode(errors="replace") for each in members)
    names = " ".join(sorted(plain(each) for each in listed if each not in _OF_LOST_LEASES))
    return f"{kind.decode()}{' expires' * (term >= 0)}: {names}"


def files(install: Install, job_id: str = "") -> Counter[str]:
    """The files of the spool, or those of a job, by what they are of, without the marks of hosts."""
    found = (path for path in install.service.spool.rglob("*") if path.is_file())
    names = (str(path.relative_to(install.service.spool)) for path in found)
    return Counter(plain(name) for name in names if name.startswith(job_id) and not name.startswith("hosts/"))


def quota_sums(install: Install) -> dict[str, int]:
    """The sums of what jobs take of the quotas of their tenants (memory, bytes in the spool), if any."""
    names = [raw for kind in ("held", "spooled") for raw in install.redis.scan_iter(f"kms:{kind}:*")]
    sums = install.asked(*(("HGET", name, "sum") for name in names))
    return {name.decode(): size for name, found in zip(names, sums, strict=True) if (size := int(found or 0))}


def spool_folders(install: Install) -> set[str]:
    """The jobs of which something is in the spool."""
    return {path.name for path in install.service.spool.iterdir()} - {"hosts"}


def audited(install: Install) -> list[dict[str, Any]]:
    """The operations in the audit log, by their chains."""
    folder = install.service.state / "audit"
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines())
    return [found for found in map(json.loads, lines) if "operation" in found]


def told(install: Install) -> dict[str, list[str]]:
    """The events of each job: its states."""
    found: dict[str, list[str]] = {}
    for _, fields in install.redis.xrange("kms:events"):
        found.setdefault(fields[b"subject"].decode(), []).append(fields[b"type"].decode().rpartition(".")[2])
    return found


def forget_all(install: Install, when_ended: Callable[[], object] = lambda: None) -> None:
    """Let the grace of inputs pass, then, after ``when_ended``, the terms of results and of records."""
    store, spool = install.own.worker_context.store, install.own.worker_context.spool
    for seconds in (store.rules.input_grace_s + 1, 3 * 86_400, 3 * 86_400):
        install.advance(seconds)
        reap_all(store, due(store))
        cleanup = SpoolCleanup(store, spool, "w0")
        cleanup.step()
        assert not cleanup._failing  # noqa: SLF001 -- a step that fails is logged only
        forget(store)
        store.wake()
        if install.take_messages():
            drain(install.core().worker_context, install.worker_name())
        when_ended()
        when_ended = lambda: None  # noqa: E731 -- once


def audit_problems(install: Install) -> list[str]:
    """What is wrong with the audit log as a whole."""
    keys_ = PublicKeys.read(install.service.state / "audit-signing.pub")
    return [str(problem) for problem in verify(install.service.state / "audit", keys_).problems]


# -- plays -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Where a process ends, or stands still, and what follows. Without a number: nowhere."""

    at: int | None = None
    moment: CutMoment = "before"
    wake_ups: WakeUps = "none"


def synced_disk(install: Install) -> SyncedDisk:
    """A disk that has spool and files as they are now, and what processes on it sync from now on."""
    shutil.rmtree(install.disk, ignore_errors=True)
    disk = SyncedDisk(install.disk)
    for folder in (install.service.spool, install.service.files):
        disk.sync_all(folder)
    return disk


def lose_power(install: Install, disk: SyncedDisk) -> None:
    """Leave of spool and files what was synced."""
    disk.cut(install.service.spool)
    disk.cut(install.service.files)


def cut_off(
    install: Install,
    cut: Cut,
    act: Callable[[Core], object],
    role: str,
    meanwhile: Callable[[], object] | None = None,
) -> Process:
    """Run what a process does, until it is cut. While it stands still others go on, or do something else."""
    core, service = install.core(role), install.service
    disk = synced_disk(install) if cut.moment == "power" else None
    moment: Moment = "after" if cut.moment == "power" else cut.moment
    others = meanwhile or partial(go_on, install, cut.wake_ups)
    with Process(service.state, cut.at, moment, meanwhile=others, disk=disk) as process:
        act(core)
    if process.is_dead:
        install.bury(core)
        if disk:
            lose_power(install, disk)
    return process


def differences(seen: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """What differs between two plays."""
    for name, value in expected.items():
        if seen[name] != value:
            yield f"{name}: {_shown(seen[name], value)}"


def _shown(seen: Any, expected: Any) -> str:  # noqa: ANN401 -- any value
    if isinstance(seen, dict) and isinstance(expected, dict):
        names = [name for name in {**expected, **seen} if seen.get(name) != expected.get(name)]
        return "; ".join(f"{name} is {seen.get(name)}, not {expected.get(name)}" for name in names)
    return f"is {seen!r}, not {expected!r}"


def cuts(points: Sequence[Point], kinds: Kinds) -> Iterator[Cut]:
    """Each kind of cut at each point. What is sent twice are commands of Redis."""
    for at, point in enumerate(points):
        for moment, wake_ups in kinds:
            if moment != "twice" or point.name.startswith("kms:"):
                yield Cut(at, moment, wake_ups)


@contextmanager
def located(at: str) -> Iterator[None]:
    """Add to an error where it was."""
    try:
        yield
    except Exception as exc:
        exc.add_note(at)
        raise
