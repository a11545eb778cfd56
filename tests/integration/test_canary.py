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
import httpx
import pyrage
import pytest

from callers import bearer
from canary import Search, family
from canarycalls import CALLS, PARAMETER, UI_CALLS, VAULT_CALLS, Body, items, nothing, sealed
from canarycommands import Given, Line, leaves, lines
from canaryhouse import REMOTE, House, Peer
from kms_api.routing import RULES, UI_RULES, VAULT_RULES
from kms_cli.local.up import is_alive
from kms_cli.main import group
from kms_core.auth import tokens
from kms_protocol.wire import PREFIX, JobKind
from service import Supervised, b64, unb64, until

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


def ask_everything(house: House) -> list[str]:
    """Each route once as it should be, once by a stranger, and once with nonsense; what came back of it."""
    job_id = house.job_of({"kind": "encrypt", "items": [items(house)]})["job_id"]
    good = {"key_id": "default", "name": "default", "mount": "transit", "job_id": str(job_id), "*": "0"}
    for (method, path), body in {**CALLS, **VAULT_CALLS}.items():
        more: dict[str, Any] = {"json": found} if (found := body(house)) is not None else {}
        if path.startswith("/files/"):
            data = house.plaintext.encode() if path.endswith("encrypt") else unb64(house.sealed())
            more = {"content": data, "headers": house.headers}
        answer = house.ask(method, address(path, good), **more)
        assert answer.status_code not in {401, 403, 500}, (method, path, answer.text)
    return [hit for route in (*CALLS, *VAULT_CALLS) for hit in nonsense(house, *route)]


def nonsense(house: House, method: str, path: str) -> Iterator[str]:
    """Secrets where none belongs: in the path, the query, headers, and a body that is none."""
    bad = address(path, {"*": house.unknown})
    where = {"context": house.value, "cursor": house.unknown, "token": house.unknown}
    odd = {
        "X-KMS-Context": house.unknown,
        "X-KMS-Key-Id": house.unknown,
        "Idempotency-Key": house.unknown,
        "Cookie": f"session={house.unknown}",
    }
    jwt = ".".join(urlsafe_b64encode(house.unknown.encode()).decode().rstrip("=") for _ in range(3))
    content = house.plaintext.encode()
    fields = json.dumps({house.plaintext: house.value, "plaintext": house.plaintext, "context": house.value})
    for more in (
        {"headers": odd, "params": where, "content": content},
        {"headers": odd, "content": fields.encode()},
        {"headers": bearer(house.unknown)},
        {"headers": bearer(house.root[:-1] + ("A" if house.root[-1] != "A" else "B"))},
        {"headers": bearer(jwt)},
        {"headers": {"Host": house.unknown}},
    ):
        answer = house.ask(method, bad, **more)
        assert answer.status_code < 500, (method, path, answer.text)
        if answer.is_error:
            yield from house.search().data(f"the answer to {method} {path}", answer.content)


def look_at_the_page(house: House) -> None:
    """Log in, open every page, send every form with its stamp, log out."""
    with httpx.Client(base_url=house.url, timeout=60, trust_env=False) as http:
        record = house.ask("POST", f"{PREFIX}/encrypt", items(house)).headers["x-kms-audit-id"]
        values = {"key_id": "default", "name": "page.css", "audit_id": record, "*": "0"}
        stamp = ""
        for method, path in UI_CALLS:
            data = {"stamp": stamp, "token": house.root} if method == "POST" else None
            answer = http.request(method, address(path, values), data=data)
            assert answer.status_code in {200, 302, 303, 404, 409, 410}, (method, path, answer.text)
            if found := re.search(r'name="stamp" value="(\w+)"', answer.text):
                stamp = found[1]
            if (method, path) == ("POST", "/ui/login"):
                (house.secrets["session"],) = [value.encode() for value in http.cookies.values() if value]
        http.post("/ui/login", data={"stamp": stamp, "token": house.unknown})


# -- jobs ----------------------------------------------------------------------------------------------


def do_jobs(house: House) -> None:
    """Every kind of job, over items, a file, many files, and an object of a bucket."""
    here, name = f"file://{house.files}/", house.unknown
    for at in range(2):
        (house.files / "many").mkdir(exist_ok=True)
        (house.files / "many" / f"{name}-{at}").write_bytes(house.plaintext.encode() * 1000)
    (house.files / name).write_bytes(house.plaintext.encode() * 1000)
    job: dict[str, object]
    for kind in get_args(JobKind):
        first = kind == "encrypt"
        source = name if first else "sealed"
        job = {"kind": kind, "items": [items(house) if first else sealed(house)] * 2, "callback": "hook"}
        assert house.job_of(job)["state"] == "succeeded"
        target = {"encrypt": "sealed", "decrypt": f"{name}-back"}.get(kind, f"{kind}ed")
        job = {"kind": kind, "source": here + source, "target": here + target, "callback": "hook"}
        assert house.job_of(job)["state"] == "succeeded"
        assert house.job_of(job)["error"] == {"code": "target_exists"}
        tree = "many/*" if first else "many-encrypt/*"
        job = {"kind": kind, "source": here + tree, "target": f"{here}many-{kind}/", "priority": "low"}
        assert house.job_of(job)["state"] == "succeeded"
    assert house.upload_of("encrypt", house.plaintext.encode() * 5000)["state"] == "succeeded"
    assert house.upload_of("decrypt", unb64(house.sealed()))["state"] == "succeeded"


# -- what goes wrong -----------------------------------------------------------------------------------


def wrong_key(house: House) -> None:
    stranger = pyrage.x25519.Identity.generate().to_public()
    foreign = b64(pyrage.encrypt(house.plaintext.encode(), [stranger]))
    for asked, status in (
        ({"ciphertext": house.sealed(), "context": {"who": house.value + "x"}}, 400),
        ({"ciphertext": foreign}, 400),
        ({"ciphertext": house.sealed(), "context": house.context, "key_id": "nix"}, 400),
        ({"ciphertext": b64(house.plaintext.encode())}, 422),
    ):
        assert house.ask("POST", f"{PREFIX}/decrypt", asked).status_code == status
    job = {"kind": "decrypt", "items": [{"ciphertext": foreign, "context": house.context}]}
    assert house.job_of(job)["error"] == {"code": "items_failed"}
    assert house.upload_of("decrypt", unb64(foreign))["state"] == "failed"
    odd = house.ask(
        "POST", f"{PREFIX}/files/decrypt", content=house.plaintext.encode(), headers=house.headers
    )
    assert odd.status_code == 422


def backend_away(house: House) -> None:
    """It is there, refuses everything, and repeats in its errors what it was told."""
    jobs = []
    for key_id in REMOTE:
        body = {**items(house), "key_id": key_id}
        assert house.ask("POST", f"{PREFIX}/encrypt", body).status_code == 503
        batch = {"operation": "encrypt", "items": [body] * 2}
        assert house.api("POST", "/batch", batch)["failed"] == 2
        job = {"kind": "encrypt", "items": [items(house)], "key_id": key_id, "context": house.context}
        jobs.append(house.api("POST", "/jobs", job)["job_id"])
    for source, target in (("s3://bucket/in", "file://{}/from-s3"), ("file://{}/sealed", "s3://bucket/out")):
        job = {
            "kind": "decrypt",
            "source": source.format(house.files),
            "target": target.format(house.files),
            "context": house.context,
        }
        asked = house.ask("POST", f"{PREFIX}/jobs", job)
        assert asked.status_code in {202, 503}  # a source is looked at first
        jobs += [asked.json()["job_id"]] if asked.status_code == 202 else []
    for told in (
        "/v1/",
        "AKIDCANARY",
        "/hook",
        *(house.secrets[name].decode() for name in ("vault", "vault-kv", "cosmian")),
    ):
        until(lambda told=told: house.peer.was_told(told), f"a peer was told {told}")  # type: ignore[misc]
    for job_id in jobs:
        house.ask("DELETE", f"{PREFIX}/jobs/{job_id}")


def redis_away(house: House) -> None:
    house.valkey.stop()
    assert house.ask("POST", f"{PREFIX}/encrypt", items(house)).status_code == 200
    job = {"kind": "encrypt", "items": [items(house)], "context": house.context}
    assert house.ask("POST", f"{PREFIX}/jobs", job).status_code == 503
    answer = house.ask(
        "POST", f"{PREFIX}/files/encrypt", content=house.plaintext.encode(), headers=house.headers
    )
    assert answer.status_code == 503
    house.valkey.start()
    until(lambda: house.ask("GET", f"{PREFIX}/jobs").status_code == 200, "Redis is back")
    assert house.job_of(job)["state"] == "succeeded"


def worker_killed(house: House) -> None:
    """Processes of the pool first, then all of it, with jobs in hand."""
    job = {"kind": "encrypt", "items": [items(house)] * 300, "context": house.context, "callback": "hook"}
    first = house.api("POST", "/jobs", job)["job_id"]
    for pid in house.pool_pids():
        os.kill(pid, signal.SIGKILL)
    second = house.api("POST", "/jobs", job)["job_id"]
    house.kill("worker")
    house.start("worker")
    assert [house.ended(job_id)["state"] for job_id in (first, second)] == ["succeeded"] * 2


def audit_cannot_be_written(house: House) -> None:
    folder, moved = house.state / "audit", house.state / "audit-moved"
    folder.rename(moved)
    folder.touch()
    answers = [house.ask("POST", f"{PREFIX}/{call}", body(house)) for call, body in AUDITED.items()]
    folder.unlink()
    moved.rename(folder)
    assert {answer.status_code for answer in answers} == {503}
    assert house.sealed()


AUDITED: Final[dict[str, Body]] = {
    "encrypt": items,
    "generate-key": lambda house: {"context": house.context},
    "jobs": lambda house: {"kind": "encrypt", "items": [items(house)]},
    "keys/default/rotate": nothing,
}


def spool_gone(house: House) -> None:
    folder, moved = house.spool, house.state / "spool-moved"
    folder.rename(moved)
    folder.touch()
    job = {"kind": "encrypt", "items": [items(house)], "context": house.context}
    asked = house.ask("POST", f"{PREFIX}/jobs", job, headers={"Connection": "close"})  # it ends after this
    folder.unlink()
    moved.rename(folder)
    assert asked.status_code >= 500
    assert house.job_of(job)["state"] == "succeeded"


def token_revoked(house: House) -> None:
    token, text = house.make("encrypt,jobs:write,jobs:read")
    house.secrets["revoked token"] = text.split("_", 2)[2].encode()
    assert house.ask("POST", f"{PREFIX}/encrypt", items(house), headers=bearer(text)).status_code == 200
    tokens.revoke(house.token_file, token.id)
    assert house.ask("POST", f"{PREFIX}/encrypt", items(house), headers=bearer(text)).status_code == 401


FAULTS: Final[tuple[Callable[[House], None], ...]] = (
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


def use_the_command(house: House) -> list[str]:
    """Every command, and some of them wrongly. Its stdout is its user's; its words hold no secret."""
    (house.mine / "plain").write_text(house.plaintext)
    (house.mine / "sealed").write_bytes(unb64(house.sealed()))
    (house.mine / "token").write_text(house.root)
    tokens.create(house.token_file, tokens.TokenRequest("caller", "default", ["encrypt"], None))
    given = Given(
        context=json.dumps(house.context),
        plaintext=house.plaintext.encode(),
        ciphertext=house.sealed().encode(),
        job_id=str(house.job_of({"kind": "encrypt", "items": [items(house)]})["job_id"]),
        unknown=house.unknown,
        peer=house.peer.url,
        peer_token=house.kept / "vault",
        mine=house.mine,
        state=house.state,
    )
    wrong = {
        "decrypt": (["--context", "who=else"], house.sealed().encode()),
        "encrypt": (["--key-id", "vault"], house.plaintext.encode()),
        "open": (["-i", str(house.kept / "vault"), str(house.mine / "sealed")], b""),
        "inspect": ([str(house.mine / "plain")], b""),
    }
    with ThreadPoolExecutor(4) as several:
        done = several.map(lambda line: run(house, *line), [*lines(given).items(), *wrong.items()])
        return [hit for hits in done for hit in hits]


def run(house: House, name: str, line: Line) -> list[str]:
    argv = [sys.executable, "-P", "-m", "kms_cli.main", *name.split(), *line[0]]
    environ = {
        **house.environ,
        "HOME": str(house.mine),
        "KMS_SERVICE_URL": house.url,
        "KMS_TOKEN_FILE": str(house.mine / "token"),
        "AWS_ACCESS_KEY_ID": "AKID",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_MAX_ATTEMPTS": "1",
    }
    done = subprocess.run(argv, env=environ, input=line[1], capture_output=True, check=False, timeout=120)
    assert done.returncode != click.UsageError.exit_code, (name, done.stderr)
    assert b"Traceback" not in done.stderr, (name, done.stderr)
    return house.search().data(f"the words of kms {name}", done.stderr)


# -- the search ----------------------------------------------------------------------------------------


def everything_found(house: House, pids: set[int]) -> list[str]:
    """In files, metrics and processes, while all of it runs; what Redis holds is in its files."""
    search = house.search()
    metrics = [
        httpx.get(f"http://127.0.0.1:{port}/metrics", headers=bearer(house.root), trust_env=False)
        for port in (house.port, house.port + 1)
    ]
    assert all(answer.status_code == 200 and len(answer.content) > 1000 for answer in metrics)
    return [
        *search.files(house.folder, house.allowed(), [house.mine, house.files]),
        *(hit for answer in metrics for hit in search.data("metrics", answer.content)),
        *search.processes(pids),
    ]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with Peer().serving() as peer, House(tmp_path, peer) as made:
        yield made.start()


def test_secrets_rest_nowhere_but_where_the_user_pointed(house: House) -> None:
    house.secrets |= {"file key": os.urandom(16), "data key": house.data_key()}
    pids = {pid for name in ("api", "worker") for pid in family(house.pid(name))}
    told = [*ask_everything(house)]
    look_at_the_page(house)
    do_jobs(house)
    told += use_the_command(house)
    for fault in FAULTS:
        fault(house)
    pids |= {pid for name in ("api", "worker") for pid in family(house.pid(name))}
    house.learn_keys()

    assert told == []
    assert everything_found(house, pids) == []
    assert [path for path in house.allowed() if stat.S_IMODE(path.stat().st_mode) != 0o600] == []
    told_to_redis = b"".join(path.read_bytes() for path in (house.state / "valkey").rglob("*.aof"))
    assert b"kms:webhooks:entries" in told_to_redis, "all that Redis was ever told stands there in plain"
    assert b"REDIS0" not in told_to_redis
    for name in ("api", "worker"):
        house.stop(name)
    assert house.search().files(house.folder, house.allowed(), [house.mine, house.files]) == []
    assert "kms.run" in house.output("worker")


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
