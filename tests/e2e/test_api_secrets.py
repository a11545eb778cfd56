"""Single calls over HTTP: what the documentation shows, and what the answers promise."""

import json
import shlex
import subprocess
from typing import Final

import pytest

from kms_protocol import __version__
from kms_protocol.wire import PREFIX
from support.programs import program
from support.service import CONTEXT, Json, Service, b64, unb64

CURL: Final = """curl -X POST http://localhost:8082/api/v1/kms/{} \\
  -H "Content-Type: application/json" \\
  -d '{}'"""
ENCRYPT: Final = CURL.format(
    "encrypt", '{"plaintext": "SGVsbG8sIFdvcmxkIQ==", "context": "env=prod,service=api"}'
)
DECRYPT: Final = CURL.format("decrypt", '{"ciphertext": "...", "context": "env=prod,service=api"}')
GENERATE_KEY: Final = CURL.format("generate-key", '{"key_spec": "AES_256"}')
HEALTH: Final = "curl http://localhost:8082/api/v1/kms/health"
USED: Final = {"key_id", "key_version", "backend", "file_id"}
STATUS: Final = "curl http://localhost:8082/api/v1/kms/status"


def curl(service: Service, command: str) -> Json:
    """Run a documented command against this service."""
    command = command.replace("\\\n", "").replace("localhost:8082", f"localhost:{service.port}")
    argv = [program("curl"), *shlex.split(command)[1:], "--silent", "--show-error"]
    answer: Json = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    return answer


# -- the documented calls ----------------------------------------------------------------------------


def test_documented_encrypt_and_decrypt_fit_together(service: Service) -> None:
    sealed = curl(service, ENCRYPT)
    opened = curl(service, DECRYPT.replace("...", sealed["ciphertext"]))

    assert sealed.keys() == USED | {"ciphertext"}
    assert opened.keys() == USED | {"plaintext", "origin"}
    assert opened["plaintext"] == "SGVsbG8sIFdvcmxkIQ=="
    assert (opened["backend"], opened["origin"]) == ("age", "service")
    assert {name: sealed[name] for name in ("key_id", "key_version", "backend")}.items() <= opened.items()


def test_documented_data_key(service: Service) -> None:
    made = curl(service, GENERATE_KEY)

    assert made.keys() == USED | {"plaintext", "ciphertext", "key_spec"}
    assert (made["key_spec"], len(unb64(made["plaintext"]))) == ("AES_256", 32)
    assert service.decrypt(unb64(made["ciphertext"]), context=None) == unb64(made["plaintext"])


def test_data_keys_that_the_settings_refuse(no_worker: Service) -> None:
    answer = curl(no_worker, GENERATE_KEY)

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
    assert after["worker_versions"] == {__version__: after["workers"]}
    assert after["api_versions"].keys() == {__version__}
    assert "redis" not in after["degraded"]


def test_every_documented_example_is_accepted(service: Service) -> None:
    page = service.http.get("/openapi.json").json()
    ran = []
    for path, operations in page["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if body is None:
            continue
        shape = page["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
        example = {**shape["examples"][0]}
        if "ciphertext" in example:  # the page shows a part of one
            example["ciphertext"] = b64(service.encrypt(b"an example", example.get("context")))
        if "stanzas" in example:
            wrapped = service.post("/wrap", {"file_key": b64(bytes(16)), "context": example.get("context")})
            example["stanzas"] = wrapped.json()["stanza"]
        answer = service.http.post(path, json=example)
        ran.append(path.removeprefix(PREFIX))
        assert answer.status_code in {200, 202}, f"{path}: {answer.text}"

    assert {"/encrypt", "/decrypt", "/generate-key", "/rewrap", "/batch", "/jobs"} <= set(ran)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/livez", "/readyz", "/metrics"])
def test_operator_pages_have_no_prefix(service: Service, path: str) -> None:
    assert service.http.get(path).status_code == 200


# -- encrypt and decrypt ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 16, 65_536, 65_537, 1_048_576], ids=str)
def test_sizes_up_to_the_limit_come_back(service: Service, size: int) -> None:
    plaintext = bytes(range(256)) * (size // 256 + 1)

    assert service.decrypt(service.encrypt(plaintext[:size])) == plaintext[:size]


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
def test_data_key_is_sealed_like_any_plaintext(no_redis: Service, asked: Json, spec: str, size: int) -> None:
    made = no_redis.post("/generate-key", asked | {"context": CONTEXT}).json()

    assert made["key_spec"] == spec
    assert len(unb64(made["plaintext"])) == size
    assert no_redis.decrypt(unb64(made["ciphertext"])) == unb64(made["plaintext"])


def test_data_key_without_plaintext_shows_none(no_redis: Service) -> None:
    made = no_redis.post("/generate-key", {"without_plaintext": True, "context": CONTEXT}).json()

    assert "plaintext" not in made
    assert len(no_redis.decrypt(unb64(made["ciphertext"]))) == 32


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


def test_whole_batch_comes_back(service: Service) -> None:
    items = [{"plaintext": b64(str(row).encode()), "context": f"row={row}"} for row in range(1000)]

    asked = items
    for operation in ("encrypt", "rewrap"):
        made = service.post("/batch", {"operation": operation, "items": asked}).json()
        assert made["failed"] == 0
        asked = [
            {"ciphertext": result["ciphertext"], "context": f"row={row}"}
            for row, result in enumerate(made["results"])
        ]
    opened = service.post("/batch", {"operation": "decrypt", "items": asked}).json()

    assert opened["failed"] == 0
    assert [result["plaintext"] for result in opened["results"]] == [item["plaintext"] for item in items]


# -- operators --------------------------------------------------------------------------------------


def test_keys_lists_the_key_in_use(service: Service) -> None:
    (key,) = service.get("/keys").json()["keys"]

    assert (key["id"], key["backend"], key["default"]) == ("default", "age", True)
    assert [version["version"] for version in key["versions"]] == [key["current_version"]]


@pytest.mark.parametrize(("install", "jobs"), [("service", "available"), ("no_redis", "unavailable")])
def test_probes_answer_also_without_redis(request: pytest.FixtureRequest, install: str, jobs: str) -> None:
    service: Service = request.getfixturevalue(install)
    ready = service.http.get("/readyz")
    others = dict.fromkeys(("audit", "keys", "spool"), "available")

    assert service.http.get("/livez").text == "ok\n"
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "jobs": jobs, **others})
    answers = float(jobs == "available")
    assert f'kms_redis_ok{{what="answers"}} {answers}' in service.http.get("/metrics").text
