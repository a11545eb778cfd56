"""Puts a file in its place whole or not at all; knows nothing of what is in it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from kms_core.payload.disk import sync_folder
from kms_protocol.errors import TargetExists


class OutputExists(TargetExists):
    """Something is where the result should go."""

    hint = "--force overwrites it, --output names another"


@contextlib.contextmanager
def placed(target: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file (0600) that appears at ``target`` when the block ends well, complete and on disk, or not at all.

    Without ``overwrite`` it is put in place by link(2), which takes nobody's place. Raises TargetExists.
    """
    if target.exists() and not overwrite:
        raise OutputExists(f"{target} exists")
    if not target.parent.is_dir():
        raise click.UsageError(f'there is no directory "{target.parent}"', click.get_current_context())
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:  # noqa: PTH123  # a handle, not a path
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            target.hardlink_to(temporary)
        sync_folder(target.parent)
    except FileExistsError as exc:
        raise OutputExists(f"{target} exists") from exc
    finally:
        temporary.unlink(missing_ok=True)
