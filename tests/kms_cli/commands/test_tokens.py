"""Tokens whose text has no place to be: none is made, since a text cannot be shown again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli.offline import Workspace


def exists(path: Path) -> None:
    path.write_text("precious")


def leads_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def leads_to_itself(path: Path) -> None:
    path.symlink_to(path)


def is_in_no_directory(path: Path) -> None:
    path.parent.rmdir()


@pytest.mark.parametrize("make", [exists, leads_nowhere, leads_to_itself, is_in_no_directory])
def test_no_token_is_made_or_changed_without_a_place_for_its_text(
    workspace: Workspace, make: Callable[[Path], None]
) -> None:
    state = workspace.path("state")
    (workspace.folder / "place").mkdir()
    make(workspace.folder / "place/token")
    workspace.stdout_of("token", "create", "--name", "kept", "--scope", "*", KMS_STATE_DIR=state)
    before = workspace.read("state/tokens.json")

    for words in ("create --name new --scope *", "rotate kept"):
        assert (
            workspace.kms("token", *words.split(), "-o", "place/token", KMS_STATE_DIR=state).returncode != 0
        )
        assert workspace.read("state/tokens.json") == before


def test_a_file_of_a_token_has_its_text_alone(workspace: Workspace) -> None:
    state = workspace.path("state")
    workspace.stdout_of("token", "create", "--name", "a", "--scope", "*", "-o", "token", KMS_STATE_DIR=state)

    assert workspace.read("token").startswith(b"kms_")
    assert len(workspace.read("token").strip()) == len(workspace.read("token")) - 1
