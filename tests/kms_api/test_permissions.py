"""Every route as every kind of caller, compared with the tables of docs/authorization.md.

The tables in the code are compared with the page only for what they name, never for what they ask.
"""

import html
import re
from collections.abc import Mapping
from typing import Final, Literal

import httpx2 as httpx
import pytest

from kms_api import app
from kms_protocol.wire import PREFIX
from support import routes
from support.authorization.application import Application, Caller
from support.authorization.permissions import OPERATIONS, PAGE, Row, Term, not_in_star, rows
from support.authorization.requests import CALLS, GoodRequest
from support.credentials import Issuer, bearer

Outcome = Literal["passes", "unauthenticated", "forbidden", "unknown_key", "absent", "sealed"]
TEXT: Final = PAGE.read_text("utf-8")
ROWS: Final = list(rows(TEXT))
IN_STAR: Final = set(OPERATIONS) - not_in_star(TEXT)
_CODES: Final[Mapping[str, Outcome]] = {
    "unauthenticated": "unauthenticated",
    "forbidden": "forbidden",
    "unknown_key": "unknown_key",
    "unknown_job": "absent",
    "unknown_record": "absent",
    "unknown": "absent",
    "decrypt_failed": "sealed",
}
_OF_SCOPES: Final = (
    "permission denied: This token lacks",
    "permission denied: This token allows",
)


# -- what an answer says -------------------------------------------------------------------------------


def outcome(row: Row, ask: GoodRequest, answer: httpx.Response) -> Outcome:
    """The kind of an answer. Raises AssertionError for one that is none of those that the page names."""
    if row.is_vault:
        return _of_vault(ask, answer)
    led_to = answer.headers.get("location", "").partition("?")[0]
    if row.is_page and led_to == "/ui/login" and "logout" not in row.path:
        return "unauthenticated"
    if "logout" in row.path and led_to == "/ui/login":
        return "passes" if "set-cookie" in answer.headers else "unauthenticated"
    code = _code(row, answer)
    if not code or code in ask.allowed_codes:
        return "passes"
    assert code in _CODES, answer.text
    return _CODES[code]


def _code(row: Row, answer: httpx.Response) -> str:
    """The error code of an answer, or of the one item of a batch; empty if there is none."""
    if answer.status_code < 400:
        is_batch = row.path.endswith("/batch")
        error = answer.json()["results"][0].get("error", {}) if is_batch else {}
        return str(error.get("code", ""))
    if row.is_page:
        words = re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", html.unescape(answer.text))
        found = [code for code in _CODES if code in words and code != "unknown"]
        assert found, answer.text
        return found[0]
    return str(answer.json()["code"])


def _of_vault(ask: GoodRequest, answer: httpx.Response) -> Outcome:
    text = ""
    if answer.status_code >= 400 and answer.content:
        said = answer.json()
        text = said["errors"][0] if said.get("errors") else str(said.get("errors", ""))
        if "data" in said:
            text = said["data"]["batch_results"][0]["error"]
    if not text or any(passed in text for passed in ask.allowed_codes):
        return "passes"
    if text.startswith("permission denied"):
        return "forbidden" if text.startswith(_OF_SCOPES) else "unauthenticated"
    if text.startswith("encryption key not found"):
        return "unknown_key"
    assert text.startswith("cipher: message authentication failed"), answer.text
    return "sealed"


def send(
    application: Application, row: Row, ask: GoodRequest, who: Caller, method: str = ""
) -> httpx.Response:
    """The request of a caller; a form with the stamp that this caller's pages have."""
    headers = dict(ask.headers)
    if ask.form is not None:
        sender, stamp = (who, ask.form["stamp"]) if "stamp" in ask.form else application.in_form(who)
        return application.ask(
            sender, row.method, ask.path, data={**ask.form, "stamp": stamp}, headers=headers
        )
    if ask.data is not None:
        return application.ask(who, row.method, ask.path, content=ask.data, headers=headers)
    if ask.body is not None:
        return application.ask(who, row.method, ask.path, json=ask.body, headers=headers)
    return application.ask(who, method or row.method, ask.path, headers=headers)


def compare(application: Application, row: Row, callers: Mapping[str, tuple[Caller, Outcome]]) -> None:
    """Ask as each of them; all that differs is told at once. What is refused changes nothing."""
    make, wrong = CALLS[row.method, row.path, row.case], {}
    for label, (who, expected) in callers.items():
        application.caller = who
        ask = make(application)
        before = application.state(ask.path)
        found = outcome(row, ask, send(application, row, ask, who))
        if found != expected:
            wrong[label] = f"{found}, not {expected}"
        elif found != "passes" and application.state(ask.path) != before:
            wrong[label] = f"{found}, and done all the same"
    assert not wrong


# -- who asks ------------------------------------------------------------------------------------------


def without_a_credential(application: Application) -> dict[str, Caller]:
    """Callers who prove nothing, each in another way."""
    stranger = Issuer()
    everything = application.master
    return {
        "nothing": Caller(),
        "junk": Caller(bearer("x")),
        "another scheme": Caller({"Authorization": "Basic dTpw"}),
        "a good token by another scheme": Caller({"Authorization": f"Basic {application.everything}"}),
        "an unknown token": Caller({"X-API-Key": "kms_aaaaaaaaaa_" + "A" * 43}),
        "a changed token": Caller(bearer(everything.headers["Authorization"][7:-1] + "_")),
        "two tokens": Caller({**everything.headers, "X-Vault-Token": "kms_aaaaaaaaaa_" + "A" * 43}),
        "a revoked token": application.revoked(),
        "an expired token": application.expired(),
        "an expired JWT": application.by_jwt(exp=1_000_000_000),
        "a JWT for others": application.by_jwt(aud="another"),
        "a JWT by another key": Caller(bearer(stranger.token(kms_scopes=["*"]))),
        "an unknown certificate": application.by_certificate("DNS:elsewhere"),
        "an expired certificate": application.by_certificate(lasts_s=-1),
        "an unknown session": Caller({"Cookie": "kms_session=AAAA"}),
    }


def refusal(row: Row) -> Outcome:
    """How a caller is refused whose scopes lack an operation; a key that no scope names is not known."""
    needs_any = any(term.operation.startswith("any") for way in row.ways for term in way)
    return "unknown_key" if needs_any else "forbidden"


def by_operations(application: Application, row: Row) -> dict[str, tuple[Caller, Outcome]]:
    """One operation alone, all but one, all, and what ``*`` holds; keys and files are free."""
    sets = {f"only {one}": {one} for one in OPERATIONS}
    sets |= {f"all but {one}": set(OPERATIONS) - {one} for one in OPERATIONS}
    sets |= {"all": set(OPERATIONS)}
    found: dict[str, tuple[Caller, Outcome]] = {}
    for label, held in sets.items():
        scope = application.scope(one for one in OPERATIONS if one in held)
        found[label] = application.with_token(scope), "passes" if row.is_met(held) else refusal(row)
    star = application.with_token(f"* {application.files_rules}")
    return {**found, "*": (star, "passes" if row.is_met(IN_STAR) else refusal(row))}


def line(application: Application, ask: GoodRequest, term: Term, rule: str | None = None) -> str:
    """A scope with just this term, and its key as the call has it unless a rule says otherwise."""
    key = (ask.qualifiers.get(term.key, "") if term.key else "") if rule is None else rule
    files = application.files_rules if term.on_files else ""
    return " ".join(filter(None, (term.operations[0], key, files)))


def by_keys(application: Application, row: Row, ask: GoodRequest) -> dict[str, tuple[Caller, Outcome]]:
    """Just what is needed, and the same with a key, a context or a file that is another one."""
    found: dict[str, tuple[Caller, Outcome]] = {}
    for number, way in enumerate(row.ways):
        lines = [line(application, ask, term) for term in way] or ["status"]
        found[f"{lines}"] = application.with_token(*lines), "passes"
        is_last = number == len(row.ways) - 1  # its refusal is the one that is told
        for at, term in enumerate(way):
            changed: dict[str, Outcome] = {}
            if term.key:
                changed[line(application, ask, term, "key=other")] = "unknown_key" if is_last else "forbidden"
            if term.key and ask.has_context:
                fitting = line(application, ask, term, f"{ask.qualifiers[term.key]} context=env=pr*")
                changed[fitting] = "passes"
                changed[fitting.replace("env=pr*", "env=prod,team=a")] = "forbidden"
            if term.on_files:
                changed[re.sub(r" read=\S+", "", lines[at])] = "forbidden"
                changed[re.sub(r" write=\S+", "", lines[at])] = "forbidden"
                changed[lines[at].replace("/ write=", "-other/ write=")] = "forbidden"
            for text, expected in changed.items():
                others = [*lines[:at], text, *lines[at + 1 :]]
                found[f"{others}"] = application.with_token(*others), expected
    return found


def by_credential(application: Application, row: Row) -> dict[str, tuple[Caller, Outcome]]:
    """Caller may do everything, by other credentials, in sessions, and in other tenants."""
    passes: Outcome = "passes"
    session = application.in_session(application.master)
    master = application.master
    beside = Caller({**master.headers, "X-API-Key": ""}, master.name, master.tenant)
    everything = application.scope(OPERATIONS)
    here: Outcome = "passes" if row.stranger == "own" else row.stranger or "passes"
    is_on_key = any(term.key for way in row.ways for term in way)
    narrow: Outcome = "unknown_key" if is_on_key and row.stranger != "absent" else here
    found: dict[str, tuple[Caller, Outcome]] = {
        "a JWT": (application.by_jwt(), passes),
        "a certificate": (application.by_certificate(), passes),
        "a token beside an empty header": (beside, passes),
        "a session": (session, passes if row.is_page else "unauthenticated"),
        "another tenant": (application.with_token(everything, tenant="another"), here),
        "a tenant without the key": (application.with_token(everything, tenant="narrow"), narrow),
    }
    if CALLS[row.method, row.path, row.case](application).form is not None:
        del found["a certificate"]  # no token to log in with, and its pages have other stamps
    return found


# -- the matrix ----------------------------------------------------------------------------------------


def test_the_page_names_every_route_and_no_other() -> None:
    """HEAD is not named where GET is: it needs what GET needs."""
    in_code = {
        *(
            (method, path if path in {"/livez", "/readyz", "/metrics"} else PREFIX + path)
            for method, path in routes.RULES
        ),
        *routes.UI_RULES,
        *routes.VAULT_RULES,
        *(("GET", path) for path in app.PAGES),
    }
    on_page = {(row.method, row.path) for row in ROWS}
    heads = {("HEAD", path) for method, path in on_page if method == "GET"}

    assert in_code - heads == on_page - heads
    assert {(row.method, row.path, row.case) for row in ROWS} == CALLS.keys()
    assert len(set(map(str, ROWS))) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if row.is_public], ids=str)
def test_what_is_public_minds_no_credential(application: Application, row: Row) -> None:
    callers = {**without_a_credential(application), "everything": application.master}
    if row.path == "/ui/login":  # the form says who
        del callers["everything"]

    compare(application, row, {label: (who, "passes") for label, who in callers.items()})


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_public], ids=str)
def test_who_proves_nothing_is_refused(application: Application, row: Row) -> None:
    compare(
        application,
        row,
        {label: (who, "unauthenticated") for label, who in without_a_credential(application).items()},
    )


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_public], ids=str)
def test_a_call_takes_the_operations_that_the_page_says(application: Application, row: Row) -> None:
    compare(application, row, by_operations(application, row))


@pytest.mark.parametrize("row", [row for row in ROWS if row.is_page and not row.is_public], ids=str)
def test_a_session_is_worth_what_its_credential_is(application: Application, row: Row) -> None:
    callers = by_operations(application, row)

    compare(
        application,
        row,
        {label: (application.in_session(who), expected) for label, (who, expected) in callers.items()},
    )


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_public], ids=str)
def test_a_call_takes_the_key_context_and_files_of_its_scope(application: Application, row: Row) -> None:
    compare(application, row, by_keys(application, row, CALLS[row.method, row.path, row.case](application)))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_public], ids=str)
def test_credentials_are_alike_and_tenants_are_apart(application: Application, row: Row) -> None:
    compare(application, row, by_credential(application, row))


@pytest.mark.parametrize("row", [row for row in ROWS if row.method == "GET"], ids=str)
def test_head_needs_what_get_needs(application: Application, row: Row) -> None:
    callers = {"nothing": Caller(), "everything": application.master, "revoked": application.revoked()}
    callers |= {
        f"all but {one}": application.with_token(application.scope(set(OPERATIONS) - {one}))
        for one in OPERATIONS
    }
    wrong = {}
    for label, who in callers.items():
        application.caller = who
        ask = CALLS[row.method, row.path, row.case](application)
        got = send(application, row, ask, who)
        head = send(application, row, ask, who, "HEAD")
        if head.status_code != got.status_code or head.content:
            wrong[label] = f"{head.status_code}, where GET is {got.status_code}"
    assert not wrong
