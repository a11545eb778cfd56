"""What a credential's scopes decide in the service: operation, key and context, and what refusals tell."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pytest

from kms_core import scopes
from kms_core.age import x25519
from kms_core.auth.policy import INTERNAL, ByScopes, Principal, allows
from kms_core.backends.age import AgeBackend
from kms_core.patterns import Pattern
from kms_core.scopes import Scope
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, Forbidden, KmsError, Unavailable, UnknownKey
from support.age_kms import NO_CONTEXT, ROW_7, MemoryTrail, age_backend, kms_over

WHO: Final = Principal("ada", "acme", "token:x")
ROOT: Final = Principal("root", "acme", "token:root")
OTHER: Final = Context.parse("row=8")


class FixedScopes:
    """What credentials are worth, by name; one that is not here is worth nothing."""

    def __init__(self, *lines: str) -> None:
        self.lines = {WHO.credential: lines, ROOT.credential: ("*",)}
        self.away = False

    def scopes_of(self, who: Principal) -> Iterable[Scope]:
        if self.away:
            raise Unavailable
        if who.credential not in self.lines:
            raise Forbidden
        return [scopes.parse(line) for line in self.lines[who.credential]]


@pytest.fixture
def backends(tmp_path: Path) -> dict[str, AgeBackend]:
    names = ("default", "pay-1", "pay-2")
    return {name: age_backend(tmp_path / name, x25519.X25519Identity.generate()) for name in names}


def kms(
    backends: dict[str, AgeBackend], *lines: str, trail: MemoryTrail | None = None, tenant_keys: str = ""
) -> Kms:
    others = {name: backend for name, backend in backends.items() if name != "default"}
    tenants = {"acme": [Pattern.parse(tenant_keys)]} if tenant_keys else {}
    policy = ByScopes(FixedScopes(*lines).scopes_of, tenants)
    return kms_over(backends["default"], others, policy=policy, trail=trail)


def refused(error: type[KmsError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return caught.value.detail


# -- keys: unknown and forbidden are one answer ------------------------------------------------------------


@pytest.mark.parametrize("key_id", ["default", "pay-2", "no-such-key"])
def test_a_key_that_is_not_for_the_caller_is_as_one_that_does_not_exist(
    backends: dict[str, AgeBackend], key_id: str
) -> None:
    service = kms(backends, "encrypt,decrypt,generate_data_key,rotate key=pay-1")
    calls: list[Callable[[], object]] = [
        lambda: service.encrypt(WHO, b"x", ROW_7, key_id=key_id),
        lambda: service.generate_data_key(WHO, 32, ROW_7, key_id=key_id),
        lambda: service.rotate(WHO, key_id),
    ]

    assert {refused(UnknownKey, call) for call in calls} == {UnknownKey.summary}


@pytest.mark.parametrize("key_id", ["pay-1", "no-such-key"])
def test_a_missing_operation_says_nothing_of_the_key(backends: dict[str, AgeBackend], key_id: str) -> None:
    service = kms(backends, "decrypt key=pay-1")

    text = refused(Forbidden, lambda: service.encrypt(WHO, b"x", ROW_7, key_id=key_id))
    assert text == "This token lacks `encrypt`"


@pytest.mark.parametrize("key_id", ["pay-1", "pay-77"])
def test_a_wrong_context_says_nothing_of_the_key(backends: dict[str, AgeBackend], key_id: str) -> None:
    service = kms(backends, "encrypt key=pay-* context=row=8")

    assert "context" in refused(Forbidden, lambda: service.encrypt(WHO, b"x", ROW_7, key_id=key_id))


def test_a_file_names_its_key_and_that_one_is_asked_for(backends: dict[str, AgeBackend]) -> None:
    service = kms(backends, "decrypt key=pay-1")
    mine = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-1").ciphertext
    theirs = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-2").ciphertext

    assert service.decrypt(WHO, mine, ROW_7).plaintext == b"x"
    refused(UnknownKey, lambda: service.decrypt(WHO, theirs, ROW_7))
    refused(UnknownKey, lambda: service.decrypt(WHO, theirs, ROW_7, key_id="pay-1"))


def test_the_default_key_is_a_key_like_any(backends: dict[str, AgeBackend]) -> None:
    service = kms(backends, "encrypt key=pay-1")

    refused(UnknownKey, lambda: service.encrypt(WHO, b"x", ROW_7))


# -- contexts --------------------------------------------------------------------------------------------


def test_who_is_held_to_a_context_must_give_it(backends: dict[str, AgeBackend]) -> None:
    service = kms(backends, "encrypt,decrypt context=row=7")
    sealed = service.encrypt(WHO, b"x", ROW_7).ciphertext
    foreign = service.encrypt(ROOT, b"x", NO_CONTEXT).ciphertext
    other = service.encrypt(ROOT, b"x", OTHER).ciphertext

    assert service.decrypt(WHO, sealed, ROW_7).plaintext == b"x"
    for context in (NO_CONTEXT, OTHER):
        refused(Forbidden, lambda context=context: service.encrypt(WHO, b"x", context))  # type: ignore[misc]  # default argument
        refused(Forbidden, lambda context=context: service.decrypt(WHO, sealed, context))  # type: ignore[misc]  # as above
    refused(DecryptFailed, lambda: service.decrypt(WHO, foreign, ROW_7))
    refused(DecryptFailed, lambda: service.decrypt(WHO, other, ROW_7))


def test_one_scope_must_allow_all_of_it(backends: dict[str, AgeBackend]) -> None:
    service = kms(
        backends, "encrypt key=pay-1 context=row=7", "decrypt key=pay-2", "encrypt key=pay-2 context=row=8"
    )

    assert service.encrypt(WHO, b"x", ROW_7, key_id="pay-1").key.key_id == "pay-1"
    refused(Forbidden, lambda: service.encrypt(WHO, b"x", ROW_7, key_id="pay-2"))
    refused(Forbidden, lambda: service.encrypt(WHO, b"x", OTHER, key_id="pay-1"))


# -- moving without opening ----------------------------------------------------------------------------------


def test_rewrap_alone_moves_a_file_that_the_caller_cannot_open(backends: dict[str, AgeBackend]) -> None:
    service = kms(backends, "rewrap key=pay-1")
    sealed = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-1").ciphertext
    moved = service.rewrap(WHO, sealed, ROW_7).ciphertext

    assert service.decrypt(ROOT, moved, ROW_7).plaintext == b"x"
    refused(Forbidden, lambda: service.decrypt(WHO, sealed, ROW_7))


@pytest.mark.parametrize(
    ("key_id", "new_context"),
    [("pay-2", None), (None, OTHER), ("pay-2", OTHER)],
    ids=["key", "context", "both"],
)
def test_rewrap_alone_takes_a_file_nowhere_else(
    backends: dict[str, AgeBackend], key_id: str | None, new_context: Context | None
) -> None:
    service = kms(backends, "rewrap", "decrypt,encrypt key=pay-2")
    sealed = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-1").ciphertext

    with pytest.raises((Forbidden, UnknownKey)):
        service.rewrap(WHO, sealed, ROW_7, new_context=new_context, key_id=key_id)


def test_rewrap_to_elsewhere_needs_decrypt_there_and_encrypt_here(backends: dict[str, AgeBackend]) -> None:
    service = kms(backends, "decrypt key=pay-1", "encrypt key=pay-2 context=row=8")
    sealed = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-1").ciphertext
    moved = service.rewrap(WHO, sealed, ROW_7, new_context=OTHER, key_id="pay-2").ciphertext

    assert service.decrypt(ROOT, moved, OTHER).key.key_id == "pay-2"
    refused(Forbidden, lambda: service.rewrap(WHO, sealed, ROW_7, key_id="pay-2"))
    refused(UnknownKey, lambda: service.rewrap(WHO, sealed, ROW_7, new_context=OTHER))


# -- tenants, chores, credentials ----------------------------------------------------------------------------


def test_a_tenant_has_the_keys_that_settings_give_it(backends: dict[str, AgeBackend]) -> None:
    service = kms(backends, "*", tenant_keys="pay-1")

    assert service.encrypt(WHO, b"x", ROW_7, key_id="pay-1").key.key_id == "pay-1"
    refused(UnknownKey, lambda: service.encrypt(WHO, b"x", ROW_7, key_id="pay-2"))
    refused(UnknownKey, lambda: service.encrypt(WHO, b"x", ROW_7, key_id="no-such-key"))
    assert [key for key in backends if service.policy.sees(WHO, key)] == ["pay-1"]


@pytest.mark.parametrize("pattern", ["pay", "ay-1", "pay-1x", "p*y", "*-2"])
def test_a_pattern_of_a_tenant_stands_for_whole_key_ids(
    backends: dict[str, AgeBackend], pattern: str
) -> None:
    service = kms(backends, "*", tenant_keys=pattern)

    refused(UnknownKey, lambda: service.encrypt(WHO, b"x", ROW_7, key_id="pay-1"))
    assert not service.policy.sees(WHO, "pay-1")


def test_the_service_itself_rotates_and_nothing_else(backends: dict[str, AgeBackend]) -> None:
    chore = Principal("rotation-schedule", credential=INTERNAL)
    service = kms(backends)
    service.rotate(chore, "pay-1")

    refused(Forbidden, lambda: service.encrypt(chore, b"x", ROW_7))
    refused(Forbidden, lambda: service.generate_data_key(chore, 32, ROW_7))


@pytest.mark.parametrize("credential", ["none", "", "token:gone", "internal:x", "INTERNAL"])
def test_a_credential_that_is_worth_nothing_allows_nothing(
    backends: dict[str, AgeBackend], credential: str
) -> None:
    nobody = Principal("root", "acme", credential)

    refused(Forbidden, lambda: kms(backends, "*").encrypt(nobody, b"x", ROW_7))


def test_what_cannot_be_told_now_is_no_refusal(backends: dict[str, AgeBackend]) -> None:
    stands = FixedScopes("*")
    stands.away = True
    service = kms_over(backends["default"], policy=ByScopes(stands.scopes_of, {}))

    refused(Unavailable, lambda: service.encrypt(WHO, b"x", ROW_7))
    with pytest.raises(Unavailable):
        allows(service.policy, WHO, "encrypt")


def test_refusals_are_recorded_with_the_key_and_without_values(backends: dict[str, AgeBackend]) -> None:
    trail = MemoryTrail()
    service = kms(backends, "encrypt key=pay-1 context=row=8", trail=trail)
    for key_id in ("pay-1", "pay-2", "no-such-key"):
        with pytest.raises((Forbidden, UnknownKey)):
            service.encrypt(WHO, b"hunter2", ROW_7, key_id=key_id)
    with pytest.raises(Forbidden):
        service.require(WHO, "jobs:write")

    assert trail.results == [
        ("encrypt", "forbidden"),
        ("encrypt", "unknown_key"),
        ("encrypt", "unknown_key"),
        ("jobs:write", "forbidden"),
    ]
    assert [line.get("key_id") for line in trail.lines] == ["pay-1", None, None, None]
    assert {line["credential"] for line in trail.lines} == {"token:x"}
    assert "hunter2" not in str(trail.lines)


@pytest.mark.parametrize("operations", ["encrypt,decrypt,generate_data_key,rotate", "jobs:read"])
def test_no_record_says_that_a_key_exists_which_the_caller_may_not_see(
    backends: dict[str, AgeBackend], operations: str
) -> None:
    """The tenant of the caller may read the records."""
    service = kms(backends, f"{operations} key=pay-1", trail=(trail := MemoryTrail()))
    theirs = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-2").ciphertext
    absent = service.encrypt(ROOT, b"x", ROW_7, key_id="pay-2").ciphertext.replace(b" pay-2 ", b" pay-9 ")
    trail.lines.clear()
    for key_id, file in (("pay-2", theirs), ("pay-9", absent)):
        calls: list[Callable[[], object]] = [
            lambda key_id=key_id: service.encrypt(WHO, b"x", ROW_7, key_id=key_id),  # type: ignore[misc]  # default argument
            lambda key_id=key_id: service.generate_data_key(WHO, 32, ROW_7, key_id=key_id),  # type: ignore[misc]  # as above
            lambda key_id=key_id: service.rotate(WHO, key_id),  # type: ignore[misc]  # as above
            lambda file=file: service.decrypt(WHO, file, ROW_7),  # type: ignore[misc]  # as above
            lambda file=file: service.reseal(WHO, file, ROW_7),  # type: ignore[misc]  # as above
        ]
        for call in calls:
            with pytest.raises((Forbidden, UnknownKey)):
                call()

    own = {"duration_us", "file_id"}
    lines = [{name: value for name, value in line.items() if name not in own} for line in trail.lines]
    assert lines[:5] == lines[5:]
    assert not any({"key_id", "key_version", "backend", "origin"} & line.keys() for line in lines)
