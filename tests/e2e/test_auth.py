"""Who is let in and what to: real processes, requests as curl makes them, tokens as kms token makes them."""

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from kms_core.scopes import OPERATIONS
from kms_protocol.wire import PREFIX
from support.core_jobs import run_job
from support.credentials import REQUIRED, SecuredService, bearer
from support.service import CONTEXT, Service, b64, check_problem, core_of
from support.waiting import until

ALL: Final = ",".join(operation for operation in OPERATIONS if operation not in {"metrics", "unwrap"})


# Which call needs which permission: tests/kms_api/test_permissions.py.


def test_a_path_that_is_no_route_tells_nothing_to_strangers(secured: SecuredService) -> None:
    for path in ("/", "/nope", f"{PREFIX}/nope", f"{PREFIX}/encrypt/", f"{PREFIX}//encrypt", "/LIVEZ"):
        check_problem(secured.http.get(path), 401, "unauthenticated")
    assert secured.http.get("/nope", headers=secured.token_header("status")).status_code == 404


# -- tokens --------------------------------------------------------------------------------------------


def curl(service: Service, path: str, *args: str) -> tuple[int, dict[str, object]]:
    argv = ["curl", "-s", "-w", "\n%{http_code}", *args, f"{service.url}{PREFIX}{path}"]
    body, _, status = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    return int(status), json.loads(body)


@pytest.mark.parametrize(
    "header", ["Authorization: Bearer {}", "authorization: bearer {}", "X-API-Key: {}", "X-Vault-Token: {}"]
)
def test_a_token_by_hand(secured: SecuredService, header: str, tmp_path: Path) -> None:
    name = tmp_path.name.replace("_", "-")[-60:]
    made = secured.run_kms("token", "create", "--name", name, "--scope", "encrypt context=env=*")
    text = made.stdout.strip()
    body = ["-d", '{"plaintext": "aGk=", "context": "env=prod"}', "-H", header.format(text)]

    status, answer = curl(secured, "/encrypt", *body)
    assert (status, answer["key_id"]) == (200, "default")
    secured.run_kms("token", "revoke", name)
    status, answer = curl(secured, "/encrypt", *body)
    assert (status, answer["code"]) == (401, "unauthenticated")


def test_a_token_file_that_cannot_be_read_is_no_refusal(tmp_path: Path) -> None:
    with SecuredService(tmp_path, redis="unix:///nonexistent.sock") as own:
        own.start("api")
        headers = own.token_header("status")
        good = own.token_file.read_bytes()
        own.token_file.write_bytes(b"{")
        answer = own.get("/status", headers=headers)
        own.token_file.write_bytes(good)

        check_problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"]
        assert own.get("/status", headers=headers).status_code == 200


def test_what_a_refusal_says_helps_and_betrays_nothing(secured: SecuredService) -> None:
    headers = secured.token_header("encrypt key=pay-* context=env=prod")
    asked = {"plaintext": "aGk=", "context": CONTEXT}
    none = secured.post("/encrypt", asked)
    key = secured.post("/encrypt", asked, headers=headers)
    absent = secured.post("/encrypt", asked | {"key_id": "no-such-key"}, headers=headers)
    context = secured.post("/encrypt", asked | {"key_id": "pay-1", "context": "env=test"}, headers=headers)

    check_problem(none, 401, "unauthenticated")
    assert "Authorization: Bearer" in none.json()["detail"]
    for answer in (key, absent):
        check_problem(answer, 404, "unknown_key")
    assert {key.json()["detail"]} == {absent.json()["detail"]}
    check_problem(context, 403, "forbidden")
    assert "context" in context.json()["detail"]
    assert "prod" not in context.text
    assert secured.post("/encrypt", asked | {"key_id": "pay-1"}, headers=headers).status_code == 200


def command(service: SecuredService, token: str | None, folder: Path) -> tuple[int, str, str]:
    """``kms encrypt`` with this token in ``KMS_TOKEN_FILE``."""
    environ = {"KMS_SERVICE_URL": service.url}
    if token is not None:
        (folder / "token").write_text(f"{token}\n")
        environ["KMS_TOKEN_FILE"] = str(folder / "token")
    done = service.run_kms("encrypt", "--context", "env=test", given="secret", **environ)
    return done.returncode, done.stdout, done.stderr


def test_the_command_sends_its_token_and_says_what_to_do_without(
    secured: SecuredService, tmp_path: Path
) -> None:
    good, weak = secured.new_token("encrypt")[1], secured.new_token("encrypt context=env=prod")[1]
    code, out, _ = command(secured, good, tmp_path)
    assert (code, out[:8]) == (0, "YWdlLWVu")

    for token, word in (
        (None, "KMS_TOKEN_FILE"),
        ("stolen", "ask the operator"),
        (weak, "whose scope allows"),
    ):
        code, out, err = command(secured, token, tmp_path)
        assert (code, out) == (77, "")
        assert word in err
        assert token is None or token not in err


# -- failed attempts -----------------------------------------------------------------------------------


def test_guessing_is_limited_counted_and_keeps_nobody_else_out(tmp_path: Path) -> None:
    settings = f"{REQUIRED}failures_per_minute = 10\n"
    with SecuredService(tmp_path, settings, "unix:///nonexistent.sock") as own:
        own.start("api")
        good = own.token_header("status")
        answers = [own.get("/status", headers=bearer(f"kms_{'a' * 10}_{n:043d}")) for n in range(30)]
        codes = [answer.status_code for answer in answers]

        assert codes[:10] == [401] * 10
        assert set(codes[15:]) == {429}
        check_problem(answers[-1], 429, "rate_limited")
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert own.get("/status", headers=good).status_code == 200
        assert own.get("/status").status_code == 401
        assert own.http.get("/livez").status_code == 200
        for reason, count in (("unknown", 30), ("limited", codes.count(429)), ("missing", 1)):
            assert own.metric(f'kms_auth_failures_total{{reason="{reason}"}}') == count
        assert own.output("api").count("auth.refused") == codes.count(401)


# -- metrics, pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "here", "proxied"), [("loopback", 200, 401), ("open", 200, 200), ("token", 401, 401)]
)
def test_metrics_are_for_whom_settings_say(tmp_path: Path, mode: str, here: int, proxied: int) -> None:
    settings = f'{REQUIRED}[kms.server]\nmetrics = "{mode}"\ndocs = false\n'
    with SecuredService(tmp_path, settings) as own:
        own.start()
        token, other = own.token_header("metrics"), own.token_header("status")
        worker = f"http://127.0.0.1:{own.port + 1}/metrics"
        for url in ("/metrics", worker):
            assert own.http.get(url).status_code == here
            assert own.http.get(url, headers={"X-Forwarded-For": "10.0.0.1"}).status_code == proxied
            assert own.http.get(url, headers={"Forwarded": "for=10.0.0.1", **token}).status_code == 200
        if mode == "token":
            assert own.http.get("/metrics", headers=other).status_code == 403
            assert own.http.get(worker, headers=other).status_code == 401
        assert own.http.get("/docs", headers=token).status_code == 404
        assert own.http.get("/openapi.json", headers=token).status_code == 404
        assert own.http.get(f"http://127.0.0.1:{own.port + 1}/livez").status_code == 200


def test_without_authentication_bare_curls_work_and_tokens_are_not_minded(service: Service) -> None:
    asked = ("-d", '{"plaintext": "aGk=", "context": "env=prod"}')

    assert curl(service, "/encrypt", *asked)[0] == 200
    assert curl(service, "/encrypt", *asked, "-H", "Authorization: Bearer stolen")[0] == 200
    assert curl(service, "/jobs")[0] == 200
    assert service.http.get("/metrics", headers={"X-Forwarded-For": "10.0.0.1"}).status_code == 403


# -- tenants -------------------------------------------------------------------------------------------


def test_two_tenants_see_nothing_of_each_other(secured: SecuredService) -> None:
    """In what lists and counts; of single jobs and records: tests/kms_api/test_permissions.py."""
    acme, web = (secured.token_header(ALL, tenant=tenant) for tenant in ("acme", "web"))
    body = {"plaintext": b64(b"of acme"), "context": "a=b"}
    sealed = secured.post("/encrypt", body, headers=acme).json()["ciphertext"]
    job = {"kind": "encrypt", "items": [{"plaintext": b64(b"of acme")}], "context": "a=b"}
    job_id = secured.post("/jobs", job, headers=acme).json()["job_id"]
    run_job(job_id, core_of(secured).worker_context, "w")
    assert secured.get(f"/jobs/{job_id}", headers=acme).json()["state"] == "succeeded"

    stranger = secured.post("/decrypt", {"ciphertext": sealed, "context": "a=b"}, headers=web)
    check_problem(stranger, 400, "decrypt_failed")
    for path in ("/jobs", "/jobs/dead", "/jobs?state=succeeded"):
        assert secured.get(path, headers=web).json()["jobs"] == []
    assert [found["job_id"] for found in secured.get("/jobs", headers=acme).json()["jobs"]] == [job_id]
    assert secured.get("/webhooks/dead", headers=web).json()["deliveries"] == []

    until(lambda: "encrypt" in operations(secured, acme), "the counts of acme")
    assert operations(secured, web).get("encrypt") is None
    assert secured.get("/status", headers=web).json()["jobs"] == {"queued": 0, "running": 0, "committing": 0}
    audited = {event["principal"] for event in secured.get("/audit", headers=web).json()["events"]}
    assert audited
    assert not audited & {
        event["principal"] for event in secured.get("/audit", headers=acme).json()["events"]
    }
    keys = {name: keys_of(secured, headers) for name, headers in (("acme", acme), ("web", web))}
    assert keys == {"acme": ["default", "pay-1"], "web": ["default", "pay-1"]}


def operations(service: Service, headers: dict[str, str]) -> dict[str, object]:
    found: dict[str, object] = service.get("/status", headers=headers).json()["operations"]["by"]
    return found


def keys_of(service: Service, headers: dict[str, str]) -> list[str]:
    return [key["id"] for key in service.get("/keys", headers=headers).json()["keys"]]


def test_a_caller_sees_the_keys_that_he_may_use(secured: SecuredService) -> None:
    mine = secured.token_header("encrypt key=pay-*")

    assert keys_of(secured, mine) == ["pay-1"]
    assert keys_of(secured, secured.token_header("jobs:read,status")) == []
    assert secured.get("/keys/pay-1", headers=mine).status_code == 200
    for key_id in ("default", "no-such-key"):
        check_problem(secured.get(f"/keys/{key_id}", headers=mine), 404, "unknown_key")


def test_counts_of_all_tenants_are_for_those_who_read_the_metrics(secured: SecuredService) -> None:
    plain, operator = secured.token_header("encrypt,status"), secured.token_header("encrypt,status,metrics")
    asked = {"plaintext": "aGk=", "context": "a=b"}
    secured.post("/encrypt", asked, headers=secured.token_header("encrypt", tenant="third"))

    until(lambda: "encrypt" in operations(secured, operator), "the counts of all")
    versions = [
        secured.get("/keys/default", headers=headers).json()["versions"][-1].get("operations")
        for headers in (plain, operator)
    ]
    assert versions[0] is None
    assert versions[1] is not None
