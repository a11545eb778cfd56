"""The vault-kv backend against a real OpenBao: who makes its key, who may not, and when a change is seen."""

import base64
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from uuid import uuid4

import httpx2 as httpx
import pytest

from kms_core.backends import KeyMissing
from kms_core.backends.vault.kv import KvCipher
from kms_core.http_client import Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed
from support import openbao
from support.contract.faults import answer, faulty
from support.openbao import Bao, kv
from support.tcp_proxy import TcpProxy

SECRET: Final = bytes(range(16))
AAD: Final = b"names and a context"
KEY: Final = base64.b64encode(bytes(range(32))).decode()
WHILE_IN_MEMORY_S: Final = 600.0
CALLS: Final[dict[str, Callable[[KvCipher], object]]] = {
    "encrypt": lambda cipher: cipher.encrypt(SECRET, "1", AAD),
    "decrypt": lambda cipher: cipher.decrypt(bytes(64), "1", AAD),
    "versions": lambda cipher: cipher.versions(),
}


@pytest.fixture
def server() -> Bao:
    return openbao.bao()


@pytest.fixture
def path() -> str:
    """A path where nothing is."""
    return f"tests/{uuid4().hex}"


@pytest.fixture
def cipher(server: Bao, path: str) -> KvCipher:
    """A key with one version."""
    made = kv(server, path)
    made.rotate()
    return made


def stored(server: Bao, path: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = server.admin("GET", f"secret/data/{path}")["data"]["data"]
    return found


def names(cipher: KvCipher) -> list[str]:
    return [version.version for version in cipher.versions()]


# -- making the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_key_is_not_made_by_the_way(server: Bao, path: str, call: str) -> None:
    with pytest.raises(KeyMissing):
        CALLS[call](kv(server, path))
    with pytest.raises(httpx.HTTPStatusError):
        stored(server, path)


def test_the_command_in_the_error_makes_a_key_once(server: Bao, path: str) -> None:
    cipher = kv(server, path)
    with pytest.raises(KeyMissing) as caught:
        cipher.versions()
    command = caught.value.detail.partition("`bao ")[2].rpartition("`")[0]
    words = command.replace('"$(openssl rand -base64 32)"', KEY).split()
    server.cli(*words)
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    assert cipher.decrypt(wrapped, "1", AAD) == SECRET
    with pytest.raises(openbao.BaoRefused, match="check-and-set"):
        server.cli(*words)


def test_who_comes_second_in_a_race_for_the_first_version_takes_that_of_the_other(
    server: Bao, path: str, cipher: KvCipher
) -> None:
    """It saw nothing there yet."""
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    def act(connection: socket.socket) -> None:
        absent = len(front.requests) == 1
        (answer(404, b'{"errors": []}') if absent else server.passes_on(front))(connection)

    with faulty(act) as front:
        second = kv(server, path, address=front.url)

        assert second.rotate().version == "1"
        assert second.decrypt(wrapped, "1", AAD) == SECRET
    assert stored(server, path).keys() == {"1"}


@pytest.mark.parametrize("there", [0, 1], ids=["the first", "the next"])
def test_racing_rotations_lose_no_version(server: Bao, path: str, there: int) -> None:
    cipher, before = kv(server, path), b""
    if there:
        cipher.rotate()
        before = cipher.encrypt(SECRET, "1", AAD)
    ciphers = [kv(server, path) for _ in range(8)]
    together = threading.Barrier(len(ciphers))

    def race(each: KvCipher) -> tuple[str, bytes]:
        together.wait()
        made = each.rotate().version
        return made, each.encrypt(SECRET, made, AAD)

    with ThreadPoolExecutor(len(ciphers)) as pool:
        made = list(pool.map(race, ciphers))

    assert not there or cipher.decrypt(before, "1", AAD) == SECRET
    assert all(cipher.decrypt(wrapped, version, AAD) == SECRET for version, wrapped in made)


@pytest.mark.parametrize("after", [True, False], ids=["after its effect", "before it"])
def test_a_rotation_whose_answer_is_lost_is_looked_up_and_not_repeated(
    server: Bao, path: str, cipher: KvCipher, *, after: bool
) -> None:
    target = f"/v1/secret/data/{path}".encode()
    with server.losing(target, after=after) as front:
        behind = kv(server, path, address=front.url)
        if after:
            assert behind.rotate().version == "2"
        else:
            with pytest.raises(Unreachable):
                behind.rotate()

        assert sum(request.startswith(b"POST " + target) for request in front.requests) == 1
    assert names(cipher) == (["1", "2"] if after else ["1"])


def test_a_deleted_key_is_neither_used_nor_written_over(server: Bao, path: str, cipher: KvCipher) -> None:
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    server.cli("kv", "delete", "-mount=secret", path)
    for call in (*CALLS.values(), KvCipher.rotate):
        with pytest.raises(BackendUnavailable, match="bao kv undelete"):
            call(cipher)
    server.cli("kv", "undelete", "-versions=1", "-mount=secret", path)

    assert cipher.decrypt(wrapped, "1", AAD) == SECRET


@pytest.mark.parametrize(
    "content",
    [
        {"password": "canary"},
        {"1": "canary"},
        {"1": base64.b64encode(bytes(31)).decode()},
        {"0": KEY},
        {"1": KEY, "note": "canary"},
        {"1": {"key": KEY, "created_at": "canary"}},
        {"1": 7},
        {},
    ],
    ids=["another secret", "no base64", "short", "version 0", "mixed", "no time", "number", "empty"],
)
def test_a_secret_that_holds_something_else_is_refused_and_left_alone(
    server: Bao, path: str, content: dict[str, object]
) -> None:
    server.admin("POST", f"secret/data/{path}", {"data": content})
    for call in (*CALLS.values(), KvCipher.rotate):
        with pytest.raises(BackendUnavailable, match="something else than wrapping keys") as caught:
            call(kv(server, path))
        assert "canary" not in caught.value.detail

    assert stored(server, path) == content


# -- versions ------------------------------------------------------------------------------------------


def test_a_removed_version_opens_nothing_any_more(server: Bao, path: str, cipher: KvCipher) -> None:
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    cipher.rotate()
    kept = {"2": stored(server, path)["2"]}
    server.admin("POST", f"secret/data/{path}", {"data": kept})

    assert names(cipher) == ["2"]
    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, "1", AAD)


def test_a_version_of_another_process_opens_at_once(server: Bao, path: str, cipher: KvCipher) -> None:
    elsewhere = kv(server, path, cache_s=WHILE_IN_MEMORY_S)
    elsewhere.versions()
    made = cipher.rotate()

    assert made.created_at is not None
    assert elsewhere.decrypt(cipher.encrypt(SECRET, "2", AAD), "2", AAD) == SECRET


@pytest.mark.parametrize("version", ["0", "01", "2", "-1", "latest", "9" * 30])
def test_a_version_that_is_not_there_opens_nothing(cipher: KvCipher, version: str) -> None:
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, version, AAD)
    with pytest.raises(BackendUnavailable, match="has no version"):
        cipher.encrypt(SECRET, version, AAD)


# -- what stays in memory ------------------------------------------------------------------------------


@pytest.mark.usefixtures("cipher")
@pytest.mark.parametrize("cache_s", [0.0, WHILE_IN_MEMORY_S], ids=["nothing", "the keys"])
def test_without_the_server_only_what_is_in_memory_works(server: Bao, path: str, cache_s: float) -> None:
    relay = TcpProxy(server.port)
    behind = kv(server, path, cache_s=cache_s, address=relay.url)
    wrapped = behind.encrypt(SECRET, "1", AAD)
    relay.cut()

    with pytest.raises(Unreachable):
        behind.versions()
    if cache_s:
        assert behind.decrypt(wrapped, "1", AAD) == SECRET
    else:
        with pytest.raises(Unreachable):
            behind.decrypt(wrapped, "1", AAD)
    relay.mend()
    assert behind.decrypt(wrapped, "1", AAD) == SECRET


@pytest.mark.usefixtures("cipher")
def test_a_refusal_takes_the_keys_out_of_memory(server: Bao, path: str) -> None:
    token = server.token()
    ours = kv(server, path, cache_s=WHILE_IN_MEMORY_S, token=token)
    wrapped = ours.encrypt(SECRET, "1", AAD)
    server.admin("POST", "auth/token/revoke", {"token": token})

    assert ours.decrypt(wrapped, "1", AAD) == SECRET
    with pytest.raises(BackendUnavailable, match="token_file"):
        ours.versions()
    with pytest.raises(BackendUnavailable, match="token_file"):
        ours.decrypt(wrapped, "1", AAD)


# -- KV version 1, which is all that RustyVault has ------------------------------------------------------


@pytest.fixture
def mount(server: Bao) -> str:
    """A mount without check-and-set; nothing is there yet."""
    mount = f"kv{uuid4().hex}"
    server.cli("secrets", "enable", f"-path={mount}", "-version=1", "kv")
    return mount


@pytest.fixture
def first(server: Bao, mount: str) -> KvCipher:
    return KvCipher(
        openbao.vault(server.url, token=openbao.ROOT_TOKEN), mount, "kms/pay", kv_version=1, cache_s=0.0
    )


def test_on_version_1_an_operator_makes_the_key_and_the_service_writes_nothing(
    server: Bao, first: KvCipher
) -> None:
    with pytest.raises(BackendUnavailable, match="add one by hand"):
        first.rotate()
    with pytest.raises(KeyMissing) as caught:
        first.versions()
    command = caught.value.detail.partition("`bao ")[2].rpartition("`")[0]
    server.cli(*command.replace('"$(openssl rand -base64 32)"', KEY).split())
    wrapped = first.encrypt(SECRET, "1", AAD)

    assert names(first) == ["1"]
    assert first.decrypt(wrapped, "1", AAD) == SECRET


@pytest.mark.usefixtures("cipher")
@pytest.mark.parametrize("call", ["versions", "encrypt"])
def test_the_wrong_kv_version_is_told(server: Bao, path: str, mount: str, call: str) -> None:
    as_1 = KvCipher(openbao.vault(server.url, token=openbao.ROOT_TOKEN), "secret", path, kv_version=1)
    as_2 = KvCipher(openbao.vault(server.url, token=openbao.ROOT_TOKEN), mount, path)

    with pytest.raises(BackendUnavailable, match=r"set kms\.vault_kv\.kv_version = 2"):
        CALLS[call](as_1)
    with pytest.raises(BackendUnavailable, match=r"set kms\.vault_kv\.kv_version = 1"):
        as_2.rotate()


def test_a_missing_mount_is_told_with_the_command_that_enables_it(server: Bao) -> None:
    cipher = KvCipher(openbao.vault(server.url, token=openbao.ROOT_TOKEN), "nowhere", "pay")

    with pytest.raises(BackendUnavailable, match="`bao secrets enable -path=nowhere kv-v2`"):
        cipher.versions()
