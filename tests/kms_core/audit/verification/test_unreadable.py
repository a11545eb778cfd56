"""A log or an anchor that cannot be read hides nothing else, and is never called compared."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import pytest
from prometheus_client import REGISTRY

from kms_cli.local import anchors
from kms_core.audit import chain, query
from kms_core.audit.hosts import host_logs, local_log
from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.removals import removal_horizon
from kms_core.audit.sinks import FolderSink
from kms_core.audit.verification.crosscheck import Removals
from kms_core.audit.verification.verify import AuditMonitor
from kms_core.settings.model import Settings
from support.audit_logs import AuditFolder, audit_ok, audit_section, notes, problem_codes, record, rewrite

NOBODY: Final = 65534
MARK: Final = b'"kind":"retired"'
EAGER: Final = audit_section(checkpoint_s=0)


@pytest.fixture
def audit_folder() -> Iterator[AuditFolder]:
    """Below a directory that other users may enter, as they may not enter that of pytest."""
    at = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", "/tmp")))
    at.chmod(0o777)
    yield AuditFolder(at)
    for folder in filter(Path.is_dir, at.iterdir()):
        folder.chmod(0o700)
    shutil.rmtree(at)


@contextmanager
def unprivileged(audit_folder: AuditFolder) -> Iterator[None]:
    """As a user for whom file modes count; root may read everything."""
    if os.geteuid():
        yield
        return
    for folder, folders, files in os.walk(audit_folder.root):
        for name in (*folders, *files):
            os.chown(Path(folder, name), NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def kept(audit_folder: AuditFolder) -> FolderSink:
    return FolderSink(audit_folder.root / "anchors")


def chain_of(audit_folder: AuditFolder, role: str, count: int = 3) -> Path:
    """A closed chain with anchors of a checkpoint and of its end; its file."""
    trail = audit_folder.trail(EAGER, role=role)
    upkeep = AuditMaintenance(trail, [kept(audit_folder)])
    for number in range(count):
        trail.append(record(number))
    upkeep.round()
    trail.close()
    upkeep.round()
    return next(file for file in audit_folder.files() if file.name.startswith(role))


def watching(audit_folder: AuditFolder) -> AuditMonitor:
    return audit_folder.monitor(kept(audit_folder))


def found(watch: AuditMonitor) -> list[str]:
    watch.round()
    return [problem.code for problem in watch.condition.anchors]


def compared() -> float:
    return audit_ok("directory")


def cut(file: Path) -> None:
    rewrite(file, lambda lines: lines[:2])


# -- the log -----------------------------------------------------------------------------------------


def lock(file: Path) -> None:
    file.chmod(0)


def put_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


AT_FIRST: Final = pytest.mark.parametrize("at_first", [True, False], ids=["at the first look", "later"])


@pytest.mark.parametrize("hide", [lock, put_directory])
@AT_FIRST
def test_a_file_that_cannot_be_read_hides_no_cut_of_another(
    audit_folder: AuditFolder, hide: Callable[[Path], None], *, at_first: bool
) -> None:
    first, second = chain_of(audit_folder, "api"), chain_of(audit_folder, "worker")
    watch = watching(audit_folder)
    if not at_first:
        assert found(watch) == []
    cut(second)
    hide(first)
    is_known = hide is lock and not at_first
    with unprivileged(audit_folder):
        assert sorted(found(watch)) == (["cut"] if is_known else ["cut", "missing_chain"])
    assert compared() == 0
    assert (first.name in watch.condition.unread) == (hide is lock)


def test_a_segment_that_cannot_be_read_is_not_called_missing(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(rotate_bytes=4096)
    for number in range(60):
        trail.append(record(number))
    trail.close()
    first, middle, *_ = audit_folder.files()
    first.chmod(0)
    middle.chmod(0)
    watch = watching(audit_folder)
    with unprivileged(audit_folder):
        watch.round()
        assert watch.condition.problems == ()
        assert "Permission denied" in watch.condition.unread
        for file in (first, middle):
            file.chmod(0o600)
        watch.round()
    assert (watch.condition.problems, watch.condition.unread) == ((), "")


def test_an_anchor_whose_line_cannot_be_read_is_compared_once_it_can(audit_folder: AuditFolder) -> None:
    """The file itself has not changed since it was read."""
    trail = audit_folder.trail(EAGER)
    trail.append(record(1))
    trail.close()
    watch = watching(audit_folder)
    watch.round()
    (file,) = audit_folder.files()
    kept(audit_folder).put(trail.last_signed)
    file.chmod(0)
    with unprivileged(audit_folder):
        assert found(watch) == []
        assert math.isnan(compared())
        assert "Permission denied" in watch.condition.not_compared["directory"]
        file.chmod(0o600)

        assert (found(watch), compared()) == ([], 1)


@pytest.mark.parametrize("what", ["file", "folder", "keys"])
def test_a_look_that_fails_is_not_called_compared(audit_folder: AuditFolder, what: str) -> None:
    file = chain_of(audit_folder, "api")
    watch = watching(audit_folder)
    assert (found(watch), compared(), watch.condition.unread) == ([], 1, "")
    read_at = watch.condition.read_at
    taken = {"file": file, "folder": audit_folder.folder, "keys": audit_folder.root / "signing.pub"}[what]
    taken.chmod(0)
    with unprivileged(audit_folder):
        assert found(watch) == []
        assert math.isnan(compared())
        assert math.isnan(audit_ok("chain"))
        assert "Permission denied" in watch.condition.unread
        assert watch.condition.not_compared == {"directory": watch.condition.unread}
        assert REGISTRY.get_sample_value("kms_audit_read_timestamp_seconds") == read_at
        assert watch.condition.read_at == read_at
        taken.chmod(0o700)

        assert found(watch) == []
    assert (compared(), audit_ok("chain")) == (1, 1)
    assert (watch.condition.unread, watch.condition.not_compared) == ("", {})
    assert watch.condition.read_at > read_at


def test_a_look_that_fails_takes_back_no_contradiction(audit_folder: AuditFolder) -> None:
    cut(chain_of(audit_folder, "api"))
    watch = watching(audit_folder)
    assert (found(watch), compared()) == (["cut"], 0)
    (audit_folder.root / "signing.pub").rename(audit_folder.root / "elsewhere")

    assert (found(watch), compared()) == (["cut"], 0)


def test_a_missing_file_is_told_although_another_cannot_be_read(audit_folder: AuditFolder) -> None:
    """Removals on record are searched in all files; one that cannot be read excuses nothing."""
    first, second = chain_of(audit_folder, "api"), chain_of(audit_folder, "worker")
    watch = watching(audit_folder)
    assert found(watch) == []
    second.unlink()
    first.touch()
    first.chmod(0)
    with unprivileged(audit_folder):
        assert found(watch) == ["missing_chain"]
        assert removal_horizon(audit_folder.folder, audit_folder.keys()) == ""
    assert [problem.code for problem in watch.condition.problems] == ["missing_file"]


def test_the_latest_removal_counts_wherever_it_is_on_record(audit_folder: AuditFolder) -> None:
    """The file that was written to last holds an earlier one."""
    first, second = audit_folder.trail(), audit_folder.trail(role="worker")
    first.append(record(1))
    first.record_removal("2026-01-01T00:00:00.000000Z", 1)
    second.append(record(1))
    second.record_removal("2026-02-01T00:00:00.000000Z", 1)
    first.append(record(2))

    assert removal_horizon(audit_folder.folder, audit_folder.keys()) == "2026-02-01T00:00:00.000000Z"


def test_what_cannot_be_read_is_told_once(audit_folder: AuditFolder) -> None:
    """Another file has the name, and cannot be read, look after look."""
    file = chain_of(audit_folder, "api")
    watch = watching(audit_folder)
    assert found(watch) == []
    file.unlink()
    file.touch()
    file.chmod(0)
    with unprivileged(audit_folder):
        for _ in range(3):
            watch.round()

    assert [problem.code for problem in watch.condition.problems] == ["cut"]


def test_a_file_whose_opening_is_not_known_is_excused_by_no_removal() -> None:
    removals = Removals("2999-01-01T00:00:00.000000Z")

    assert removals.cover("2026-01-01T00:00:00.000000Z")
    assert not removals.cover("")


def test_a_copy_that_cannot_be_read_is_told_and_read_once_it_can(audit_folder: AuditFolder) -> None:
    """The pages of several hosts show the others."""
    own, other, copies = (
        AuditFolder(audit_folder.root / "own"),
        AuditFolder(audit_folder.root / "other"),
        audit_folder.root / "copies",
    )
    own.written(1)
    other.written(1)
    shutil.copytree(other.folder, copies / "kms-2")
    logs = host_logs(own.folder, copies).logs
    (hidden,) = (copies / "kms-2").iterdir()
    hidden.chmod(0)
    unread: dict[str, str] = {}
    with unprivileged(audit_folder):
        page = query.page(logs, query.EventFilter(), None, 10)
        query.newest(logs, query.EventFilter(), 10, unread=unread)
        hidden.chmod(0o600)
        later = query.page(logs, query.EventFilter(), page.following, 10)

    assert ([event.host for event in page.events], [*page.unread]) == ([local_log()], ["kms-2"])
    assert [*unread] == ["kms-2"]
    assert ([event.host for event in later.events], [*later.unread]) == (["kms-2"], [])


# -- anchors -----------------------------------------------------------------------------------------


def anchor_file(audit_folder: AuditFolder, role: str) -> Path:
    return next((audit_folder.root / "anchors").glob(f"{role}-*"))


def forged(file: Path, count: int) -> bytes:
    """Lines like the last of a file of anchors, of later numbers, which no key signed."""
    last = file.read_bytes().splitlines()[-1]
    read = chain.read(last)
    assert read is not None
    begin = b'{"seq":%d,' % read.seq
    return b"".join(
        last.replace(begin, b'{"seq":%d,' % (read.seq + 1 + number)) + b"\n" for number in range(count)
    )


JUNK: Final[dict[str, tuple[Callable[[Path], bytes], int]]] = {
    "text": (lambda _: b"nonsense\n", 7),
    "many lines": (lambda _: b"{}\n" * 5_000, 7),
    "forged": (lambda file: forged(file, 20), 7),
    "empty lines": (lambda _: b"\n" * 100_000, 7),
    "more than a MiB": (lambda _: b"nonsense\n" * 200_000, 6),
}
"""What stands behind the anchors of lines 6 and 7, and the one that counts at the first look."""


@pytest.mark.parametrize("name", JUNK)
@AT_FIRST
def test_what_stands_behind_an_anchor_does_not_hide_it(
    audit_folder: AuditFolder, name: str, *, at_first: bool
) -> None:
    make, anchor_seq = JUNK[name]
    file = chain_of(audit_folder, "api", 5)
    anchored = anchor_file(audit_folder, "api")
    watch = watching(audit_folder)
    if not at_first:
        assert (found(watch), watch.condition.not_compared) == ([], {})
    with anchored.open("ab") as out:
        out.write(make(anchored))

    assert found(watch) == []
    assert "is damaged" in watch.condition.not_compared["directory"]
    assert math.isnan(compared())
    cut(file)
    assert (found(watch), compared()) == (["cut"], 0)
    (problem,) = watch.condition.anchors
    assert problem.anchor_seq == (anchor_seq if at_first else 7)


STRAY: Final = "api-20260101T000000.000000Z-1.anchors.jsonl"


def put_locked(file: Path) -> None:
    file.write_bytes(b"nonsense\n")
    file.chmod(0)


def put_out_of_reach(file: Path) -> None:
    """A link is in its place, and the file is in a directory that the user may not enter."""
    away = file.parent.parent / "away"
    away.mkdir()
    if file.exists():
        file.rename(away / file.name)
    file.symlink_to(away / file.name)
    away.chmod(0)


NO_ANCHORS: Final[dict[str, tuple[Callable[[Path], None], bool]]] = {
    "directory": (Path.mkdir, False),
    "pipe": (os.mkfifo, False),
    "link": (lambda file: file.symlink_to("a" * 300), False),
    "locked": (put_locked, True),
    "out of reach": (put_out_of_reach, True),
}
"""How it comes about, and whether it may be a file of anchors."""


@pytest.mark.parametrize("kind", NO_ANCHORS)
@AT_FIRST
def test_what_is_no_file_of_anchors_hides_no_other(
    audit_folder: AuditFolder, kind: str, *, at_first: bool
) -> None:
    make, is_told = NO_ANCHORS[kind]
    file = chain_of(audit_folder, "api")
    watch = watching(audit_folder)
    if not at_first:
        assert found(watch) == []
    stray = audit_folder.root / "anchors" / STRAY
    make(stray)
    cut(file)
    folder = kept(audit_folder)
    with unprivileged(audit_folder):
        assert (found(watch), compared()) == (["cut"], 0)
        assert problem_codes(audit_folder.verified(*folder.lines())) == ["cut"]
        told = [folder.unread, watch.condition.not_compared.get("directory", "")]
        assert told == [f"{stray} cannot be read (Permission denied)" if is_told else ""] * 2
        read = anchors.named_anchors(cast("Settings", None), [str(folder.path)])
    assert set(read.lines) == {str(folder.path)}
    assert len(read.lines[str(folder.path)]) > 1
    assert list(read.failed) == ([str(folder.path)] if is_told else [])


def test_a_link_that_leads_nowhere_does_not_end_a_verification(audit_folder: AuditFolder) -> None:
    file = chain_of(audit_folder, "api")
    audit_folder.folder.joinpath("api.jsonl").symlink_to("a" * 300)
    cut(file)

    assert problem_codes(audit_folder.verified(*kept(audit_folder).lines())) == ["cut"]


def test_a_log_with_a_file_out_of_reach_is_not_called_intact(audit_folder: AuditFolder) -> None:
    """It is the newest, which no other names."""
    chain_of(audit_folder, "api")
    put_out_of_reach(chain_of(audit_folder, "worker"))
    watch = watching(audit_folder)
    with unprivileged(audit_folder):
        with pytest.raises(PermissionError):
            audit_folder.verified()
        watch.round()

    assert "Permission denied" in watch.condition.unread


@pytest.mark.parametrize("mode", [0, 0o300, 0o400])
def test_a_folder_of_anchors_that_cannot_be_read_is_told_of(audit_folder: AuditFolder, mode: int) -> None:
    """Its anchors are not compared: an older copy of the log would pass."""
    cut(chain_of(audit_folder, "api"))
    folder = kept(audit_folder)
    folder.path.chmod(mode)
    with unprivileged(audit_folder):
        watch = watching(audit_folder)
        assert found(watch) == []
        read = anchors.named_anchors(cast("Settings", None), [str(folder.path)])

    assert "cannot be read (Permission denied)" in watch.condition.not_compared["directory"]
    assert ["cannot be read (Permission denied)" in why for why in read.failed.values()] == [True]


def test_a_file_of_anchors_that_can_be_read_again_is_compared(audit_folder: AuditFolder) -> None:
    """It has not changed."""
    file, anchored = chain_of(audit_folder, "api"), anchor_file(audit_folder, "api")
    anchored.chmod(0)
    watch = watching(audit_folder)
    with unprivileged(audit_folder):
        assert found(watch) == []
        assert "Permission denied" in watch.condition.not_compared["directory"]
        anchored.chmod(0o600)
        cut(file)

        assert (found(watch), watch.condition.not_compared) == (["cut"], {})


def test_the_next_anchor_ends_it(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(EAGER)
    upkeep = AuditMaintenance(trail, [kept(audit_folder)])
    trail.append(record(1))
    upkeep.round()
    with anchor_file(audit_folder, "api").open("ab") as out:
        out.write(b"nonsense\n")
    watch = watching(audit_folder)
    watch.round()
    assert watch.condition.not_compared
    trail.append(record(2))
    upkeep.round()

    assert (found(watch), watch.condition.not_compared, compared()) == ([], {}, 1)


def test_an_empty_file_and_one_of_another_install_are_not_damaged_and_junk_alone_is(
    audit_folder: AuditFolder,
) -> None:
    (audit_folder.root / "other").mkdir()
    other = AuditFolder(audit_folder.root / "other")
    chain_of(other, "worker")
    shutil.copytree(other.root / "anchors", audit_folder.root / "anchors")
    chain_of(audit_folder, "api")
    stray = audit_folder.root / "anchors" / STRAY
    stray.touch()
    watch = watching(audit_folder)
    assert (found(watch), watch.condition.not_compared, compared()) == ([], {}, 1)
    stray.write_bytes(b"nonsense\n")

    assert found(watch) == []
    assert "is damaged" in watch.condition.not_compared["directory"]


def test_verification_notes_lines_that_are_no_anchors(audit_folder: AuditFolder) -> None:
    chain_of(audit_folder, "api")
    assert notes(audit_folder.verified(*kept(audit_folder).lines())) == []
    with anchor_file(audit_folder, "api").open("ab") as out:
        out.write(b"nonsense\n{\n")
    report = audit_folder.verified(*kept(audit_folder).lines())

    assert (report.verdict, notes(report)) == ("intact", ["anchors_damaged"])
    assert "2 lines in here" in report.notes[0].text
