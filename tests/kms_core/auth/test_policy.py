"""Who may do what is asked in the service, once for every front, before any key is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kms_core.age import x25519
from kms_core.auth.policy import AllowAll, Principal, Remembered
from kms_core.backends.age import AgeBackend
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden
from support.age_kms import ADA, NO_CONTEXT, ROW_7, age_backend, kms_over, operation_counts


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "default", x25519.X25519Identity.generate())


class RecordingPolicy(AllowAll):
    """A policy that counts, and refuses when told to."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.calls, self.refuses = 0, refuses

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        del who, operation, key_id, context
        self.calls += 1
        if self.refuses:
            raise Forbidden


def test_policy_comes_before_any_unwrap(backend: AgeBackend) -> None:
    sealed = kms_over(backend).encrypt(ADA, b"x", ROW_7).ciphertext

    with pytest.raises(Forbidden):
        kms_over(backend, policy=RecordingPolicy(refuses=True)).decrypt(ADA, sealed, NO_CONTEXT)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("encrypt", lambda kms, _: kms.encrypt(ADA, b"x", ROW_7)),
        ("decrypt", lambda kms, sealed: kms.decrypt(ADA, sealed, ROW_7)),
        ("generate_data_key", lambda kms, _: kms.generate_data_key(ADA, 32, ROW_7)),
        ("rewrap", lambda kms, sealed: kms.rewrap(ADA, sealed, ROW_7)),
    ],
)
def test_operations_are_forbidden_unless_allowed_and_counted_by_outcome(
    backend: AgeBackend, name: str, call: Callable[[Kms, bytes], object]
) -> None:
    sealed = kms_over(backend).encrypt(ADA, b"x", ROW_7).ciphertext
    before = operation_counts()
    call(kms_over(backend), sealed)
    with pytest.raises(Forbidden):
        call(kms_over(backend, policy=RecordingPolicy(refuses=True)), sealed)
    after = operation_counts()
    counted = {at: after[at] - before.get(at, 0) for at in after if after[at] != before.get(at, 0)}

    assert counted == {(name, "ok"): 1, (name, "forbidden"): 1}


def test_without_authentication_a_caller_still_has_a_name() -> None:
    AllowAll().require(ADA, "encrypt", "default", ROW_7)

    with pytest.raises(Forbidden):
        AllowAll().require(Principal(""), "encrypt", "default", ROW_7)


# -- one batch or run --------------------------------------------------------------------------------


def test_equal_items_of_a_batch_are_checked_once() -> None:
    asked = RecordingPolicy()
    policy = Remembered(asked)
    other = Principal("ada", "rival", "test")
    row = Context.parse("row=7")
    for _ in range(100):
        policy.require(Principal("ada", "acme", "test"), "encrypt", "payroll", row)
        policy.require(ADA, "encrypt", "payroll", Context.parse({"row": "8"}))
        policy.require(ADA, "decrypt", "payroll", row)
        policy.require(ADA, "encrypt", None, row)
        policy.require(other, "encrypt", "payroll", row)

    assert asked.calls == 5


def test_what_was_withdrawn_ends_within_half_a_second_of_a_run() -> None:
    asked, now = RecordingPolicy(), [0.0]
    policy = Remembered(asked, clock=lambda: now[0])
    policy.require(ADA, "encrypt")
    asked.refuses = True
    now[0] = 0.49
    policy.require(ADA, "encrypt")
    now[0] = 0.5

    for _ in range(3):
        with pytest.raises(Forbidden):
            policy.require(ADA, "encrypt")
    assert asked.calls == 4
    asked.refuses = False
    policy.require(ADA, "encrypt")


def test_a_run_of_many_contexts_remembers_a_bounded_number() -> None:
    policy = Remembered(RecordingPolicy(), clock=lambda: 0.0)
    for row in range(5000):
        policy.require(Principal("ada"), "encrypt", "payroll", Context.parse(f"row={row}"))

    assert len(policy._allowed) <= 1000  # noqa: SLF001 -- the bound is what is tested
