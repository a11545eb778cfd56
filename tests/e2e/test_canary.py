"""Secrets go through everything the service does; afterwards they are nowhere but where the user pointed."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, get_args

import click
import httpx2 as httpx
import pyrage
import pytest

from kms_cli.command_line import group
from kms_core.auth import tokens
from kms_core.programs.liveness import is_alive
from kms_protocol.wire import PREFIX, JobKind
from support.canary.commands import CommandLine, Given, leaves, lines
from support.canary.requests import (
    CALLS,
    PARAMETER,
    UI_CALLS,
    VAULT_CALLS,
    Body,
    decrypt_body,
    encrypt_body,
    nothing,
)
from support.canary.secrets import Search, family
from support.canary.service import REMOTE, CanaryService, EchoingServer
from support.credentials import bearer
from support.routes import RULES, UI_RULES, VAULT_RULES
from support.service import Supervised, b64, unb64
from support.waiting import until

# -- routes ---------------------------------------------------------------------------------------------


def test_every_route_has_a_call_with_secrets() -> None:
    assert CALLS.keys() == RULES.keys()
    assert VAULT_CALLS.keys() == VAULT_RULES.keys()
    assert set(UI_CALLS) == UI_RULES.keys()


def address(path: str, values: Mapping[str, str]) -> str:
    whole = (
        path
        if path.startswith(("/v1/", "/ui", "/docs")) or path in {"/livez", "/readyz", "/metrics"}
        else PREFIX + path
    )
    return PARAMETER.sub(lambda found: values.get(found[1]) or values["*"], whole)


def ask_everything(install: CanaryService) -> list[str]:
    """Each route once as it should be, once by a stranger, and once with nonsense; what came back of it."""
    job_id = install.job_of({"kind": "encrypt", "items": [encrypt_body(install)]})["job_id"]
    good = {"key_id": "default", "name": "default", "mount": "transit", "job_id": str(job_id), "*": "0"}
    for (method, path), body in {**CALLS, **VAULT_CALLS}.items():
        more: dict[str, Any] = {"json": found} if (found := body(install)) is not None else {}
        if path.startswith("/files/"):
            data = install.plaintext.encode() if path.endswith("encrypt") else unb64(install.sealed())
            more = {"content": data, "headers": install.headers}
        answer = install.ask(method, address(path, good), **more)
        assert answer.status_code not in {401, 403, 500}, (method, path, answer.text)
        if "auth" in path and path.endswith("login"):
            short = answer.json()["auth"]["client_token"]
            install.secrets["token of a login"] = short.rpartition(".")[2].encode()
    return [hit for route in (*CALLS, *VAULT_CALLS) for hit in nonsense(install, *route)]


def nonsense(install: CanaryService, method: str, path: str) -> Iterator[str]:
    """Secrets where none belongs: in the path, the query, headers, and a body that is none."""
    bad = address(path, {"*": install.plain_secret})
    where = {"context": install.context_secret, "cursor": install.plain_secret, "token": install.plain_secret}
    odd = {
        "X-KMS-Context": install.plain_secret,
        "X-KMS-Key-Id": install.plain_secret,
        "Idempotency-Key": install.plain_secret,
        "Cookie": f"session={install.plain_secret}",
    }
    jwt = ".".join(urlsafe_b64encode(install.plain_secret.encode()).decode().rstrip("=") for _ in range(3))
    content = install.plaintext.encode()
    fields = json.dumps(
        {
            install.plaintext: install.context_secret,
            "plaintext": install.plaintext,
            "context": install.context_secret,
        }
    )
    for more in (
        {"headers": odd, "params": where, "content": content},
        {"headers": odd, "content": fields.encode()},
        {"headers": bearer(install.plain_secret)},
        {"headers": bearer(install.root[:-1] + ("A" if install.root[-1] != "A" else "B"))},
        {"headers": bearer(jwt)},
        {"headers": {"Host": install.plain_secret}},
    ):
        answer = install.ask(method, bad, **more)
        assert answer.status_code < 500, (method, path, answer.text)
        if answer.is_error:
            yield from install.search().data(f"the answer to {method} {path}", answer.content)


def look_at_the_page(install: CanaryService) -> None:
    """Log in, open every page, send every form with its stamp, log out."""
    with httpx.Client(base_url=install.url, timeout=60, trust_env=False) as http:
        record = install.ask("POST", f"{PREFIX}/encrypt", encrypt_body(install)).headers["x-kms-audit-id"]
        values = {"key_id": "default", "name": "page.css", "audit_id": record, "*": "0"}
        stamp = ""
        for method, path in UI_CALLS:
            data = {"stamp": stamp, "token": install.root} if method == "POST" else None
            answer = http.request(method, address(path, values), data=data)
            assert answer.status_code in {200, 302, 303, 404, 409, 410}, (method, path, answer.text)
            if found := re.search(r'name="stamp" value="(\w+)"', answer.text):
                stamp = found[1]
            if (method, path) == ("POST", "/ui/login"):
                (install.secrets["session"],) = [value.encode() for value in http.cookies.values() if value]
        http.post("/ui/login", data={"stamp": stamp, "token": install.plain_secret})


# -- jobs ----------------------------------------------------------------------------------------------


def do_jobs(install: CanaryService) -> None:
    """Every kind of job, over items, a file, many files, and an object of a bucket."""
    here, name = f"file://{install.files}/", install.plain_secret
    for at in range(2):
        (install.files / "many").mkdir(exist_ok=True)
        (install.files / "many" / f"{name}-{at}").write_bytes(install.plaintext.encode() * 1000)
    (install.files / name).write_bytes(install.plaintext.encode() * 1000)
    job: dict[str, object]
    for kind in get_args(JobKind):
        first = kind == "encrypt"
        source = name if first else "sealed"
        job = {
            "kind": kind,
            "items": [encrypt_body(install) if first else decrypt_body(install)] * 2,
            "callback": "hook",
        }
        assert install.job_of(job)["state"] == "succeeded"
        target = {"encrypt": "sealed", "decrypt": f"{name}-back"}.get(kind, f"{kind}ed")
        job = {"kind": kind, "source": here + source, "target": here + target, "callback": "hook"}
        assert install.job_of(job)["state"] == "succeeded"
        assert install.job_of(job)["error"]["code"] == "target_exists"
        tree = "many/*" if first else "many-encrypt/*"
        job = {"kind": kind, "source": here + tree, "target": f"{here}many-{kind}/", "priority": "low"}
        assert install.job_of(job)["state"] == "succeeded"
    assert install.upload_of("encrypt", install.plaintext.encode() * 5000)["state"] == "succeeded"
    assert install.upload_of("decrypt", unb64(install.sealed()))["state"] == "succeeded"


# -- what goes wrong -----------------------------------------------------------------------------------


def wrong_key(install: CanaryService) -> None:
    stranger = pyrage.x25519.Identity.generate().to_public()
    foreign = b64(pyrage.encrypt(install.plaintext.encode(), [stranger]))
    for asked, status in (
        ({"ciphertext": install.sealed(), "context": {"who": install.context_secret + "x"}}, 400),
        ({"ciphertext": foreign}, 400),
        ({"ciphertext": install.sealed(), "context": install.context, "key_id": "nix"}, 400),
        ({"ciphertext": b64(install.plaintext.encode())}, 422),
    ):
        assert install.ask("POST", f"{PREFIX}/decrypt", asked).status_code == status
    job = {"kind": "decrypt", "items": [{"ciphertext": foreign, "context": install.context}]}
    failed = [{"index": 0, "code": "decrypt_failed"}]
    assert install.job_of(job)["error"].items() >= {"code": "items_failed", "items": failed}.items()
    assert install.upload_of("decrypt", unb64(foreign))["state"] == "failed"
    odd = install.ask(
        "POST", f"{PREFIX}/files/decrypt", content=install.plaintext.encode(), headers=install.headers
    )
    assert odd.status_code == 422


def backend_away(install: CanaryService) -> None:
    """It is there, refuses everything, and repeats in its errors what it was told."""
    jobs = []
    for key_id in REMOTE:
        body = {**encrypt_body(install), "key_id": key_id}
        assert install.ask("POST", f"{PREFIX}/encrypt", body).status_code == 503
        batch = {"operation": "encrypt", "items": [body] * 2}
        assert install.api("POST", "/batch", batch)["failed"] == 2
        job = {
            "kind": "encrypt",
            "items": [encrypt_body(install)],
            "key_id": key_id,
            "context": install.context,
        }
        jobs.append(install.api("POST", "/jobs", job)["job_id"])
    for source, target in (("s3://bucket/in", "file://{}/from-s3"), ("file://{}/sealed", "s3://bucket/out")):
        job = {
            "kind": "decrypt",
            "source": source.format(install.files),
            "target": target.format(install.files),
            "context": install.context,
        }
        asked = install.ask("POST", f"{PREFIX}/jobs", job)
        assert asked.status_code in {202, 503}  # a source is looked at first
        jobs += [asked.json()["job_id"]] if asked.status_code == 202 else []
    for told in (
        "/v1/",
        "AKIDCANARY",
        "/hook",
        *(install.secrets[name].decode() for name in ("vault", "vault-kv", "cosmian")),
    ):
        until(lambda told=told: install.peer.was_told(told), f"a peer was told {told}")  # type: ignore[misc]
    for job_id in jobs:
        install.ask("DELETE", f"{PREFIX}/jobs/{job_id}")


def redis_away(install: CanaryService) -> None:
    install.valkey.stop()
    assert install.ask("POST", f"{PREFIX}/encrypt", encrypt_body(install)).status_code == 200
    job = {"kind": "encrypt", "items": [encrypt_body(install)], "context": install.context}
    assert install.ask("POST", f"{PREFIX}/jobs", job).status_code == 503
    answer = install.ask(
        "POST", f"{PREFIX}/files/encrypt", content=install.plaintext.encode(), headers=install.headers
    )
    assert answer.status_code == 503
    install.valkey.start()
    until(lambda: install.ask("GET", f"{PREFIX}/jobs").status_code == 200, "Redis is back")
    assert install.job_of(job)["state"] == "succeeded"


def worker_killed(install: CanaryService) -> None:
    """Processes of the pool first, then all of it, with jobs in hand."""
    job = {
        "kind": "encrypt",
        "items": [encrypt_body(install)] * 300,
        "context": install.context,
        "callback": "hook",
    }
    first = install.api("POST", "/jobs", job)["job_id"]
    for pid in install.pool_pids():
        os.kill(pid, signal.SIGKILL)
    second = install.api("POST", "/jobs", job)["job_id"]
    install.kill("worker")
    install.start("worker")
    assert [install.wait(job_id)["state"] for job_id in (first, second)] == ["succeeded"] * 2


def audit_cannot_be_written(install: CanaryService) -> None:
    folder, moved = install.state / "audit", install.state / "audit-moved"
    folder.rename(moved)
    folder.touch()
    answers = [install.ask("POST", f"{PREFIX}/{call}", body(install)) for call, body in AUDITED.items()]
    folder.unlink()
    moved.rename(folder)
    assert {answer.status_code for answer in answers} == {503}
    assert install.sealed()


AUDITED: Final[dict[str, Body]] = {
    "encrypt": encrypt_body,
    "generate-key": lambda install: {"context": install.context},
    "jobs": lambda install: {"kind": "encrypt", "items": [encrypt_body(install)]},
    "keys/default/rotate": nothing,
}


def spool_gone(install: CanaryService) -> None:
    folder, moved = install.spool, install.state / "spool-moved"
    folder.rename(moved)
    folder.touch()
    job = {"kind": "encrypt", "items": [encrypt_body(install)] * 300, "context": install.context}
    asked = install.ask("POST", f"{PREFIX}/jobs", job, headers={"Connection": "close"})  # it ends after this
    folder.unlink()
    moved.rename(folder)
    assert asked.status_code >= 500
    assert install.job_of(job)["state"] == "succeeded"


def token_revoked(install: CanaryService) -> None:
    token, text = install.new_token("encrypt,jobs:write,jobs:read")
    install.secrets["revoked token"] = text.split("_", 2)[2].encode()
    assert (
        install.ask("POST", f"{PREFIX}/encrypt", encrypt_body(install), headers=bearer(text)).status_code
        == 200
    )
    tokens.revoke(install.token_file, token.id)
    assert (
        install.ask("POST", f"{PREFIX}/encrypt", encrypt_body(install), headers=bearer(text)).status_code
        == 401
    )


FAULTS: Final[tuple[Callable[[CanaryService], None], ...]] = (
    wrong_key,
    backend_away,
    token_revoked,
    redis_away,
    worker_killed,
    audit_cannot_be_written,
    spool_gone,
)

# -- the command ---------------------------------------------------------------------------------------


def test_every_command_has_a_line_with_secrets() -> None:
    assert {*lines(Given()), "up"} == set(leaves(group()))


def use_the_command(install: CanaryService) -> list[str]:
    """Every command, and some of them wrongly. Its stdout is its user's; its words hold no secret."""
    (install.mine / "plain").write_text(install.plaintext)
    (install.mine / "sealed").write_bytes(unb64(install.sealed()))
    (install.mine / "token").write_text(install.root)
    tokens.create(install.token_file, tokens.TokenRequest("caller", "default", ["encrypt"], None))
    given = Given(
        context=json.dumps(install.context),
        plaintext=install.plaintext.encode(),
        ciphertext=install.sealed().encode(),
        job_id=str(install.job_of({"kind": "encrypt", "items": [encrypt_body(install)]})["job_id"]),
        unknown_id=install.plain_secret,
        peer=install.peer.url,
        peer_token=install.kept / "vault",
        user_dir=install.mine,
        state=install.state,
    )
    wrong = {
        "decrypt": (["--context", "who=else"], install.sealed().encode()),
        "encrypt": (["--key-id", "vault"], install.plaintext.encode()),
        "open": (["-i", str(install.kept / "vault"), str(install.mine / "sealed")], b""),
        "inspect": ([str(install.mine / "plain")], b""),
    }
    with ThreadPoolExecutor(4) as several:
        done = several.map(lambda line: run(install, *line), [*lines(given).items(), *wrong.items()])
        return [hit for hits in done for hit in hits]


def run(install: CanaryService, name: str, line: CommandLine) -> list[str]:
    argv = [sys.executable, "-P", "-m", "kms_cli.main", *name.split(), *line[0]]
    environ = {
        **install.environ,
        "HOME": str(install.mine),
        "KMS_SERVICE_URL": install.url,
        "KMS_TOKEN_FILE": str(install.mine / "token"),
        "AWS_ACCESS_KEY_ID": "AKID",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_MAX_ATTEMPTS": "1",
    }
    done = subprocess.run(argv, env=environ, input=line[1], capture_output=True, check=False, timeout=120)
    assert done.returncode != click.UsageError.exit_code, (name, done.stderr)
    assert b"Traceback" not in done.stderr, (name, done.stderr)
    return install.search().data(f"the words of kms {name}", done.stderr)


# -- the search ----------------------------------------------------------------------------------------


def everything_found(install: CanaryService, pids: set[int]) -> list[str]:
    """In files, metrics and processes, while all of it runs; what Redis holds is in its files."""
    search = install.search()
    metrics = [
        httpx.get(f"http://127.0.0.1:{port}/metrics", headers=bearer(install.root), trust_env=False)
        for port in (install.port, install.port + 1)
    ]
    assert all(answer.status_code == 200 and len(answer.content) > 1000 for answer in metrics)
    return [
        *search.files(install.folder, install.allowed(), [install.mine, install.files]),
        *(hit for answer in metrics for hit in search.data("metrics", answer.content)),
        *search.processes(pids),
    ]


@pytest.fixture
def install(tmp_path: Path) -> Iterator[CanaryService]:
    with EchoingServer().serving() as peer, CanaryService(tmp_path, peer) as made:
        yield made.start()


def test_secrets_rest_nowhere_but_where_the_user_pointed(install: CanaryService) -> None:
    install.secrets |= {"file key": os.urandom(16), "data key": install.data_key()}
    pids = {pid for name in ("api", "worker") for pid in family(install.pid(name))}
    told = [*ask_everything(install)]
    look_at_the_page(install)
    do_jobs(install)
    told += use_the_command(install)
    for fault in FAULTS:
        fault(install)
    pids |= {pid for name in ("api", "worker") for pid in family(install.pid(name))}
    install.learn_keys()

    assert told == []
    assert everything_found(install, pids) == []
    assert [path for path in install.allowed() if stat.S_IMODE(path.stat().st_mode) != 0o600] == []
    told_to_redis = b"".join(path.read_bytes() for path in (install.state / "valkey").rglob("*.aof"))
    assert b"kms:webhooks:due:hook" in told_to_redis, "all that Redis was ever told stands there in plain"
    assert b"REDIS0" not in told_to_redis
    for name in ("api", "worker"):
        install.stop(name)
    assert install.search().files(install.folder, install.allowed(), [install.mine, install.files]) == []
    assert "kms.run" in install.output("worker")


def parent(pid: int) -> int:
    found = re.search(r"^PPid:\s*(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_what_kms_up_starts_keeps_nothing_either(tmp_path: Path) -> None:
    secrets = {
        "plaintext": b"Kanarienvogel " + os.urandom(12).hex().encode(),
        "context": os.urandom(9).hex().encode(),
    }
    settings = '[kms.age]\ndata_keys = true\n[kms.log]\nlevel = "debug"\n'
    with Supervised(tmp_path, settings) as service:
        context = {"who": secrets["context"].decode()}
        made = service.post("/generate-key", {"context": context}).json()
        job_id = service.upload("encrypt", secrets["plaintext"], f"who={context['who']}")
        service.wait(job_id, "succeeded")
        service.kill("api")
        service.kill("worker")
        until(lambda: is_alive("127.0.0.1", service.port), "the API is back")
        search = Search({**secrets, "data key": unb64(made["plaintext"])})

        assert search.processes(family(parent(service.pid("api")))) == []
    assert search.files(tmp_path, {}) == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    secret = 'Kanarienvögel "x" \\ 4711'
    raw = secret.encode()
    texts = [
        raw,
        raw.hex().encode(),
        json.dumps({"context": secret}).encode(),
        repr({"context": secret}).encode(),
        repr({"context": raw}).encode(),
        b'{"plaintext": "%s"}' % b64encode(raw),
        urlsafe_b64encode(b"x" + raw + b"y"),
        b64encode(b"xy" + raw),
        httpx.URL("http://x/", params={"context": secret}).raw_path,
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}").write_bytes(b"before " + text + b" after")
    search = Search({"it": raw})

    assert len(search.files(tmp_path, {})) == len(texts)
    assert search.files(tmp_path, {}, [tmp_path]) == []
    assert len(search.files(tmp_path, {tmp_path / "0": ("it",)})) == len(texts) - 1
