from collections.abc import Callable
from pathlib import Path

import pytest

from kms_client import Client, ServiceUnreachable, UnexpectedAnswer, requests
from kms_protocol import errors, wire
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
def test_round_trip(kms: Client, context: wire.ContextIn) -> None:
    sealed = kms.encrypt(b"secret-data", context=context)

    assert kms.decrypt(sealed.ciphertext, context=context).plaintext == b"secret-data"
    assert (sealed.key_id, sealed.key_version, sealed.backend) == ("default", "0a1b2c3d", "age")


def test_wrong_context_is_decrypt_failed(kms: Client) -> None:
    sealed = kms.encrypt(b"secret-data", context="env=prod")

    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed.ciphertext, context="env=dev")


def test_data_key_with_and_without_plaintext(kms: Client) -> None:
    assert len(bytes(kms.generate_data_key("AES_128").plaintext or b"")) == 16
    assert not kms.generate_data_key(without_plaintext=True).plaintext


def test_refused_data_keys(kms: Client, server: ContractServer) -> None:
    server.faults.data_keys = False

    with pytest.raises(errors.DataKeysUnsupported):
        kms.generate_data_key()


def test_rewrap_changes_the_context(kms: Client) -> None:
    sealed = kms.encrypt(b"x", context="env=dev")

    moved = kms.rewrap(sealed.ciphertext, context="env=dev", new_context="env=prod")

    assert kms.decrypt(moved.ciphertext, context="env=prod").plaintext == b"x"


def test_batch_keeps_refusals_in_place(kms: Client) -> None:
    good = wire.BatchItem(ciphertext=kms.encrypt(b"x").ciphertext)

    answer = kms.batch("decrypt", [good, wire.BatchItem(ciphertext=b"junk")])

    assert answer.failed == 1
    assert answer.results[0].plaintext == b"x"
    assert answer.results[1].error == wire.ErrorCode(code="not_a_ciphertext")


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


def test_busy_service_is_asked_again(kms: Client, server: ContractServer) -> None:
    server.faults.busy = 2

    assert kms.status().version == "0.1.0"
    assert len(server.seen) == 3


@pytest.mark.parametrize("retry_after", [None, "3600"], ids=["unsaid", "too long"])
def test_no_retry_without_a_short_retry_after(
    kms: Client, server: ContractServer, retry_after: str | None
) -> None:
    server.faults.busy, server.faults.retry_after = 1, retry_after

    with pytest.raises(errors.JobsUnavailable) as caught:
        kms.status()

    assert caught.value.retry_after_s == float(retry_after or 5)
    assert len(server.seen) == 1


def test_retries_are_bounded(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 9

    with pytest.raises(ServiceUnreachable):
        kms.status()

    assert len(server.seen) == 3


def test_no_attempt_begins_after_the_deadline(connect: Connect, server: ContractServer) -> None:
    server.faults.busy, server.faults.retry_after = 1, "3"

    with pytest.raises(errors.JobsUnavailable):
        connect(deadline_s=1.0).status()

    assert len(server.seen) == 1


def test_deadline_leaves_room_for_attempts_within_it(connect: Connect, server: ContractServer) -> None:
    server.faults.busy = 1

    assert connect(deadline_s=60.0).status().backend

    assert len(server.seen) == 2


def test_nothing_listening_says_how_to_start_it(connect: Connect) -> None:
    with pytest.raises(ServiceUnreachable) as caught:
        connect("http://127.0.0.1:9", retries=0).status()

    assert "kms up" in caught.value.hint
    assert caught.value.exit_code == 69


def test_another_server_is_recognised(kms: Client, server: ContractServer) -> None:
    server.faults.foreign_answer = True

    with pytest.raises(UnexpectedAnswer):
        kms.status()
