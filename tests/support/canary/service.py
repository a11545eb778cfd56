"""A service that is full of secrets, and peers that tell everything they were told in their errors."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx2 as httpx

from kms_core.scopes import OPERATIONS
from support.canary.secrets import Search
from support.credentials import SecuredService, bearer
from support.http_servers import QuietHandler, served
from support.service import Json, b64, unb64

SETTINGS: Final = """
[kms.age]
data_keys = true
[kms.log]
level = "debug"
[kms.auth]
mode = "required"
failures_per_minute = 100_000
[kms.auth.logins.transit]
method = "approle"
[kms.facade]
enabled = true
[kms.transit]
address = "{peer}"
token_file = "{secrets}/vault"
[kms.vault_kv]
address = "{peer}"
token_file = "{secrets}/vault-kv"
[kms.cosmian]
server_url = "{peer}"
api_key_file = "{secrets}/cosmian"
[kms.keys]
vault = "transit:away"
kv = "vault-kv:away"
cosmian = "cosmian:away"
[kms.jobs]
lease_s = 2
[kms.jobs.endpoints.hook]
url = "{peer}/hook"
secret_file = "{secrets}/webhook"
[kms.jobs.buckets.bucket]
endpoint = "{peer}"
access_key_id = "AKIDCANARY"
secret_key_file = "{secrets}/s3"
read = [""]
write = [""]
allow_http = true
timeout_s = 2
[kms.audit]
checkpoint_lines = 1
[kms.tenants.acme]
keys = ["default"]
"""
FILES: Final = ("vault", "vault-kv", "cosmian", "webhook", "s3")
IDENTITIES: Final = ("age/private_key.txt", "spool.key", "intake.key")
KEYS: Final = ("audit.key", "audit-signing.key")
REMOTE: Final = ("vault", "kv", "cosmian")


def escaping_canary(name: str) -> str:
    """Text, unique to a run, that escapes change; without control characters, which no context has."""
    return f'Kanarienvögel "{name}" \\ {os.urandom(9).hex()}'


def plain_canary(name: str) -> str:
    """A secret of letters and digits: for headers and paths."""
    return f"Kanarienvogel-{name}-{os.urandom(9).hex()}"


@dataclass
class EchoingServer:
    """Refuses everything, and repeats in its answer what it was told, tokens too."""

    url: str = ""
    heard: list[str] = field(default_factory=list)

    @contextmanager
    def serving(self) -> Iterator["EchoingServer"]:
        peer = self

        class Handler(QuietHandler):
            def _answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                told = {"path": self.path, "headers": dict(self.headers), "body": b64(self.rfile.read(size))}
                text = json.dumps(told)
                peer.heard.append(text)
                body = json.dumps({"errors": [text], "error": text, "message": text}).encode()
                self.reply(500, body, "application/json")

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer  # noqa: N815 -- the base class's names

        with served(Handler) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    def was_told(self, text: str) -> bool:
        return any(text in heard for heard in self.heard)


class CanaryService(SecuredService):
    """One install, what is secret in it, and who may call."""

    def __init__(self, folder: Path, peer: EchoingServer) -> None:
        self.folder, self.peer = folder, peer
        self.kept = folder / "secrets"
        self.mine = folder / "mine"  # where the command's user keeps his own files
        for made in (self.kept, self.mine):
            made.mkdir(mode=0o700, parents=True)
        given = {name: plain_canary(name) for name in FILES}
        for name, text in given.items():
            path = self.kept / name
            path.touch(mode=0o600)
            path.write_text(f"{text}\n")
        super().__init__(folder, SETTINGS.format(peer=peer.url, secrets=self.kept))
        self.plaintext, self.context_secret, self.plain_secret = (
            escaping_canary("plaintext"),
            escaping_canary("context"),
            plain_canary("token"),
        )
        everything, files = ",".join(OPERATIONS), f"file://{self.files}/"
        places = f"read={files} read=s3://bucket/ write={files} write=s3://bucket/"
        _, self.root = self.new_token(everything, f"{everything} {places}")
        self.http.headers.update(bearer(self.root))
        self.secrets: dict[str, bytes] = {
            "plaintext": self.plaintext.encode(),
            "context": self.context_secret.encode(),
            "unknown token": self.plain_secret.encode(),
            "token": self.root.split("_", 2)[2].encode(),
            **{name: text.encode() for name, text in given.items()},
        }

    # -- calls -------------------------------------------------------------------------------------

    @property
    def context(self) -> dict[str, str]:
        return {"who": self.context_secret}

    @property
    def headers(self) -> dict[str, str]:
        """As a streamed body brings its context."""
        return {"X-KMS-Context": quote(json.dumps(self.context))}

    def ask(self, method: str, path: str, body: object = None, **more: Any) -> httpx.Response:  # noqa: ANN401 -- httpx's own keywords
        """As the one who may do everything, unless ``headers`` have another token."""
        if body is not None:
            more["json"] = body
        with self.http.stream(method, path, **more) as answer:
            if not (answer.is_success and path.endswith("/jobs/events")):  # of which there is no end
                answer.read()
        return answer

    def api(self, method: str, path: str, body: object = None, **more: Any) -> Json:  # noqa: ANN401 -- as above
        answer = self.ask(method, f"/api/v1/kms{path}", body, **more)
        assert answer.is_success, answer.text
        found: Json = answer.json()
        return found

    def sealed(self, key_id: str | None = None) -> str:
        """A ciphertext of the plaintext in the context, in base64."""
        body = {"plaintext": b64(self.plaintext.encode()), "context": self.context, "key_id": key_id}
        return str(self.api("POST", "/encrypt", body)["ciphertext"])

    def job_of(self, body: Mapping[str, object]) -> Json:
        """A job, once it has ended."""
        return self.wait(self.submit({"context": self.context, **body}))

    def upload_of(self, kind: str, data: bytes) -> Json:
        return self.wait(self.upload(kind, data, quote(json.dumps(self.context))))

    def data_key(self) -> bytes:
        return unb64(self.api("POST", "/generate-key", {"context": self.context})["plaintext"])

    # -- the search --------------------------------------------------------------------------------

    def learn_keys(self) -> None:
        """What was made since the start: new versions of keys, keys of the audit trail, tokens."""
        for name in (*IDENTITIES, *KEYS):
            for number, line in enumerate((self.state / name).read_bytes().splitlines()):
                if line and not line.startswith((b"#", b"-----")):
                    self.secrets[f"{name} {number}"] = line
        for path in self.mine.glob("*-token"):
            self.secrets[path.name] = path.read_text().strip().split("_", 2)[2].encode()

    def allowed(self) -> dict[Path, tuple[str, ...]]:
        """Every file that is there to hold a secret, and which one; all are for the service's user alone."""
        own = {
            name: [each for each in self.secrets if each.startswith(name)] for name in (*IDENTITIES, *KEYS)
        }
        return {
            **{self.kept / name: (name,) for name in FILES},
            **{self.state / name: tuple(names) for name, names in own.items()},
        }

    def search(self) -> Search:
        return Search(self.secrets)
