"""Whatever a server of a backend does, only errors of ours leave, of the right kind, in time, and clean."""

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from kms_core import http_client
from kms_core.backends.aws.backend import AwsCipher
from kms_core.backends.remote import Cipher
from kms_core.backends.vault.kv import KvCipher
from kms_core.backends.vault.transit import TransitCipher
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import BackendUnavailable
from support import openbao
from support.aws_servers import calls_to
from support.contract import faults
from support.contract.cosmian_faults import cosmian_makers
from support.contract.faults import CANARY, Fault, answer, faulty
from support.waiting import WAIT_S, until

TOKEN: Final = "s.canary-of-ours"
SECRET: Final = b"canary of a file"
LONG_S: Final = 30.0  # for calls that end by themselves
SHORT_S: Final = 1.0  # long enough for a busy machine to send the request
Maker = Callable[[str, float], Cipher]
"""A cipher of the server at this URL, with this timeout in seconds."""


def make_transit(url: str, timeout_s: float) -> Cipher:
    return TransitCipher(openbao.vault(url, token=TOKEN, timeout_s=timeout_s), "transit", "pay")


def make_vault_kv(url: str, timeout_s: float) -> Cipher:
    return KvCipher(openbao.vault(url, token=TOKEN, timeout_s=timeout_s), "secret", "pay")


def make_awskms(url: str, timeout_s: float) -> Cipher:
    return AwsCipher(calls_to(url, timeout_s=timeout_s), "alias/pay")


MAKERS: Final[dict[str, Maker]] = {
    "awskms": make_awskms,
    **cosmian_makers(TOKEN),
    "transit": make_transit,
    "vault-kv": make_vault_kv,
}
CALLS: Final[dict[str, Callable[[Cipher], object]]] = {
    "encrypt": lambda cipher: cipher.encrypt(SECRET, "1", b"aad"),
    "decrypt": lambda cipher: cipher.decrypt(bytes(64), "1", b"aad"),
    "versions": lambda cipher: cipher.versions(),
    "rotate": lambda cipher: cipher.rotate(),
}
NESTED: Final = b"[" * 100_000

FAULTS: Final[dict[str, tuple[Fault, type[BackendUnavailable]]]] = {
    "401": (answer(401), BackendUnavailable),
    "403": (answer(403), BackendUnavailable),
    "404": (answer(404), BackendUnavailable),
    "409": (answer(409), BackendUnavailable),
    "412": (answer(412), Busy),
    "418": (answer(418), BackendUnavailable),
    "429": (answer(429), Busy),
    "500": (answer(500), Busy),
    "501": (answer(501), Busy),
    "502": (answer(502), Unreachable),
    "503": (answer(503), Unreachable),
    "504": (answer(504), Unreachable),
    "page": (answer(200), BackendUnavailable),
    "page to a bad request": (answer(400), BackendUnavailable),
    "nothing": (answer(200, b""), BackendUnavailable),
    "no content": (answer(204, b""), BackendUnavailable),
    "list": (answer(200, f'["{CANARY}"]'.encode()), BackendUnavailable),
    "object": (answer(200, f'{{"canary": "{CANARY}"}}'.encode()), BackendUnavailable),
    "data of another kind": (answer(200, f'{{"data": {{"x": "{CANARY}"}}}}'.encode()), BackendUnavailable),
    "object to a bad request": (answer(400, f'{{"canary": "{CANARY}"}}'.encode()), BackendUnavailable),
    "object that is forbidden": (answer(403, f'{{"canary": "{CANARY}"}}'.encode()), BackendUnavailable),
    "nested": (answer(200, NESTED), BackendUnavailable),
    "not UTF-8": (answer(200, b'{"data": "\xff"}'), BackendUnavailable),
    "hangs up": (faults.hangs_up, Unreachable),
    "resets": (faults.resets, Unreachable),
    "cuts": (faults.cuts, Unreachable),
    "floods": (faults.floods, BackendUnavailable),
    "floods the head": (faults.floods_head, Unreachable),
    "speaks SSH": (faults.speaks_ssh, Unreachable),
}
SLOW: Final[dict[str, Fault]] = {
    "silent": faults.silent,
    "drips the head": faults.drips_head,
    "drips the body": faults.drips_body,
}


@pytest.fixture(params=MAKERS.values(), ids=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Maker:
    made: Maker = request.param
    return made


def failure(call: str, cipher: Cipher) -> BackendUnavailable:
    """The error that a call ends with, which holds nothing of what was asked or answered."""
    with pytest.raises(BackendUnavailable) as caught:
        CALLS[call](cipher)
    told = caught.value.detail + "".join(traceback.format_exception(caught.value, chain=True))
    for canary in (CANARY, TOKEN, SECRET.decode()):
        assert canary not in told
    return caught.value


def kind(error: BackendUnavailable) -> type[BackendUnavailable]:
    """How ``RemoteBackend`` tells it apart."""
    return next((known for known in (Unreachable, Busy) if isinstance(error, known)), BackendUnavailable)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_of_its_kind(make: Maker, fault: str, call: str) -> None:
    doing, expected = FAULTS[fault]
    with faulty(doing) as server:
        error = failure(call, make(server.url, LONG_S))

        assert kind(error) is expected
        assert "127.0.0.1" in error.detail
        assert server.requests


@pytest.mark.parametrize("call", ["encrypt", "decrypt", "versions"])
@pytest.mark.parametrize("fault", SLOW)
def test_a_slow_server_gets_no_more_than_the_timeout(make: Maker, fault: str, call: str) -> None:
    with faulty(SLOW[fault]) as server:
        error = failure(call, make(server.url, SHORT_S))

        assert kind(error) is Unreachable
        assert f"within {SHORT_S:g} s" in error.detail
        if server.connections:  # the time may be over before there is one, on a busy machine
            assert server.hung_up.wait(LONG_S)
            assert len(server.requests) <= 1


def test_a_call_waits_no_longer_than_its_thread_may_also_for_another_call(make: Maker) -> None:
    """For an answer, and for one that another thread waits for with more time."""

    def shorter(cipher: Cipher) -> BackendUnavailable:
        with http_client.within(SHORT_S):
            return failure("decrypt", cipher)

    with ThreadPoolExecutor(2) as threads, faulty(faults.silent) as server:
        cipher = make(server.url, 2 * WAIT_S)
        longer = threads.submit(failure, "decrypt", cipher)
        until(lambda: server.requests, "the first call waits")

        assert kind(threads.submit(shorter, cipher).result(WAIT_S)) is Unreachable
        assert not longer.done()


@pytest.mark.parametrize("fault", ["floods", "resets", "cuts"])
def test_a_connection_with_half_an_answer_is_not_used_again(make: Maker, fault: str) -> None:
    with faulty(FAULTS[fault][0]) as server:
        cipher = make(server.url, LONG_S)
        failure("versions", cipher)

        assert server.hung_up.wait(LONG_S)
        failure("versions", cipher)


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_not_there_is_unreachable(make: Maker, call: str) -> None:
    assert kind(failure(call, make(faults.unused_url(), LONG_S))) is Unreachable


@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_redirect_is_not_followed(make: Maker, status: int) -> None:
    with faulty(answer(200)) as elsewhere:
        with faulty(answer(status, b"", f"Location: {elsewhere.url}/v1/x")) as server:
            error = failure("encrypt", make(server.url, LONG_S))

        assert kind(error) is BackendUnavailable
        assert "not followed" in error.detail
        assert not elsewhere.requests


@pytest.mark.parametrize(
    ("header", "expected_s"), [("7", 7.0), ("999999", 300.0), ("soon", 0.0)], ids=["said", "bounded", "odd"]
)
def test_a_busy_server_says_when_to_come_again(make: Maker, header: str, expected_s: float) -> None:
    with faulty(answer(429, faults.PAGE, f"Retry-After: {header}")) as server:
        error = failure("encrypt", make(server.url, LONG_S))

    assert isinstance(error, Busy)
    assert error.retry_after_s == expected_s


def test_a_header_that_http_does_not_allow_is_not_in_the_error() -> None:
    """Settings refuse such a namespace; one that slips through must not be quoted, and neither a token."""
    with faulty(answer(200)) as server:
        vault = openbao.vault(server.url, token=TOKEN, namespace=f"n\r\nX: {CANARY}")

        assert (
            "characters that HTTP does not allow" in failure("encrypt", TransitCipher(vault, "t", "k")).detail
        )
        assert not server.requests
