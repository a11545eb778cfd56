"""The whole application in this process, asked as an ASGI server asks it, and what its callers are."""

import re
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import uvicorn
from anyio.from_thread import BlockingPortal
from cryptography import x509
from pyrage import x25519
from starlette.types import Receive, Scope, Send

from kms_api import app
from kms_api.deps import Service
from kms_core.auth import tokens
from kms_core.auth.client_certificates import PresentedCertificate, authority_of, key_of
from kms_core.auth.policy import Principal
from kms_core.backends.key_files import make_identity
from kms_core.http_protocol import CERTIFICATE, HttpProtocol
from kms_core.jobs.events.outbox import MOST_ATTEMPTS, Delivery, Outbox
from kms_core.jobs.store.keys import job_key
from kms_protocol import wire
from support.authorization.permissions import OPERATIONS
from support.credentials import AUDIENCE, ISSUER, Authority, Issuer, SecuredService, bearer
from support.job_options import job_options
from support.service import b64, core_of, unb64

CONTEXT: Final = "env=prod"
OTHER_CONTEXT: Final = "env=test"
SUBJECT: Final = "URI:spiffe://acme/builder"
CLIENT_ADDRESS: Final = "198.51.100.7"
SETTINGS: Final = f"""
[kms.auth]
mode = "required"
failures_per_minute = 1_000_000
[kms.auth.issuers.corp]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks_file = "{{folder}}/jwks.json"
scopes_claim = "kms_scopes"
[kms.auth.issuers.corp.grants.all]
when = {{ sub = "ada" }}
scopes = []
[kms.auth.logins.jwt]
method = "jwt"
issuer = "corp"
[kms.auth.certificates.builder]
subject = "{SUBJECT}"
scopes = ["{{everything}}"]
[kms.server]
tls_cert = "{{ca}}/server.crt"
tls_key = "{{ca}}/server.key"
client_ca = "{{ca}}/ca.pem"
[kms.facade]
enabled = true
[kms.age]
data_keys = true
[kms.audit]
checkpoint_lines = 1
[kms.jobs]
open_jobs = 100_000
[kms.tenants.narrow]
keys = ["other"]
[kms.tenants.narrow-1]
keys = ["pay-1"]
[kms.keys]
pay-1 = "age://{{age}}/private_key.txt?public={{age}}/public_key.txt"
new-1 = "age://{{age}}/private_key.txt?public={{age}}/public_key.txt"
other = "age://{{age}}/private_key.txt?public={{age}}/public_key.txt"
turn-1 = "age://{{age}}/turned.txt?public={{age}}/turned.pub"
"""
_STAMP: Final = re.compile(r'name="stamp" value="(\w+)"')
_JOB: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_numbers: Final = count(1)


@dataclass(frozen=True)
class Caller:
    """A caller. ``name`` and ``tenant`` are whose its jobs are; ``certificate`` is that of its connection."""

    headers: Mapping[str, str] = field(default_factory=dict)
    name: str = "nobody"
    tenant: str = "default"
    certificate: PresentedCertificate | None = None

    @property
    def credential(self) -> str:
        """The name of its token, if it has one."""
        found = tokens.TEXT.fullmatch(self.headers.get("Authorization", "").removeprefix("Bearer "))
        return f"token:{found[1]}" if found else "none"


class Application:
    """One install with an application, its keys, files and callers."""

    def __init__(self, folder: Path, portal: BlockingPortal, redis: str) -> None:
        self.issuer = Issuer()
        self.files = folder / "state/files"
        self.files_rules = f"read=file://{self.files}/ write=file://{self.files}/"
        self.install = self._installed(folder, redis)
        self.caller = Caller()  # for whom a request is being made
        self._app = app.build(self.install.settings)
        self.core = core_of(self.install)
        self._sender = Caller()
        self._portal = portal
        self._serve()
        self.master = self.with_token(self.scope(OPERATIONS))
        self.everything = self.master.headers["Authorization"].removeprefix("Bearer ")
        for name in ("in", "out"):
            (self.files / name).mkdir()
        (self.files / "in/one").write_bytes(b"seventeen")
        (self.files / "in/one.age").write_bytes(self.sealed("pay-1"))

    def _installed(self, folder: Path, redis: str) -> SecuredService:
        """Settings, keys and certificates."""
        age, authority = folder / "state/age", folder / "ca"
        self._authority = Authority(authority)
        self._authority.issue("server", x509.DNSName("localhost"), server=True)
        (folder / "jwks.json").write_bytes(self.issuer.jwks)
        text = SETTINGS.replace("{folder}", str(folder)).replace("{age}", str(age))
        text = text.replace("{ca}", str(authority)).replace("{everything}", self.scope(OPERATIONS))
        install = SecuredService(folder, text, redis)
        make_identity(age / "turned.txt")
        secret = (age / "turned.txt").read_text().split()[-1]
        (age / "turned.pub").write_text(f"{x25519.Identity.from_str(secret).to_public()}\n")
        return install

    def _serve(self) -> None:
        """Over a socket, and without one for the method LIST, which the server's parser does not know."""
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._asked, http=HttpProtocol, interface="asgi3", lifespan="off", log_config=None
        )
        self._server = uvicorn.Server(config)
        self._served = self._portal.start_task_soon(self._server.serve, [listener])
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        within = httpx.ASGITransport(self._asked, client=(CLIENT_ADDRESS, 1))
        self._within = httpx.AsyncClient(transport=within, base_url=url, timeout=60)

    async def _asked(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Adds what the TLS protocol knows of a connection, from another machine than this one."""
        more = {} if self._sender.certificate is None else {CERTIFICATE: self._sender.certificate}
        state = {**scope.get("state", {}), **more}
        await self._app({**scope, "state": state, "client": (CLIENT_ADDRESS, 1)}, receive, send)

    def close(self) -> None:
        self._http.close()
        self._server.should_exit = True
        self._served.result()

    @property
    def pages(self) -> app.Application:
        """The application, whose state has the templates."""
        return self._app

    @property
    def service(self) -> Service:
        """The state that its routes share."""
        return self._app.service

    def streams(self) -> int:
        """The number of event streams and waits that are open."""
        return self._app.layers._budgets["streams"].held  # type: ignore[attr-defined, no-any-return]  # noqa: SLF001 -- nothing else shows it

    # -- callers -----------------------------------------------------------------------------------------

    def scope(self, operations: Iterable[str]) -> str:
        """A scope with these operations, any key and all files."""
        return f"{','.join(operations)} {self.files_rules}"

    @cache  # noqa: B019 -- one for each test session
    def with_token(self, *scopes: str, tenant: str = "default") -> Caller:
        """A caller with a token of these scopes; the same one each time."""
        token, text = self.install.new_token(*scopes, tenant=tenant)
        return Caller(bearer(text), token.name, tenant)

    def revoked(self) -> Caller:
        token, text = self.install.new_token(self.scope(OPERATIONS))
        tokens.revoke(self.install.token_file, token.id)
        return Caller(bearer(text))

    def expired(self) -> Caller:
        return Caller(bearer(self.install.new_token(self.scope(OPERATIONS), ttl=-timedelta(hours=1))[1]))

    def by_jwt(self, **claims: object) -> Caller:
        """A caller with a JWT of the issuer, for everything unless its claims say otherwise."""
        said = {"kms_scopes": [self.scope(OPERATIONS)]} | claims
        return Caller(bearer(self.issuer.token(**said)), "corp:ada")

    def by_certificate(self, subject: str = SUBJECT, lasts_s: float = 600) -> Caller:
        authority = x509.load_pem_x509_certificate(self._authority.ca_file.read_bytes())
        identity = f"{next(_numbers):x}:{authority_of(authority.subject)}:{key_of(authority)}"
        return Caller(
            {}, "cert:builder", certificate=PresentedCertificate((subject,), time.time() + lasts_s, identity)
        )

    def in_session(self, who: Caller) -> Caller:
        """The same caller, logged in to the page."""
        stamp, cookie = self.visitor()
        token = who.headers["Authorization"].removeprefix("Bearer ")
        answer = self.ask(
            Caller(), "POST", "/ui/login", data={"token": token, "stamp": stamp}, headers={"Cookie": cookie}
        )
        assert answer.headers["location"] == "/ui", answer.text
        (session,) = re.findall(r"kms_session=[^;]+", answer.headers["set-cookie"])
        return Caller({"Cookie": session}, who.name, who.tenant)

    def in_form(self, who: Caller) -> tuple[Caller, str]:
        """The sender of this caller's forms, and the stamp of its pages: a caller with a token logs in."""
        page = self.ask(who, "GET", "/ui")
        if page.status_code == 200 and not self.stamp_in(page) and "Authorization" in who.headers:
            who = self.in_session(who)
            page = self.ask(who, "GET", "/ui")
        return who, self.stamp_in(page)

    def visitor(self) -> tuple[str, str]:
        """The stamp of a login form, and the cookie that it is for."""
        page = self.ask(Caller(), "GET", "/ui/login")
        return self.stamp_in(page), str(page.headers["set-cookie"]).partition(";")[0]

    @staticmethod
    def stamp_in(page: httpx.Response) -> str:
        found = _STAMP.search(page.text)
        return found[1] if found else ""

    # -- requests ----------------------------------------------------------------------------------------

    def ask(self, who: Caller, method: str, path: str, **more: Any) -> httpx.Response:  # noqa: ANN401 -- httpx's own keywords
        self._sender = who
        headers = {**who.headers, **more.pop("headers", {})}
        self._http.cookies.clear()
        if method != "LIST":
            return self._http.request(method, path, headers=headers, **more)

        async def send() -> httpx.Response:
            return await self._within.request(method, path, headers=headers, **more)

        return self._portal.call(send)

    def _made(self, path: str, body: object) -> Any:  # noqa: ANN401 -- JSON
        answer = self.ask(self.master, "POST", path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def state(self, path: str) -> tuple[object, ...]:
        """What a request to this path could change: its job, jobs, deliveries, a key, targets of files."""
        redis, job = self.core.worker_context.store.redis, _JOB.search(path)
        return (
            redis.hgetall(job_key(job[0])) if job else {},
            redis.zcard("kms:open"),
            redis.zcard("kms:webhooks:given_up"),
            (self.install.state / "age/turned.txt").read_bytes(),
            sorted(path.name for path in (self.files / "out").iterdir()),
        )

    # -- what requests are about -------------------------------------------------------------------------

    @cache  # noqa: B019 -- as above
    def sealed(self, key_id: str) -> bytes:
        body = {"plaintext": b64(b"seventeen"), "context": CONTEXT, "key_id": key_id}
        return unb64(self._made("/api/v1/kms/encrypt", body)["ciphertext"])

    @cache  # noqa: B019 -- as above
    def wrapped(self, key_id: str) -> str:
        body = {"file_key": b64(bytes(range(16))), "context": CONTEXT, "key_id": key_id}
        return str(self._made("/api/v1/kms/wrap", body)["stanza"])

    @cache  # noqa: B019 -- as above
    def encoded(self, key_id: str) -> bytes:
        """A payload that Temporal holds, without a namespace."""
        payload = b'{"metadata":{"encoding":"anNvbi9wbGFpbg=="},"data":"MQ=="}'
        body = {"plaintext": b64(payload), "key_id": key_id}
        return unb64(self._made("/api/v1/kms/encrypt", body)["ciphertext"])

    @cache  # noqa: B019 -- as above
    def of_vault(self, key_id: str) -> str:
        body = {"plaintext": b64(b"seventeen")}
        return str(self._made(f"/v1/transit/encrypt/{key_id}", body)["data"]["ciphertext"])

    def url(self, path: str) -> str:
        return f"file://{self.files}/{path}"

    def new_target(self, *, is_folder: bool) -> str:
        name = f"out/{next(_numbers)}"
        if is_folder:
            (self.files / name).mkdir()
        return self.url(f"{name}/" if is_folder else name)

    def group(self) -> str:
        """The name of a new group of one job of somebody of the default tenant."""
        name = uuid.uuid4().hex
        group = wire.GroupIn(name=name, jobs=1)
        who = Principal(self.master.name, "default", "token:x")
        options = job_options(who, "encrypt", CONTEXT, group=group)
        self.core.submitter.items(options, [wire.JobItem(plaintext=b"seventeen")])
        return name

    def job(
        self,
        kind: wire.JobKind = "encrypt",
        key_id: str | None = None,
        *,
        owner: Caller | None = None,
        dead: bool = False,
    ) -> str:
        """A new job of ``owner``, or of somebody else of the default tenant, that waits or is dead."""
        by = owner or self.master
        desk, store = self.core.submitter, self.core.worker_context.store
        if kind == "encrypt":
            item = wire.JobItem(plaintext=b"seventeen")
        else:
            item = wire.JobItem(ciphertext=self.sealed("pay-1"))
        terms = job_options(Principal(by.name, "default", by.credential), kind, CONTEXT, key_id=key_id)
        job_id = desk.items(terms, [item]).job_id
        if dead:
            store.redis.hset(job_key(job_id), mapping={"state": "failed", "error": "attempts_exhausted"})
        return job_id

    def exhausted_delivery(self) -> str:
        """A delivery of the default tenant that was given up."""
        number = f"delivery-{next(_numbers)}"
        delivery = Delivery(
            delivery_id=number,
            endpoint="ci",
            job_id=self.job(),
            state="succeeded",
            body=b"{}",
            created_at=time.time(),
            attempts=MOST_ATTEMPTS,
            tenant="default",
            entry=number.encode(),
        )
        store = self.core.worker_context.store
        store.redis.zadd("kms:webhooks:due:ci", {number: 0})
        assert Outbox(store, {}).put_off(delivery) is None
        return number

    @cache  # noqa: B019 -- as above
    def audit_id(self) -> str:
        """The record of an operation of the default tenant, which a signed checkpoint covers."""
        self.sealed("pay-1")
        events = self.ask(self.master, "GET", "/api/v1/kms/audit?operation=encrypt").json()["events"]
        return str(events[0]["id"])
