"""What a tenant's requests a second are spent on: items of batches and jobs, and logins, as much as requests.

Buckets fill by one in 100 seconds here, so what is left can be counted; every tenant of a test has its own.
"""

import re
from collections.abc import Iterator
from typing import Final

import httpx2 as httpx
import pytest

from support.credentials import REQUIRED, Guarded
from support.embedded_valkey import EmbeddedValkey
from support.service import CONTEXT, b64, check_problem

BURST: Final = 10
PER_S: Final = 0.01
DEBT_S: Final = 60
RETRY_S: Final = DEBT_S + 1 / PER_S
"""Until one request is left to a tenant that owes as much as it can."""
TENANTS: Final = (
    "batch",
    "large",
    "moved",
    "vault",
    "json",
    "stream",
    "long",
    "cut",
    "login",
    "boundary",
    "debt",
    "refused",
    "denied",
)
ITEM: Final = {"plaintext": b64(b"x"), "context": CONTEXT}


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Guarded]:
    """One API process; no worker runs."""
    quotas = "".join(f"[kms.tenants.{name}]\nrequests_per_s = {PER_S}\nburst = {BURST}\n" for name in TENANTS)
    settings = f"{REQUIRED}[kms.facade]\nenabled = true\n{quotas}"
    redis = valkey.files.url_of(next(database_numbers))
    with Guarded(tmp_path_factory.mktemp("quotas"), settings, redis) as running:
        yield running.start("api")


def left(guarded: Guarded, headers: dict[str, str]) -> int:
    """How many requests are left to a tenant, found by spending them."""
    for spent in range(BURST + 1):
        answer = guarded.get("/keys", headers=headers)
        if answer.status_code != 200:
            check_problem(answer, 429, "rate_limited")
            return spent
    raise AssertionError("there is no end of them")


def wait_s(answer: httpx.Response) -> int:
    check_problem(answer, 429, "rate_limited")
    return int(answer.headers["retry-after"])


def batch(
    guarded: Guarded, headers: dict[str, str], count: int, operation: str = "encrypt"
) -> httpx.Response:
    return guarded.post("/batch", {"operation": operation, "items": [ITEM] * count}, headers=headers)


def of_vault(guarded: Guarded, headers: dict[str, str], count: int) -> httpx.Response:
    body = {"batch_input": [{"plaintext": b64(b"x")}] * count}
    return httpx.put(f"{guarded.url}/v1/transit/encrypt/default", json=body, headers=headers, trust_env=False)


def test_a_request_is_let_in_while_one_is_left(guarded: Guarded) -> None:
    acme = guarded.token("*", tenant="boundary")

    assert left(guarded, acme) == BURST
    assert 90 <= wait_s(guarded.get("/keys", headers=acme)) <= 100


def test_a_batch_costs_its_items(guarded: Guarded) -> None:
    acme = guarded.token("*", tenant="batch")

    answer = batch(guarded, acme, 7).json()
    assert (answer["failed"], "retry_after_s" in answer) == (0, False)
    assert left(guarded, acme) == BURST - 7


def test_a_batch_larger_than_the_burst_passes_and_those_after_it_wait(guarded: Guarded) -> None:
    acme = guarded.token("*", tenant="large")
    answer = batch(guarded, acme, 60)

    assert answer.status_code == 200
    assert len(answer.json()["results"]) == 60
    waits = [
        answer.json()["retry_after_s"],
        wait_s(batch(guarded, acme, 1)),
        wait_s(guarded.get("/keys", headers=acme)),
    ]
    for wait in waits:
        assert RETRY_S - 10 <= wait <= RETRY_S


def test_items_that_fail_cost_as_much(guarded: Guarded) -> None:
    """They are counted when they are known, whatever becomes of them."""
    acme = guarded.token("*", tenant="moved")
    for operation, count in (("rewrap", 3), ("reseal", 3), ("decrypt", 2)):
        assert batch(guarded, acme, count, operation).json()["failed"] == count

    assert left(guarded, acme) == BURST - 8


def test_items_of_vaults_batches_are_counted_as_well(guarded: Guarded) -> None:
    acme = guarded.token("*", tenant="vault")
    answer, refused = of_vault(guarded, acme, 30), of_vault(guarded, acme, 30)

    assert len(answer.json()["data"]["batch_results"]) == 30
    assert (refused.status_code, list(refused.json())) == (429, ["errors"])
    assert RETRY_S - 10 <= int(refused.headers["retry-after"]) <= RETRY_S


def test_a_batch_that_no_scope_allows_costs_one_request(guarded: Guarded) -> None:
    """Or a credential that may do nothing could put its tenant into debt."""
    nothing = guarded.token("metrics", tenant="refused")
    check_problem(batch(guarded, nothing, 1000), 403, "forbidden")
    assert of_vault(guarded, nothing, 1000).status_code == 403

    assert left(guarded, guarded.token("*", tenant="refused")) == BURST - 2


def test_items_of_a_job_are_counted_when_they_come(guarded: Guarded) -> None:
    acme = guarded.token("*", tenant="json")
    answer = guarded.post("/jobs", {"kind": "encrypt", "items": [ITEM] * 6}, headers=acme)

    assert answer.status_code == 202
    assert left(guarded, acme) == BURST - 6


def test_items_of_a_job_that_is_denied_are_not_counted(guarded: Guarded) -> None:
    for scopes in (("jobs:write",), ("jobs:write", "encrypt key=else")):
        body = {"kind": "encrypt", "items": [ITEM] * 100}
        answer = guarded.post("/jobs", body, headers=guarded.token(*scopes, tenant="denied"))
        assert answer.json()["code"] in {"forbidden", "unknown_key"}

    assert left(guarded, guarded.token("*", tenant="denied")) == BURST - 2


def stream(guarded: Guarded, headers: dict[str, str], lines: bytes) -> httpx.Response:
    return guarded.post(
        "/jobs?kind=encrypt", content=lines, headers={**headers, "Content-Type": "application/x-ndjson"}
    )


LINE: Final = b'{"plaintext":"eA=="}\n'


@pytest.mark.parametrize(("tenant", "good", "status"), [("stream", 7, 202), ("cut", 5, 422)])
def test_items_of_a_stream_are_counted_as_they_come(
    guarded: Guarded, tenant: str, good: int, status: int
) -> None:
    """Also those before one that cannot be read."""
    acme = guarded.token("*", tenant=tenant)
    lines = LINE * good + (b"" if status == 202 else b"{no\n")

    assert stream(guarded, acme, lines).status_code == status
    assert left(guarded, acme) == BURST - good


def test_a_stream_of_any_length_passes_and_puts_its_tenant_into_debt(guarded: Guarded) -> None:
    acme = guarded.token("*", tenant="long")

    assert stream(guarded, acme, LINE * 20_000).status_code == 202
    assert RETRY_S - 10 <= wait_s(guarded.get("/keys", headers=acme)) <= RETRY_S


def sent(browser: httpx.Client, path: str, **fields: str) -> httpx.Response:
    """A form, with the stamp of its page."""
    found = re.search(r'name="stamp" value="(\w+)"', browser.get(path).text)
    assert found
    return browser.post(path, data={"stamp": found[1], **fields})


def log_in(guarded: Guarded, token: str) -> httpx.Response:
    with httpx.Client(base_url=guarded.url, trust_env=False) as browser:
        return sent(browser, "/ui/login", token=token)


def test_a_login_counts_against_the_tenant_of_its_credential(guarded: Guarded) -> None:
    _, text = guarded.make("*", tenant="login")
    answers = [log_in(guarded, text) for _ in range(BURST + 1)]

    assert [answer.status_code for answer in answers] == [303] * BURST + [429]
    assert 90 <= int(answers[-1].headers["retry-after"]) <= 100
    assert "kms_session" not in answers[-1].headers.get("set-cookie", "")
    assert log_in(guarded, guarded.make("*", tenant="web")[1]).status_code == 303
