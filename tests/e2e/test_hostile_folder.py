"""Commands and programs, run in a folder that somebody else filled, send that person nothing."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kms_cli.command_line import group
from support.canary.commands import Given, leaves, lines

CANARY = "canary-0f1e2d3c"
FOUND = "provisioning/config/kms.toml"
THEIRS = """[kms]
dev_backend = "transit"
[kms.transit]
address = "{address}"
key_name = "k"
token = "${VAULT_TOKEN}"
"""
READ_SETTINGS = (
    "config lint",
    "config show",
    "doctor",
    "audit verify",
    "audit tail",
    "audit receipt",
    "audit key",
    "audit acknowledge-loss",
    "audit check-receipt",
    "token create",
    "token list",
    "token rotate",
    "token revoke",
    "token adopt",
    "keys adopt",
    "cosmian init-key",
    "backup",
)
SERVERS = ("kms_cli.main up", "kms_api.main", "kms_worker.main")


@dataclass
class Stranger:
    """A server that keeps the first bytes of every connection, and answers nothing."""

    listener: socket.socket
    heard: list[bytes] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(1)
                try:
                    self.heard.append(connection.recv(65536))
                except OSError:
                    self.heard.append(b"")


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Stranger(listener)
        thread = threading.Thread(target=server.listen, daemon=True)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """What a user has about: credentials in variables, and in the files that tools look for."""
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".vault-token").write_text(CANARY)
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    (home / ".aws/credentials").write_text("[default]\n" + "".join(f"{name} = {CANARY}\n" for name in names))
    secrets = (
        "VAULT_TOKEN",
        "COSMIAN_API_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
    )
    nowhere = {"KMS_SERVICE_URL": "http://127.0.0.1:1", "KMS_REDIS_URL": "redis://127.0.0.1:1"}
    return {"HOME": str(home), "PATH": os.environ["PATH"], **nowhere, **dict.fromkeys(secrets, CANARY)}


@pytest.fixture
def folder(tmp_path: Path, stranger: Stranger) -> Path:
    made = tmp_path / "theirs"
    (made / FOUND).parent.mkdir(parents=True)
    (made / FOUND).write_text(THEIRS.replace("{address}", f"http://{stranger.host}"))
    return made


def run(
    program: str, folder: Path, environ: dict[str, str], words: Sequence[str] = (), told: bytes = b""
) -> tuple[int, str]:
    """The exit code of a program that runs in the folder, and what it says on stderr."""
    ended = subprocess.run(
        [sys.executable, "-P", "-m", *program.split(), *words],
        cwd=folder, env=environ, input=told, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert CANARY.encode() not in ended.stdout + ended.stderr
    return ended.returncode, ended.stderr.decode()


def call(command: str, folder: Path, environ: dict[str, str]) -> str:
    """Run a command in the folder, with what it reads from stdin. Returns what it says on stderr."""
    mine = folder.parent / "mine"
    mine.mkdir()
    (mine / "plain").write_bytes(b"plain")
    token = mine / "token"
    token.write_text(CANARY)
    token.chmod(0o600)
    given = Given(
        "env=dev", b"plain", b"c2VhbGVk", "job", "unknown", "https://127.0.0.1:1", token, mine, mine
    )
    words, told = lines(given)[command]
    if command == "job wait":
        words = [*words, "--timeout", "1"]
    return run(f"kms_cli.main {command}", folder, environ, words, told)[1]


@pytest.mark.parametrize("command", sorted({*leaves(group())} - {"up"}))
def test_no_command_reads_theirs(
    command: str, folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    """A command that reads settings says once that it passes theirs over."""
    token = folder / "token"
    token.write_text(CANARY)
    token.chmod(0o600)

    said = call(command, folder, environ | {"KMS_TOKEN_FILE": str(token)})

    assert said.count(f"{folder / FOUND} is not read") == (command in READ_SETTINGS), said
    assert stranger.heard == []


def test_a_probe_of_the_container_reads_none_of_theirs(folder: Path, environ: dict[str, str]) -> None:
    _, said = run("kms_api.server.healthcheck", folder, environ)

    assert f"{folder / FOUND} is not read" in said


@pytest.mark.parametrize("program", SERVERS)
def test_servers_refuse_what_others_can_write(
    program: str, folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    (folder / FOUND).chmod(0o666)

    code, said = run(program, folder, environ)

    assert code == 78, said
    assert f"others can write to {folder / FOUND} (mode 0666); chmod go-w {folder / FOUND}" in said
    assert f"--config {folder / FOUND}" in said
    assert stranger.heard == []


def test_the_stranger_hears_what_is_sent_when_the_file_is_named(
    folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    """The control: what is withheld above would arrive."""
    call("doctor", folder, environ | {"KMS_CONFIG": FOUND})

    assert any(CANARY.encode() in each for each in stranger.heard)
