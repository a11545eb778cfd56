"""The example in examples/workflow, as its README runs it, against a real service."""

import json

import pytest

from kms_core.jobs.submission import celery_intake
from support.celery_messages import EXAMPLE, JOB, decrypted, run_example
from support.service import CANARY, Service, b64


def test_the_example_stands_alone() -> None:
    assert "import kms" not in EXAMPLE.read_text()
    assert "from kms" not in EXAMPLE.read_text()


@pytest.mark.parametrize("by_events", [False, True], ids=["by HTTP", "by events"])
def test_the_example_brings_items_home(service: Service, *, by_events: bool) -> None:
    events = ("--events", service.settings.kms.redis.url) if by_events else ()
    ran = run_example(service, JOB, "--service", service.url, *events)

    assert ran.returncode == 0, ran.stderr
    ciphertext = json.loads(ran.stdout)["ciphertext"]
    assert decrypted(service, [ciphertext], "env=prod") == [CANARY]


def test_the_example_needs_no_http(service: Service) -> None:
    (service.files / "report.txt").write_text(CANARY)
    job = {
        "kind": "encrypt",
        "source": f"file://{service.files}/report.txt",
        "target": f"file://{service.files}/report.age",
        "context": "env=prod",
    }
    recipient = str(celery_intake.recipient(service.settings.kms.jobs.intake_identity_path))
    ran = run_example(service, job, "--recipient", recipient, "--events", service.settings.kms.redis.url)

    assert ran.returncode == 0, ran.stderr
    sealed = (service.files / "report.age").read_bytes()
    assert decrypted(service, [b64(sealed)], "env=prod") == [CANARY]


def test_the_example_tells_a_failure(service: Service) -> None:
    job = {"kind": "decrypt", "items": [{"ciphertext": b64(b"no ciphertext")}]}
    ran = run_example(service, job, "--service", service.url)

    assert ran.returncode == 1
    assert "failed items_failed" in ran.stderr
    assert json.loads(ran.stdout)["error"]["code"] == "not_a_ciphertext"


def test_the_example_ends_soon_after_a_refusal_and_names_the_job(service: Service) -> None:
    job = {"kind": "encrypt", "key_id": "no-such-key", "items": [{"plaintext": b64(b"x")}]}
    ran = run_example(service, job, "--service", service.url, "--accept-within", "1")

    assert (ran.returncode, ran.stdout) == (1, "")
    job_id, _, said = ran.stderr.partition(" ")
    assert said.startswith("was not accepted within 1 s, and is not run later: ")
    assert job_id in "".join(
        line for line in service.output("worker").splitlines() if "submit.refused" in line
    )
