"""Every command and program, run in a folder that somebody else filled, sends that person nothing."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from kms_cli.main import group
from support.canary.commands import Given, leaves, lines

STRANGER = 4711
CANARY = "canary-0f1e2d3c"
FOUND = "provisioning/config/kms.toml"
ATTACKS = {
    "variable in an address": 'dev_backend = "cosmian"\n'
    '[kms.cosmian]\nserver_url = "{address}/${VAULT_TOKEN}"',
    "token of the environment": 'dev_backend = "transit"\n'
    '[kms.transit]\naddress = "{address}"\nkey_name = "k"\ntoken = "${VAULT_TOKEN}"',
    "token of a file": 'dev_backend = "transit"\n'
    '[kms.transit]\naddress = "{address}"\nkey_name = "k"\ntoken_file = "~/.vault-token"',
    "variable in a name": 'dev_backend = "transit"\n'
    '[kms.transit]\naddress = "{address}"\ntoken = "t"\nkey_name = "${AWS_SECRET_ACCESS_KEY}"',
    "key of the environment": 'dev_backend = "cosmian"\n[kms.cosmian]\nserver_url = "{address}"',
    "AWS credentials": 'dev_backend = "awskms"\n'
    '[kms.awskms]\nkey_id = "alias/k"\nregion = "eu-central-1"\nendpoint_url = "{address}"',
    "Redis": '[kms.redis]\nurl = "redis://:${VAULT_TOKEN}@{host}/0"',
    "another owner": 'dev_backend = "cosmian"\n[kms.cosmian]\nserver_url = "{address}"\napi_key = "its-own"',
}
READ_SETTINGS = (
    "up",
    "config lint",
    "config show",
    "doctor",
    "audit verify",
    "audit tail",
    "audit receipt",
    "audit key",
    "audit acknowledge-loss",
    "token create",
    "token list",
    "token rotate",
    "token revoke",
    "token adopt",
    "keys adopt",
    "cosmian init-key",
    "backup",
)
READ_NONE = (
    "completion",
    "help",
    "encrypt",
    "decrypt",
    "generate-key",
    "rewrap",
    "encrypt-file",
    "decrypt-file",
    "rewrap-file",
    "job submit",
    "job list",
    "job show",
    "job wait",
    "job cancel",
    "job group",
    "job release",
    "job result",
    "job dead",
    "job retry",
    "config init",
    "keys list",
    "keys usage",
    "keys rotate",
    "status",
    "health",
    "seal",
    "open",
    "run",
    "keygen",
    "recipient",
    "identity",
    "inspect",
    "migrate transit",
    "migrate aws",
    "migrate sops",
    "restore",
)
READ_THEIR_OWN = ("audit check-receipt",)  # those that this machine's public key is named in
PROGRAMS = ("kms_api.main", "kms_worker.main", "kms_api.server.healthcheck")


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
    nowhere = {"KMS_SERVICE_URL": "http://127.0.0.1:1"}  # or a service of the developer would be asked
    return {"HOME": str(home), "PATH": os.environ["PATH"], **nowhere, **dict.fromkeys(secrets, CANARY)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "theirs"
    (made / FOUND).parent.mkdir(parents=True)
    return made


def fill(folder: Path, attack: str, stranger: Stranger) -> None:
    text = ATTACKS[attack].replace("{address}", f"http://{stranger.host}").replace("{host}", stranger.host)
    (folder / FOUND).write_text(f"[kms]\n{text}\n")
    if attack == "another owner":
        os.chown(folder / FOUND, STRANGER, STRANGER)


def call(command: str, folder: Path, environ: dict[str, str]) -> "subprocess.CompletedProcess[bytes]":
    """Run a command in the folder, with what it reads from stdin."""
    mine = folder.parent / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "plain").write_bytes(b"plain")
    token = mine / "token"
    token.write_text(CANARY)
    token.chmod(0o600)
    given = Given(
        "env=dev", b"plain", b"c2VhbGVk", "job", "unknown", "https://127.0.0.1:1", token, mine, mine
    )
    words, told = ([], b"") if command == "up" else lines(given)[command]
    if command == "job wait":
        words = [*words, "--timeout", "1"]
    run = [sys.executable, "-P", "-m", "kms_cli.main", *command.split(), *words]
    return subprocess.run(
        run, cwd=folder, env=environ, input=told, capture_output=True, timeout=60, check=False
    )


def assert_refused(ended: "subprocess.CompletedProcess[bytes]", folder: Path, stranger: Stranger) -> None:
    said = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 78, said
    assert f"KMS_CONFIG={folder / FOUND}" in said
    assert CANARY not in said
    assert stranger.heard == []


def test_every_command_is_known() -> None:
    """A new command must be sorted, and is then driven below."""
    assert set(leaves(group())) == {*READ_SETTINGS, *READ_NONE, *READ_THEIR_OWN}


EACH: Final = (
    *((command, "token of the environment") for command in READ_SETTINGS),
    *((command, attack) for attack in ATTACKS for command in ("doctor", "up")),
)


@pytest.mark.parametrize(("command", "attack"), dict.fromkeys(EACH))
def test_what_reads_settings_refuses_theirs(
    command: str, attack: str, folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    if attack == "another owner" and os.geteuid() != 0:
        pytest.skip("only root gives a file to another user")
    fill(folder, attack, stranger)

    assert_refused(call(command, folder, environ), folder, stranger)


@pytest.mark.parametrize("command", [*READ_NONE, *READ_THEIR_OWN])
def test_what_reads_none_sends_nothing_there(
    command: str, folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    fill(folder, "token of the environment", stranger)
    (folder / "token").write_text(CANARY)

    ended = call(command, folder, environ | {"KMS_TOKEN": CANARY, "KMS_TOKEN_FILE": str(folder / "token")})

    assert CANARY not in (ended.stdout + ended.stderr).decode(errors="replace")
    assert stranger.heard == []


@pytest.mark.parametrize("attack", ["token of the environment", "AWS credentials"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_refuse_theirs(
    program: str, attack: str, folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    fill(folder, attack, stranger)

    ended = subprocess.run(
        [sys.executable, "-P", "-m", program],
        cwd=folder, env=environ, capture_output=True, timeout=60, check=False,
    )  # fmt: skip

    assert_refused(ended, folder, stranger)


def test_the_stranger_hears_what_is_sent_when_the_file_is_named(
    folder: Path, environ: dict[str, str], stranger: Stranger
) -> None:
    """The control: what is refused above would arrive."""
    fill(folder, "token of the environment", stranger)

    call("doctor", folder, environ | {"KMS_CONFIG": FOUND})

    assert any(CANARY.encode() in each for each in stranger.heard)
