"""Answers about jobs: why a job failed and what to do, in words for people."""

import msgspec
import pytest

from kms_api.routes.job_answers import shape
from kms_core.jobs.model import Job
from kms_core.jobs.spec import SignedEnd
from kms_protocol import wire
from kms_protocol.error_texts import TEXTS

CODES = [
    "attempts_exhausted",
    "cancelled",
    "context_required",
    "data_keys_unsupported",
    "decrypt_failed",
    "expired",
    "forbidden",
    "foreign_refused",
    "invalid_context",
    "not_a_ciphertext",
    "not_started",
    "path_refused",
    "record_refused",
    "result_expired",
    "spool_full",
    "target_exists",
    "too_large",
    "unknown_key",
]
"""The codes of docs/contract.md with which a job or one of its items can end."""


def failed(error: str, *failures: tuple[int, str]) -> wire.JobError:
    end = SignedEnd(fence=1, attempt=1, state="failed", failures=failures, kept_until=0.0)
    job = Job(
        job_id="j",
        tenant="t",
        kind="decrypt",
        state="failed",
        error=error,
        items=3,
        items_failed=2,
        end=end if failures else None,
    )
    found = shape(job).error
    assert found
    return found


@pytest.mark.parametrize("code", CODES)
def test_a_failed_job_says_what_happened_and_what_to_do(code: str) -> None:
    found = failed(code)

    assert found.code == code
    assert isinstance(found.detail, str)
    assert isinstance(found.hint, str)
    assert found.detail[0].isupper()
    assert not found.hint.endswith(".")


def test_there_are_no_words_for_a_code_that_does_not_exist() -> None:
    assert [code for code, text in TEXTS.items() if text.job_detail] == CODES
    assert [code for code, text in TEXTS.items() if text.job_hint] == CODES


def test_failed_items_are_explained_by_the_first_of_them() -> None:
    found = failed("items_failed", (1, "expired"), (2, "decrypt_failed"))

    assert msgspec.to_builtins(found) == {
        "code": "items_failed",
        "detail": "2 of 3 items failed, the first at index 1: it had not ended by its run_by",
        "hint": "submit it again with a later run_by; `kms job result` shows which and why",
        "items": [{"index": 1, "code": "expired"}, {"index": 2, "code": "decrypt_failed"}],
    }


def test_a_code_without_words_is_told_as_it_is() -> None:
    assert msgspec.to_builtins(failed("of_the_future")) == {"code": "of_the_future"}
    assert failed("items_failed", (0, "of_the_future")).detail == "2 of 3 items failed"
