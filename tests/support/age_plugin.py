"""Age tools with ``age-plugin-kms`` on their PATH, over one install that asks for tokens."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from kms_cli.plugin.names import PluginTarget
from kms_protocol.context import Context
from support.credentials import REQUIRED, SecuredService, bearer
from support.openbao import bao
from support.programs import venv_program
from support.service import b64, unb64
from support.waiting import WAIT_S

ENV: Final = "env=prod,service=api"


def sops() -> str:
    return venv_program("sops")


def plugin_dir(folder: Path) -> Path:
    """A directory that holds ``age-plugin-kms`` as this Python would install it."""
    folder.mkdir(exist_ok=True)
    script = folder / "age-plugin-kms"
    argv = shlex.join([sys.executable, "-P", "-m", "kms_cli.plugin.main"])
    script.write_text(f'#!/bin/sh\nexec {argv} "$@"\n', "utf-8")
    script.chmod(0o755)
    return folder


@dataclass(frozen=True, slots=True)
class AgeTools:
    """A place to run age tools in."""

    folder: Path
    service: SecuredService
    environ: dict[str, str]

    def run(self, *argv: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
        """Run a tool to its end."""
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environ | env,
            input=stdin,
            capture_output=True,
            check=False,
            timeout=WAIT_S,
        )

    def ok(self, *argv: str, stdin: bytes = b"", **env: str) -> bytes:
        """What a tool that succeeds prints."""
        done = self.run(*argv, stdin=stdin, **env)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def kms(self, *words: str, stdin: bytes = b"", **env: str) -> bytes:
        return self.ok(sys.executable, "-P", "-m", "kms_cli.main", *words, stdin=stdin, **env)

    def within(self, **env: str) -> "AgeTools":
        """The same place with more in its environment."""
        return replace(self, environ=self.environ | env)

    def post(self, path: str, body: dict[str, str]) -> httpx.Response:
        """A call with the credential that the tools have, without the cost of a process."""
        token = (self.folder / "token").read_text()
        return self.service.post(f"/{path}", body, headers=bearer(token))

    def seal(self, plaintext: bytes, context: str = ENV, key_id: str = "default") -> bytes:
        """A file that the service makes."""
        answer = self.post("encrypt", {"plaintext": b64(plaintext), "context": context, "key_id": key_id})
        return unb64(answer.json()["ciphertext"])

    def identity_file(self, *targets: PluginTarget) -> str:
        """The path of an identity file."""
        path = self.folder / "kms.id"
        path.write_text("".join(f"{target.identity()}\n" for target in targets))
        return str(path)

    def token_file(self, *scopes: str) -> str:
        """The path of a file with a new token."""
        path = self.folder / "token"
        path.touch(mode=0o600)
        path.write_text(self.service.new_token(*scopes)[1])
        return str(path)


def target(key_id: str | None = None, context: str = ENV, *, in_process: bool = False) -> PluginTarget:
    return PluginTarget(key_id, Context.parse(context), None, in_process)


def generate_key(path: Path, *more: str) -> str:
    """The URI of a new age key."""
    subprocess.run(
        [sys.executable, "-P", "-m", "kms_cli.main", "keygen", *more, "-o", str(path)],
        check=True,
        capture_output=True,
        timeout=WAIT_S,
    )
    return f"age://{path}"


@pytest.fixture(scope="session")
def keys_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredService]:
    """One for the session: the default key (age), ``vault`` (transit), ``both`` (these), ``pq``; no jobs."""
    folder = tmp_path_factory.mktemp("plugin")
    server = bao()
    transit = f"transit:{server.new_key()}"
    pq = generate_key(folder / "pq.txt", "--pq")
    also = generate_key(folder / "also.txt")
    settings = (
        f'[kms.keys]\nvault = "{transit}"\nboth = ["{transit}", "{also}"]\npq = "{pq}"\n'
        f"{server.settings()}{REQUIRED}"
    )
    with SecuredService(folder, settings, "unix:///nonexistent/valkey.sock") as running:
        yield running.start("api")


@pytest.fixture
def age_tools(tmp_path: Path, keys_service: SecuredService) -> AgeTools:
    """With a token that may do everything that tools need."""
    made = AgeTools(
        tmp_path,
        keys_service,
        {
            "PATH": f"{plugin_dir(tmp_path / 'bin')}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "KMS_SERVICE_URL": keys_service.url,
            "KMS_TOKEN_FILE": str(tmp_path / "token"),
        },
    )
    made.token_file("encrypt,decrypt,rewrap,wrap,unwrap")
    return made
