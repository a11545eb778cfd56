"""Batches of callers that may do nothing of the kind: refused as a whole, as a single call, on one record."""

from typing import Final

import httpx2 as httpx
import pytest

from support.audit_logs import AuditFolder, Line
from support.credentials import SecuredService
from support.service import CONTEXT, b64, check_problem

ITEMS: Final = 1000
BOUND: Final = 10
PLAIN: Final = {"plaintext": b64(b"a")}
ANY: Final = {"ciphertext": b64(b"a")}
LACKING: Final = {
    "encrypt": ("decrypt", "rewrap,reseal", "metrics"),
    "decrypt": ("encrypt", "rewrap", "jobs:read"),
    "rewrap": ("encrypt", "decrypt", "reseal"),
    "reseal": ("encrypt", "decrypt", "rewrap"),
}
"""Scopes that allow no call of the operation, whatever its key and context."""
ENOUGH: Final = {
    "encrypt": ("encrypt key=else",),
    "decrypt": ("decrypt context=env=prod",),
    "rewrap": ("rewrap key=else", "decrypt,encrypt"),
    "reseal": ("reseal", "encrypt,decrypt key=else"),
}
"""Scopes that allow some, so that items are asked for one by one."""


def lines_of(secured: SecuredService, answer: httpx.Response) -> list[Line]:
    """The records of a request, in the order of the log."""
    name = answer.headers["x-request-id"]
    return [line for line in AuditFolder(secured.state).operations() if line.get("request_id") == name]


def batch(secured: SecuredService, operation: str, headers: dict[str, str]) -> httpx.Response:
    item = PLAIN if operation == "encrypt" else ANY
    return secured.post("/batch", {"operation": operation, "items": [item] * ITEMS}, headers=headers)


def of_vault(secured: SecuredService, operation: str, headers: dict[str, str]) -> httpx.Response:
    item = PLAIN if operation == "encrypt" else {"ciphertext": "vault:v1:AAAA"}
    url = f"{secured.url}/v1/transit/{operation}/default"
    return httpx.put(url, json={"batch_input": [item] * ITEMS}, headers=headers, trust_env=False)


def check_one_record(secured: SecuredService, answer: httpx.Response, operation: str) -> None:
    (line,) = lines_of(secured, answer)
    assert (line["operation"], line["result"]) == (operation, "forbidden")
    assert str(line["credential"]).startswith("token:")
    assert answer.headers["x-kms-audit-id"] == f"{line['chain']}:{line['seq']}"


@pytest.mark.parametrize(("operation", "scope"), [(of, one) for of, all_ in LACKING.items() for one in all_])
def test_a_batch_that_no_scope_allows_is_refused_as_a_whole(
    secured: SecuredService, operation: str, scope: str
) -> None:
    answer = batch(secured, operation, secured.token_header(scope))

    check_problem(answer, 403, "forbidden")
    check_one_record(secured, answer, operation)


@pytest.mark.parametrize(
    ("operation", "scope"), [(of, one) for of, all_ in LACKING.items() if of != "reseal" for one in all_]
)
def test_one_of_vault_is_refused_as_a_whole(secured: SecuredService, operation: str, scope: str) -> None:
    answer = of_vault(secured, operation, secured.token_header(scope))

    assert answer.status_code == 403
    assert answer.json()["errors"][0].startswith("permission denied")
    check_one_record(secured, answer, operation)


@pytest.mark.parametrize(("operation", "scope"), [(of, one) for of, all_ in ENOUGH.items() for one in all_])
def test_where_a_scope_allows_some_each_item_has_its_outcome(
    secured: SecuredService, operation: str, scope: str
) -> None:
    answer = batch(secured, operation, secured.token_header(scope))

    assert answer.status_code == 200
    assert answer.json()["failed"] == ITEMS


def test_items_of_a_key_that_no_scope_names_are_counted_and_allowed_ones_told(
    secured: SecuredService,
) -> None:
    allowed = {**PLAIN, "context": CONTEXT, "key_id": "default"}
    items = [{**PLAIN, "key_id": "else"}] * 500 + [allowed] * 50
    answer = secured.post(
        "/batch",
        {"operation": "encrypt", "items": items},
        headers=secured.token_header("encrypt key=default"),
    )
    lines = lines_of(secured, answer)

    assert answer.json()["failed"] == 500
    assert [line["result"] for line in lines].count("ok") == 50
    assert [line.get("count") for line in lines if line["result"] != "ok"] == [None] * BOUND + [500 - BOUND]


def test_items_of_vault_with_such_a_key_are_counted(secured: SecuredService) -> None:
    answer = of_vault(secured, "encrypt", secured.token_header("encrypt key=else"))

    assert answer.status_code == 400
    assert len(answer.json()["data"]["batch_results"]) == ITEMS
    lines = lines_of(secured, answer)
    assert [line.get("count") for line in lines] == [None] * BOUND + [ITEMS - BOUND]
    assert {line["result"] for line in lines} == {"unknown_key"}
