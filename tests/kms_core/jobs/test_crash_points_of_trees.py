"""A worker dies at each of its effects in a job over files; each file is done once all the same.

Jobs over many files are cut into parts of two files. Equal to the undisturbed run are: state and counts of
the job, its report and the lines of its result, all files below the root with their modes, the keys of Redis,
and that nothing is left in the end. What may differ is the number of attempts, as ``events_law`` and
``audit_law`` say. The undisturbed run is held to what each kind of job is to do.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import tree
from kms_core.jobs.model import part_id
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from support import core_jobs
from support.core_jobs import CONTEXT, NEW, WHO, lines, now
from support.crash_points import (
    Cut,
    Install,
    Kinds,
    audit_problems,
    audited,
    cut_off,
    cuts,
    differences,
    drain,
    files,
    forget_all,
    go_on,
    installed,
    keys,
    located,
    lose_power,
    quota_sums,
    synced_disk,
    told,
)
from support.effects import Point, Process
from support.embedded_valkey import unrestricted
from support.job_stores import TENANT

A: Final = b"a small file" * 100
D: Final = b"another one"
PART_FILES: Final = 2
AGE: Final = b"age-encryption.org/v1\n"
HISTORY: Final = re.compile(
    r"queued( running( committing)? queued)*( running)?( committing)? (succeeded|failed)"
)
DISTURBANCES: Final[Kinds] = (
    ("after", "two"),
    ("power", "late"),
    ("pause", "none"),
    ("pause", "two"),
    ("twice", "none"),
)
"""With ``two`` the process stands still for less than its lease: another works beside it."""


class Sealed(NamedTuple):
    """A file that is sealed: what is in it, whether its key version is the newest, its context."""

    plaintext: bytes
    version: Literal["old", "new"] = "new"
    context: Context = CONTEXT


Files = Mapping[str, bytes | Sealed]
"""Files by their paths below the root; bytes of those that are not sealed."""


@dataclass(frozen=True)
class Campaign:
    """The report of a migration: files by outcome, and those of an older version, found and left."""

    changed: int
    newest: int
    found: int
    left: int


@dataclass(frozen=True)
class TreeKind:
    """A job over files below the root, and its effects.

    ``outcomes`` has the word or the error of each file that it names, in order, empty for one that is done;
    none for a job over one file. ``made`` are the files that it makes or replaces.
    ``records`` counts its operations in the audit log by result.
    """

    operation: wire.JobKind
    source: str
    target: str | None
    before: Files
    made: Files
    outcomes: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, int] = field(default_factory=dict)
    overwrite: bool = False
    new_context: Context | None = None
    report: Campaign | None = None

    @property
    def failed(self) -> int:
        words = {"", "changed", "newest"}
        return sum(word not in words for word in self.outcomes.values())

    @property
    def sources(self) -> list[str]:
        return list(self.outcomes) or [self.source]

    def submit(self, install: Install, core: Core) -> str:
        """The id of the job."""
        source, target = (name and below(install, name) for name in (self.source, self.target))
        assert source
        new, overwrite = self.new_context, self.overwrite
        return core_jobs.submit(core, self.operation, source, target, new=new, overwrite=overwrite)


def below(install: Install, name: str) -> str:
    """The URL of a name below the root."""
    return f"{install.service.files.as_uri()}/{name}"


def done(*names: str, word: str = "") -> dict[str, str]:
    return dict.fromkeys(names, word)


OLD: Final[Mapping[str, Sealed]] = {
    "in/a": Sealed(A, "old"),
    "in/b/c": Sealed(b"", "old"),
    "in/d": Sealed(D),
}
ENCRYPT: Final = TreeKind(
    "encrypt",
    "in/**",
    "out/",
    before={"in/a": A, "in/b/c": b"", "in/d": D},
    made={"out/a.age": Sealed(A), "out/b/c.age": Sealed(b""), "out/d.age": Sealed(D)},
    outcomes=done("in/a", "in/b/c", "in/d"),
    records={"ok": 3},
)
REWRAP: Final = TreeKind(
    "rewrap",
    "in/**",
    None,
    before=OLD,
    made={"in/a": Sealed(A), "in/b/c": Sealed(b"")},
    outcomes={"in/a": "changed", "in/b/c": "changed", "in/d": "newest"},
    records={"ok": 2},
    overwrite=True,
    report=Campaign(changed=2, newest=1, found=2, left=0),
)
ONE: Final = TreeKind(
    "rewrap",
    "in/a",
    None,
    before={"in/a": Sealed(A, "old")},
    made={"in/a": Sealed(A)},
    records={"ok": 1},
    overwrite=True,
)
KINDS: Final = {
    "encrypt": ENCRYPT,
    "encrypt over others": replace(
        ENCRYPT, before={**ENCRYPT.before, "out/a.age": b"old", "out/b/c.age": b"older"}, overwrite=True
    ),
    "encrypt, one is refused": replace(
        ENCRYPT,
        before={**ENCRYPT.before, "out/b/c.age": b"theirs"},
        made={"out/a.age": Sealed(A), "out/d.age": Sealed(D)},
        outcomes=done("in/a") | done("in/b/c", word="target_exists") | done("in/d"),
        records={"ok": 2},
    ),
    "decrypt": TreeKind(
        "decrypt",
        "in/**",
        "out/",
        before={"in/a.age": Sealed(A), "in/b/c.age": Sealed(b""), "in/d.age": b"no age file"},
        made={"out/a": A, "out/b/c": b""},
        outcomes=done("in/a.age", "in/b/c.age") | done("in/d.age", word="not_a_ciphertext"),
        records={"ok": 2, "not_a_ciphertext": 1},
    ),
    "rewrap": REWRAP,
    "reseal": replace(REWRAP, operation="reseal"),
    "rewrap elsewhere": replace(
        REWRAP,
        target="out/",
        made={
            name.replace("in", "out"): each._replace(version="new", context=NEW) for name, each in OLD.items()
        },
        outcomes=done("in/a", "in/b/c", "in/d", word="changed"),
        records={"ok": 3},
        overwrite=False,
        new_context=NEW,
        report=Campaign(changed=3, newest=0, found=2, left=0),
    ),
    "rewrap of a file": ONE,
    "reseal of a file": replace(ONE, operation="reseal"),
    "reseal of a file elsewhere": replace(
        ONE,
        operation="reseal",
        target="out",
        made={"out": Sealed(A, "new", NEW)},
        overwrite=False,
        new_context=NEW,
    ),
}
SHORT: Final = ("encrypt", "decrypt", "rewrap", "rewrap of a file", "reseal of a file elsewhere")
"""The kinds of which the first tier has the deaths; the second has all else."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def install(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    monkeypatch.setattr(tree, "PART_FILES", PART_FILES)
    made = Install(tmp_path, server)
    with installed(made):
        yield made


class Play:
    """Plays of one kind of job in an install. What is sealed before is sealed once."""

    def __init__(self, install: Install, kind: TreeKind) -> None:
        self.install, self.kind = install, kind
        install.begin()
        self._before = {name: self._content(each) for name, each in kind.before.items() if not _is_new(each)}
        if any(isinstance(each, Sealed) for each in kind.before.values()):
            install.own.kms.rotate(WHO, "default")
        self._before |= {name: self._content(each) for name, each in kind.before.items() if _is_new(each)}

    def _content(self, wanted: bytes | Sealed) -> bytes:
        if isinstance(wanted, bytes):
            return wanted
        return self.install.own.kms.encrypt(WHO, wanted.plaintext, wanted.context).ciphertext

    def submit(self) -> str:
        """Begin a play: write the files, and submit the job; its id."""
        self.install.begin()
        for name, content in self._before.items():
            path = self.install.service.files / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o640)
        return self.kind.submit(self.install, self.install.core("api"))

    def run(self, cut: Cut) -> tuple[Process, dict[str, Any]]:
        """Submit the job, have a worker run it until it is cut, and others go on."""
        job_id = self.submit()
        install, name = self.install, self.install.worker_name()
        others = partial(beside, install) if (cut.moment, cut.wake_ups) == ("pause", "two") else None
        process = cut_off(install, cut, lambda core: drain(core.worker_context, name), "worker", others)
        go_on(install, cut.wake_ups)
        return process, self._observed(job_id)

    def _observed(self, job_id: str) -> dict[str, Any]:
        """What is the same after each play, once the job has ended."""
        install, core = self.install, self.install.own
        job = now(core, job_id)
        seen: dict[str, Any] = {
            "state": (job.state, job.error),
            "counts": (job.items, job.items_done, job.items_failed, job.bytes),
            "bytes done": job.bytes - (job.bytes_done if self.kind.outcomes else job.bytes),
            "parts": (job.parts, job.parts_left),
            "counts of parts": [part_counts(core, job_id, number) for number in range(job.parts)],
            "report": report(core, job_id),
            "lines": self.outcomes(job_id),
            "content": self.content(),
            "modes": {str(path): oct(path.stat().st_mode) for path in self._paths()},
            "keys": keys(install),
            "events": events_law(told(install)[job_id], job.attempt),
            "audit": audit_law(self.kind, [each for each in audited(install) if each["job_id"] == job_id]),
        }
        forget_all(install, lambda: seen.update(files=result_files(install, job_id)))
        install.end()
        in_the_end = {"keys in the end": keys(install), "files in the end": files(install)}
        return seen | in_the_end | {"log": audit_problems(install), "quotas": quota_sums(install)}

    def outcomes(self, job_id: str) -> dict[str, str]:
        """The word or the error of each file, as the result has it."""
        if not self.kind.outcomes:
            return {}
        begin = below(self.install, "")
        return {
            line["source"].removeprefix(begin): line.get("outcome") or line.get("error", {}).get("code", "")
            for line in lines(self.install.own, job_id)
        }

    def content(self) -> dict[str, bytes | Sealed]:
        """All files below the root."""
        root = self.install.service.files
        return {str(path.relative_to(root)): self._opened(path.read_bytes()) for path in self._paths()}

    def _paths(self) -> Iterator[Path]:
        return (path for path in self.install.service.files.rglob("*") if path.is_file())

    def _opened(self, content: bytes) -> bytes | Sealed:
        if not content.startswith(AGE):
            return content
        kms = self.install.own.kms
        for context in (CONTEXT, NEW):
            try:
                found = kms.decrypt(WHO, content, context)
            except DecryptFailed:
                continue
            is_newest = found.key.version == kms.keyring.default.ref(TENANT).version
            return Sealed(found.plaintext, "new" if is_newest else "old", context)
        raise AssertionError("no context opens a file")

    @property
    def whole(self) -> dict[str, Any]:
        """What an undisturbed run is to do, by what is said of the kind of job."""
        kind = self.kind
        size_bytes, count = sum(len(self._before[name]) for name in kind.sources), len(kind.outcomes)
        return {
            "state": ("failed", "items_failed") if kind.failed else ("succeeded", ""),
            "counts": (count, count, kind.failed, size_bytes),
            "bytes done": 0,
            "parts": (-(-count // PART_FILES), 0),
            "report": kind.report,
            "lines": kind.outcomes,
            "content": {**kind.before, **kind.made},
            "events": "",
            "audit": "",
            "files in the end": {},
            "log": [],
            "quotas": {},
        }


def _is_new(wanted: bytes | Sealed) -> bool:
    return isinstance(wanted, Sealed) and wanted.version == "new"


def beside(install: Install) -> None:
    """Another worker takes what is ready; no lease ends meanwhile."""
    drain(install.core().worker_context, install.worker_name())


def part_counts(core: Core, job_id: str, number: int) -> tuple[int, int, int]:
    part = core.worker_context.store.part(part_id(job_id, number)).job
    return part.items, part.items_done, part.items_failed


def report(core: Core, job_id: str) -> Campaign | None:
    found = tree.migration_report(now(core, job_id))
    if not isinstance(found, wire.Report):
        return None
    older = found.older
    return Campaign(
        found.changed, found.newest, sum(each.found for each in older), sum(each.left for each in older)
    )


def events_law(states: list[str], attempts: int) -> str:
    """Each attempt is reported once, and there is one end. Parts are not reported."""
    is_so = HISTORY.fullmatch(" ".join(states)) and states.count("running") == attempts
    return "" if is_so else f"{states} in {attempts} attempts"


def audit_law(kind: TreeKind, records: list[dict[str, Any]]) -> str:
    """Each operation has its record; that of one file may be repeated, since there is one cut.

    Each file that was put in place has one commit, whoever finishes it, and each commit has an outcome.
    """
    made = Counter(each["result"] for each in records if each["operation"] == kind.operation)
    is_so = made.keys() == kind.records.keys()
    is_so = is_so and all(count <= made[result] <= count + 1 for result, count in kind.records.items())
    is_so = is_so and sum(each["operation"] == "job.submit" for each in records) == 1
    begun = {each["effect"] for each in records if each.get("stage") == "intent"}
    done = {each["effect"] for each in records if each.get("stage") == "outcome" and each["result"] == "ok"}
    of_files = {effect.rpartition("-")[0] for effect in begun}
    is_so = is_so and begun == done and len(begun) == len(of_files) == len(kind.made)
    return "" if is_so else f"{made}, {begun}, {done}"


def result_files(install: Install, job_id: str) -> dict[str, int]:
    """The files of the result. The attempt that did not end the job may have left its own beside each."""
    return {name: max(1, count - 1) for name, count in files(install, job_id).items()}


def deaths(points: Sequence[Point]) -> Iterator[Cut]:
    """A death before each effect, which is one after that before it: then one process finds it, or two."""
    for at in range(len(points)):
        yield Cut(at, "before", ("none", "two")[at % 2])
    yield Cut(len(points) - 1, "after")


def wrong_after(
    play: Play,
    cuts_of: Callable[[Sequence[Point]], Iterator[Cut]],
    record_property: Callable[[str, object], None],
) -> list[str]:
    """What is not as in the undisturbed run, after each cut."""
    whole, expected = play.run(Cut())
    assert {"claim", "finish"} <= {point.effect for point in whole.points}
    assert whole.missed == []
    assert list(differences(expected, play.whole)) == []
    assert "<job>" not in str(expected["keys in the end"])

    wrong = []
    for cut in cuts_of(whole.points):
        at = f"{cut.moment} {whole.points[cut.at or 0]}, {cut.wake_ups}"
        with located(at):
            process, seen = play.run(cut)
            assert process.points[: cut.at] == whole.points[: cut.at]
        wrong += [f"{at}: {each}" for each in differences(seen, expected)]
    record_property("crash_points", len(whole.points))
    return wrong


@pytest.mark.parametrize("kind", [KINDS[name] for name in SHORT], ids=SHORT)
def test_each_file_is_done_once_whichever_effect_a_worker_dies_at(
    install: Install, kind: TreeKind, record_property: Callable[[str, object], None]
) -> None:
    wrong = wrong_after(Play(install, kind), deaths, record_property)

    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_file_is_done_once_however_a_worker_is_disturbed(
    install: Install, kind: TreeKind, record_property: Callable[[str, object], None]
) -> None:
    """It dies, the power fails, others go on while it stands still, or a command is sent twice."""
    wrong = wrong_after(Play(install, kind), partial(cuts, kinds=DISTURBANCES), record_property)

    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_others_ended_for_a_dead_worker_outlasts_a_power_cut(install: Install, kind: TreeKind) -> None:
    """What the dead one made, and did not sync, is synced by those who count on it."""
    play, at, wrong = Play(install, kind), 0, []
    is_over = False
    while not is_over:
        job_id = play.submit()
        core, name = install.core(), install.worker_name()
        disk, state = synced_disk(install), install.service.state
        with Process(state, at, disk=disk) as process:
            drain(core.worker_context, name)
        is_over = not process.is_dead
        if process.is_dead:
            install.bury(core)
        with Process(state, disk=disk):
            go_on(install)
        lose_power(install, disk)
        seen = {"content": play.content(), "lines": play.outcomes(job_id)}
        install.end()
        point = "no death" if is_over else process.points[-1]
        wrong += [
            f"before {point}: {each}" for each in differences(seen, {name: play.whole[name] for name in seen})
        ]
        at += 1

    assert not wrong, "\n".join(wrong)
