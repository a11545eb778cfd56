"""What a tenant's requests a second are spent on: items of batches and jobs, and logins, as much as requests.

Buckets fill by one in 100 seconds here, so what is left can be counted; every tenant of a test has its own.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import httpx2 as httpx
import pytest

from support.credentials import REQUIRED, SecuredService
from support.service import CONTEXT, b64, check_problem

BURST: Final = 10
PER_S: Final = 0.01
DEBT_S: Final = 60
RETRY_S: Final = DEBT_S + 1 / PER_S
"""Until one request is left to a tenant that owes as much as it can."""
ITEM: Final = {"plaintext": b64(b"x"), "context": CONTEXT}
LINE: Final = b'{"plaintext":"eA=="}\n'
Headers = dict[str, str]
Call = Callable[[SecuredService, Headers], httpx.Response]


def batch(
    secured: SecuredService, headers: Headers, count: int, operation: str = "encrypt"
) -> httpx.Response:
    return secured.post("/batch", {"operation": operation, "items": [ITEM] * count}, headers=headers)


def of_vault(secured: SecuredService, headers: Headers, count: int) -> httpx.Response:
    body = {"batch_input": [{"plaintext": b64(b"x")}] * count}
    return httpx.put(f"{secured.url}/v1/transit/encrypt/default", json=body, headers=headers, trust_env=False)


def job(secured: SecuredService, headers: Headers, count: int) -> httpx.Response:
    return secured.post("/jobs", {"kind": "encrypt", "items": [ITEM] * count}, headers=headers)


def stream(secured: SecuredService, headers: Headers, lines: bytes) -> httpx.Response:
    more = {"Content-Type": "application/x-ndjson"}
    return secured.post("/jobs?kind=encrypt", content=lines, headers=headers | more)


SPENT: Final[dict[str, tuple[Call, int, int]]] = {
    "batch": (partial(batch, count=7), 200, 7),
    "batch-that-fails": (partial(batch, count=8, operation="decrypt"), 200, 8),
    "job": (partial(job, count=6), 202, 6),
    "stream": (partial(stream, lines=LINE * 7), 202, 7),
    "broken-stream": (partial(stream, lines=LINE * 5 + b"{no\n"), 422, 5),
}
"""Calls by the tenant that makes them, with their status and what they cost."""
DENIED: Final[dict[str, tuple[Call, str]]] = {
    "denied-batch": (partial(batch, count=1000), "metrics"),
    "denied-vault": (partial(of_vault, count=1000), "metrics"),
    "denied-job": (partial(job, count=100), "jobs:write"),
    "denied-key": (partial(job, count=100), "jobs:write,encrypt key=else"),
}
"""Calls by the tenant that makes them, with a scope that does not allow them."""
TENANTS: Final = (*SPENT, *DENIED, "boundary", "large", "vault", "long", "login")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[SecuredService]:
    """One API process; no worker runs."""
    quotas = "".join(f"[kms.tenants.{name}]\nrequests_per_s = {PER_S}\nburst = {BURST}\n" for name in TENANTS)
    with SecuredService(tmp_path_factory.mktemp("quotas"), REQUIRED + quotas, module_redis) as running:
        yield running.start("api")


def left(secured: SecuredService, headers: Headers) -> int:
    """How many requests are left to a tenant, found by spending them."""
    for spent in range(BURST + 1):
        answer = secured.get("/keys", headers=headers)
        if answer.status_code != 200:
            check_problem(answer, 429, "rate_limited")
            return spent
    raise AssertionError("there is no end of them")


def wait_s(answer: httpx.Response) -> int:
    check_problem(answer, 429, "rate_limited")
    return int(answer.headers["retry-after"])


def test_a_request_is_let_in_while_one_is_left(secured: SecuredService) -> None:
    acme = secured.token_header("*", tenant="boundary")

    assert left(secured, acme) == BURST
    assert 90 <= wait_s(secured.get("/keys", headers=acme)) <= 100


@pytest.mark.parametrize("tenant", SPENT)
def test_a_call_costs_its_items(secured: SecuredService, tenant: str) -> None:
    """They are counted as they come, whatever becomes of them, and also those before one that is none."""
    (call, status, spent), who = SPENT[tenant], secured.token_header("*", tenant=tenant)

    assert call(secured, who).status_code == status
    assert left(secured, who) == BURST - spent


@pytest.mark.parametrize("tenant", DENIED)
def test_a_call_that_no_scope_allows_costs_one_request(secured: SecuredService, tenant: str) -> None:
    """Or a credential that may do nothing could put its tenant into debt."""
    call, scope = DENIED[tenant]

    assert call(secured, secured.token_header(scope, tenant=tenant)).status_code in {403, 404}
    assert left(secured, secured.token_header("*", tenant=tenant)) == BURST - 1


def test_a_batch_larger_than_the_burst_passes_and_those_after_it_wait(secured: SecuredService) -> None:
    acme = secured.token_header("*", tenant="large")
    answer = batch(secured, acme, 60)

    assert answer.status_code == 200
    assert len(answer.json()["results"]) == 60
    waits = [
        answer.json()["retry_after_s"],
        wait_s(batch(secured, acme, 1)),
        wait_s(secured.get("/keys", headers=acme)),
    ]
    for wait in waits:
        assert RETRY_S - 10 <= wait <= RETRY_S


def test_items_of_vaults_batches_are_counted_as_well(secured: SecuredService) -> None:
    acme = secured.token_header("*", tenant="vault")
    answer, refused = of_vault(secured, acme, 30), of_vault(secured, acme, 30)

    assert len(answer.json()["data"]["batch_results"]) == 30
    assert (refused.status_code, list(refused.json())) == (429, ["errors"])
    assert RETRY_S - 10 <= int(refused.headers["retry-after"]) <= RETRY_S


def test_a_stream_of_any_length_passes_and_puts_its_tenant_into_debt(secured: SecuredService) -> None:
    acme = secured.token_header("*", tenant="long")

    assert stream(secured, acme, LINE * 20_000).status_code == 202
    assert RETRY_S - 10 <= wait_s(secured.get("/keys", headers=acme)) <= RETRY_S


def log_in(secured: SecuredService, token: str) -> httpx.Response:
    with httpx.Client(base_url=secured.url, trust_env=False) as browser:
        stamp = re.search(r'name="stamp" value="(\w+)"', browser.get("/ui/login").text)
        assert stamp
        return browser.post("/ui/login", data={"stamp": stamp[1], "token": token})


def test_a_login_counts_against_the_tenant_of_its_credential(secured: SecuredService) -> None:
    _, text = secured.new_token("*", tenant="login")
    answers = [log_in(secured, text) for _ in range(BURST + 1)]

    assert [answer.status_code for answer in answers] == [303] * BURST + [429]
    assert 90 <= int(answers[-1].headers["retry-after"]) <= 100
    assert "kms_session" not in answers[-1].headers.get("set-cookie", "")
    assert log_in(secured, secured.new_token("*", tenant="web")[1]).status_code == 303
