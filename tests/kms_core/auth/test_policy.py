"""Who may do what is asked in the service, once for every front, before any key is touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from kms_core.auth.policy import AllowAll, Principal, Remembered
from kms_core.backends.age import AgeBackend
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden
from support.age_kms import ADA, NO_CONTEXT, ROW, age_backend, kms_over, operation_counts


@pytest.fixture
def backend(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "default", x25519.X25519Identity.generate())


@pytest.fixture
def payroll(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "payroll", x25519.X25519Identity.generate())


class Allowing:
    """A policy of (operation, key id) pairs that keeps what it was asked."""

    def __init__(self, *allowed: tuple[str, str]) -> None:
        self._allowed = allowed
        self.asked: list[tuple[str, str, Context]] = []

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        assert key_id is not None
        assert context is not None
        self.asked.append((operation, key_id, context))
        if not who.name or (operation, key_id) not in self._allowed:
            raise Forbidden

    def sees(self, who: Principal, key_id: str) -> bool:
        return bool(who.name) and any(key_id == allowed for _, allowed in self._allowed)


def test_policy_is_asked_with_the_key_that_the_file_names(backend: AgeBackend, payroll: AgeBackend) -> None:
    sealed = kms_over(backend, {"payroll": payroll}).encrypt(ADA, b"x", ROW, key_id="payroll").ciphertext
    policy = Allowing(("decrypt", "default"))

    with pytest.raises(Forbidden):
        kms_over(backend, {"payroll": payroll}, policy=policy).decrypt(ADA, sealed, ROW)
    assert policy.asked == [("decrypt", "payroll", ROW)]


def test_policy_comes_before_any_unwrap(backend: AgeBackend) -> None:
    sealed = kms_over(backend).encrypt(ADA, b"x", ROW).ciphertext

    with pytest.raises(Forbidden):
        kms_over(backend, policy=Allowing()).decrypt(ADA, sealed, NO_CONTEXT)


OTHER: Final = Context.parse("row=8")
CALLS: Final[dict[str, Callable[[Kms, bytes], object]]] = {
    "encrypt": lambda kms, _: kms.encrypt(ADA, b"x", ROW),
    "decrypt": lambda kms, sealed: kms.decrypt(ADA, sealed, ROW),
    "generate_data_key": lambda kms, _: kms.generate_data_key(ADA, 32, ROW),
    "rewrap": lambda kms, sealed: kms.rewrap(ADA, sealed, ROW, new_context=OTHER, key_id="payroll"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_allowed_is_forbidden(backend: AgeBackend, payroll: AgeBackend, name: str) -> None:
    sealed = kms_over(backend).encrypt(ADA, b"x", ROW).ciphertext

    with pytest.raises(Forbidden):
        CALLS[name](kms_over(backend, {"payroll": payroll}, policy=Allowing()), sealed)


def test_a_rewrap_needs_decrypt_under_the_old_and_encrypt_under_the_new(
    backend: AgeBackend, payroll: AgeBackend
) -> None:
    sealed = kms_over(backend).encrypt(ADA, b"x", ROW).ciphertext
    policy = Allowing(("decrypt", "default"), ("encrypt", "payroll"))
    CALLS["rewrap"](kms_over(backend, {"payroll": payroll}, policy=policy), sealed)
    half = Allowing(("decrypt", "default"), ("encrypt", "default"))

    assert policy.asked == [("decrypt", "default", ROW), ("encrypt", "payroll", OTHER)]
    with pytest.raises(Forbidden):
        CALLS["rewrap"](kms_over(backend, {"payroll": payroll}, policy=half), sealed)


def test_without_authentication_a_caller_still_has_a_name() -> None:
    AllowAll().require(ADA, "encrypt", "default", ROW)

    with pytest.raises(Forbidden):
        AllowAll().require(Principal(""), "encrypt", "default", ROW)


@pytest.mark.parametrize("name", CALLS)
def test_operations_are_counted_by_outcome(backend: AgeBackend, payroll: AgeBackend, name: str) -> None:
    kms = kms_over(backend, {"payroll": payroll})
    sealed = kms.encrypt(ADA, b"x", ROW).ciphertext
    before = operation_counts()
    CALLS[name](kms, sealed)
    with pytest.raises(Forbidden):
        CALLS[name](kms_over(backend, {"payroll": payroll}, policy=Allowing()), sealed)
    after = operation_counts()
    counted = {at: after[at] - before.get(at, 0) for at in after if after[at] != before.get(at, 0)}

    assert counted == {(name, "ok"): 1, (name, "forbidden"): 1}


# -- one batch or run --------------------------------------------------------------------------------


class Asked(AllowAll):
    """A policy that counts, and refuses when told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.refuses = False

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        del who, operation, key_id, context
        self.calls += 1
        if self.refuses:
            raise Forbidden


def test_equal_items_of_a_batch_are_checked_once() -> None:
    asked = Asked()
    policy = Remembered(asked)
    other = Principal("ada", "rival", "test")
    row = Context.parse("row=7")
    for _ in range(100):
        policy.require(Principal("ada", "acme", "test"), "encrypt", "payroll", row)
        policy.require(Principal("ada", "acme", "test"), "encrypt", "payroll", Context.parse({"row": "8"}))
        policy.require(Principal("ada", "acme", "test"), "decrypt", "payroll", row)
        policy.require(Principal("ada", "acme", "test"), "encrypt", None, row)
        policy.require(other, "encrypt", "payroll", row)

    assert asked.calls == 5


def test_what_was_withdrawn_ends_within_half_a_second_of_a_run() -> None:
    asked, now = Asked(), [0.0]
    policy = Remembered(asked, clock=lambda: now[0])
    who = Principal("ada", "acme", "test")
    policy.require(who, "encrypt")
    asked.refuses = True
    now[0] = 0.49
    policy.require(who, "encrypt")
    now[0] = 0.5

    for _ in range(3):
        with pytest.raises(Forbidden):
            policy.require(who, "encrypt")
    assert asked.calls == 4
    asked.refuses = False
    policy.require(who, "encrypt")


def test_a_run_of_many_contexts_remembers_a_bounded_number() -> None:
    policy = Remembered(Asked(), clock=lambda: 0.0)
    for row in range(5000):
        policy.require(Principal("ada"), "encrypt", "payroll", Context.parse(f"row={row}"))

    assert len(policy._allowed) <= 1000  # noqa: SLF001 -- the bound is what is tested
