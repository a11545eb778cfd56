"""Redis servers as operators run them: TLS alone, access lists, a replica, a Sentinel; by the PATH."""

import hashlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis

from hooks import Authority
from kms_cli.local.valkey import ACCESS
from kms_core.programs import tether
from peers import program
from ports import free_port

PASSWORD: Final = "pa/ss:w@rd #?é"  # each of these has a meaning in a URL
_ADMIN: Final = "admin"
_START_S: Final = 20.0


@dataclass(frozen=True)
class Server:
    """One server on ``localhost``, which speaks nothing but TLS."""

    port: int
    process: subprocess.Popen[bytes]
    authority: Authority

    def admin(self, password: str = _ADMIN) -> redis.Redis:
        return redis.Redis(
            port=self.port, password=password, ssl=True, ssl_ca_certs=str(self.authority.ca_file)
        )

    def url(self, user: str = "kms", password: str = PASSWORD) -> str:
        return f"rediss://{user}:{quote(password, '')}@localhost:{self.port}/0"


@contextmanager
def server(folder: Path, authority: Authority, *, master: int | None = None) -> Iterator[Server]:
    """A server with the user ``kms``, who may do what the embedded server's user may."""
    folder.mkdir()
    secret = hashlib.sha256(PASSWORD.encode()).hexdigest()
    ours = ACCESS.replace("user default on nopass", f"user kms on #{secret}")
    ours = ours.replace("+client|setinfo ", "")  # of 7.2; Debian 12 has 7.0, and clients do without
    (folder / "users.acl").write_text(f"user default on >{_ADMIN} ~* &* +@all\n{ours}")
    options = {"dir": str(folder), "aclfile": str(folder / "users.acl"), "masterauth": _ADMIN}
    options |= {"appendonly": "yes", "appendfsync": "always", "save": "", "tls-replication": "yes"}
    options["replica-announce-ip"] = "localhost"  # the name in its certificate
    if master is not None:
        options["replicaof"] = f"localhost {master}"
    with _running(folder, authority, options) as started:
        yield started


@contextmanager
def sentinel(folder: Path, authority: Authority, master: int) -> Iterator[Server]:
    """One that decides alone, and quickly."""
    folder.mkdir()
    lines = [
        "sentinel resolve-hostnames yes",
        "sentinel announce-hostnames yes",
        f"sentinel monitor mymaster localhost {master} 1",
        f"sentinel auth-pass mymaster {_ADMIN}",
        "sentinel down-after-milliseconds mymaster 1000",
        "sentinel failover-timeout mymaster 4000",
        "requirepass sentinel",
        "tls-replication yes",
    ]
    (folder / "sentinel.conf").write_text("\n".join(lines))
    with _running(folder, authority, {"dir": str(folder)}, sentinel=True) as started:
        yield started


@contextmanager
def _running(
    folder: Path, authority: Authority, options: dict[str, str], *, sentinel: bool = False
) -> Iterator[Server]:
    port = free_port()
    tls = {"port": "0", "bind": "127.0.0.1", "tls-port": str(port), "tls-auth-clients": "no"}
    tls |= {"tls-ca-cert-file": str(authority.ca_file)}
    tls |= dict.fromkeys(("tls-cert-file", "tls-key-file"), str(authority.chain))
    words = [word for name, value in (tls | options).items() for word in (f"--{name}", *_words(value))]
    first = [str(folder / "sentinel.conf")] if sentinel else []
    argv = [program("redis-server"), *first, *(["--sentinel"] if sentinel else []), *words]
    with ExitStack() as stack:
        output = stack.enter_context((folder / "log").open("wb"))
        process = tether.spawn(argv, env={}, output=output)
        stack.callback(process.wait)
        stack.callback(process.kill)
        found = Server(port, process, authority)
        _await(found, "sentinel" if sentinel else _ADMIN, folder / "log")
        yield found


def _words(value: str) -> list[str]:
    return value.split(" ") if value else [""]


def _await(found: Server, password: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            found.admin(password).ping()
        except redis.RedisError:
            assert found.process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.02)
        else:
            return
