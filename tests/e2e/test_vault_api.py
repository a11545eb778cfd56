"""Vault's transit API at this service: what is bound, what is refused and how, whoever wraps the keys."""

from typing import Final

import httpx2 as httpx
import pytest

from support.credentials import bearer
from support.service import CANARY, b64, check_problem, unb64
from support.vault_api import KEYS, Facade

PLAINTEXT: Final = b64(CANARY.encode())
CONTEXT: Final = b64(b"a context")
DATA: Final = b64(b"associated")
HELLO: Final = b64(b"hello")
ASKED: Final = {"plaintext": HELLO}
BOUND: Final = {"context": CONTEXT, "associated_data": DATA}


def refused(answer: httpx.Response, status: int, words: str) -> None:
    """As Vault's clients read it; it echoes nothing."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["errors"]
    assert any(words in error for error in answer.json()["errors"]), answer.text
    assert CANARY not in answer.text
    assert PLAINTEXT not in answer.text


@pytest.fixture(params=KEYS)
def key(request: pytest.FixtureRequest) -> str:
    """A key in a file, and one in OpenBao."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def sealed(facade: Facade) -> dict[str, str]:
    """A ciphertext of each key that binds both, by key."""
    body = {"plaintext": PLAINTEXT, **BOUND}
    return {key: facade.data("PUT", f"transit/encrypt/{key}", body)["ciphertext"] for key in KEYS}


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("mount", ["transit", "a/b/transit"])
def test_what_is_sealed_opens_again(facade: Facade, key: str, mount: str, method: str) -> None:
    made = facade.data(method, f"{mount}/encrypt/{key}", {"plaintext": PLAINTEXT})
    opened = facade.data(method, f"{mount}/decrypt/{key}", {"ciphertext": made["ciphertext"]})

    assert made["ciphertext"].startswith(f"vault:v{made['key_version']}:")
    assert opened == {"plaintext": PLAINTEXT}


def test_a_ciphertext_holds_an_age_file_and_the_answer_a_whole_envelope(facade: Facade, key: str) -> None:
    answer = facade.call("PUT", f"transit/encrypt/{key}", ASKED)

    prefix, number, text = answer.json()["data"]["ciphertext"].split(":")
    assert (prefix, number) == ("vault", f"v{answer.json()['data']['key_version']}")
    assert unb64(text).startswith(b"age-encryption.org/v1\n")
    assert answer.json() | {"data": None} == {
        "request_id": answer.headers["x-request-id"],
        "lease_id": "",
        "renewable": False,
        "lease_duration": 0,
        "data": None,
        "wrap_info": None,
        "warnings": None,
        "auth": None,
    }
    assert answer.headers["x-kms-audit-id"]


WRONG: Final = {
    "no context": {"associated_data": DATA},
    "another context": {"context": DATA, "associated_data": DATA},
    "no associated data": {"context": CONTEXT},
    "other associated data": {"context": CONTEXT, "associated_data": CONTEXT},
    "exchanged": {"context": DATA, "associated_data": CONTEXT},
    "neither": {},
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("operation", ["decrypt", "rewrap"])
def test_context_and_associated_data_are_bound(
    facade: Facade, sealed: dict[str, str], key: str, given: dict[str, str], operation: str
) -> None:
    answer = facade.call("PUT", f"transit/{operation}/{key}", {"ciphertext": sealed[key], **given})

    refused(answer, 400, "message authentication failed")


def test_the_version_in_the_prefix_is_bound(facade: Facade, sealed: dict[str, str], key: str) -> None:
    number = int(sealed[key].split(":")[1].removeprefix("v"))
    edited = sealed[key].replace(f":v{number}:", f":v{number + 1}:", 1)

    assert facade.data("PUT", f"transit/decrypt/{key}", {"ciphertext": sealed[key], **BOUND})
    answer = facade.call("PUT", f"transit/decrypt/{key}", {"ciphertext": edited, **BOUND})
    refused(answer, 400, "message authentication failed")


def test_after_a_rotation_old_ciphertexts_open_and_rewrap_moves_them(facade: Facade, key: str) -> None:
    old = facade.data("PUT", f"transit/encrypt/{key}", {"plaintext": HELLO, **BOUND})
    record = facade.data("PUT", f"transit/keys/{key}/rotate")
    moved = facade.data("PUT", f"transit/rewrap/{key}", {"ciphertext": old["ciphertext"], **BOUND})

    assert record["latest_version"] == moved["key_version"] == old["key_version"] + 1
    assert moved["ciphertext"].startswith(f"vault:v{moved['key_version']}:")
    assert facade.data("GET", f"transit/keys/{key}") == record
    assert sorted(map(int, record["keys"])) == list(range(1, record["latest_version"] + 1))
    for ciphertext in (old["ciphertext"], moved["ciphertext"]):
        assert facade.data("PUT", f"transit/decrypt/{key}", {"ciphertext": ciphertext, **BOUND}) == {
            "plaintext": HELLO
        }
    old_version = {"plaintext": HELLO, "key_version": old["key_version"]}
    refused(facade.call("PUT", f"transit/encrypt/{key}", old_version), 400, "no other one encrypts")


@pytest.mark.parametrize("operation", ["decrypt", "rewrap"])
def test_a_ciphertext_of_another_key_is_refused(
    facade: Facade, sealed: dict[str, str], operation: str
) -> None:
    body = {"ciphertext": sealed["default"], **BOUND}

    refused(facade.call("PUT", f"transit/{operation}/remote", body), 400, "authentication failed")
    unknown = facade.call("PUT", f"transit/{operation}/nope", body)
    assert unknown.status_code == 400


@pytest.mark.parametrize("field", ["context", "associated_data"])
@pytest.mark.parametrize("text", ["null", "Null", "NULL"])
def test_base64_that_reads_like_nothing_is_bound_as_bytes(facade: Facade, field: str, text: str) -> None:
    made = facade.data("PUT", "transit/encrypt/default", {"plaintext": text, field: text})
    body = {"ciphertext": made["ciphertext"]}

    refused(facade.call("PUT", "transit/decrypt/default", body), 400, "message authentication failed")
    assert facade.data("PUT", "transit/decrypt/default", {**body, field: text}) == {"plaintext": text}


# -- other doors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context",
    [None, "a=b", {"kms:transit": "v1"}, "kms:transit=v1", {"kms:transit.context": CONTEXT}],
    ids=["none", "some", "reserved", "reserved text", "reserved context"],
)
@pytest.mark.parametrize("path", ["/decrypt", "/rewrap"])
def test_no_other_door_opens_what_the_facade_sealed(
    facade: Facade, key: str, context: object, path: str
) -> None:
    ciphertext = facade.data("PUT", f"transit/encrypt/{key}", ASKED)["ciphertext"]
    file = ciphertext.rpartition(":")[2]

    answer = facade.post(path, {"ciphertext": file, "context": context}, headers=bearer(facade.root))

    told = (400, "decrypt_failed") if context in (None, "a=b") else (422, "invalid_context")
    check_problem(answer, *told)


@pytest.mark.parametrize("field", ["context", "new_context"])
def test_no_other_door_seals_for_the_facade(facade: Facade, field: str) -> None:
    sealed = facade.post(
        "/encrypt", {"plaintext": HELLO, "context": "a=b"}, headers=bearer(facade.root)
    ).json()["ciphertext"]
    moved = {"ciphertext": sealed, "context": "a=b", field: {"kms:transit": "v1"}}

    check_problem(facade.post("/rewrap", moved, headers=bearer(facade.root)), 422, "invalid_context")
    answer = facade.call("PUT", "transit/decrypt/default", {"ciphertext": f"vault:v1:{sealed}"})
    refused(answer, 400, "message authentication failed")


def test_a_scope_may_ask_for_this_door_and_for_a_context(facade: Facade) -> None:
    token = facade.new_token(f"encrypt context=kms:transit=*,kms:transit.context={CONTEXT}")[1]
    body = {"plaintext": HELLO, "context": CONTEXT}

    assert facade.data("PUT", "transit/encrypt/default", body, token=token)
    for other in (body | {"context": DATA}, ASKED):
        refused(facade.call("PUT", "transit/encrypt/default", other, token=token), 403, "permission denied")
    denied = facade.post("/encrypt", {"plaintext": HELLO, "context": "a=b"}, headers=bearer(token))
    check_problem(denied, 403, "forbidden")


# -- several at once -----------------------------------------------------------------------------------


def test_a_batch_has_every_outcome_in_order(facade: Facade, key: str) -> None:
    items = [{"plaintext": b64(bytes([n])), "reference": f"r{n}", "context": CONTEXT} for n in range(3)]
    made = facade.data("POST", f"transit/encrypt/{key}", {"batch_input": items, "plaintext": None})
    sealed = [
        {"ciphertext": one["ciphertext"], "context": CONTEXT, "reference": one["reference"]}
        for one in made["batch_results"]
    ]
    moved = facade.data("POST", f"transit/rewrap/{key}", {"batch_input": sealed})["batch_results"]
    sealed[1]["ciphertext"] = moved[1]["ciphertext"]
    opened = facade.data("POST", f"transit/decrypt/{key}", {"batch_input": sealed, "ciphertext": None})

    assert opened["batch_results"] == [{"reference": f"r{n}", "plaintext": b64(bytes([n]))} for n in range(3)]


BAD_ITEMS: Final = {
    "no plaintext": ({}, "missing plaintext"),
    "bad base64": ({"plaintext": "aGVsbG8"}, "base64"),
    "unknown field": ({"plaintext": HELLO, CANARY: 1}, "unknown field"),
    "not an object": ([], "Expected"),
    "convergent": ({"plaintext": HELLO, "convergent_encryption": True}, "convergent"),
}


@pytest.mark.parametrize(("item", "words"), BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_one_bad_item_sinks_no_other_and_shows_in_the_status(
    facade: Facade, key: str, item: object, words: str
) -> None:
    body = {"batch_input": [ASKED, item]}
    answer = facade.call("PUT", f"transit/encrypt/{key}", body)
    chosen = facade.call("PUT", f"transit/encrypt/{key}", {**body, "partial_failure_response_code": 207})

    good, bad = answer.json()["data"]["batch_results"]
    assert (answer.status_code, chosen.status_code) == (400, 207)
    assert "errors" not in answer.json()
    assert facade.data("PUT", f"transit/decrypt/{key}", {"ciphertext": good["ciphertext"]})
    assert words in bad["error"]
    assert CANARY not in answer.text


def test_a_batch_of_nothing_but_refusals_is_400_whatever_was_chosen(facade: Facade) -> None:
    body = {"batch_input": [{"ciphertext": "vault:v1:AAAA"}], "partial_failure_response_code": 207}

    assert facade.call("PUT", "transit/decrypt/default", body).status_code == 400


@pytest.mark.parametrize("field", ["context", "associated_data"])
def test_what_stands_beside_a_batch_would_bind_no_item_and_is_refused(facade: Facade, field: str) -> None:
    body = {"batch_input": [ASKED], field: CONTEXT}

    refused(facade.call("PUT", "transit/encrypt/default", body), 400, "into each item")


@pytest.mark.parametrize("code", [204, 205, 304, 199, 600])
def test_a_status_that_has_no_body_cannot_be_chosen(facade: Facade, code: int) -> None:
    body = {"batch_input": [ASKED, {}], "partial_failure_response_code": code}

    refused(facade.call("PUT", "transit/encrypt/default", body), 400, "partial_failure_response_code")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1", 1), ("0", 2), ("-1", 2), ("x", 2), ("2", 2), ("9" * 5000, 2), ("\u0663", 2)],
    ids=["one", "none", "below", "no number", "all", "of many digits", "other digits"],
)
def test_a_list_has_as_many_names_as_were_asked_for(facade: Facade, limit: str, expected: int) -> None:
    found = facade.data("GET", "transit/keys", params={"list": "true", "limit": limit})

    assert found == {"keys": list(KEYS[:expected])}


# -- refusals --------------------------------------------------------------------------------------------

REFUSALS: Final[dict[str, tuple[str, object, int, str]]] = {
    "no plaintext": ("encrypt/default", {}, 400, "missing plaintext"),
    "null plaintext": ("encrypt/default", {"plaintext": None}, 400, "missing plaintext"),
    "url-safe base64": ("encrypt/default", {"plaintext": "_-8="}, 400, "base64"),
    "unpadded base64": ("encrypt/default", {"plaintext": "aGVsbG8"}, 400, "base64"),
    "bad context": ("encrypt/default", {"plaintext": HELLO, "context": "?"}, 400, "base64"),
    "number": ("encrypt/default", {"plaintext": 1}, 400, "Expected"),
    "unknown field": ("encrypt/default", {"plaintext": HELLO, CANARY: CANARY}, 400, "unknown field"),
    "nonce": ("encrypt/default", {"plaintext": HELLO, "nonce": "AAAA"}, 400, "convergent"),
    "convergent": ("encrypt/default", ASKED | {"convergent_encryption": "true"}, 400, "convergent"),
    "type": ("encrypt/default", {"plaintext": HELLO, "type": "rsa-2048"}, 400, "type"),
    "unknown key": ("encrypt/nope", ASKED, 400, "encryption key not found"),
    "unknown key decrypts": ("decrypt/nope", {"ciphertext": "vault:v1:YWdl"}, 400, "invalid ciphertext"),
    "odd key": ("encrypt/a:b", ASKED, 400, "encryption key not found"),
    "no ciphertext": ("decrypt/default", {}, 400, "missing ciphertext"),
    "no prefix": ("decrypt/default", {"ciphertext": "AAAA"}, 400, "invalid ciphertext"),
    "version 0": ("decrypt/default", {"ciphertext": "vault:v0:AAAA"}, 400, "invalid ciphertext"),
    "version 01": ("decrypt/default", {"ciphertext": "vault:v01:AAAA"}, 400, "invalid ciphertext"),
    "not base64": ("decrypt/default", {"ciphertext": "vault:v1:A!"}, 400, "base64"),
    "not a file": ("decrypt/default", {"ciphertext": "vault:v1:AAAA"}, 400, "invalid ciphertext"),
    "empty batch": ("encrypt/default", {"batch_input": []}, 400, "missing batch input"),
    "odd batch": ("encrypt/default", {"batch_input": {}}, 400, "Expected"),
    "large batch": ("encrypt/default", {"batch_input": [{}] * 1001}, 413, "1000 items"),
    "large plaintext": ("encrypt/default", {"plaintext": b64(bytes(1 << 20) + b"x")}, 413, "above"),
    "large body": ("encrypt/default", {"plaintext": "A" * (3 << 20)}, 413, "exceeds"),
    "large context": ("encrypt/default", ASKED | {"associated_data": b64(bytes(9000))}, 400, "8192 bytes"),
    "bits": ("datakey/plaintext/default", {"bits": 100}, 400, "128, 256 or 512"),
    "derived": ("keys/default", {"derived": True}, 400, "derived"),
    "convergent key": ("keys/default", {"convergent_encryption": "true"}, 400, "convergent"),
    "exportable": ("keys/default/config", {"exportable": True}, 400, "exportable"),
    "minimum": ("keys/default/config", {"min_decryption_version": 2}, 400, "retired"),
    "new key": ("keys/new", {}, 400, "encryption key not found"),
    "rotate nothing": ("keys/nope/rotate", None, 400, "encryption key not found"),
    "export": ("export/encryption-key/default", None, 404, "no handler"),
    "sign": ("sign/default", {}, 404, "no handler"),
    "empty part": ("/encrypt/default", ASKED, 404, "no handler"),
    "list": ("keys", {}, 405, "unsupported operation"),
    "no object": ("encrypt/default", [], 400, ""),
}


@pytest.mark.parametrize(("path", "body", "status", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_why_and_is_no_reason_to_try_again(
    facade: Facade, path: str, body: object, status: int, words: str
) -> None:
    refused(facade.call("PUT", f"transit/{path}", body), status, words)


def test_what_would_be_passed_over_without_a_word_is_refused(facade: Facade) -> None:
    body = {"plaintext": HELLO}

    for header, status, words in (
        ({"X-Vault-Wrap-Ttl": "60s"}, 400, "not wrapped"),
        ({"X-Vault-Namespace": "acme"}, 403, "another tenant"),
        ({"Content-Encoding": "gzip"}, 400, "Content-Encoding"),
    ):
        refused(facade.call("PUT", "transit/encrypt/default", body, headers=header), status, words)
    assert facade.data("PUT", "transit/encrypt/default", body, headers={"X-Vault-Namespace": "default/"})


def test_a_wrong_name_of_the_service_is_told_in_words_that_clients_show(facade: Facade) -> None:
    answer = facade.call("GET", "sys/health", headers={"Host": "elsewhere.example"})

    refused(answer, 403, "allowed_hosts")


# -- who may -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "nope", "kms_aaaaaaaaaa_" + "A" * 43], ids=["none", "odd", "old"])
@pytest.mark.parametrize("path", ["transit/encrypt/default", "auth/token/lookup-self", "nope"])
def test_without_a_credential_permission_is_denied(facade: Facade, path: str, token: str) -> None:
    refused(facade.call("PUT", path, {"plaintext": PLAINTEXT}, token=token), 403, "permission denied")


def test_a_token_sees_its_keys_its_tenant_and_what_it_may_do(facade: Facade) -> None:
    token = facade.new_token("encrypt key=default", tenant="acme")[1]
    paths = {"paths": ["transit/encrypt/default", "transit/decrypt/default", "transit/encrypt/remote"]}
    may = facade.data("POST", "sys/capabilities-self", paths, token=token)

    assert list(may.values()) == [["update"], ["update"], ["deny"], ["deny"]]
    assert facade.data("GET", "transit/keys?list=true", token=token) == {"keys": ["default"]}
    refused(facade.call("GET", "transit/keys/remote", token=token), 404, "not found")
    assert facade.data("GET", "auth/token/lookup-self", token=token)["meta"] == {"tenant": "acme"}


def test_operations_and_refusals_are_on_record(facade: Facade) -> None:
    made = facade.call("PUT", "transit/encrypt/default", {"plaintext": PLAINTEXT, "context": CONTEXT})
    failed = facade.call("PUT", "transit/encrypt/nope", {"plaintext": PLAINTEXT})
    denied = facade.call("PUT", "transit/encrypt/default", {}, headers={"X-Vault-Namespace": "acme"})
    events = facade.get("/audit", params={"limit": 1000}, headers=bearer(facade.root)).json()["events"]

    by_request = {event.get("request_id"): event for event in events}
    ok, unknown, turned = (by_request[one.headers["x-request-id"]] for one in (made, failed, denied))
    assert (ok["operation"], ok["result"], ok["key_id"]) == ("encrypt", "ok", "default")
    assert ok["context"].keys() == {"kms:transit", "kms:transit.context"}
    assert CONTEXT not in str(ok["context"])
    assert (unknown["operation"], unknown["result"]) == ("encrypt", "unknown_key")
    assert (turned["operation"], turned["route"]) == ("denied", "PUT /v1/{mount}/encrypt/{name}")


@pytest.mark.parametrize(
    ("asked", "path"),
    [("transit/keys/a", "transit/"), ("a/b/transit/encrypt/x", "a/b/transit/"), ("team/kv", "team/kv/")],
)
def test_the_mount_of_a_path_is_told(facade: Facade, asked: str, path: str) -> None:
    found = facade.data("GET", f"sys/internal/ui/mounts/{asked}")

    assert (found["path"], found["type"]) == (path, "transit")


# -- methods and lengths -------------------------------------------------------------------------------


def test_keys_are_listed_by_the_method_of_vault(facade: Facade) -> None:
    token = {"X-Vault-Token": facade.root}
    assert facade.http.request("LIST", "/v1/transit/keys", headers=token).json()["data"]["keys"] == [*KEYS]
    assert facade.http.request("LIST", "/v1/transit/keys/", headers=token).status_code == 200
    other = facade.http.request("PATCH", "/v1/transit/keys", headers=token)
    refused(other, 405, "unsupported")
    assert other.headers["allow"] == "GET, HEAD, LIST"
    assert facade.http.request("BREW", "/v1/transit/keys", headers=token).status_code == 400
    refused(facade.http.request("LIST", "/v1/transit/keys"), 403, "permission denied")
