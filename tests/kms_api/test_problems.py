from collections.abc import Iterator

import httpx2 as httpx
import msgspec
import pytest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from kms_api import problems
from kms_core import audit
from kms_core.jobs.model import LeaseLost
from kms_protocol import errors, wire
from kms_protocol.errors import KmsError

CONTRACT = {
    400: {"decrypt_failed"},
    401: {"unauthenticated"},
    403: {"forbidden", "path_refused", "foreign_refused"},
    404: {"unknown_key", "unknown_job"},
    409: {
        "idempotency_conflict",
        "job_not_finished",
        "job_committing",
        "group_complete",
        "rotation_refused",
        "too_many_versions",
        "target_exists",
    },
    410: {"result_expired", "result_released", "record_refused"},
    413: {"too_large"},
    422: {"invalid_request", "invalid_context", "invalid_deadline", "context_required", "not_a_ciphertext"},
    429: {"rate_limited", "tenant_share"},
    501: {"data_keys_unsupported"},
    503: {
        "backend_unavailable",
        "jobs_unavailable",
        "redis_full",
        "redis_read_only",
        "audit_unavailable",
        "install_mismatch",
    },
    507: {"spool_full", "spool_quota"},
}
LEAVES = [(status, code) for status, codes in CONTRACT.items() for code in sorted(codes)]


def tree(kind: type[KmsError]) -> Iterator[type[KmsError]]:
    for child in kind.__subclasses__():
        yield child
        yield from tree(child)


PUBLIC = [kind for kind in tree(KmsError) if kind.__module__ == errors.__name__]


async def failing(error: Exception) -> httpx.Response:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await problems.answer(error)(scope, receive, send)

    transport = httpx.ASGITransport(fail)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get("/")


def test_a_denial_that_cannot_be_recorded_is_not_answered_as_one() -> None:
    def denied(code: str) -> None:
        raise errors.AuditUnavailable(code)

    token = audit.noted.set(audit.Noted(denied))
    try:
        answer = problems.answer(errors.Forbidden("Not for you"))
    finally:
        audit.noted.reset(token)

    assert answer.status_code == 503
    assert msgspec.json.decode(answer.body)["code"] == "audit_unavailable"


def test_every_public_error_has_a_status() -> None:
    without = {kind for kind in PUBLIC if problems.answer_of(kind).status == 500}

    assert without == {errors.ConfigurationError}


@pytest.mark.parametrize(("status", "code"), LEAVES)
def test_codes_have_the_status_of_the_contract(status: int, code: str) -> None:
    found = {problems.answer_of(kind).status for kind in PUBLIC if kind.code == code}

    assert status in found
    assert len(found) == 1


def test_error_of_a_backend_has_its_parents_status() -> None:
    class ServerIsAway(errors.BackendUnavailable):
        """What a backend may add."""

    assert problems.answer_of(ServerIsAway).status == 503


def test_error_that_never_leaves_the_worker_is_an_internal_one() -> None:
    assert problems.answer_of(LeaseLost).status == 500


@pytest.mark.anyio
@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
async def test_error_is_answered_as_a_problem(kind: type[KmsError]) -> None:
    audit.request_id.set("req-1")

    answer = await failing(kind())

    problem = msgspec.json.decode(answer.content, type=wire.Problem)
    assert answer.status_code == problem.status == problems.answer_of(kind).status
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem.code == kind.code
    assert problem.type == f"urn:kms-service:problem:{kind.code}"
    assert problem.title == kind.summary
    assert problem.detail == (kind.summary if kind is not errors.BackendUnavailable else problems.AWAY)
    assert problem.request_id == "req-1"


@pytest.mark.anyio
async def test_where_a_backend_is_stands_in_the_log_alone() -> None:
    answer = await failing(errors.BackendUnavailable("https://vault.internal:8200 is sealed"))

    assert "vault.internal" not in answer.text
    assert answer.json()["detail"] == problems.AWAY


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("retry_after_s", "header"), [(0.0, "1"), (0.2, "1"), (5.0, "5"), (61.4, "62")], ids=str
)
async def test_unavailable_says_when_to_try_again(retry_after_s: float, header: str) -> None:
    answer = await failing(errors.JobsUnavailable(retry_after_s=retry_after_s))

    assert answer.headers["retry-after"] == header


@pytest.mark.anyio
async def test_too_large_points_to_the_job_api() -> None:
    answer = await failing(errors.TooLarge())

    assert answer.json()["links"] == {
        "jobs": "/api/v1/kms/jobs",
        "files": "/api/v1/kms/files/encrypt",
    }


@pytest.mark.anyio
async def test_unauthenticated_names_the_scheme() -> None:
    answer = await failing(errors.Unauthenticated())

    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.anyio
async def test_crash_tells_nothing_of_its_cause() -> None:
    answer = await failing(ValueError("canary-4711"))

    assert answer.status_code == 500
    assert answer.json()["code"] == "internal"
    assert "canary-4711" not in answer.text


def test_a_method_that_vaults_clients_may_not_use_is_answered_with_the_others() -> None:
    """RFC 9110 §15.5.6: a 405 must have Allow."""
    refusal = HTTPException(405, headers={"Allow": "GET, LIST", "X-Other": "1"})

    assert problems.vault_answer(refusal).headers["allow"] == "GET, LIST"
    assert "x-other" not in problems.vault_answer(refusal).headers


@pytest.mark.anyio
async def test_refusal_of_the_framework_is_a_problem_too() -> None:
    answer = await failing(HTTPException(418, "canary-4711", {"X-Kept": "yes"}))

    assert answer.status_code == 418
    assert answer.json()["code"] == "invalid_request"
    assert answer.headers["x-kept"] == "yes"
    assert "canary-4711" not in answer.text
