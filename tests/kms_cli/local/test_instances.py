"""Notes of ``kms up``: where commands find it. What others put beside them stops none and is not believed."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final

import click
import pytest

from kms_cli import connection
from kms_cli.local import instances
from kms_cli.local.directories import runtime_dir
from kms_cli.local.up import url_of
from kms_cli.plugin.main import KeysOfTargets
from kms_cli.plugin.names import PluginTarget
from kms_cli.session import META
from kms_client import UnexpectedAnswer
from kms_core.settings.load import load
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError
from support.scripted_servers import scripted

NOBODY: Final = 65534
SECRET: Final = bytes(range(16))


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
    with instances.keep_note(settings, url_of(settings), environ):
        yield runtime_dir(settings.state_dir, environ)


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
        assert len(instances.running(environ)) == 1


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
        assert instances.running(environ) == []


def test_settings_are_those_of_what_runs_also_where_only_the_command_has_a_variable(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with up(environ):
        command = environ | {"XDG_STATE_HOME": str(tmp_path / "other"), "KMS_REDIS_URL": "redis://named"}
        found = instances.running(command)
        used = instances.environ_of(found, command)

    assert len(found) == 1
    assert load(None, used).state_dir == tmp_path / ".local/state/kms-service"
    assert used["KMS_REDIS_URL"] == "redis://named"


# -- the address of a command ------------------------------------------------------------------------


def on(environ: dict[str, str], port: int, state: Path, **more: str) -> AbstractContextManager[Path]:
    """One that runs on a port, with a state directory."""
    return up({**environ, "KMS_PORT": str(port), "KMS_STATE_DIR": str(state), **more})


def test_a_command_finds_the_one_that_runs(environ: dict[str, str], tmp_path: Path) -> None:
    with on(environ, 48123, tmp_path / "a"):
        assert instances.address(environ) == "http://127.0.0.1:48123"
    assert instances.address(environ) == "http://localhost:8082"


def test_a_command_of_a_login_finds_one_that_runs_outside_of_any(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """As cron and ssh start it, without XDG_RUNTIME_DIR."""
    with on(environ, 48123, tmp_path / "a", XDG_RUNTIME_DIR=""):
        assert instances.address(environ) == "http://127.0.0.1:48123"


def test_of_several_it_says_which_one_it_uses(
    environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert " " in str(tmp_path), "so that both are quoted"
    with on(environ, 48123, tmp_path / "a"), on(environ, 48124, tmp_path / "c"):
        used = instances.address(environ)
        said = capsys.readouterr().err
        click.get_current_context().resilient_parsing = True
        instances.address(environ)

    assert used == "http://127.0.0.1:48124"
    text = (
        f"kms: using {used}, kms up with --state-dir '{tmp_path}/c'; for another: --state-dir '{tmp_path}/a'"
    )
    assert said.startswith(text)
    assert capsys.readouterr().err == "", "to a shell that completes a word"


def test_the_default_port_goes_before_a_newer_one(environ: dict[str, str], tmp_path: Path) -> None:
    with on(environ, 8082, tmp_path / "a"), on(environ, 48123, tmp_path / "b"):
        assert instances.address(environ) == "http://127.0.0.1:8082"


def test_a_named_state_directory_is_not_that_of_the_default_address(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """Or the secret of one install would be encrypted by another."""
    click.get_current_context().meta[f"{META}state_dir"] = tmp_path / "b"
    with on(environ, 8082, tmp_path / "a"):
        with pytest.raises(ConfigurationError, match=r"No kms up runs with --state-dir .*/b'; that at .*/a'"):
            instances.address(environ)
        with on(environ, 48123, tmp_path / "b"):
            assert instances.address(environ) == "http://127.0.0.1:48123"


def by_command(environ: dict[str, str]) -> object:
    del environ
    with connection.connect(retries=0) as kms:
        return kms.encrypt(SECRET)


def by_plugin(environ: dict[str, str]) -> object:
    return KeysOfTargets(environ).wrap(SECRET, PluginTarget(None, Context()))


both = pytest.mark.parametrize("send", [by_command, by_plugin])


@pytest.fixture
def seen() -> list[bytes]:
    return []


@pytest.fixture
def stranger(seen: list[bytes]) -> Iterator[int]:
    """The port of another program, which keeps what it hears in ``seen``."""

    def answer(connection: socket.socket) -> None:
        seen.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with scripted(answer) as server:
        yield int(server.url.rpartition(":")[2])


@both
def test_a_command_asks_an_address_that_it_found(
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    send: Callable[[dict[str, str]], object],
    stranger: int,
    seen: list[bytes],
) -> None:
    """Before it sends a secret there: its holder may have changed."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with on(environ, stranger, Path(environ["HOME"]) / "a"), pytest.raises(UnexpectedAnswer):
        send(environ)

    assert [request.split(b"\r\n")[0] for request in seen] == [b"GET /livez HTTP/1.1"]


@both
def test_a_command_asks_no_address_that_is_named(
    environ: dict[str, str], send: Callable[[dict[str, str]], object], stranger: int, seen: list[bytes]
) -> None:
    url = f"http://127.0.0.1:{stranger}"
    click.get_current_context().meta[f"{META}url"] = url
    with pytest.raises(UnexpectedAnswer):
        send({**environ, "KMS_SERVICE_URL": url})

    assert [request.split(b" ")[0] for request in seen] == [b"POST"]
