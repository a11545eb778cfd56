"""Receivers of webhooks for tests: a real HTTPS server under a CA of our own, and endpoints that name it."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Final, cast

import msgspec
from cryptography import x509

from kms_core.jobs.events.outbox import Delivery, Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.spec import WorkResult
from kms_core.jobs.store.store import JobStore
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import EndpointSection, Settings
from kms_protocol.wire import JobState
from support import credentials
from support.http_servers import QuietHandler, served
from support.job_stores import TENANT, claimed

SECRET: Final = b"0123456789abcdef0123456789abcdef"
PATH: Final = "/hooks/kms?from=kms"
DUE: Final = "kms:webhooks:due:ci"
Answer = int | tuple[int, str]  # a status, or a status and a Location


@dataclass(frozen=True)
class LocalhostTls:
    """A CA and one certificate of it, for ``localhost`` alone."""

    ca_file: Path
    cert_and_key: Path

    def serving(self) -> ssl.SSLContext:
        """What a server with this certificate wraps its connections with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_and_key)
        return context


def make_localhost_tls(folder: Path) -> LocalhostTls:
    authority = credentials.Authority(folder)
    pair = authority.issue("localhost", x509.DNSName("localhost"), server=None)
    made = LocalhostTls(authority.ca_file, folder / "chain.pem")
    made.cert_and_key.write_bytes(pair.key.read_bytes() + pair.cert.read_bytes())
    return made


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """What came, and what to answer: ``answers`` in turn, then 204. ``slowly`` runs before each answer."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    sni_names: list[str | None] = field(default_factory=list)
    slowly: Callable[[], object] = lambda: None

    def url(self, host: str = "localhost", scheme: str = "https") -> str:
        return f"{scheme}://{host}:{self.port}{PATH}"


@contextmanager
def receiving(authority: LocalhostTls | None) -> Iterator[Receiver]:
    """A receiver on 127.0.0.1, over TLS if there is an authority."""
    found = Receiver()
    context = _server_context(authority, found) if authority else None

    class Handler(QuietHandler):
        def do_POST(self) -> None:  # noqa: N802 -- the library's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append(Request(self.path, dict(self.headers.items()), body))
            found.slowly()
            answer = found.answers.pop(0) if found.answers else 204
            status, location = answer if isinstance(answer, tuple) else (answer, "")
            self.reply(status, location=location)

    with served(Handler, context) as found.port:
        yield found


def _server_context(authority: LocalhostTls, found: Receiver) -> ssl.SSLContext:
    context = authority.serving()

    def note(_connection: object, name: str | None, _context: object) -> None:
        found.sni_names.append(name)

    context.sni_callback = note
    return context


def secret_file(folder: Path, secret: bytes = SECRET + b"\n", mode: int = 0o600) -> Path:
    path = folder / "hook.secret"
    path.touch(0o600)
    path.write_bytes(secret)
    path.chmod(mode)
    return path


def endpoint(folder: Path, url: str, authority: LocalhostTls | None, **changes: object) -> WebhookEndpoint:
    """An endpoint that may be on this machine, unless the changes say otherwise."""
    tls = ssl.create_default_context(cafile=authority.ca_file) if authority else None
    section = EndpointSection(url=url, secret_file=secret_file(folder), allow_private=True)
    return WebhookEndpoint(msgspec.structs.replace(section, **changes), tls=tls)


def changed(found: WebhookEndpoint, **changes: object) -> WebhookEndpoint:
    """The same endpoint with other settings."""
    return replace(found, section=msgspec.structs.replace(found.section, **changes))


def toml(name: str, receiver: Receiver, authority: LocalhostTls, secret: Path, more: str = "") -> str:
    """The section of an endpoint for a settings file."""
    return (
        f"[kms.jobs.endpoints.{name}]\nurl = '{receiver.url()}'\nsecret_file = '{secret}'\n"
        f"ca_file = '{authority.ca_file}'\n{more}\n"
    )


def load_endpoint(folder: Path, body: str, environment: str = "dev") -> Settings:
    """Settings with one endpoint, ``ci``, of this body."""
    text = f"[kms]\nenvironment = '{environment}'\n[kms.environments.staging]\nbackend = 'age'\n"
    file = folder / "kms.toml"
    file.write_text(text + f"[kms.jobs.endpoints.ci]\n{body}")
    return load_settings(file, {"HOME": str(folder), "COSMIAN_KMS_URL": "https://kms.test"})


@contextmanager
def dripping() -> Iterator[int]:
    """The port of a server that answers a byte every 20 ms, and never all."""
    stopped = threading.Event()

    def serve(listener: socket.socket) -> None:
        pieces = chain([b"HTTP/1.1 200 OK\r\nX: "], repeat(b"x"))
        with listener.accept()[0] as peer:
            while not stopped.is_set():
                try:
                    peer.sendall(next(pieces))
                except OSError:
                    return
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        stopped.set()
        thread.join()


# -- jobs that tell of their end -----------------------------------------------------------------------


def ended_job(store: JobStore, state: JobState = "succeeded", code: str = "", callback: str = "ci") -> str:
    """A job that has run to its end; its id."""
    claim = claimed(store, callback=callback)
    store.finish(claim, state, code, WorkResult(bytes_done=5))
    return claim.accepted.job_id


def waiting(store: JobStore, endpoints: Mapping[str, WebhookEndpoint]) -> tuple[Outbox, Delivery]:
    """An outbox with one delivery, as a worker leaves it that is killed before it sends."""
    outbox = Outbox(store, endpoints)
    [delivery] = outbox.due("ci", 10)
    return outbox, delivery


def every(outbox: Outbox) -> list[Delivery]:
    """Everything in the outbox that is to be sent, due or not."""
    found = []
    for name in outbox.endpoints():
        entries = cast("list[bytes]", outbox.store.redis.zrange(f"kms:webhooks:due:{name}", 0, -1))
        found += [each for entry in entries if (each := outbox.delivery(name, entry))]
    return found


def hasten(store: JobStore) -> None:
    """Let everything that waits for ``ci`` be due."""
    for entry in cast("list[bytes]", store.redis.zrange(DUE, 0, -1)):
        store.redis.zadd(DUE, {entry: 0})


def event_entry(job_id: str, state: str = "succeeded", **changes: str) -> bytes:
    """An entry of the outbox as a script writes it, or as somebody with access to Redis may."""
    event = {
        "type": f"kms.job.{state}",
        "subject": job_id,
        "id": f"{job_id}.0.{state}",
        "time": str(time.time()),
        "tenant": TENANT,
        "attempt": "1",
        "code": "",
    }
    return msgspec.json.encode([text for pair in (event | changes).items() for text in pair])
