"""Archives that are damaged, forged or made by others: nothing of them is put in place."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyrage
import pytest

from kms_cli import age_files
from kms_cli.backup.files import ArchiveWriter, Change, FilesKeepChanging, Source
from kms_cli.main import run
from kms_core.age import x25519
from support.cli.offline import Done, Workspace, workspace, write_key

MANIFEST: Final = "kms-backup.json"
FILES: Final = {
    "spool.key": b"AGE-SECRET-KEY-OF-A-TEST\n",
    "audit/a.jsonl": b"{}\n" * 100_000,
    "a/b/c/d": b"deep",
    "empty": b"",
}
Tar = tarfile.TarFile


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return workspace(tmp_path)


def put(tar: Tar, name: str, data: bytes = b"x", **fields: object) -> None:
    """Add a file (0600), or what the fields of tarfile's entry say."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    for field, value in fields.items():
        setattr(entry, field, value)
    tar.addfile(entry, io.BytesIO(data))


def manifest(files: Mapping[str, bytes], **other: object) -> dict[str, Any]:
    listed = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]
    told = {"version": 1, "service": "0.2", "made_at": "2027-01-31T00:00:00Z", "host": "kms-1"}
    return {**told, "install_id": "", "state_dir": "/srv", "files": listed, "left_out": [], **other}


def made(
    place: Workspace, change: Callable[[Tar], object] = lambda _: None, told: object = None, end: bool = True
) -> str:
    """A backup as another program makes it: by tarfile and by the age of pyrage."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, data in FILES.items():
            put(tar, name, data)
        change(tar)
        if end:
            put(tar, MANIFEST, json.dumps(told or manifest(FILES)).encode())
    return sealed(place, whole.getvalue())


def sealed(place: Workspace, data: bytes) -> str:
    return place.write("b.age", pyrage.encrypt(data, [pyrage.x25519.Recipient.from_str(place.recipient)]))


class Restore:
    """``kms restore`` in this process."""

    def __init__(self, place: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
        self._place, self._capsys = place, capsys

    def __call__(self, *more: str, identity: str = "key.txt") -> Done:
        place = self._place
        words = ["restore", place.path("b.age"), "-i", place.path(identity), "--to", place.path("new"), *more]
        code = run(words)
        out, err = self._capsys.readouterr()
        return Done(words, code, out.encode(), err.encode())


@pytest.fixture
def restore(place: Workspace, capsys: pytest.CaptureFixture[str]) -> Restore:
    return Restore(place, capsys)


def check_refused(place: Workspace, done: Done, text: str = "") -> None:
    """Neither the folder nor anything beside it was left, and the message says why."""
    said = done.stderr.decode()
    assert done.returncode == 65, said
    assert said.startswith("kms: error: ")
    assert "Traceback" not in said
    assert text in said
    assert place.names() <= {"key.txt", "b.age", "other.txt"}


def restored(place: Workspace) -> dict[str, bytes]:
    found = (path for path in (place.folder / "new").rglob("*") if path.is_file())
    return {str(path.relative_to(place.folder / "new")): path.read_bytes() for path in found}


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "an empty folder"])
def test_an_archive_of_tar_and_age_is_restored(is_there: bool, place: Workspace, restore: Restore) -> None:
    made(place)
    if is_there:
        (place.folder / "new").mkdir()

    done = restore()

    assert done.returncode == 0, done.stderr
    assert restored(place) == FILES
    modes = {path.stat().st_mode & 0o777 for path in (place.folder / "new").rglob("*") if path.is_file()}
    below = ("new", "new/audit", "new/a", "new/a/b", "new/a/b/c")
    folders = {(place.folder / name).stat().st_mode & 0o777 for name in below}
    assert (modes, folders) == ({0o600}, {0o700})


LINK: Final = {"linkname": "spool.key"}
HOSTILE: Final[dict[str, tuple[str, bytes, dict[str, object]]]] = {
    "parent": ("../outside", b"x", {}),
    "parent within": ("a/../../outside", b"x", {}),
    "absolute": ("{folder}/outside", b"x", {}),
    "dot": ("./spool2.key", b"x", {}),
    "control character": ("a\x1b[2J", b"x", {}),
    "symbolic link": ("link", b"", {"type": tarfile.SYMTYPE, **LINK}),
    "hard link": ("link", b"", {"type": tarfile.LNKTYPE, **LINK}),
    "pipe": ("pipe", b"", {"type": tarfile.FIFOTYPE}),
    "device": ("null", b"", {"type": tarfile.CHRTYPE}),
    "folder": ("folder", b"", {"type": tarfile.DIRTYPE}),
    "contiguous": ("file", b"x", {"type": tarfile.CONTTYPE}),
    "sparse": ("file", b"", {"pax_headers": {"GNU.sparse.map": "0,0", "GNU.sparse.size": "9999999"}}),
    "open to others": ("file", b"x", {"mode": 0o644}),
    "set user id": ("file", b"x", {"mode": 0o4600}),
    "a time that is none": ("file", b"x", {"pax_headers": {"mtime": "nan"}}),
    "a time far away": ("file", b"x", {"pax_headers": {"mtime": "1e30"}}),
}


@pytest.mark.parametrize(("name", "data", "fields"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_with_anything_but_plain_files_is_refused(
    name: str, data: bytes, fields: dict[str, object], place: Workspace, restore: Restore
) -> None:
    """The manifest lists it, so that nothing else refuses it."""
    name = name.format(folder=place.folder)
    made(place, lambda tar: put(tar, name, data, **fields), manifest({**FILES, name: data}))

    check_refused(place, restore(), text="in the folder of the archive")


@pytest.mark.parametrize(
    ("name", "is_listed", "text"),
    [
        ("spool.key", True, "twice"),
        ("spool.key/below", True, "twice"),
        ("audit", True, "twice"),
        ("unlisted", False, "unlisted"),
    ],
)
def test_a_name_that_is_there_twice_or_not_listed_is_refused(
    name: str, is_listed: bool, text: str, place: Workspace, restore: Restore
) -> None:
    told = manifest(FILES)
    if is_listed:
        told["files"] += manifest({name: b"x"})["files"]
    made(place, lambda tar: put(tar, name), told)

    check_refused(place, restore(), text=text)


@pytest.mark.parametrize("name", [MANIFEST, "file"])
def test_what_follows_the_manifest_is_refused(name: str, place: Workspace, restore: Restore) -> None:
    told = json.dumps(manifest(FILES)).encode()

    def twice(tar: Tar) -> None:
        put(tar, MANIFEST, told)
        put(tar, name, told)

    made(place, twice, end=False)

    check_refused(place, restore(), text="follows the manifest")


LIES: Final[dict[str, object]] = {
    "other content": manifest({**FILES, "spool.key": b"AGE-SECRET-KEY-OF-A-TOAST"}),
    "other size": manifest({**FILES, "empty": b"1"}),
    "a file that is missing": manifest({**FILES, "tokens.json": b"{}"}),
    "a file too few": manifest({"empty": b""}),
    "another order": manifest(dict(reversed(FILES.items()))),
    "later version": manifest(FILES, version=2),
    "no files": {"version": 1},
    "no object": ["version"],
}


@pytest.mark.parametrize("told", LIES.values(), ids=LIES)
def test_a_manifest_that_lies_is_refused(told: object, place: Workspace, restore: Restore) -> None:
    made(place, told=told)

    check_refused(place, restore())


def test_an_archive_without_a_manifest_is_refused(place: Workspace, restore: Restore) -> None:
    made(place, end=False)

    check_refused(place, restore(), text="no manifest")


@pytest.mark.parametrize("data", [b"", b"text", bytes(10_240), os.urandom(3_000_000)], ids=len)
def test_an_age_file_that_is_no_archive_is_refused(data: bytes, place: Workspace, restore: Restore) -> None:
    sealed(place, data)

    check_refused(place, restore())


@pytest.mark.parametrize("only_check", [False, True], ids=["restore", "check"])
@pytest.mark.parametrize("at", [200, 100_000, -100, -1])
def test_a_flipped_byte_is_found(at: int, only_check: bool, place: Workspace, restore: Restore) -> None:
    data = bytearray(Path(made(place)).read_bytes())
    data[at] ^= 1
    place.write("b.age", bytes(data))

    check_refused(place, restore(*["--check"] * only_check))


def test_a_flipped_byte_after_the_end_of_the_archive_is_found(place: Workspace, restore: Restore) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        put(tar, MANIFEST, json.dumps(manifest({})).encode())
    data = bytearray(Path(sealed(place, whole.getvalue() + bytes(3_000_000))).read_bytes())
    data[-1_000_000] ^= 1
    place.write("b.age", bytes(data))

    check_refused(place, restore(), text="damaged")


@pytest.mark.parametrize("size", [10, 150, 65_536 + 16 + 200, 200_000, -1])
def test_a_truncated_file_is_found(size: int, place: Workspace, restore: Restore) -> None:
    place.write("b.age", Path(made(place)).read_bytes()[:size])

    check_refused(place, restore())


def test_another_identity_restores_nothing(place: Workspace, restore: Restore) -> None:
    made(place)
    write_key(place.folder / "other.txt", x25519.X25519Identity.generate())

    check_refused(place, restore(identity="other.txt"), text="none of the identities")


def test_a_file_with_armor_is_refused(place: Workspace, restore: Restore) -> None:
    recipient = pyrage.x25519.Recipient.from_str(place.recipient)
    place.write("b.age", pyrage.encrypt(b"text", [recipient], armored=True))

    check_refused(place, restore(), text="armor")


def test_a_folder_with_files_stays_as_it_is(place: Workspace, restore: Restore) -> None:
    made(place)
    (place.folder / "new").mkdir()
    place.write("new/tokens.json", b"mine")

    done = restore()

    assert done.returncode == 73
    assert restored(place) == {"tokens.json": b"mine"}

    done = restore("--force")

    assert done.returncode == 0, done.stderr
    assert restored(place) == FILES
    (kept,) = (each for each in place.names() if each.startswith("new.replaced-"))
    assert place.read(f"{kept}/tokens.json") == b"mine"


# -- writing ---------------------------------------------------------------------------------------------


class Changing:
    """A file that is changed after its first bytes were read."""

    def __init__(self, file: BinaryIO, change: Callable[[int], object]) -> None:
        self._file, self._change = file, change

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, 10))
        if self._file.tell() == 10:
            self._change(self.fileno())
            os.utime(self._file.fileno(), ns=(1, 1))
        return data


def write(change: Callable[[int], object], kind: Change) -> None:
    """Archive a file of 30 bytes that changes while it is read."""
    recipient = x25519.X25519Identity.generate().recipient
    writer = ArchiveWriter(age_files.for_recipients([recipient]), io.BytesIO())
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(30))
        file.seek(0)
        changing: Any = Changing(file, change)
        writer.add(Source("a", Path("a"), changing, 30, kind))


CHANGES: Final[dict[str, tuple[Callable[[int], object], set[Change]]]] = {
    "grows": (lambda fd: os.pwrite(fd, b"more", 30), {"append", "any"}),
    "is cut below what was read": (lambda fd: os.ftruncate(fd, 5), set()),
    "is cut where it is read": (lambda fd: os.ftruncate(fd, 20), set()),
    "changes within": (lambda fd: os.pwrite(fd, b"other", 0), {"any"}),
}


@pytest.mark.parametrize("kind", ["never", "append", "any"])
@pytest.mark.parametrize(("change", "allowed"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_read_ends_the_backup(
    change: Callable[[int], object], allowed: set[Change], kind: Change
) -> None:
    """Unless the service writes such files so: it appends to the audit log, and uploads go on."""
    ends: AbstractContextManager[object] = pytest.raises(FilesKeepChanging)
    with nullcontext() if kind in allowed else ends:
        write(change, kind)
