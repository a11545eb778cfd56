"""Which settings file servers and commands read where none is named, and who may have written it."""

import os
import shlex
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kms_core.settings.files import for_command, for_server, write_note
from kms_core.settings.load import load
from kms_protocol.errors import ConfigurationError

FOUND = Path("provisioning/config/kms.toml")
STRANGER = 4711

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to another user")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a settings file that nobody else can change."""
    cwd = tmp_path / "repository"
    cwd.mkdir(mode=0o755)
    monkeypatch.chdir(cwd)
    monkeypatch.setattr("kms_core.settings.files.MACHINE", tmp_path / "etc.toml")
    FOUND.parent.mkdir(parents=True)
    FOUND.write_text("[kms]\nport = 9001\n")
    return cwd


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home")}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "etc.toml"
    path.touch()
    return path


def refusal() -> str:
    with pytest.raises(ConfigurationError) as caught:
        for_server(None, {})
    return caught.value.detail


def assert_says_how_to_trust(told: str, here: Path) -> None:
    named = shlex.quote(str(here / FOUND))
    assert f"--config {named}" in told
    assert f"KMS_CONFIG={named}" in told


# -- what a server reads -----------------------------------------------------------------------------


def test_search_order(here: Path, machine: Path) -> None:
    flag, named = Path("flag.toml"), Path("named.toml")

    assert for_server(flag, {"KMS_CONFIG": str(named)}) == flag
    assert for_server(None, {"KMS_CONFIG": str(named)}) == named
    machine.unlink()
    assert for_server(None, {"KMS_CONFIG": ""}) == here / FOUND
    FOUND.unlink()
    assert for_server(None, {}) is None
    machine.touch()
    assert for_server(None, {}) == machine


def test_a_found_file_does_not_replace_the_settings_of_the_machine(machine: Path) -> None:
    """Even an empty one would switch off what the other demands, such as authentication."""
    assert f"Both {FOUND} and {machine} exist: name the one to read" in refusal()


def test_a_found_file_may_set_and_send_everything() -> None:
    FOUND.write_text('[kms]\nstate_dir = "state"\n[kms.redis]\nurl = "redis://${R}"')

    settings = load(for_server(None, {}), {"R": "r.test"})

    assert (settings.state_dir, settings.kms.redis.url) == (Path("state"), "redis://r.test")


PLACES = {
    "file": FOUND,
    "folder": FOUND.parent,
    "parent": FOUND.parent.parent,
    "cwd": Path(),
    "above": Path(".."),
}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@each_place
@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH], ids=["group", "others"])
def test_what_others_can_write_to_is_refused(place: Path, bit: int, here: Path) -> None:
    place.chmod(stat.S_IMODE(place.stat().st_mode) | bit)

    told = refusal()

    assert f"others can write to {place.resolve()} " in told
    assert f"chmod go-w '{place.resolve()}', or, " in told
    assert_says_how_to_trust(told, here)


@root_only
@each_place
def test_what_belongs_to_another_user_is_refused(place: Path, here: Path) -> None:
    os.chown(place, STRANGER, -1)

    told = refusal()

    assert f"{place.resolve()} belongs to another user (uid {STRANGER})" in told
    assert_says_how_to_trust(told, here)


@root_only
def test_a_file_of_root_is_read_by_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)

    assert for_server(None, {}) == here / FOUND


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_named_file_is_read_whoever_may_write_to_it(how: str, here: Path) -> None:
    FOUND.chmod(0o666)
    named = here / FOUND

    found = for_server(named, {}) if how == "flag" else for_server(None, {"KMS_CONFIG": str(named)})

    assert found == named


def test_a_sticky_folder_may_be_writable(here: Path) -> None:
    here.chmod(0o1777)

    assert for_server(None, {}) == here / FOUND


@root_only
def test_what_others_own_in_a_sticky_folder_is_refused(here: Path) -> None:
    here.chmod(0o1777)
    os.chown("provisioning", STRANGER, -1)

    assert "provisioning belongs to another user" in refusal()


def elsewhere(tmp_path: Path) -> Path:
    """The file moved out of the working directory, and a link in its place."""
    moved = tmp_path / "elsewhere"
    moved.mkdir(mode=0o755)
    target = FOUND.rename(moved / "kms.toml")
    FOUND.symlink_to(target)
    return target


def test_a_link_to_a_file_of_this_user_is_read(here: Path, tmp_path: Path) -> None:
    elsewhere(tmp_path)

    assert for_server(None, {}) == here / FOUND


def test_a_link_to_what_others_can_write_to_is_refused(tmp_path: Path) -> None:
    target = elsewhere(tmp_path)
    target.parent.chmod(0o777)

    assert f"others can write to {target.parent} " in refusal()


@root_only
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    os.chown(FOUND, STRANGER, -1, follow_symlinks=False)

    assert "kms.toml belongs to another user" in refusal()


@root_only
def test_a_relative_link_through_another_users_folder_is_refused(here: Path) -> None:
    (here / "theirs").mkdir()
    FOUND.rename(here / "theirs/kms.toml")
    FOUND.symlink_to("../../theirs/kms.toml")
    os.chown(here / "theirs", STRANGER, -1)

    assert "theirs belongs to another user" in refusal()


def test_a_circle_of_links_is_refused() -> None:
    FOUND.unlink()
    FOUND.symlink_to(FOUND.name)

    assert "is a circle of symbolic links" in refusal()


# -- what a command reads ----------------------------------------------------------------------------


def read(environ: dict[str, str], state_dir: Path | None = None) -> tuple[Path | None, list[str]]:
    """The file of a command, and what it says."""
    said: list[str] = []
    return for_command(None, environ, state_dir, said.append), said


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a server read, and a command that runs in another directory."""
    file = tmp_path / "served.toml"
    file.touch()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    return file


def test_a_command_passes_over_a_file_in_its_working_directory(here: Path, home: dict[str, str]) -> None:
    told = f"{here / FOUND} is not read: if you trust it, name it by --config"

    assert read(home) == (None, [f"settings: defaults; {told}"])
    assert for_command(FOUND, home, None, pytest.fail) == FOUND
    assert for_command(None, home | {"KMS_CONFIG": str(FOUND)}, None, pytest.fail) == FOUND


def test_a_command_reads_what_was_served_last(
    here: Path, away: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_note(here / FOUND, home)
    write_note(away, home)
    assert read(home) == (away, [])

    monkeypatch.chdir(here)
    write_note(for_server(None, home), home)
    assert read(home) == (here / FOUND, [])
    monkeypatch.chdir(away.parent)
    assert read(home) == (here / FOUND, [])

    write_note(None, home)
    assert read(home) == (None, [])
    write_note(away, home)
    os.mkfifo(away.parent / "pipe")
    write_note(away.parent / "pipe", home)
    assert read(home) == (None, [])


@pytest.mark.parametrize(
    ("given", "state"),
    [
        ("KMS_STATE_DIR=~/s", "home/s"),
        ("XDG_STATE_HOME={tmp}/xdg", "xdg/kms-service"),
        ("XDG_STATE_HOME=", "home/.local/state/kms-service"),
    ],
)
def test_the_note_is_in_the_state_directory(
    away: Path, home: dict[str, str], tmp_path: Path, given: str, state: str
) -> None:
    name, _, value = given.replace("{tmp}", str(tmp_path)).partition("=")
    environ = home | {name: value}
    write_note(away, environ)

    note = tmp_path / state / "run/config"
    assert note.read_text() == f"{away}\n"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert stat.S_IMODE(note.parent.stat().st_mode) == 0o700
    assert read(environ) == (away, [])
    assert read({"HOME": "/nonexistent"}, tmp_path / state) == (away, [])


def test_without_a_state_directory_there_is_no_note(away: Path) -> None:
    write_note(away, {})
    write_note(away, {"HOME": "/proc/nonexistent"})

    assert read({}) == (None, [])


def test_a_noted_file_that_is_gone_is_told(away: Path, home: dict[str, str]) -> None:
    write_note(away, home)
    away.unlink()

    with pytest.raises(ConfigurationError) as caught:
        read(home)

    note = Path(home["HOME"], ".local/state/kms-service/run/config")
    told = f"{away}, which the service read last, is gone: name another by --config, or remove {note}"
    assert caught.value.detail == told


def test_beside_the_settings_of_the_machine_a_note_is_told_and_stops_nothing(
    away: Path, home: dict[str, str], machine: Path
) -> None:
    write_note(away, home)
    why = f"the service read {away} last"

    assert read(home) == (away, [f"settings: {away}; {machine} is not read: {why}"])
    away.unlink()
    assert read(home) == (machine, [f"settings: {machine}; {away} is gone: {why}"])
    write_note(machine, home)
    assert read(home) == (machine, [])


PLANTED: dict[str, Callable[[Path], None]] = {
    "of another user": lambda note: os.chown(note, STRANGER, -1),
    "writable for the group": lambda note: note.chmod(0o620),
    "writable for others": lambda note: note.chmod(0o602),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_note_that_others_could_have_written_is_not_believed(
    away: Path, home: dict[str, str], kind: str
) -> None:
    if os.geteuid() and kind == "of another user":
        pytest.skip("only root gives files away")
    write_note(away, home)
    note = Path(home["HOME"], ".local/state/kms-service/run/config")
    PLANTED[kind](note)

    assert read(home) == (
        None,
        [f"{note} is not read: another user could have written it; name the settings by --config"],
    )


@pytest.mark.parametrize("text", ["", "kms.toml\n", "/\0\n"])
def test_a_note_without_an_absolute_path_is_none(away: Path, home: dict[str, str], text: str) -> None:
    write_note(away, home)
    Path(home["HOME"], ".local/state/kms-service/run/config").write_text(text)

    if "\0" in text:
        with pytest.raises(ConfigurationError, match="is gone"):
            read(home)
    else:
        assert read(home) == (None, [])


def test_neither_a_link_nor_a_pipe_is_a_note(away: Path, home: dict[str, str]) -> None:
    write_note(away, home)
    note = Path(home["HOME"], ".local/state/kms-service/run/config")
    note.rename(note.with_name("other"))
    note.symlink_to("other")
    assert read(home)[0] is None

    note.unlink()
    os.mkfifo(note, 0o600)
    assert read(home)[0] is None
