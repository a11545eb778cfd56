"""Files of every kind beneath and outside a root. ``make(root, outside)`` gives the path to try."""

import os
from pathlib import Path


def write_file_uri(root: Path, name: str = "plain.txt", data: bytes = b"salary") -> str:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.as_uri()


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def a_link_to_a_file(root: Path, outside: Path) -> Path:
    (root / "link").symlink_to(outside / "secret")
    return root / "link"


def a_link_to_a_file_beneath(root: Path, _: Path) -> Path:
    write_file_uri(root, "inner")
    (root / "link").symlink_to("inner")
    return root / "link"


def beneath_a_linked_directory(root: Path, outside: Path) -> Path:
    (root / "dir").symlink_to(outside, target_is_directory=True)
    return root / "dir/secret"


def a_hard_link(root: Path, outside: Path) -> Path:
    (root / "hard").hardlink_to(outside / "secret")
    return root / "hard"


def a_fifo(root: Path, _: Path) -> Path:
    os.mkfifo(root / "fifo")
    return root / "fifo"


def a_directory(root: Path, _: Path) -> Path:
    (root / "dir").mkdir()
    return root / "dir"


def beneath_a_file(root: Path, _: Path) -> Path:
    write_file_uri(root, "file")
    return root / "file/below"


def missing(root: Path, _: Path) -> Path:
    return root / "missing"


def beneath_a_missing_directory(root: Path, _: Path) -> Path:
    return root / "missing/file"


def the_root_itself(root: Path, _: Path) -> Path:
    return root


def a_name_too_long(root: Path, _: Path) -> Path:
    return root / ("a" * 256)


def outside_the_root(_: Path, outside: Path) -> Path:
    return outside / "secret"
