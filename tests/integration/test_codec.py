"""The codec server, called as Temporal's tools do, with Temporal's own data converter at both ends."""

import json
from collections.abc import Iterator, Sequence

import pytest
import temporalio.converter
from google.protobuf import json_format
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.converter import DataConverter, PayloadCodec

from callers import Guarded
from kms_cli.local.valkey import EmbeddedValkey
from service import Service, b64, check_problem, unb64

NAMESPACE = {"X-Namespace": "payroll"}


class Remote(PayloadCodec):
    """What Temporal's samples call a remote codec: each list of payloads is one POST of their JSON."""

    def __init__(self, service: Service, namespace: str) -> None:
        self._service = service
        self._headers = {"X-Namespace": namespace}

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return self._post("encode", payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return self._post("decode", payloads)

    def _post(self, verb: str, payloads: Sequence[Payload]) -> list[Payload]:
        body = json_format.MessageToDict(Payloads(payloads=payloads))
        answer = self._service.post(f"/codec/{verb}", body, headers=self._headers)
        assert answer.status_code == 200, answer.text
        return list(json_format.ParseDict(answer.json(), Payloads()).payloads)


def converter(service: Service, namespace: str = "payroll") -> DataConverter:
    return DataConverter(payload_codec=Remote(service, namespace))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


VALUES = ["salary", {"row": 7, "euro": 4200}, b"\x00\xff", None, 3.5]


@pytest.mark.anyio
async def test_values_of_a_workflow_go_there_and_back(service: Service) -> None:
    sealed = await converter(service).encode(VALUES)

    assert {payload.metadata["encoding"] for payload in sealed} == {b"binary/encrypted"}
    assert all(b"salary" not in payload.data for payload in sealed)
    assert await converter(service).decode(sealed, [str, dict, bytes, type(None), float]) == VALUES


@pytest.mark.anyio
async def test_payloads_that_are_not_sealed_stay_as_they_are(service: Service) -> None:
    plain = await temporalio.converter.default().encode(["before the codec"])

    assert await converter(service).decode(plain, [str]) == ["before the codec"]


def sealed(service: Service) -> dict[str, object]:
    payload = {"metadata": {"encoding": b64(b"json/plain")}, "data": b64(b'"x"')}
    answer = service.post("/codec/encode", {"payloads": [payload]}, headers=NAMESPACE)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


@pytest.mark.parametrize("namespace", [{}, {"X-Namespace": "other"}], ids=["none", "other"])
def test_namespace_is_bound(service: Service, namespace: dict[str, str]) -> None:
    check_problem(service.post("/codec/decode", sealed(service), headers=namespace), 400, "decrypt_failed")


def test_ciphertext_that_holds_no_payload_is_refused(service: Service) -> None:
    context = {"temporal:namespace": "payroll"}
    data = b64(service.encrypt(b"not a payload", context))
    body = {"payloads": [{"metadata": {"encoding": b64(b"binary/encrypted")}, "data": data}]}

    check_problem(service.post("/codec/decode", body, headers=NAMESPACE), 422, "invalid_request")


def test_key_is_named_in_the_payload(service: Service) -> None:
    payload = json.loads(json.dumps(sealed(service)))["payloads"][0]

    assert unb64(payload["metadata"]["encryption-key-id"]) == b"default"


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Guarded]:
    url = valkey.place.url_of(next(database_numbers))
    with Guarded(tmp_path_factory.mktemp("guarded"), redis=url) as running:
        yield running.start("api")


def test_scope_that_only_seals_opens_nothing(guarded: Guarded) -> None:
    token = guarded.token("encrypt") | NAMESPACE
    body = {"payloads": [{"data": b64(b"x")}]}

    made = guarded.post("/codec/encode", body, headers=token)

    assert made.status_code == 200
    check_problem(guarded.post("/codec/decode", made.json(), headers=token), 403, "forbidden")


@pytest.mark.parametrize(
    "body", [{"payloads": [{"data": "x"}]}, {"payloads": [{"more": 1}]}, {"payload": []}], ids=repr
)
@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_what_is_no_payload_is_refused(service: Service, verb: str, body: object) -> None:
    check_problem(service.post(f"/codec/{verb}", body), 422, "invalid_request")


@pytest.mark.parametrize("payloads", [[], [{"data": b64(b"x")}]], ids=["none", "one"])
def test_unknown_key_is_told_of(service: Service, payloads: list[object]) -> None:
    answer = service.post("/codec/encode", {"payloads": payloads}, headers={"X-KMS-Key-Id": "payrol"})

    check_problem(answer, 404, "unknown_key")


@pytest.mark.parametrize("body", [{}, {"payloads": []}], ids=repr)
def test_no_payloads_are_answered_with_none(service: Service, body: object) -> None:
    assert service.post("/codec/encode", body).json() == {"payloads": []}
