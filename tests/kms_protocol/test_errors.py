import re
from collections import Counter
from collections.abc import Iterator

import pytest

from kms_core.age.x25519 import NoMatch
from kms_protocol import errors
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError, Unavailable

ABSTRACT = {"BadInput", "Refused", "Missing", "Conflict", "Unavailable"}
SHARED = {"invalid_request", "forbidden"}  # a kind and its plainest case
PUBLISHED = {
    "decrypt_failed", "unauthenticated", "forbidden", "path_refused", "foreign_refused", "unknown_key",
    "unknown_job", "idempotency_conflict", "job_not_finished", "job_committing", "target_exists",
    "result_expired", "too_large", "rate_limited", "invalid_request", "invalid_context", "context_required",
    "not_a_ciphertext", "data_keys_unsupported", "backend_unavailable", "jobs_unavailable",
    "audit_unavailable", "result_released", "group_complete",
    "redis_full", "redis_read_only", "install_mismatch", "rotation_refused", "too_many_versions",
    "tenant_share", "spool_quota", "spool_full",
}  # fmt: skip
EXIT_CODES = {1, 65, 69, 73, 77, 78}  # sysexits.h; 0 and 2 are not for errors of ours


def below(kind: type[KmsError]) -> Iterator[type[KmsError]]:
    """The kind and all that the module declares beneath it."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from below(child)


TREE = tuple(below(KmsError))
every_error = pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)


def test_codes_are_unique() -> None:
    counted = Counter(error.code for error in TREE)

    assert {code for code, times in counted.items() if times > 1} == SHARED


def test_every_published_code_is_there() -> None:
    assert {error.code for error in TREE if error.__name__ not in ABSTRACT} >= PUBLISHED


@every_error
def test_an_error_has_a_code_of_words_and_an_exit_code_of_sysexits(error: type[KmsError]) -> None:
    """A branch keeps its exit code."""
    parent = error.__mro__[1]

    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", error.code)
    assert error.exit_code in EXIT_CODES
    if issubclass(parent, KmsError) and parent is not KmsError:
        assert error.exit_code == parent.exit_code


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("internal", 1), ("unknown_key", 1), ("decrypt_failed", 65), ("invalid_context", 65),
        ("not_a_ciphertext", 65), ("backend_unavailable", 69), ("spool_full", 69), ("target_exists", 73),
        ("forbidden", 77), ("unauthenticated", 77), ("configuration", 78),
    ],
)  # fmt: skip
def test_exit_codes_of_what_scripts_look_for(code: str, exit_code: int) -> None:
    assert {error.exit_code for error in TREE if error.code == code} == {exit_code}


@every_error
def test_an_error_says_what_it_was_given_or_its_summary(error: type[KmsError]) -> None:
    assert str(error()) == error().detail == error.summary
    assert str(error("The tape is full")) == error("The tape is full").detail == "The tape is full"


@every_error
def test_only_what_may_be_tried_again_says_when(error: type[KmsError]) -> None:
    assert hasattr(error(), "retry_after_s") == issubclass(error, Unavailable)


def test_a_retry_has_a_delay() -> None:
    assert BackendUnavailable().retry_after_s == 5
    assert BackendUnavailable("later", retry_after_s=30).retry_after_s == 30


def test_no_match_looks_like_every_other_failure() -> None:
    assert NoMatch().code == DecryptFailed.code
    assert str(NoMatch()) == str(DecryptFailed())
