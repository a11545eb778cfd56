import io
from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import anyio.from_thread
import httpcore2
import pytest

from kms_client import Client, UnexpectedAnswer, requests
from kms_client.async_transport import transport_errors
from kms_client.requests import BY_CODE, Reply, answer_error, coded_error
from kms_client.settings import ClientSettings, credentials_of
from kms_protocol import errors, wire
from kms_protocol.context import Context
from kms_protocol.errors import KmsError
from support.contract_server import ContractServer

MIB = 1024 * 1024


def tree(top: type[KmsError]) -> Iterator[type[KmsError]]:
    yield top
    for child in top.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("code", sorted({kind.code for kind in tree(KmsError)}))
def test_every_code_becomes_its_class(code: str) -> None:
    core = [kind for kind in tree(KmsError) if kind.__module__ == "kms_protocol.errors" and kind.code == code]
    body = wire.encode(
        wire.Problem(type="urn:x", title="t", status=418, detail="why", code=code, request_id="r-9")
    )

    error = answer_error(Reply(418, {}, body))

    assert type(error) is (core[-1] if core else UnexpectedAnswer)
    assert error.detail == "why"
    assert error.__notes__ == ["request id r-9"]


def test_classes_that_share_a_code_give_the_deeper_one_and_unknown_codes_keep_their_text() -> None:
    assert BY_CODE["invalid_request"] is errors.InvalidRequest
    assert BY_CODE["forbidden"] is errors.Forbidden
    assert isinstance(coded_error("of_the_future"), UnexpectedAnswer)
    assert "of_the_future" in str(coded_error("of_the_future"))


@pytest.mark.parametrize(
    ("status", "kind"), [(502, errors.Unavailable), (404, UnexpectedAnswer), (500, UnexpectedAnswer)]
)
def test_answers_of_others_are_told_from_ours(status: int, kind: type[KmsError]) -> None:
    assert type(answer_error(Reply(status, {}, b"<html>"))) is kind


@pytest.mark.parametrize(
    ("value", "expected"),
    [("7", 7.0), ("", None), ("soon", None), ("Tue, 24 Nov 2020 00:00:00 GMT", 0.0)],
    ids=["seconds", "absent", "nonsense", "date in the past"],
)
def test_retry_after_is_read(value: str, expected: float | None) -> None:
    assert Reply(503, {"retry-after": value}, b"").retry_after_s() == expected


def test_sync_client_works_inside_an_event_loop(server: ContractServer) -> None:
    async def inside() -> str:
        with Client(server.url) as kms:
            return kms.status().version

    assert anyio.run(inside) == "0.1.0"


def test_abandoned_result_gives_its_connection_back(server: ContractServer) -> None:
    with Client(server.url) as kms:
        job_id = kms.upload_encrypt(io.BytesIO(b"x" * MIB)).job_id
        kms.wait(job_id)
        with closing(cast("Any", kms.result(job_id))) as chunks:
            next(chunks)

        assert kms.status().version == "0.1.0"


def test_secrets_are_not_shown(server: ContractServer) -> None:
    call = requests.post("/encrypt", wire.EncryptIn(plaintext=b"plain"), wire.EncryptOut)
    settings = ClientSettings(server.url, token="tok-123")

    assert "cGxhaW4" not in repr(call)
    assert "tok-123" not in repr(settings)
    assert Context.parse("env=prod").keys == ("env",)


def raised_by_httpcore() -> list[type[Exception]]:
    known = [
        kind for kind in vars(httpcore2).values() if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    return [kind for kind in known if kind is not httpcore2.ConnectionNotAvailable]  # its pool keeps that one


@pytest.mark.parametrize("kind", raised_by_httpcore(), ids=lambda kind: kind.__name__)
def test_whatever_httpcore_raises_becomes_ours(kind: type[Exception]) -> None:
    with pytest.raises(KmsError), transport_errors("http://h"):
        raise kind("x")


@pytest.mark.parametrize(
    ("environ", "url", "expected"),
    [
        ({}, "https://kms.example.com", None),
        ({"HTTPS_PROXY": "http://p:3128"}, "https://kms.example.com", ("http", "p", 3128, None)),
        ({"HTTPS_PROXY": "p:3128"}, "https://kms.example.com", ("http", "p", 3128, None)),
        ({"HTTPS_PROXY": "http://u:%40@p"}, "https://kms.example.com", ("http", "p", None, ("u", "@"))),
        ({"ALL_PROXY": "https://p"}, "http://kms.example.com", ("https", "p", None, None)),
        ({"HTTP_PROXY": "http://p"}, "https://kms.example.com", None),
        ({"HTTPS_PROXY": "http://p", "NO_PROXY": "example.com"}, "https://kms.example.com", None),
        ({"ALL_PROXY": "http://p"}, "http://localhost:8082", None),
    ],
    ids=["none", "https", "no scheme", "credentials", "all", "other scheme", "not for it", "loopback"],
)
def test_proxy_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], url: str, expected: tuple[object, ...] | None
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name.lower(), value)

    found = ClientSettings(url, allow_http=True).proxy()

    assert (found and (found.scheme, found.hostname, found.port, credentials_of(found))) == expected


@pytest.mark.parametrize("proxy", ["socks5://p:1080", "http://", "http://p:port", "http://[p"])
def test_proxy_of_another_kind_is_told_of(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("https_proxy", proxy)

    with pytest.raises(errors.ConfigurationError, match="proxy"):
        ClientSettings("https://kms.example.com").proxy()
