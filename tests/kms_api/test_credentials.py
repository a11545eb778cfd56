"""What a credential is worth later: in the tenant that it had, and as long as it lasts."""

import time
from base64 import b64decode
from typing import Final

import pytest

from kms_core.auth.policy import Grant, Principal
from kms_core.container import Core
from kms_protocol.errors import Forbidden
from support.authorization.application import Application, Caller
from support.authorization.permissions import OPERATIONS
from support.credentials import bearer
from support.service import b64, core_of

DAY_S: Final = 24 * 3600.0


@pytest.fixture(scope="module")
def later(application: Application) -> Core:
    """The core of another process, as a worker asks it about the submitters of jobs."""
    return core_of(application.install)


def principal(application: Application, kind: str, tenant: str = "default") -> Principal:
    """A submitter as the record of a job names it; its credential is one of the default tenant."""
    token, _ = application.install.new_token("encrypt")
    grant = Grant(("encrypt",), time.time() + DAY_S) if kind == "jwt" else None
    certificate = application.by_certificate().certificate
    assert certificate
    credentials = {
        "token": f"token:{token.id}",
        "cert": f"cert:builder:{certificate.identity}",
        "jwt": "jwt:corp:00",
    }
    credential = credentials[kind]
    return Principal("ada", tenant, credential, grant)


@pytest.mark.parametrize("kind", ["token", "cert"])
def test_a_credential_is_worth_nothing_in_another_tenant(
    application: Application, later: Core, kind: str
) -> None:
    """The record of a job names the tenant of its submission; settings and tokens may have changed since."""
    later.kms.policy.require(principal(application, kind), "encrypt", "pay-1")

    with pytest.raises(Forbidden, match="revoked or has expired"):
        later.kms.policy.require(principal(application, kind, "another"), "encrypt", "pay-1")


def test_a_grant_ends_when_it_says_and_with_its_issuer(application: Application, later: Core) -> None:
    good = principal(application, "jwt")
    assert good.grant
    over = Principal("ada", "default", good.credential, Grant(good.grant.scopes, time.time() - 1))
    gone = Principal("ada", "default", "jwt:elsewhere:00", good.grant)
    later.kms.policy.require(good, "encrypt", "pay-1")

    for who in (over, gone):
        with pytest.raises(Forbidden, match="revoked or has expired"):
            later.kms.policy.require(who, "encrypt", "pay-1")


def test_a_connection_outlives_its_certificate_and_its_requests_do_not(application: Application) -> None:
    """One connection, whose certificate has been verified when it began."""
    good, over = application.by_certificate(), application.by_certificate(lasts_s=-1)
    answers = [application.ask(who, "GET", "/api/v1/kms/status") for who in (good, over, good)]

    assert [answer.status_code for answer in answers] == [200, 401, 200]
    assert answers[1].json()["detail"] == "The client certificate has expired: connect with a new one"


def test_every_failed_attempt_is_recorded_once(application: Application) -> None:
    """More of them than requests without any credential may leave in a minute."""
    guesses = [Caller(bearer(f"kms_aaaaaaaaaa_{number:043d}")) for number in range(61)]
    before = _denials(application)
    for who in guesses:
        assert application.ask(who, "GET", "/api/v1/kms/status").status_code == 401

    assert _denials(application) - before == len(guesses)


def _denials(application: Application) -> int:
    files = application.install.settings.kms.audit.path.glob("*.jsonl")
    return sum(path.read_text().count('"result":"unauthenticated"') for path in files)


# -- keys that a caller may not see, through the Vault API -------------------------------------------------

UNSEEN: Final = "other"
ABSENT: Final = "othex"
BODY: Final = {"plaintext": "aGk="}
CALLS: Final = [
    ("POST", "encrypt/{}", BODY),
    ("POST", "encrypt/{}", {"batch_input": [BODY]}),
    ("POST", "datakey/plaintext/{}", None),
    ("POST", "datakey/wrapped/{}", None),
    ("POST", "rewrap/{}", {"ciphertext": "of pay-1"}),
    ("POST", "decrypt/{}", {"ciphertext": "of pay-1"}),
    ("POST", "decrypt/{}", {"ciphertext": "of the key"}),
    ("POST", "rewrap/{}", {"ciphertext": "of the key"}),
    ("POST", "decrypt/{}", {"batch_input": [{"ciphertext": "of the key"}]}),
    ("GET", "keys/{}", None),
    ("POST", "keys/{}", None),
    ("DELETE", "keys/{}", None),
    ("POST", "keys/{}/rotate", None),
    ("POST", "keys/{}/config", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS, ids=str)
def test_an_unseen_key_is_answered_like_one_that_does_not_exist(
    application: Application, method: str, path: str, body: dict[str, object] | None
) -> None:
    """Status, headers and body; a ciphertext names the key of the path, whichever that is."""
    callers = [
        application.with_token(f"{','.join(OPERATIONS)} key=pay-1"),
        application.with_token(",".join(OPERATIONS), tenant="narrow-1"),
    ]
    for who in callers:
        unseen, absent = (_said(application, who, (method, path, body), key) for key in (UNSEEN, ABSENT))
        assert unseen == absent
        assert unseen[0] in {400, 404}


def _said(
    application: Application, who: Caller, call: tuple[str, str, object], key: str
) -> tuple[int, str, dict[str, str]]:
    """An answer, without what tells it from others to the same call."""
    method, path, body = call
    sealed = {"of pay-1": application.of_vault("pay-1"), "of the key": _naming(application, key)}
    answer = application.ask(who, method, f"/v1/transit/{path.format(key)}", json=_filled(body, sealed))
    own = {"x-request-id", "x-kms-audit-id", "date"}
    kept = {name: value for name, value in answer.headers.items() if name not in own}
    return answer.status_code, answer.text.replace(answer.headers["x-request-id"], ""), kept


def _naming(application: Application, key: str) -> str:
    """A ciphertext whose header names this key, genuine or not: the name is read before anything opens."""
    prefix, _, text = application.of_vault(UNSEEN).rpartition(":")
    file = b64decode(text)
    assert file.count(f" {UNSEEN} ".encode()) == 1
    return f"{prefix}:{b64(file.replace(f' {UNSEEN} '.encode(), f' {key} '.encode()))}"


def _filled(body: object, sealed: dict[str, str]) -> object:
    if isinstance(body, dict):
        return {name: _filled(value, sealed) for name, value in body.items()}
    if isinstance(body, list):
        return [_filled(value, sealed) for value in body]
    return sealed.get(body, body) if isinstance(body, str) else body
