"""What callers get wrong, by accident or on purpose, one table after another; never is the value echoed."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from kms_protocol.wire import PREFIX
from support.service import B64_CANARY, CANARY, CONTEXT, Service, b64, check_problem

MIB = 1024 * 1024


# -- bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plaintext",
    [
        "SGVsbG8",
        "-_-_",
        "SGVs bG8=",
        " SGVsbG8=",
        "SGVsbG8=\n",
        "====",
        5,
        ["SGVsbG8="],
        {"a": "b"},
        True,
        1.5,
    ],
    ids=repr,
)
def test_bytes_that_are_not_padded_base64_are_refused(service: Service, plaintext: object) -> None:
    answer = service.post("/encrypt", {"plaintext": plaintext, "context": f"a={CANARY}"})

    check_problem(answer, 422, "invalid_request")
    assert "$.plaintext" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        '""',
        "5",
        "{",
        f"{{'plaintext': '{B64_CANARY}'}}",
        f'{{"plaintext": "{B64_CANARY}"}} {{}}',
        f'{{"plaintext": "{B64_CANARY}", "{CANARY}": 1}}',
        f'{{"plaintext": "{B64_CANARY}", "{CANARY * 9}": 1}}',
        f'{{"plaintext": "{B64_CANARY}", "key_id": "{CANARY}/.."}}',
        f'{{"plaintext": "{B64_CANARY}", "key_id": ""}}',
        '{"plaintext": ' + "[" * 500_000,
        '{"a": ' * 300_000,
        "\ufeff{}",
    ],
    ids=[
        "empty",
        "null",
        "array",
        "text",
        "number",
        "cut",
        "single-quotes",
        "two-values",
        "unknown-field",
        "long-unknown-field",
        "path-as-key-id",
        "empty-key-id",
        "deep-array",
        "deep-object",
        "byte-order-mark",
    ],
)
def test_body_that_is_no_request_is_refused(service: Service, body: str) -> None:
    check_problem(service.post("/encrypt", content=body.encode()), 422, "invalid_request")


@pytest.mark.parametrize(
    "context",
    [
        f"{CANARY}",
        f"a={CANARY},",
        f"=,{CANARY}=",
        f"a={CANARY},a=2",
        f"kms:tenant={CANARY}",
        f"a={CANARY}\x00",
        f"a={CANARY}\n",
        ",".join(f"k{number}={CANARY}" for number in range(65)),
        f"a={CANARY * 500}",
        {"": CANARY},
        {"kms:x": CANARY},
        {"a": f"{CANARY}\x7f"},
        {f"k{number}": CANARY for number in range(65)},
    ],
    ids=lambda context: repr(context)[:24],
)
@pytest.mark.parametrize("path", ["/encrypt", "/jobs"])
def test_context_outside_its_grammar_is_refused(service: Service, path: str, context: object) -> None:
    item = {"plaintext": ""}
    body = {"context": context} | (item if path == "/encrypt" else {"kind": "encrypt", "items": [item]})

    check_problem(service.post(path, body), 422, "invalid_context")


@pytest.mark.parametrize("context", [5, True, ["a=b"], {"a": 1}, {"a": None}, {"a": {"b": CANARY}}], ids=repr)
def test_context_of_a_wrong_type_is_refused(service: Service, context: object) -> None:
    check_problem(service.post("/encrypt", {"plaintext": "", "context": context}), 422, "invalid_request")


@pytest.mark.parametrize("limit", ["2027-01-31", "tomorrow", "2027-01-31T12:00:00"], ids=str)
def test_time_limit_that_is_no_time_is_refused(service: Service, limit: str) -> None:
    answer = service.post("/encrypt", {"plaintext": "", "context": {"not_after": limit}})

    check_problem(answer, 422, "invalid_context")


def test_time_limit_in_the_past_is_a_failed_decryption(service: Service) -> None:
    past, future = {"not_after": "2020-01-31T12:00:00Z"}, {"not_after": "2999-01-31T12:00:00+01:00"}

    late = service.post("/decrypt", {"ciphertext": b64(service.encrypt(b"x", past)), "context": past})

    check_problem(late, 400, "decrypt_failed")
    assert service.decrypt(service.encrypt(b"x", future), future) == b"x"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/generate-key", {"key_spec": "AES_256", "number_of_bytes": 32}),
        ("/generate-key", {"number_of_bytes": 0}),
        ("/generate-key", {"number_of_bytes": 1025}),
        ("/generate-key", {"number_of_bytes": -1}),
        ("/generate-key", {"key_spec": CANARY}),
        ("/generate-key", {"without_plaintext": CANARY}),
        ("/batch", {"operation": CANARY, "items": [{"plaintext": ""}]}),
        ("/batch", {"operation": "encrypt", "items": [{"plaintext": CANARY}]}),
        ("/batch", {"operation": "encrypt", "items": [{"plaintext": "", "reference": CANARY * 20}]}),
        ("/batch", {"operation": "encrypt", "items": [{"plaintext": "", CANARY: 1}]}),
        ("/jobs", {}),
        ("/jobs", {"kind": "encrypt"}),
        ("/jobs", {"kind": CANARY, "items": []}),
        ("/jobs", {"kind": "encrypt", "items": []}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "source": f"file:///{CANARY}"}),
        ("/jobs", {"kind": "encrypt", "source": f"file:///{CANARY}"}),
        ("/jobs", {"kind": "encrypt", "items": [{"ciphertext": B64_CANARY}]}),
        ("/jobs", {"kind": "decrypt", "items": [{"plaintext": B64_CANARY}]}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": "", "ciphertext": ""}]}),
        ("/jobs", {"kind": "encrypt", "items": [{}]}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "ttl_s": 59}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "ttl_s": 10**9}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "priority": CANARY}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "queue": CANARY}),
        ("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "callback": f"http://{CANARY}"}),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:50],
)
def test_fields_outside_their_range_are_refused(service: Service, path: str, asked: object) -> None:
    check_problem(service.post(path, asked), 422, "invalid_request")


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
    answer = service.post(
        path,
        content=b"\x1f\x8b",
        headers={"Content-Encoding": "gzip", "Content-Type": "application/x-ndjson"},
    )

    check_problem(answer, 422, "invalid_request")


# -- ciphertexts -------------------------------------------------------------------------------------


def damaged(sealed: bytes) -> Iterator[tuple[str, bytes]]:
    """A cut or a flipped bit in each part of a file, and bytes where none belong."""
    mac, payload = sealed.index(b"\n--- ") + 5, sealed.index(b"\n--- ") + 5 + 44 + 16
    for name, position in {
        "first-stanza": sealed.index(b"X25519") + 10,
        "context": sealed.index(b"kms-service/context") + 60,
        "origin": sealed.index(b"kms-service/origin") + 30,
        "mac": mac + 3,
        "nonce": payload - 3,
        "payload": payload + 1,
        "tag": len(sealed) - 1,
    }.items():
        flipped = bytearray(sealed)
        flipped[position] ^= 1
        yield f"flip-{name}", bytes(flipped)
    for name, length in {
        "header": mac - 20,
        "nonce": payload - 1,
        "payload": payload + 1,
        "tag": len(sealed) - 1,
    }.items():
        yield f"cut-{name}", sealed[:length]
    yield "no-payload", sealed[:payload]
    yield "one-byte-more", sealed + b"x"
    yield "newline-more", sealed + b"\n"
    yield "twice", sealed + sealed
    yield "no-context-stanza", sealed[: sealed.index(b"-> kms-service/context")] + sealed[mac - 4 :]
    yield "version-2", sealed.replace(b"/v1\n", b"/v1\n-> kms-service/later 1\n\n", 1)


def test_damaged_ciphertexts_have_one_answer(service: Service) -> None:
    sealed = service.encrypt(CANARY.encode())
    for name, bad in damaged(sealed):
        answer = service.post("/decrypt", {"ciphertext": b64(bad), "context": CONTEXT})

        assert answer.status_code == 400, name
        check_problem(answer, 400, "decrypt_failed")
        assert answer.json()["detail"] == answer.json()["title"], name


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\n",
        b"age-encryption.org/v2\n",
        b"AGE-ENCRYPTION.ORG/v1\n",
        b"age-encryption.org/v1",
        b"-----BEGIN AGE ENCRYPTED FILE-----\n",
    ],
    ids=repr,
)
def test_what_begins_with_no_age_header_is_not_a_ciphertext(service: Service, start: bytes) -> None:
    check_problem(service.post("/decrypt", {"ciphertext": b64(start)}), 422, "not_a_ciphertext")


def test_header_above_the_limit_of_a_single_call_is_refused(service: Service) -> None:
    stanza = b"-> X 1\n" + b"A" * 43 + b"\n"
    many = b"age-encryption.org/v1\n" + stanza * 65 + b"--- " + b"A" * 43 + b"\n" + bytes(32)
    long = (
        b"age-encryption.org/v1\n-> X "
        + b"1" * 33_000
        + b"\n"
        + b"A" * 43
        + b"\n--- "
        + b"A" * 43
        + b"\n"
        + bytes(32)
    )

    check_problem(service.post("/decrypt", {"ciphertext": b64(many)}), 413, "too_large")
    check_problem(service.post("/decrypt", {"ciphertext": b64(long)}), 413, "too_large")


def test_file_for_another_key_cannot_be_opened(service: Service, strict: Service) -> None:
    sealed = b64(strict.encrypt(CANARY.encode()))

    check_problem(service.post("/decrypt", {"ciphertext": sealed, "context": CONTEXT}), 400, "decrypt_failed")


# -- headers, parameters, routes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": f"{CANARY}.example"},
        {"Host": "["},
        {"Origin": f"http://{CANARY}.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", [f"{PREFIX}/encrypt", f"{PREFIX}/nowhere", "/docs", "/metrics"])
def test_foreign_page_is_refused_before_routing(service: Service, path: str, headers: dict[str, str]) -> None:
    check_problem(service.http.post(path, json={}, headers=headers), 403, "forbidden")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/encrypt/x", "not_found"),
        ("/../encrypt", "not_found"),
        ("//encrypt", "not_found"),
        ("/Encrypt", "not_found"),
    ],
)
def test_unknown_route_is_a_problem(service: Service, path: str, code: str) -> None:
    connection = HTTPConnection("127.0.0.1", service.port)
    connection.request("POST", PREFIX + path, "{}")
    answer = connection.getresponse()

    assert (answer.status, json.loads(answer.read())["code"]) == (404, code)
    connection.close()


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/encrypt"), ("PUT", "/jobs"), ("PATCH", "/health"), ("DELETE", "/jobs")]
)
def test_unknown_method_names_the_allowed_ones(service: Service, method: str, path: str) -> None:
    answer = service.http.request(method, PREFIX + path)

    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=1001",
        "limit=x",
        "limit=",
        "limit=²",
        "limit=1e3",
        f"limit={'9' * 5000}",
        "cursor=-1",
        f"cursor={CANARY}",
        "cursor=99999999999999999999",
        "state=",
        f"state={CANARY}",
        "state=QUEUED",
    ],
)  # fmt: skip
def test_listing_refuses_what_it_does_not_understand(service: Service, query: str) -> None:
    check_problem(service.get(f"/jobs?{query}"), 422, "invalid_request")


@pytest.mark.parametrize("path", ["/jobs", "/files/encrypt"])
def test_huge_idempotency_key_is_refused(service: Service, path: str) -> None:
    answer = service.post(
        path, {"kind": "encrypt", "items": [{"plaintext": ""}]}, headers={"Idempotency-Key": "k" * 257}
    )

    check_problem(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-KMS-Context": CANARY}, 422, "invalid_context"),
        ({"X-KMS-Context": f"a={CANARY},a=1"}, 422, "invalid_context"),
        ({"X-KMS-Context": "a=%ff"}, 422, "invalid_request"),
        ({"X-KMS-Context": "a=%00"}, 422, "invalid_context"),
        ({"X-KMS-Key-Id": CANARY}, 404, "unknown_key"),
        ({"X-KMS-Key-Id": f"../{CANARY}"}, 404, "unknown_key"),
        ({"X-KMS-Key-Id": ""}, 404, "unknown_key"),
        ({"X-KMS-Callback": ""}, 422, "invalid_request"),
    ],
    ids=repr,
)
def test_headers_of_an_upload_are_checked(
    service: Service, headers: dict[str, str], status: int, code: str
) -> None:
    before = service.spooled()

    check_problem(service.post("/files/encrypt", content=CANARY.encode(), headers=headers), status, code)
    assert service.spooled() == before


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?kind=encrypt", {}),
        ("", {"X-KMS-Context": f"a={CANARY}"}),
        ("", {"X-KMS-Key-Id": "default"}),
        ("", {"X-KMS-Priority": "high"}),
        ("", {"X-KMS-Callback": CANARY}),
    ],
    ids=repr,
)
def test_what_a_json_job_says_is_said_nowhere_else(
    service: Service, query: str, headers: dict[str, str]
) -> None:
    job = {"kind": "encrypt", "items": [{"plaintext": ""}]}

    check_problem(service.post(f"/jobs{query}", job, headers=headers), 422, "invalid_request")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/jobs", "GET, HEAD, POST"), ("/jobs/x", "DELETE, GET, HEAD"), ("/keys", "GET, HEAD")],
)
def test_allow_names_every_method_of_a_path(service: Service, path: str, allowed: str) -> None:
    answer = service.http.request("PATCH", f"{PREFIX}{path}")

    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/keys/", "/jobs/"])
def test_path_with_a_slash_too_many_is_not_redirected(service: Service, path: str) -> None:
    check_problem(service.get(path), 404, "not_found")


@pytest.mark.parametrize(
    "job_id",
    ["x", "..", "%2e%2e%2fetc", "00000000-0000-0000-0000-000000000000", "a" * 300, "%00", "lock:caretaker"],
)
@pytest.mark.parametrize("path", ["", "/result", "?wait=1"])
def test_unknown_job_is_nobody_s(service: Service, job_id: str, path: str) -> None:
    answer = service.get(f"/jobs/{job_id}{path}")

    assert answer.status_code == 404
    assert answer.json()["code"] in {"unknown_job", "not_found"}
