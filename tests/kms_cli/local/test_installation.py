"""Notes of ``kms up``: what others put beside them ends no command, and none of it is believed."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import click
import pytest

from kms_cli.local import installation
from kms_core.settings.load import load

NOBODY: Final = 65534


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "r").mkdir(mode=0o700)
    return {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "r")}


@pytest.fixture(autouse=True)
def _command() -> Iterator[None]:
    with click.Context(click.Command("kms")):
        yield


@contextmanager
def up(environ: dict[str, str]) -> Iterator[Path]:
    """The directory of the note of one that runs."""
    settings = load(None, environ)
    with installation.noted(settings, environ):
        yield installation.runtime_dir(settings.state_dir, environ)


def pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "up.json")


PLANTED: Final[dict[str, Callable[[Path], None]]] = {
    "link to itself": lambda folder: folder.symlink_to(folder),
    "link that leads nowhere": lambda folder: folder.symlink_to("a" * 300),
    "file": Path.touch,
    "pipe": pipe,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_lies_beside_the_note_ends_no_command(environ: dict[str, str], kind: str) -> None:
    PLANTED[kind](Path(environ["XDG_RUNTIME_DIR"]) / "kms-planted")
    with up(environ):
        assert len(installation.running(environ)) == 1


def moved(note: Path) -> None:
    note.replace(note.with_name("moved"))
    note.symlink_to("moved")


CHANGES: Final[dict[str, Callable[[Path], None]]] = {
    "a link": moved,
    "of another user": lambda note: os.chown(note, NOBODY, NOBODY),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_note_that_this_user_has_not_written_is_not_believed(environ: dict[str, str], kind: str) -> None:
    if os.geteuid() and kind == "of another user":
        pytest.skip("only root gives files away")
    with ExitStack() as stack:
        folder = stack.enter_context(up(environ))
        CHANGES[kind](folder / "up.json")
        assert installation.running(environ) == []


def test_settings_are_those_of_what_runs_also_where_only_the_command_has_a_variable(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with up(environ):
        command = environ | {"XDG_STATE_HOME": str(tmp_path / "other"), "KMS_REDIS_URL": "redis://named"}
        found = installation.running(command)
        used = installation.environ_of(found, command)

    assert len(found) == 1
    assert load(None, used).state_dir == tmp_path / ".local/state/kms-service"
    assert used["KMS_REDIS_URL"] == "redis://named"
