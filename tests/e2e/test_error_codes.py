"""Every error code of docs/contract.md that can be met today, brought about once over HTTP."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pyrage
import pytest

from kms_core.jobs.model import Commit
from kms_protocol.wire import PREFIX
from support.service import B64_CANARY, CANARY, Service, b64, check_problem, core_of


@pytest.fixture(scope="module")
def unaudited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An API whose audit trail cannot be written."""
    folder = tmp_path_factory.mktemp("unaudited")
    blocked = folder / "a-file"
    blocked.write_text("not a directory")
    with Service(folder, f'[kms.audit]\npath = "{blocked}/audit"\n', "unix:///nonexistent.sock") as running:
        yield running.start("api")


Call = Callable[[pytest.FixtureRequest], httpx.Response]
JOB = {"kind": "encrypt", "items": [{"plaintext": ""}]}


def on(name: str, method: str, path: str, body: object = None, **headers: str) -> Call:
    def call(request: pytest.FixtureRequest) -> httpx.Response:
        service: Service = request.getfixturevalue(name)
        return service.http.request(
            method,
            PREFIX + path,
            json=body,
            headers={key.replace("_", "-"): text for key, text in headers.items()},
        )

    return call


def decrypt_failed(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("service")
    sealed = b64(service.encrypt(CANARY.encode(), f"a={CANARY}"))
    return service.post("/decrypt", {"ciphertext": sealed, "context": f"b={CANARY}"})


def foreign_refused(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("no_redis")
    recipient = pyrage.x25519.Recipient.from_str((service.state / "age/public_key.txt").read_text().strip())
    return service.post("/decrypt", {"ciphertext": b64(pyrage.encrypt(CANARY.encode(), [recipient]))})


def idempotency_conflict(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("no_worker")
    headers = {"Idempotency-Key": CANARY}
    job = {"kind": "encrypt", "items": [{"plaintext": ""}]}
    service.post("/jobs", job, headers=headers)
    return service.post("/jobs", job | {"context": f"a={CANARY}"}, headers=headers)


def queued(service: Service) -> str:
    return service.submit({"kind": "encrypt", "items": [{"plaintext": B64_CANARY}]})


def job_not_finished(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("no_worker")
    return service.get(f"/jobs/{queued(service)}/result")


def job_committing(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("no_worker")
    job_id = queued(service)
    store = core_of(service).worker_context.store
    claim = store.claim(job_id, "a test")
    assert claim
    store.committing(claim, Commit(attempt_id=claim.attempt_id, inode=1, size_bytes=1, mtime_ns=1))
    return service.http.delete(f"{PREFIX}/jobs/{job_id}")


def result_expired(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("no_worker")
    job_id = queued(service)
    assert service.http.delete(f"{PREFIX}/jobs/{job_id}").json()["state"] == "cancelled"
    return service.get(f"/jobs/{job_id}/result")


def spool_full(request: pytest.FixtureRequest) -> httpx.Response:
    service: Service = request.getfixturevalue("no_worker")
    return service.post("/files/encrypt", content=CANARY.encode() * 100_000)


SEALABLE = {"plaintext": B64_CANARY}
BOUND = SEALABLE | {"context": f"a={CANARY}"}
OUTSIDE = {"kind": "encrypt", "source": f"file:///{CANARY}", "target": f"file:///{CANARY}"}
BULK = {"kind": "encrypt", "items": [SEALABLE], "context": f"a={CANARY}"}
CODES: list[tuple[int, str, Call]] = [
    (400, "decrypt_failed", decrypt_failed),
    (403, "forbidden", on("service", "GET", "/health", Host=f"{CANARY}.example")),
    (403, "path_refused", on("service", "POST", "/jobs", OUTSIDE)),
    (403, "foreign_refused", foreign_refused),
    (404, "unknown_key", on("service", "POST", "/encrypt", SEALABLE | {"key_id": CANARY})),
    (404, "unknown_job", on("service", "GET", f"/jobs/{CANARY}")),
    (404, "not_found", on("service", "GET", f"/{CANARY}")),
    (405, "method_not_allowed", on("service", "GET", "/encrypt")),
    (409, "idempotency_conflict", idempotency_conflict),
    (409, "job_not_finished", job_not_finished),
    (409, "job_committing", job_committing),
    (410, "result_expired", result_expired),
    (413, "too_large", on("service", "POST", "/encrypt", {"plaintext": b64(CANARY.encode() * 100_000)})),
    (422, "invalid_request", on("service", "POST", "/encrypt", {"plaintext": CANARY})),
    (422, "invalid_context", on("service", "POST", "/encrypt", SEALABLE | {"context": CANARY})),
    (422, "invalid_deadline", on("no_worker", "POST", "/jobs", JOB | {"run_by": "2020-01-01T00:00:00Z"})),
    (422, "context_required", on("no_redis", "POST", "/encrypt", SEALABLE)),
    (422, "not_a_ciphertext", on("service", "POST", "/decrypt", {"ciphertext": B64_CANARY})),
    (501, "data_keys_unsupported", on("no_worker", "POST", "/generate-key", {"context": f"a={CANARY}"})),
    (503, "jobs_unavailable", on("no_redis", "POST", "/jobs", BULK)),
    (503, "audit_unavailable", on("unaudited", "POST", "/encrypt", BOUND)),
    (507, "spool_full", spool_full),
]


@pytest.mark.parametrize(("status", "code", "call"), CODES, ids=[code for _, code, _ in CODES])
def test_every_code_is_answered_as_the_contract_says(
    request: pytest.FixtureRequest, status: int, code: str, call: Call
) -> None:
    answer = call(request)

    check_problem(answer, status, code)
    assert ("retry-after" in answer.headers) == (status in {503, 507})


def test_unhealthy_backend_is_told_by_status_alone(tmp_path: Path) -> None:
    with Service(tmp_path, redis="unix:///nonexistent.sock") as service:
        service.start("api")
        (service.state / "age/private_key.txt").write_text("no identity\n")
        answers = [service.get("/health") for _ in range(1)]
        while answers[-1].status_code == 200:
            answers.append(service.get("/health"))

        assert answers[-1].status_code == 503
        assert answers[-1].json()["status"] == "unhealthy"
        assert answers[-1].json().keys() == {"status", "backend", "checked_at"}
        assert service.http.get("/readyz").status_code == 503
        assert service.http.get("/livez").status_code == 200
        assert "backend" in service.degraded
        assert service.decrypt(service.encrypt(b"the old keys still work")) == b"the old keys still work"
