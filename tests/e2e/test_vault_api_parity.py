"""One request to the façade and to a real server: the same status, and answers of the same shape."""

from typing import Any, Final

import httpx2 as httpx
import pytest

from support.openbao import ROOT_TOKEN, bao
from support.service import b64
from support.vault_api import Facade

HELLO: Final = b64(b"hello")
CIPHERTEXT: Final = "«ciphertext»"  # what encrypt gave for HELLO and DATA, at the server that is asked
KEY: Final = "«key»"
DATA: Final = b64(b"associated")
Request = tuple[str, str, object]
SEALED: Final = {"ciphertext": CIPHERTEXT, "associated_data": DATA}
ALIKE: Final[dict[str, Request]] = {
    "encrypt": ("PUT", "encrypt/K", {"plaintext": HELLO}),
    "encrypt by POST": ("POST", "encrypt/K", {"plaintext": HELLO, "associated_data": ""}),
    "numbers as text": ("PUT", "encrypt/K", {"plaintext": HELLO, "key_version": "0"}),
    "empty text": ("PUT", "encrypt/K", {"plaintext": ""}),
    "the key's name in the body": ("PUT", "encrypt/K", {"plaintext": HELLO, "name": KEY}),
    "the key's name at a rotation": ("POST", "keys/K/rotate", {"name": KEY}),
    "no plaintext": ("PUT", "encrypt/K", {}),
    "no version": ("PUT", "encrypt/K", {"plaintext": HELLO, "key_version": 99}),
    "decrypt": ("PUT", "decrypt/K", SEALED),
    "decrypt without data": ("PUT", "decrypt/K", {"ciphertext": CIPHERTEXT}),
    "decrypt with other data": ("PUT", "decrypt/K", {**SEALED, "associated_data": HELLO}),
    "decrypt nothing": ("PUT", "decrypt/K", {}),
    "no prefix": ("PUT", "decrypt/K", {"ciphertext": "AAAA"}),
    "too new": ("PUT", "decrypt/K", {"ciphertext": "vault:v99:AAAA"}),
    "decrypt with an unknown key": ("PUT", "decrypt/nope", SEALED),
    "rewrap with an unknown key": ("PUT", "rewrap/nope", SEALED),
    "batch": (
        "PUT",
        "encrypt/K",
        {"batch_input": [{"plaintext": HELLO, "reference": "r"}], "plaintext": None},
    ),
    "batch with a bad item": ("PUT", "decrypt/K", {"batch_input": [SEALED, {"ciphertext": "vault:v1:AAAA"}]}),
    "batch with its own status": (
        "PUT",
        "decrypt/K",
        {"batch_input": [SEALED, {"ciphertext": "vault:v1:AAAA"}], "partial_failure_response_code": 207},
    ),
    "empty batch": ("PUT", "encrypt/K", {"batch_input": []}),
    "data key": ("PUT", "datakey/plaintext/K", None),
    "wrapped data key": ("PUT", "datakey/wrapped/K", {"bits": "512"}),
    "odd bits": ("PUT", "datakey/plaintext/K", {"bits": 100}),
    "read": ("GET", "keys/K", None),
    "read an unknown key": ("GET", "keys/nope", None),
    "list": ("GET", "keys?list=true", None),
    "list with a slash": ("GET", "keys/?list=true", None),
    "LIST": ("LIST", "keys", None),
    "list what is a key": ("GET", "keys/K?list=true", None),
    "LIST what is a key": ("LIST", "keys/K", None),
    "list at an operation": ("GET", "encrypt/K?list=true", None),
    "list by 1": ("GET", "keys?list=1", None),
    "list by 1 what is a key": ("GET", "keys/K?list=1", None),
    "list by T at an operation": ("GET", "encrypt/K?list=T", None),
    "list by FALSE": ("GET", "keys/K?list=FALSE", None),
    "list by nothing": ("GET", "keys/K?list=", None),
    "a write with another word": ("PUT", "encrypt/K?list=yes", {"plaintext": HELLO}),
    "an unknown path": ("GET", "nope", None),
    "make a key that is there": ("PUT", "keys/K", None),
    "rotate": ("PUT", "keys/K/rotate", None),
    "delete": ("DELETE", "keys/K", None),
    "wrong method": ("DELETE", "encrypt/K", None),
    "not JSON": ("PUT", "encrypt/K", b"{"),
}
BESIDE: Final[dict[str, Request]] = {
    "health": ("GET", "sys/health", None),
    "seal status": ("GET", "sys/seal-status", None),
    "init": ("GET", "sys/init", None),
    "leader": ("GET", "sys/leader", None),
    "mounts": ("GET", "sys/mounts", None),
    "visible mount": ("GET", "sys/internal/ui/mounts/transit/keys/K", None),
    "self": ("GET", "auth/token/lookup-self", None),
    "capabilities": ("POST", "sys/capabilities-self", {"paths": ["transit/keys/K"]}),
    "wrong method at sys": ("DELETE", "sys/health", None),
    "an unknown path of sys": ("GET", "sys/nope", None),
    "an unknown path of auth": ("GET", "auth/nope", None),
    "renewal": ("POST", "auth/token/renew-self", {}),
}
OWN: Final = {"commit_date", "warnings"}  # members that the real one has more, and no client needs


class Side:
    """One of the two servers: where it is, its key, and what it sealed."""

    def __init__(self, url: str, token: str, key: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/v1/", headers={"X-Vault-Token": token}, trust_env=False)
        self.key = key
        body = {"plaintext": HELLO, "associated_data": DATA}
        self._sealed = self.ask(("PUT", "transit/encrypt/K", body)).json()["data"]["ciphertext"]

    def ask(self, request: Request, **headers: str) -> httpx.Response:
        method, path, body = request
        path = path.replace("/K", f"/{self.key}")
        if isinstance(body, bytes):
            return self._http.request(method, path, content=body)
        return self._http.request(method, path, json=self._filled(body), headers=headers)

    def _filled(self, body: Any) -> Any:  # noqa: ANN401 -- JSON
        if isinstance(body, dict):
            return {name: self._filled(value) for name, value in body.items()}
        if isinstance(body, list):
            return [self._filled(value) for value in body]
        if body == KEY:
            return self.key
        return self._sealed if body == CIPHERTEXT else body

    def close(self) -> None:
        self._http.close()


@pytest.fixture(scope="module")
def sides(facade: Facade) -> Any:  # noqa: ANN401 -- a generator of a pair
    ours = Side(facade.url, facade.root, "default")
    theirs = Side(bao().url, ROOT_TOKEN, bao().new_key())
    yield ours, theirs
    ours.close()
    theirs.close()


def shape(found: Any) -> Any:  # noqa: ANN401 -- JSON
    """Names and kinds, without values; what stands for a version, a key or a mount is no name."""
    if isinstance(found, dict):
        return {
            name: "texts" if name == "errors" else shape(value)
            for name, value in found.items()
            if name not in OWN and not name.isdecimal() and "/" not in name
        }
    if isinstance(found, list):
        return [shape(value) for value in found[:1]]
    return "" if found is None else type(found).__name__


@pytest.mark.parametrize("request_", ALIKE.values(), ids=ALIKE)
def test_transit_answers_as_the_real_one(sides: tuple[Side, Side], request_: Request) -> None:
    method, path, body = request_
    ours, theirs = (side.ask((method, f"transit/{path}", body)) for side in sides)

    assert ours.status_code == theirs.status_code or (ours.status_code, theirs.status_code) == (200, 204)
    if theirs.content:
        assert shape(ours.json()) == shape(theirs.json())


@pytest.mark.parametrize("request_", BESIDE.values(), ids=BESIDE)
def test_what_is_asked_beside_it_is_answered_alike(sides: tuple[Side, Side], request_: Request) -> None:
    ours, theirs = (side.ask(request_) for side in sides)

    assert ours.status_code == theirs.status_code
    missing = shape(theirs.json()).keys() - shape(ours.json()).keys()
    assert not missing


ENCRYPT: Final[Request] = ("PUT", "transit/encrypt/K", {"plaintext": HELLO})


@pytest.mark.parametrize("ttl", ["", "0", "0s"])
def test_a_wrap_ttl_of_nothing_wraps_nothing(sides: tuple[Side, Side], ttl: str) -> None:
    for side in sides:
        answer = side.ask(ENCRYPT, **{"X-Vault-Wrap-TTL": ttl})
        assert (answer.status_code, answer.json()["wrap_info"]) == (200, None)


REFUSED: Final[dict[str, tuple[Request, dict[str, str], int, str]]] = {
    "an unknown field": (
        ("PUT", "transit/encrypt/K", {"plaintext": HELLO, "contxt": DATA}),
        {},
        400,
        "context",
    ),
    "another name in the body": (
        ("PUT", "transit/encrypt/K", {"plaintext": HELLO, "name": "x"}),
        {},
        400,
        "name",
    ),
    "a wrapped answer": (ENCRYPT, {"X-Vault-Wrap-TTL": "60s"}, 400, "not wrapped"),
    "random bytes": (("POST", "transit/random/16", None), {}, 404, "no handler"),
    "a mount's tuning": (("GET", "sys/mounts/transit/tune", None), {}, 404, "no handler"),
}


@pytest.mark.parametrize(("request_", "headers", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_real_one_does_and_this_one_does_not_is_named(
    sides: tuple[Side, Side], request_: Request, headers: dict[str, str], status: int, words: str
) -> None:
    ours, theirs = (side.ask(request_, **headers) for side in sides)

    assert theirs.status_code == 200
    assert ours.status_code == status
    assert words in ours.json()["errors"][0]
