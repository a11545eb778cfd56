"""Redis servers as operators run them: access lists, replicas, a Sentinel.

With an authority they are Redis of the PATH and speak TLS only; without one they are the embedded Valkey,
which knows WAITAOF and no TLS.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis

from kms_cli.local.valkey import find_binary
from kms_protocol.wire import ENDED
from support.embedded_valkey import RIGHTS
from support.ports import free_port
from support.programs import program, running
from support.service import Service
from support.waiting import until_up
from support.webhooks import LocalhostTls

PASSWORD: Final = "pa/ss:w@rd #?é"  # each of these has a meaning in a URL
_ADMIN: Final = "admin"


@dataclass(frozen=True)
class Server:
    """One server on ``localhost``."""

    port: int
    process: subprocess.Popen[bytes]
    authority: LocalhostTls | None

    def admin(self, password: str = _ADMIN) -> redis.Redis:
        ca_file = str(self.authority.ca_file) if self.authority else None
        return redis.Redis(port=self.port, password=password, ssl=ca_file is not None, ssl_ca_certs=ca_file)

    def url(self, user: str = "kms", password: str = PASSWORD, host: str = "localhost") -> str:
        scheme = "rediss" if self.authority else "redis"
        return f"{scheme}://{user}:{quote(password, '')}@{host}:{self.port}/0"


@contextmanager
def server(
    folder: Path,
    authority: LocalhostTls | None,
    *,
    master: int | None = None,
    appends: bool = True,
    bind: str = "127.0.0.1",
) -> Iterator[Server]:
    """A server with the user ``kms``, who has the rights of a deployment.

    ``appends``: with an append-only file, as a server of jobs should have it. It listens at ``bind``.
    """
    folder.mkdir()
    secret = hashlib.sha256(PASSWORD.encode()).hexdigest()
    ours = f"user kms on #{secret} {RIGHTS}\n"
    if authority:
        for newer in ("+client|setinfo ", "+waitaof "):  # of 7.2; Debian 12 has 7.0, and clients do without
            ours = ours.replace(newer, "")
    (folder / "users.acl").write_text(f"user default on >{_ADMIN} ~* &* +@all\n{ours}")
    options = {"dir": str(folder), "aclfile": str(folder / "users.acl"), "masterauth": _ADMIN}
    options |= {"appendonly": "yes" if appends else "no", "appendfsync": "always", "save": ""}
    options |= {"tls-replication": "yes"} if authority else {}
    options |= {"bind": bind}
    options["replica-announce-ip"] = "localhost"  # the name in its certificate
    if master is not None:
        options["replicaof"] = f"localhost {master}"
    with _running(folder, authority, options) as started:
        yield started


@contextmanager
def sentinel(
    folder: Path, authority: LocalhostTls | None, master: int, *, failover_timeout_s: float = 4.0
) -> Iterator[Server]:
    """One that decides alone, and quickly.

    After ``failover_timeout_s`` it has replicas follow the master itself, where they follow a relay to it.
    """
    folder.mkdir()
    lines = [
        "sentinel resolve-hostnames yes",
        "sentinel announce-hostnames yes",
        f"sentinel monitor mymaster localhost {master} 1",
        f"sentinel auth-pass mymaster {_ADMIN}",
        "sentinel down-after-milliseconds mymaster 1000",
        f"sentinel failover-timeout mymaster {failover_timeout_s * 1000:.0f}",
        "requirepass sentinel",
        *(["tls-replication yes"] if authority else []),
    ]
    (folder / "sentinel.conf").write_text("\n".join(lines))
    with _running(folder, authority, {"dir": str(folder)}, sentinel=True) as started:
        yield started


@contextmanager
def _running(
    folder: Path, authority: LocalhostTls | None, options: dict[str, str], *, sentinel: bool = False
) -> Iterator[Server]:
    port = free_port()
    named = {"bind": "127.0.0.1", "port": str(port)}
    if authority:
        named |= {"port": "0", "tls-port": str(port), "tls-auth-clients": "no"}
        named |= {"tls-ca-cert-file": str(authority.ca_file)}
        named |= dict.fromkeys(("tls-cert-file", "tls-key-file"), str(authority.cert_and_key))
    words = [word for name, value in (named | options).items() for word in (f"--{name}", *_words(value))]
    first = [str(folder / "sentinel.conf")] if sentinel else []
    binary = program("redis-server") if authority else str(find_binary(os.environ))
    argv = [binary, *first, *(["--sentinel"] if sentinel else []), *words]
    with running(argv, folder / "log") as process:
        found = Server(port, process, authority)
        password = "sentinel" if sentinel else _ADMIN
        until_up(process, lambda: _answers(found, password), (folder / "log").read_text)
        yield found


def _words(value: str) -> list[str]:
    return value.split(" ") if value else [""]


def _answers(found: Server, password: str) -> bool:
    try:
        return bool(found.admin(password).ping())
    except redis.RedisError:
        return False


def all_ended(service: Service) -> bool:
    """Whether a service answers that all its jobs have ended."""
    answer = service.get("/jobs")
    return answer.status_code == 200 and all(job["state"] in ENDED for job in answer.json()["jobs"])
