"""Budgets: who is refused at each bound, what others still get, and that nothing is kept."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import pytest

from kms_api.deps import ANONYMOUS, LOCAL_CALLER, PRINCIPAL
from kms_api.transport.admission import Budget, Holder, holder_of
from kms_core.auth.policy import Grant, Principal
from kms_protocol.errors import KmsError, RateLimited, Unavailable

ANN: Final = ("acme", "token:ann")
ALF: Final = ("acme", "token:alf")
BOB: Final = ("blue", "token:bob")
pytestmark = pytest.mark.anyio


def budget(total: int, tenant: int, credential: int) -> Budget:
    return Budget("uploads", total, tenant, credential)


def is_idle(of: Budget) -> bool:
    """Whether no request holds an amount, and nothing is kept of those that did."""
    return not (of.held or of._amounts)  # noqa: SLF001 -- what is kept


def taken(of: Budget, holder: Holder | None) -> int:
    """How often one could be taken until it was refused."""
    for count in range(1000):
        try:
            of.take(holder)
        except (RateLimited, Unavailable):
            return count
    raise AssertionError("nothing bounds it")


# -- bounds --------------------------------------------------------------------------------------------


async def test_a_credential_has_its_bound_and_others_of_its_tenant_go_on() -> None:
    of = budget(100, 40, 10)

    assert taken(of, ANN) == 10
    with pytest.raises(RateLimited, match="credential"):
        of.take(ANN)
    of.take(ALF)


async def test_a_tenant_has_its_bound_and_others_go_on() -> None:
    of = budget(100, 12, 10)

    assert [taken(of, ANN), taken(of, ALF)] == [10, 2]
    with pytest.raises(RateLimited, match="tenant"):
        of.take(("acme", "token:amy"))
    of.take(BOB)


async def test_a_tenant_holds_no_more_than_is_free() -> None:
    """Alone half of all; of three that take what they get, each a quarter, and the fourth finds room."""
    of = budget(64, 64, 64)

    assert taken(of, ANN) == 32
    held = {name: taken(of, (name, name)) for name in "bcdefgh"}

    assert list(held.values()) == [16, 8, 4, 2, 1, 1, 0]
    assert of.held == 64


async def test_tenants_that_take_in_turn_get_alike_and_leave_as_much() -> None:
    of = budget(60, 60, 60)
    got = Counter[str]()
    for tenant in ("a", "b", "c") * 60:
        with suppress(RateLimited):
            of.take((tenant, tenant))
            got[tenant] += 1

    assert got == {"a": 15, "b": 15, "c": 15}
    assert taken(of, BOB) > 0


async def test_at_the_total_all_are_refused_as_unavailable() -> None:
    of = budget(4, 4, 4)
    assert taken(of, None) == 4

    with pytest.raises(Unavailable, match="service") as refused:
        of.take(BOB)
    assert refused.value.code == "unavailable"
    assert refused.value.retry_after_s > 0


async def test_callers_that_are_not_authenticated_are_bound_by_the_total_alone() -> None:
    assert taken(budget(64, 32, 16), None) == 64


async def test_bytes_are_counted_as_they_are() -> None:
    of = budget(1000, 500, 300)
    of.take(ANN, 200)

    with pytest.raises(RateLimited):
        of.take(ANN, 101)
    of.take(ANN, 100)
    of.give_back(ANN, 200)
    of.give_back(ANN, 100)
    assert is_idle(of)


# -- whom it counts for ---------------------------------------------------------------------------------

GRANT: Final = Grant(("encrypt",), 0.0)


def holder(who: Principal, address: str = "192.0.2.1") -> Holder | None:
    return holder_of({PRINCIPAL: who, "client": (address, 50_000)})


def test_a_token_counts_for_its_tenant_and_itself() -> None:
    assert holder(Principal("ci", "acme", "token:1")) != holder(Principal("ci", "acme", "token:2"))
    assert holder(Principal("ci", "acme", "token:1")) == holder(
        Principal("ci", "acme", "token:1"), "192.0.2.9"
    )


def test_a_subject_counts_together_whichever_jwt_it_sends() -> None:
    first = holder(Principal("corp:ada", "acme", "jwt:corp:11", GRANT))

    assert first == holder(Principal("corp:ada", "acme", "jwt:corp:22", GRANT))
    assert first != holder(Principal("corp:bob", "acme", "jwt:corp:33", GRANT))


def test_strangers_count_by_their_address_and_are_no_tenant() -> None:
    assert holder(ANONYMOUS) != holder(ANONYMOUS, "192.0.2.2")
    assert (
        holder(ANONYMOUS, "2001:db8::1")
        == holder(ANONYMOUS, "2001:db8::ffff")
        != holder(ANONYMOUS, "2001:db8:1::1")
    )
    assert holder(ANONYMOUS) != holder(Principal("x", "192.0.2.1", "192.0.2.1"))


def test_callers_that_nobody_asks_have_no_bound_of_their_own() -> None:
    assert holder(LOCAL_CALLER) is None


# -- refusals -------------------------------------------------------------------------------------------


async def test_a_refusal_says_when_to_come_again_and_takes_nothing() -> None:
    of = budget(8, 4, 1)
    of.take(ANN)

    for _ in range(100):
        with pytest.raises(RateLimited, match="credential") as refused:
            of.take(ANN)
        assert refused.value.retry_after_s > 0
    of.take(ALF)
    of.take(BOB)
    assert of.held == 3


async def test_nothing_is_kept_by_a_thousand_that_end_in_any_way() -> None:
    rng = random.Random(4711)  # noqa: S311 -- repeatable, no secret
    of = budget(20, 10, 5)

    async def one(holder: Holder | None, work: Callable[[], Awaitable[None]]) -> None:
        amount = rng.randint(1, 3)
        of.take(holder, amount)
        try:
            assert of.held <= 20
            await work()
        finally:
            of.give_back(holder, amount)

    async def rest() -> None:
        await asyncio.sleep(rng.random() / 50)

    holders = [ANN, ALF, BOB, None]
    tasks = [asyncio.create_task(one(rng.choice(holders), rest)) for _ in range(1000)]
    await asyncio.sleep(0.01)
    for task in rng.sample(tasks, 300):
        task.cancel()
        await asyncio.sleep(0)
    ends = await asyncio.gather(*tasks, return_exceptions=True)

    assert is_idle(of)
    assert all(end is None or isinstance(end, KmsError | asyncio.CancelledError) for end in ends)
