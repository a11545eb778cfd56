from collections.abc import Callable
from pathlib import Path

import pytest

from kms_client import Client, ServiceUnreachable, UnexpectedAnswer, requests
from kms_protocol import errors, wire
from kms_protocol.errors import KmsError
from support.contract_server import ContractServer

Connect = Callable[..., Client]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (None, None),
        ("b=2,a=1", "%7B%22a%22%3A%221%22%2C%22b%22%3A%222%22%7D"),
        ({"ort": "Köln"}, "%7B%22ort%22%3A%22K%C3%B6ln%22%7D"),
        ({"a": "1,2"}, "%7B%22a%22%3A%221%2C2%22%7D"),
    ],
    ids=["none", "text", "utf-8", "comma"],
)
def test_context_of_an_upload_is_json(context: wire.ContextIn, expected: str | None) -> None:
    assert requests.upload("encrypt", {"context": context}).headers.get("X-KMS-Context") == expected


def test_wrong_context_costs_no_request(kms: Client, server: ContractServer) -> None:
    with pytest.raises(errors.InvalidContext):
        kms.encrypt(b"x", context="no-equals-sign")

    assert not server.seen


@pytest.mark.parametrize("context", [None, "env=prod", {"a": "1,2"}], ids=["none", "text", "mapping"])
def test_calls_there_and_back(kms: Client, context: wire.ContextIn) -> None:
    sealed = kms.encrypt(b"secret-data", context=context)
    moved = kms.rewrap(sealed.ciphertext, context=context, new_context="env=dev")
    good = wire.BatchItem(ciphertext=moved.ciphertext, context="env=dev")
    answer = kms.batch("decrypt", [good, wire.BatchItem(ciphertext=b"junk")])

    assert (sealed.key_id, sealed.key_version, sealed.backend) == ("default", "0a1b2c3d", "age")
    assert kms.decrypt(sealed.ciphertext, context=context).plaintext == b"secret-data"
    assert kms.decrypt(moved.ciphertext, context="env=dev").plaintext == b"secret-data"
    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed.ciphertext, context="env=dev")
    assert (answer.failed, answer.results[0].plaintext) == (1, b"secret-data")
    assert answer.results[1].error == wire.ErrorCode(code="not_a_ciphertext")


def test_data_keys(kms: Client, server: ContractServer) -> None:
    assert len(bytes(kms.generate_data_key("AES_128").plaintext or b"")) == 16
    assert not kms.generate_data_key(without_plaintext=True).plaintext
    server.faults.data_keys = False
    with pytest.raises(errors.DataKeysUnsupported):
        kms.generate_data_key()


def test_unhealthy_is_an_answer(kms: Client, server: ContractServer) -> None:
    assert kms.health().status == "healthy"

    server.faults.unhealthy = True

    assert kms.health().status == "unhealthy"


def test_status_and_keys(kms: Client) -> None:
    assert kms.status().operations.by["encrypt"].ok == 2
    assert [key.current_version for key in kms.keys().keys if key.default] == ["0a1b2c3d"]


def test_token_file_is_read_for_each_request(
    connect: Connect, server: ContractServer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    kms = connect(token_file=file)
    server.faults.token = "new"

    with pytest.raises(errors.Unauthenticated):
        kms.status()
    file.write_text("new\n")

    assert kms.status().version == "0.1.0"


def test_unreadable_token_file_is_a_configuration_error(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="token file"):
        connect(token_file=tmp_path / "absent").status()


@pytest.mark.parametrize("url", ["localhost:8082", "ftp://h", "http://", "http://a:b@h", "http://h:x"])
def test_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        Client(url)


@pytest.mark.parametrize(
    ("faults", "options", "expected"),
    [
        ({"busy": 2}, {}, (None, 3)),
        ({"busy": 1}, {"deadline_s": 60.0}, (None, 2)),
        ({"busy": 1, "retry_after": "3"}, {"deadline_s": 1.0}, (3.0, 1)),
        ({"busy": 1, "retry_after": "3600"}, {}, (3600.0, 1)),
        ({"busy": 1, "retry_after": None}, {}, (5.0, 1)),
    ],
    ids=["busy", "within the deadline", "after the deadline", "too long", "unsaid"],
)
def test_busy_service_is_asked_again_where_that_may_help(
    connect: Connect,
    server: ContractServer,
    faults: dict[str, object],
    options: dict[str, float],
    expected: tuple[float | None, int],
) -> None:
    for name, value in faults.items():
        setattr(server.faults, name, value)
    retry_after_s, attempts = expected
    kms = connect(**options)

    if retry_after_s is None:
        assert kms.status().version == "0.1.0"
    else:
        with pytest.raises(errors.JobsUnavailable) as caught:
            kms.status()
        assert caught.value.retry_after_s == retry_after_s
    assert len(server.seen) == attempts


def test_a_key_backend_that_did_not_answer_the_service_is_asked_once_more(
    connect: Connect, server: ContractServer
) -> None:
    """The service has asked it several times already, for as long as the caller may have to wait again."""
    server.faults.busy, server.faults.busy_with = 9, errors.BackendUnavailable
    retries: list[tuple[KmsError, float, int]] = []
    kms = connect(on_retry=lambda *retry: retries.append(retry))

    with pytest.raises(errors.BackendUnavailable):
        kms.encrypt(b"x")

    assert len(server.seen) == 2
    ((error, wait_s, left),) = retries
    assert (type(error), wait_s, left) == (errors.BackendUnavailable, 0.0, 1)


def test_retries_are_bounded(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 9

    with pytest.raises(ServiceUnreachable):
        kms.status()

    assert len(server.seen) == 3


def test_nothing_listening_says_how_to_start_it(connect: Connect) -> None:
    with pytest.raises(ServiceUnreachable) as caught:
        connect("http://127.0.0.1:9", retries=0).status()

    assert "kms up" in caught.value.hint
    assert caught.value.exit_code == 69


def test_another_server_is_recognised(kms: Client, server: ContractServer) -> None:
    server.faults.foreign_answer = True

    with pytest.raises(UnexpectedAnswer):
        kms.status()
