"""A worker dies at each of its effects in a job over files; each file is done once all the same.

Jobs over many files are cut into parts of two files. Equal to the undisturbed run are: state and counts of
the job, its report and the lines of its result, all files below the root with their modes, the keys of Redis,
and that nothing is left in the end. What may differ is the number of attempts, as ``events_law`` and
``audit_law`` say. The undisturbed run is held to what each kind of job is to do.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import tree
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
    spool_sums,
    synced_disk,
    told,
)
from support.effects import Process
from support.embedded_valkey import unrestricted
from support.job_stores import TENANT

A: Final = b"a small file" * 100
D: Final = b"another one"
PART_FILES: Final = 2
AGE: Final = b"age-encryption.org/v1\n"
HISTORY: Final = re.compile(
    r"queued( running( committing)? queued)*( running)?( committing)? (succeeded|failed)"
)
DEATHS: Final[Kinds] = (("before", "none"), ("after", "two"))
DISTURBANCES: Final[Kinds] = (
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
        more = {"overwrite": self.overwrite, "new": self.new_context}
        return core_jobs.submit(core, self.operation, source, target, **more)


def below(install: Install, name: str) -> str:
    """The URL of a name below the root."""
    return f"{install.service.files.as_uri()}/{name}"


def done(*names: str, word: str = "") -> dict[str, str]:
    return dict.fromkeys(names, word)


OLD: Final[Files] = {
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
        made={name.replace("in", "out"): each._replace(version="new", context=NEW) for name, each in OLD.items()},
        outcomes=done("in/a", "in/b/c", "in/d", word="changed"),
        records={"ok": 3},
        overwrite=False,
        new_context=NEW,
        report=Campaign(changed=3, newest=0, found=2, left=0),
    ),
    "rewrap of a file": ONE,
    "reseal of a file": replace(ONE, operation="reseal"),
    "reseal of a file elsewhere": replace(
        ONE, operation="reseal", target="out", made={"out": Sealed(A, "new", NEW)}, overwrite=False, new_context=NEW
    ),
}
