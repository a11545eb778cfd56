"""A client that openapi-python-client makes of the OpenAPI document, unchanged, against a live service."""

import importlib
import io
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

import pytest

from support.openapi_check import FILE
from support.service import Service, b64, unb64
from support.waiting import until

PACKAGE: Final = "generated_kms_client"
# It knows no NDJSON; as bytes it could be sent, though no test does. Its own tidying up costs seconds.
CONFIG: Final = "post_hooks: []\ncontent_type_overrides: {application/x-ndjson: application/octet-stream}\n"
Package = Any


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    folder = tmp_path_factory.mktemp("generated")
    config = folder / "config.yml"
    config.write_text(CONFIG)
    subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning"),
            *("--path", FILE, "--meta", "none", "--output-path", folder / PACKAGE, "--config", config),
        ],
        check=True,
        capture_output=True,
    )
    sys.path.insert(0, str(folder))
    yield lambda name: importlib.import_module(f"{PACKAGE}.{name}")
    sys.path.remove(str(folder))


@pytest.fixture
def client(package: Package, service: Service) -> Iterator[Any]:
    with package("client").Client(
        service.url, raise_on_unexpected_status=True, httpx_args={"trust_env": False}
    ) as made:
        yield made


def finished(package: Package, client: Any, job_id: str) -> Any:  # noqa: ANN401 -- generated
    def job() -> Any:  # noqa: ANN401 -- generated
        return package("api.jobs.get_job").sync(job_id, client=client)

    until(lambda: job().state in {"succeeded", "failed", "cancelled"}, "the end of the job")
    return job()


def test_secret_goes_there_and_back(package: Package, client: Any) -> None:  # noqa: ANN401 -- generated
    models = package("models")
    sealed = package("api.secrets.encrypt").sync(
        client=client, body=models.EncryptIn(plaintext=b64(b"a secret"), context="env=prod")
    )
    opened = package("api.secrets.decrypt").sync(
        client=client, body=models.DecryptIn(ciphertext=sealed.ciphertext, context="env=prod")
    )

    assert unb64(opened.plaintext) == b"a secret"
    assert opened.origin == "service"


def test_refusal_is_a_problem_with_a_code(package: Package, client: Any) -> None:  # noqa: ANN401 -- generated
    models = package("models")
    answer = package("api.secrets.encrypt").sync_detailed(
        client=client, body=models.EncryptIn(plaintext="", context="env")
    )

    assert answer.status_code == HTTPStatus.UNPROCESSABLE_ENTITY
    assert isinstance(answer.parsed, models.Problem)
    assert answer.parsed.code == "invalid_context"


def test_file_goes_there_and_back(package: Package, client: Any) -> None:  # noqa: ANN401 -- generated
    result, file = package("api.files.job_result"), package("types").File
    plaintext = bytes(range(256)) * 1000
    job = package("api.files.encrypt_file").sync(
        client=client, body=file(io.BytesIO(plaintext)), x_kms_context="env%3Dprod"
    )
    assert finished(package, client, job.job_id).state == "succeeded"
    sealed = result.sync(job.job_id, client=client)
    again = package("api.files.decrypt_file").sync(client=client, body=sealed, x_kms_context="env%3Dprod")

    assert finished(package, client, again.job_id).state == "succeeded"
    assert result.sync(again.job_id, client=client).payload.read() == plaintext


def test_job_of_items_runs(package: Package, client: Any) -> None:  # noqa: ANN401 -- generated
    models = package("models")
    items = [{"plaintext": b64(b"one")}, {"plaintext": b64(b"two")}]
    job = package("api.jobs.submit_job").sync(
        client=client,
        body=models.JobIn.from_dict({"kind": "encrypt", "items": items}),
        idempotency_key="generated",
    )

    ended = finished(package, client, job.job_id)

    assert (ended.state, ended.progress.items_done) == ("succeeded", 2)
