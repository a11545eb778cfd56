"""Single calls over HTTP: what the documentation shows, byte for byte, and what the answers promise."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx2 as httpx
import pyrage
import pytest

from kms_protocol.wire import PREFIX
from support.service import CONTEXT, Json, Service, b64, unb64

ENCRYPT = """curl -X POST http://localhost:8082/api/v1/kms/encrypt \\
  -H "Content-Type: application/json" \\
  -d '{
    "plaintext": "SGVsbG8sIFdvcmxkIQ==",
    "context": "env=prod,service=api"
  }'"""
DECRYPT = """curl -X POST http://localhost:8082/api/v1/kms/decrypt \\
  -H "Content-Type: application/json" \\
  -d '{
    "ciphertext": "...",
    "context": "env=prod,service=api"
  }'"""
GENERATE_KEY = """curl -X POST http://localhost:8082/api/v1/kms/generate-key \\
  -H "Content-Type: application/json" \\
  -d '{
    "key_spec": "AES_256"
  }'"""
HEALTH = "curl http://localhost:8082/api/v1/kms/health"
STATUS = "curl http://localhost:8082/api/v1/kms/status"


def curl(service: Service, command: str) -> Json:
    """Run a documented command against this service; with httpx where there is no curl."""
    command = command.replace("\\\n", "").replace("localhost:8082", f"localhost:{service.port}")
    words = shlex.split(command)
    if shutil.which("curl"):
        done = subprocess.run([*words, "--silent", "--show-error"], capture_output=True, check=True)
        answer: Json = json.loads(done.stdout)
    else:
        answer = with_httpx(words)
    return answer


def with_httpx(words: list[str]) -> Json:
    """What the command asks for, without curl."""
    url = next(word for word in words if word.startswith("http"))
    method = "POST" if "-X" in words else "GET"
    content = words[words.index("-d") + 1] if "-d" in words else None
    answer: Json = httpx.request(method, url, content=content, trust_env=False).json()
    return answer


# -- the documented calls ----------------------------------------------------------------------------


def test_documented_encrypt_and_decrypt_fit_together(service: Service) -> None:
    sealed = curl(service, ENCRYPT)
    opened = curl(service, DECRYPT.replace("...", sealed["ciphertext"]))

    assert sealed.keys() == {"ciphertext", "key_id", "key_version", "backend", "file_id"}
    assert opened.keys() == {"plaintext", "key_id", "key_version", "backend", "origin", "file_id"}
    assert opened["plaintext"] == "SGVsbG8sIFdvcmxkIQ=="
    assert (opened["backend"], opened["origin"]) == ("age", "service")
    assert {name: sealed[name] for name in ("key_id", "key_version", "backend")}.items() <= opened.items()


def test_documented_data_key(service: Service) -> None:
    made = curl(service, GENERATE_KEY)

    assert made.keys() == {
        "plaintext", "ciphertext", "key_spec", "key_id", "key_version", "backend", "file_id"
    }  # fmt: skip
    assert (made["key_spec"], len(unb64(made["plaintext"]))) == ("AES_256", 32)
    assert service.decrypt(unb64(made["ciphertext"]), context=None) == unb64(made["plaintext"])


def test_data_keys_that_the_settings_refuse(idle: Service) -> None:
    answer = curl(idle, GENERATE_KEY)

    assert (answer["status"], answer["code"]) == (501, "data_keys_unsupported")
    assert "data_keys = true" in answer["detail"]


def test_documented_health(service: Service) -> None:
    answer = curl(service, HEALTH)

    assert answer.keys() == {"status", "backend", "checked_at"}
    assert (answer["status"], answer["backend"]) == ("healthy", "age")


def test_documented_status_counts_operations(service: Service) -> None:
    before = curl(service, STATUS)
    service.encrypt(b"counted")
    service.post("/decrypt", {"ciphertext": b64(b"no age file")})
    after = curl(service, STATUS)

    assert (after["backend"], after["environment"]) == ("age", "dev")
    assert after["operations"]["total"] == before["operations"]["total"] + 2
    assert after["operations"]["by"]["encrypt"]["ok"] > before["operations"]["by"].get("encrypt", {}).get(
        "ok", 0
    )
    assert after["operations"]["by"]["decrypt"]["failed"] >= 1
    assert after["uptime_s"] > before["uptime_s"]
    assert after["jobs"].keys() == {"queued", "running", "committing"}
    assert after["queue_depth"] >= 0
    assert "redis" not in after["degraded"]


def example_of(page: Json, body: Json) -> Json:
    """The example of the shape of a body."""
    shape: Json = page["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
    return {**shape["examples"][0]}


def test_every_documented_example_is_accepted(service: Service) -> None:
    page = service.http.get("/openapi.json").json()
    ran = []
    for path, operations in page["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if body is None or path.endswith("/generate-key"):
            continue
        example = example_of(page, body)
        if "ciphertext" in example:  # the page shows a part of one
            example["ciphertext"] = b64(service.encrypt(b"an example", example.get("context")))
        if "stanzas" in example:
            wrapped = service.post("/wrap", {"file_key": b64(bytes(16)), "context": example.get("context")})
            example["stanzas"] = wrapped.json()["stanza"]
        answer = service.http.post(path, json=example)
        ran.append(path.removeprefix(PREFIX))
        assert answer.status_code in {200, 202}, f"{path}: {answer.text}"

    assert {"/encrypt", "/decrypt", "/rewrap", "/batch", "/jobs"} <= set(ran)


def test_documented_data_key_example_is_accepted_where_allowed(strict: Service) -> None:
    page = strict.http.get("/openapi.json").json()
    content = page["paths"][f"{PREFIX}/generate-key"]["post"]["requestBody"]["content"]

    example = example_of(page, content["application/json"])

    answer = strict.post("/generate-key", {**example, "context": CONTEXT})

    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/livez", "/readyz", "/metrics"])
def test_operator_pages_have_no_prefix(service: Service, path: str) -> None:
    assert service.http.get(path).status_code == 200


# -- encrypt and decrypt ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [None, "application/json", "application/json; charset=utf-8", "text/plain", "application/octet-stream"],
    ids=str,
)
def test_content_type_is_optional(service: Service, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}

    answer = service.post("/encrypt", content=b'{"plaintext": ""}', headers=headers)

    assert answer.status_code == 200


@pytest.mark.parametrize("size", [0, 1, 16, 65_536, 65_537, 1_048_576], ids=str)
def test_sizes_up_to_the_limit_come_back(service: Service, size: int) -> None:
    plaintext = bytes(range(256)) * (size // 256 + 1)

    assert service.decrypt(service.encrypt(plaintext[:size])) == plaintext[:size]


@pytest.mark.parametrize(
    "absent",
    [{}, {"context": None}, {"context": ""}, {"context": {}}],
    ids=["absent", "null", "text", "object"],
)
def test_forms_of_no_context_are_one(service: Service, absent: Json) -> None:
    sealed = service.post("/encrypt", {"plaintext": b64(b"bare"), "key_id": None} | absent).json()

    forms: list[object] = [None, "", {}]
    for other in forms:
        opened = service.post("/decrypt", {"ciphertext": sealed["ciphertext"], "context": other})
        assert opened.status_code == 200


@pytest.mark.parametrize(
    "given",
    ["service=api,env=prod", " env = prod , service = api ", {"env": "prod", "service": "api"}],
    ids=["other-order", "spaces", "object"],
)
def test_forms_of_one_context_are_one(service: Service, given: object) -> None:
    assert service.decrypt(service.encrypt(b"bound", CONTEXT), given) == b"bound"
    assert service.decrypt(service.encrypt(b"bound", given), CONTEXT) == b"bound"


def test_object_holds_what_text_cannot(service: Service) -> None:
    context = {"path": "a=1,b=2", "größe": "ünïcödé 🔑", "empty": ""}

    assert service.decrypt(service.encrypt(b"odd", context), context) == b"odd"


@pytest.mark.parametrize(
    "wrong",
    [None, "env=prod", "env=prod,service=web", "env=prod,service=api,x=", {"env": "prod,service=api"}],
    ids=["none", "less", "other", "more", "folded"],
)
def test_wrong_context_is_a_failed_decryption(service: Service, wrong: object) -> None:
    answer = service.post("/decrypt", {"ciphertext": b64(service.encrypt(b"salary")), "context": wrong})

    assert (answer.status_code, answer.json()["code"]) == (400, "decrypt_failed")


def test_same_plaintext_never_gives_the_same_ciphertext(service: Service) -> None:
    assert service.encrypt(b"again") != service.encrypt(b"again")


def test_ciphertext_opens_with_stock_age(service: Service, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed.age"
    sealed.write_bytes(service.encrypt(b"break glass"))
    identity = service.state / "age/private_key.txt"
    if shutil.which("age"):
        opened = subprocess.run(["age", "-d", "-i", identity, sealed], capture_output=True, check=True).stdout
    else:
        text = identity.read_text().splitlines()[-1]
        opened = pyrage.decrypt(sealed.read_bytes(), [pyrage.x25519.Identity.from_str(text)])

    assert opened == b"break glass"


def foreign(service: Service, plaintext: bytes) -> bytes:
    recipient = (service.state / "age/public_key.txt").read_text().strip()
    sealed: bytes = pyrage.encrypt(plaintext, [pyrage.x25519.Recipient.from_str(recipient)])
    return sealed


def test_file_of_stock_age_is_opened_and_called_foreign(service: Service) -> None:
    answer = service.post("/decrypt", {"ciphertext": b64(foreign(service, b"from age"))})

    assert answer.status_code == 200
    assert (unb64(answer.json()["plaintext"]), answer.json()["origin"]) == (b"from age", "foreign")


def test_file_of_stock_age_has_no_context_to_match(service: Service) -> None:
    answer = service.post("/decrypt", {"ciphertext": b64(foreign(service, b"x")), "context": CONTEXT})

    assert answer.json()["code"] == "decrypt_failed"


def test_key_id_of_the_file_must_be_the_one_that_was_named(service: Service) -> None:
    sealed = b64(service.encrypt(b"x"))

    same = service.post("/decrypt", {"ciphertext": sealed, "context": CONTEXT, "key_id": "default"})
    other = service.post("/decrypt", {"ciphertext": sealed, "context": CONTEXT, "key_id": "other"})

    assert same.status_code == 200
    assert (other.status_code, other.json()["code"]) == (400, "decrypt_failed")


# -- data keys, rewrap, batch -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "spec", "size"),
    [
        ({}, "AES_256", 32),
        ({"key_spec": None}, "AES_256", 32),
        ({"key_spec": "AES_256"}, "AES_256", 32),
        ({"key_spec": "AES_128"}, "AES_128", 16),
        ({"number_of_bytes": 1}, "BYTES_1", 1),
        ({"number_of_bytes": 1024}, "BYTES_1024", 1024),
    ],
    ids=str,
)
def test_data_key_is_sealed_like_any_plaintext(strict: Service, asked: Json, spec: str, size: int) -> None:
    made = strict.post("/generate-key", asked | {"context": CONTEXT}).json()

    assert made["key_spec"] == spec
    assert len(unb64(made["plaintext"])) == size
    assert strict.decrypt(unb64(made["ciphertext"])) == unb64(made["plaintext"])


def test_data_key_without_plaintext_shows_none(strict: Service) -> None:
    made = strict.post("/generate-key", {"without_plaintext": True, "context": CONTEXT}).json()

    assert "plaintext" not in made
    assert len(strict.decrypt(unb64(made["ciphertext"]))) == 32


def test_rewrap_moves_the_context_and_keeps_the_payload(service: Service) -> None:
    sealed = service.encrypt(b"moved", "a=1")

    answer = service.post("/rewrap", {"ciphertext": b64(sealed), "context": "a=1", "new_context": "b=2"})

    moved = unb64(answer.json()["ciphertext"])
    payload = sealed.partition(b"\n--- ")[2][44:]
    assert answer.json().keys() == {"ciphertext", "key_id", "key_version", "backend", "file_id"}
    assert moved.endswith(payload)
    assert service.decrypt(moved, "b=2") == b"moved"
    assert service.post("/decrypt", {"ciphertext": b64(moved), "context": "a=1"}).status_code == 400


def test_rewrap_keeps_the_context_unless_told_otherwise(service: Service) -> None:
    sealed = service.encrypt(b"kept", "a=1")

    moved = service.post("/rewrap", {"ciphertext": b64(sealed), "context": "a=1", "new_context": None})

    assert service.decrypt(unb64(moved.json()["ciphertext"]), "a=1") == b"kept"


def test_rewrap_gives_a_foreign_file_no_origin(service: Service) -> None:
    answer = service.post("/rewrap", {"ciphertext": b64(foreign(service, b"x"))})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_refused_item_does_not_sink_its_batch(service: Service) -> None:
    good, bad = b64(service.encrypt(b"one", "row=1")), b64(service.encrypt(b"two", "row=2"))
    items = [
        {"ciphertext": good, "context": "row=1", "reference": "first"},
        {"ciphertext": bad, "context": "row=1"},
        {"ciphertext": b64(b"not an age file"), "reference": "third"},
        {"ciphertext": good, "context": "row"},
        {"plaintext": b64(b"x")},
        {"ciphertext": good, "context": "row=1", "key_id": "other"},
    ]

    answer = service.post("/batch", {"operation": "decrypt", "items": items})

    assert answer.status_code == 200
    results = answer.json()["results"]
    assert answer.json()["failed"] == 5
    assert [result["index"] for result in results] == [0, 1, 2, 3, 4, 5]
    assert [result.get("reference") for result in results] == ["first", None, "third", None, None, None]
    assert unb64(results[0]["plaintext"]) == b"one"
    assert [result["error"]["code"] for result in results[1:]] == [
        "decrypt_failed",
        "not_a_ciphertext",
        "invalid_context",
        "invalid_request",
        "decrypt_failed",
    ]


@pytest.mark.parametrize("count", [0, 1001], ids=str)
def test_batch_has_one_to_a_thousand_items(service: Service, count: int) -> None:
    answer = service.post("/batch", {"operation": "encrypt", "items": [{"plaintext": ""}] * count})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_whole_batch_comes_back(service: Service) -> None:
    items = [{"plaintext": b64(str(row).encode()), "context": f"row={row}"} for row in range(1000)]

    sealed = service.post("/batch", {"operation": "encrypt", "items": items}).json()
    again = [
        {"ciphertext": result["ciphertext"], "context": f"row={row}"}
        for row, result in enumerate(sealed["results"])
    ]
    moved = service.post("/batch", {"operation": "rewrap", "items": again}).json()
    again = [
        {"ciphertext": result["ciphertext"], "context": f"row={row}"}
        for row, result in enumerate(moved["results"])
    ]
    opened = service.post("/batch", {"operation": "decrypt", "items": again}).json()

    assert sealed["failed"] == moved["failed"] == opened["failed"] == 0
    assert [result["plaintext"] for result in opened["results"]] == [item["plaintext"] for item in items]


# -- operators --------------------------------------------------------------------------------------


def test_keys_lists_the_key_in_use(service: Service) -> None:
    (key,) = service.get("/keys").json()["keys"]

    assert (key["id"], key["backend"], key["default"]) == ("default", "age", True)
    assert [version["version"] for version in key["versions"]] == [key["current_version"]]


def test_probes_answer_without_redis(strict: Service) -> None:
    ready = strict.http.get("/readyz")

    assert strict.http.get("/livez").text == "ok\n"
    assert (ready.status_code, ready.json()) == (
        200,
        {
            "status": "ready",
            "jobs": "unavailable",
            "audit": "available",
            "keys": "available",
            "spool": "available",
        },
    )
    assert 'kms_redis_ok{what="answers"} 0.0' in strict.http.get("/metrics").text


def test_probes_say_that_jobs_are_there(service: Service) -> None:
    found = service.http.get("/readyz").json()
    assert found == {
        "status": "ready",
        "jobs": "available",
        "audit": "available",
        "keys": "available",
        "spool": "available",
    }
    assert 'kms_redis_ok{what="answers"} 1.0' in service.http.get("/metrics").text


def test_every_operation_leaves_an_audit_line(service: Service) -> None:
    request_id = "audit-line-1"
    service.post(
        "/encrypt",
        {"plaintext": b64(b"four"), "context": "shown=hidden-value"},
        headers={"X-Request-Id": request_id},
    )
    service.post("/decrypt", {"ciphertext": b64(b"junk")}, headers={"X-Request-Id": request_id})

    text = "".join(path.read_text() for path in (service.state / "audit").glob("api-*.jsonl"))
    lines = [json.loads(line) for line in text.splitlines()]
    sealed, refused = [line for line in lines if line.get("request_id") == request_id]
    assert (sealed["operation"], sealed["result"], sealed["bytes_in"]) == ("encrypt", "ok", 4)
    assert list(sealed["context"]) == ["shown"]
    assert (refused["operation"], refused["result"]) == ("decrypt", "not_a_ciphertext")
    assert "hidden-value" not in text
