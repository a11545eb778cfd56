"""What callers get wrong, by accident or on purpose, one table after another; never is the value echoed.

What a body, its base64 or a context may have wrong: tests/kms_api/test_json_body.py, tests/kms_protocol.
"""

import json
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from typing import Final

import pytest

from kms_protocol.wire import PREFIX
from support.service import B64_CANARY, CANARY, CONTEXT, Json, Service, b64, check_problem

MIB: Final = 1024 * 1024
EMPTY: Final = {"plaintext": ""}
JOB: Final[Json] = {"kind": "encrypt", "items": [EMPTY]}


# -- bodies ------------------------------------------------------------------------------------------

BAD_LABELS: Final[tuple[object, ...]] = (
    {"": "x"},
    {"-a": "x"},
    {"a": "with space"},
    {"a": "x" * 129},
    {"a" * 64: "x"},
    {"a\n": "x"},
    {"a": "x\n"},
    {f"a{number}": "x" for number in range(17)},
    {"a": 1},
    ["a=b"],
)
BAD_GROUPS: Final[tuple[object, ...]] = (
    {"name": "", "jobs": 1},
    {"name": "a b", "jobs": 1},
    {"name": "a", "jobs": 0},
    {"name": "a"},
    "a",
)
BAD_CALLBACKS: Final = ("other", f"http://{CANARY}", "https://evil.example/", "a b", "x" * 81, "")
BAD_BODIES: Final[list[tuple[str, object]]] = [
    ("/generate-key", {"key_spec": "AES_256", "number_of_bytes": 32}),
    ("/generate-key", {"without_plaintext": CANARY}),
    ("/batch", {"operation": CANARY, "items": [EMPTY]}),
    ("/batch", {"operation": "encrypt", "items": [{"plaintext": "", "reference": CANARY * 20}]}),
    ("/batch", {"operation": "encrypt", "items": [{"plaintext": "", CANARY: 1}]}),
    ("/jobs", {}),
    ("/jobs", {"kind": "encrypt"}),
    ("/jobs", {"kind": CANARY, "items": []}),
    ("/jobs", {"kind": "encrypt", "items": []}),
    ("/jobs", {"kind": "encrypt", "source": f"file:///{CANARY}"}),
    ("/jobs", {"kind": "encrypt", "items": [{"ciphertext": B64_CANARY}]}),
    ("/jobs", {"kind": "decrypt", "items": [{"plaintext": B64_CANARY}]}),
    ("/jobs", {"kind": "encrypt", "items": [{"plaintext": "", "ciphertext": ""}]}),
    ("/jobs", {"kind": "encrypt", "items": [{}]}),
    ("/jobs", JOB | {"source": f"file:///{CANARY}"}),
    ("/jobs", JOB | {"priority": CANARY}),
    ("/jobs", JOB | {"queue": CANARY}),
    *(("/jobs", JOB | {"labels": labels}) for labels in BAD_LABELS),
    *(("/jobs", JOB | {"group": group}) for group in BAD_GROUPS),
    *(("/jobs", JOB | {"callback": name}) for name in BAD_CALLBACKS),
    *(("/jobs/status", {"job_ids": ids}) for ids in ([], ["x"] * 1001, "x", [1])),
]


@pytest.mark.parametrize(
    ("path", "body"), BAD_BODIES, ids=lambda value: value if isinstance(value, str) else str(value)[:60]
)
def test_fields_outside_their_range_are_refused(service: Service, path: str, body: object) -> None:
    check_problem(service.post(path, body), 422, "invalid_request")


@pytest.mark.parametrize("path", ["/encrypt", "/jobs"])
def test_context_outside_its_grammar_is_refused(service: Service, path: str) -> None:
    body = {"context": f"a={CANARY},a=2"} | (EMPTY if path == "/encrypt" else JOB)

    check_problem(service.post(path, body), 422, "invalid_context")


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
@pytest.mark.parametrize("path", ["/encrypt", "/decrypt", "/generate-key", "/rewrap", "/batch", "/jobs"])
def test_oversized_body_is_refused(service: Service, path: str, *, declared: bool) -> None:
    size = 40 * MIB if path == "/jobs" else 4 * MIB

    def pieces() -> Iterator[bytes]:
        for _ in range(size // MIB):
            yield b" " * MIB

    answer = service.post(path, content=b" " * size if declared else pieces())

    check_problem(answer, 413, "too_large")
    assert answer.json()["links"] == {"jobs": f"{PREFIX}/jobs", "files": f"{PREFIX}/files/encrypt"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/encrypt", {"plaintext": b64(bytes(MIB + 1))}),
        ("/decrypt", {"ciphertext": b64(bytes(MIB + 65_537))}),
    ],
    ids=["encrypt", "decrypt"],
)
def test_one_byte_above_the_limit_is_refused(service: Service, path: str, body: object) -> None:
    check_problem(service.post(path, body), 413, "too_large")


@pytest.mark.parametrize("path", ["/encrypt", "/jobs", "/files/encrypt", "/jobs?kind=encrypt"])
def test_compressed_body_is_refused(service: Service, path: str) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/x-ndjson"}

    check_problem(service.post(path, content=b"\x1f\x8b", headers=headers), 422, "invalid_request")


# -- ciphertexts -------------------------------------------------------------------------------------


def damaged(sealed: bytes) -> Mapping[str, bytes]:
    """A cut or a flipped bit in each part of a file, and bytes where none belong."""
    mac, end = sealed.index(b"\n--- ") + 5, len(sealed)
    payload = mac + 44 + 16
    flips = {
        "first stanza": sealed.index(b"X25519") + 10,
        "context": sealed.index(b"kms-service/context") + 60,
        "origin": sealed.index(b"kms-service/origin") + 30,
        "mac": mac + 3,
        "nonce": payload - 3,
        "payload": payload + 1,
        "tag": end - 1,
    }
    cuts = {
        "header": mac - 20,
        "nonce": payload - 1,
        "payload": payload,
        "chunk": payload + 1,
        "tag": end - 1,
    }
    return {
        **{
            f"flipped {name}": sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
            for name, at in flips.items()
        },
        **{f"cut {name}": sealed[:at] for name, at in cuts.items()},
        "one byte more": sealed + b"x",
        "twice": sealed + sealed,
        "no context": sealed[: sealed.index(b"-> kms-service/context")] + sealed[mac - 4 :],
        "version 2": sealed.replace(b"/v1\n", b"/v1\n-> kms-service/later 1\n\n", 1),
    }


def test_damaged_ciphertexts_have_one_answer(service: Service) -> None:
    for name, bad in damaged(service.encrypt(CANARY.encode())).items():
        answer = service.post("/decrypt", {"ciphertext": b64(bad), "context": CONTEXT})

        assert answer.status_code == 400, name
        check_problem(answer, 400, "decrypt_failed")
        assert answer.json()["detail"] == answer.json()["title"], name


# -- headers, parameters, routes ---------------------------------------------------------------------

BAD_HEADERS: Final = [
    ("X-KMS-Context", CANARY, 422, "invalid_context"),
    ("X-KMS-Context", f"a={CANARY},a=1", 422, "invalid_context"),
    ("X-KMS-Context", "a=%ff", 422, "invalid_request"),
    ("X-KMS-Context", "a=%00", 422, "invalid_context"),
    ("X-KMS-Key-Id", CANARY, 404, "unknown_key"),
    ("X-KMS-Key-Id", f"../{CANARY}", 404, "unknown_key"),
    ("X-KMS-Key-Id", "", 404, "unknown_key"),
    ("X-KMS-Callback", "", 422, "invalid_request"),
    ("X-KMS-Callback", "other", 422, "invalid_request"),
    ("X-KMS-Release", "now", 422, "invalid_request"),
    ("X-KMS-Run-By", "tomorrow", 422, "invalid_request"),
    ("X-KMS-Run-By", "2999-01-01T00:00:00", 422, "invalid_request"),
    ("X-KMS-Keep-For", "59", 422, "invalid_request"),
    ("X-KMS-Keep-For", "40000000", 422, "invalid_deadline"),
    ("X-KMS-Start-By", "2020-01-01T00:00:00Z", 422, "invalid_deadline"),
    ("X-KMS-Start-By", "2999-01-01T00:00:00Z", 422, "invalid_deadline"),
    ("Idempotency-Key", "k" * 257, 422, "invalid_request"),
    *(("X-KMS-Labels", text, 422, "invalid_request") for text in ("x", "=x", "a=b,a=c", "a=%20", "%ff")),
    *(("X-KMS-Metadata", text, 422, "invalid_request") for text in ("[]", "{", '{"a":1}', "%ff")),
    ("X-KMS-Metadata", json.dumps({"a": "x" * 513}), 422, "invalid_request"),
    *(
        ("X-KMS-Group", text, 422, "invalid_request")
        for text in ("x", "%ff", "{}", '{"name":"a","jobs":"x"}')
    ),
]


@pytest.mark.parametrize(("name", "text", "status", "code"), BAD_HEADERS, ids=lambda value: str(value)[:40])
def test_headers_of_an_upload_are_checked(
    no_worker: Service, name: str, text: str, status: int, code: str
) -> None:
    before = no_worker.spooled()

    check_problem(
        no_worker.post("/files/encrypt", content=CANARY.encode(), headers={name: text}), status, code
    )
    assert no_worker.spooled() == before


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?kind=encrypt", {}),
        ("", {"X-KMS-Context": f"a={CANARY}"}),
        ("", {"X-KMS-Key-Id": "default"}),
        ("", {"X-KMS-Priority": "high"}),
        ("", {"X-KMS-Callback": CANARY}),
        ("", {"Idempotency-Key": "k" * 257}),
    ],
    ids=repr,
)
def test_what_a_json_job_says_is_said_nowhere_else(
    service: Service, query: str, headers: dict[str, str]
) -> None:
    check_problem(service.post(f"/jobs{query}", JOB, headers=headers), 422, "invalid_request")


BAD_LIMITS: Final = ("0", "-1", "1001", "x", "", "²", "1e3", "9" * 5000)
BAD_QUERIES: Final = [
    *(f"/jobs?limit={limit}" for limit in BAD_LIMITS),
    *(f"/jobs?cursor={cursor}" for cursor in ("-1", CANARY, "99999999999999999999")),
    *(f"/jobs?state={state}" for state in ("", CANARY, "QUEUED")),
    "/jobs?label=nothing",
    *(f"/audit?limit={limit}" for limit in BAD_LIMITS[:4]),
    "/audit?after=x",
    "/audit?since=yesterday",
    "/audit?since=2026-01-01",
    "/audit?tenant=x",
]


@pytest.mark.parametrize("path", BAD_QUERIES, ids=lambda path: path[:40])
def test_listing_refuses_what_it_does_not_understand(service: Service, path: str) -> None:
    check_problem(service.get(path), 422, "invalid_request")


def test_unknown_route_is_a_problem(service: Service) -> None:
    for path in ("/encrypt/x", "/../encrypt", "//encrypt", "/Encrypt", "/keys/", "/jobs/"):
        connection = HTTPConnection("127.0.0.1", service.port)
        connection.request("GET", PREFIX + path)
        answer = connection.getresponse()

        assert (answer.status, json.loads(answer.read())["code"]) == (404, "not_found"), path
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/encrypt", "POST"),
        ("PUT", "/jobs", "GET, HEAD, POST"),
        ("PATCH", "/jobs/x", "DELETE, GET, HEAD"),
        ("PATCH", "/keys", "GET, HEAD"),
    ],
)
def test_unknown_method_names_every_allowed_one(
    service: Service, method: str, path: str, allowed: str
) -> None:
    answer = service.http.request(method, f"{PREFIX}{path}")

    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    "job_id",
    ["x", "..", "%2e%2e%2fetc", "00000000-0000-0000-0000-000000000000", "a" * 300, "%00", "lock:caretaker"],
)
@pytest.mark.parametrize("path", ["", "/result", "?wait=1"])
def test_unknown_job_is_nobody_s(service: Service, job_id: str, path: str) -> None:
    answer = service.get(f"/jobs/{job_id}{path}")

    assert answer.status_code == 404
    assert answer.json()["code"] in {"unknown_job", "not_found"}
