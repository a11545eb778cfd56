"""JWTs of an identity provider against a running service: keys over a network, rollover, and forgeries."""

from collections.abc import Iterator
from dataclasses import dataclass

import jwt
import pytest

from support.credentials import Guarded, Issuer, bearer, claims, issuer_settings, serving
from support.service import check_problem
from support.waiting import until

GRANT = (
    'scopes = ["status"]\ntenant_claim = "org"\ntenants = ["acme", "web"]\n'
    '[kms.auth.issuers.corp.grants.deploy]\nwhen = { repository = "acme/*" }\nscopes = ["encrypt"]\n'
)


@dataclass
class Trusting:
    """A service, and the issuer that it trusts."""

    service: Guarded
    issuer: Issuer


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trusting]:
    issuer = Issuer()
    issuer.rollover("first", "RS256")
    settings = "failures_per_minute = 1000\n"
    with serving(issuer) as url:
        text = issuer_settings(f'jwks_url = "{url}"', GRANT).replace(
            'mode = "required"\n', f'mode = "required"\n{settings}'
        )
        with Guarded(tmp_path_factory.mktemp("trusting"), text, "unix:///nonexistent.sock") as running:
            yield Trusting(running.start("api"), issuer)


def encrypt(trusting: Trusting, token: str) -> int:
    body = {"plaintext": "aGk=", "context": "a=b"}
    return trusting.service.post("/encrypt", body, headers=bearer(token)).status_code


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key", "X-Vault-Token"])
def test_a_jwt_is_let_in_by_every_header(trusting: Trusting, header: str) -> None:
    token = trusting.issuer.token(org="acme", sub=header)
    text = f"Bearer {token}" if header == "Authorization" else token

    assert trusting.service.get("/status", headers={header: text}).status_code == 200


def test_claims_decide_what_a_caller_may_do_and_for_whom(trusting: Trusting) -> None:
    def of(**said: object) -> str:
        return trusting.issuer.token(kms_scopes=None, **said)

    assert encrypt(trusting, of(org="acme", repository="acme/infra")) == 200
    assert encrypt(trusting, of(org="acme", repository="evil/infra")) == 403
    assert encrypt(trusting, of(org="acme")) == 403
    assert encrypt(trusting, of(org="evil", repository="acme/infra")) == 401
    assert encrypt(trusting, of(repository="acme/infra")) == 401
    assert trusting.service.get("/status", headers=bearer(of(org="web"))).status_code == 200


def test_tenants_of_one_issuer_cannot_open_each_others_files(trusting: Trusting) -> None:
    body = {"plaintext": "aGk=", "context": "a=b"}
    acme, web = (bearer(trusting.issuer.token(org=org)) for org in ("acme", "web"))
    sealed = trusting.service.post("/encrypt", body, headers=acme).json()["ciphertext"]
    asked = {"ciphertext": sealed, "context": "a=b"}

    assert trusting.service.post("/decrypt", asked, headers=acme).status_code == 200
    check_problem(trusting.service.post("/decrypt", asked, headers=web), 400, "decrypt_failed")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"aud": "another"}, "audience"),
        ({"exp": 1_000_000_000}, "expired"),
        ({"iss": "https://evil.example.com"}, "issuer"),
        ({"org": "evil"}, "tenant"),
    ],
    ids=str,
)
def test_a_wrong_claim_is_refused(trusting: Trusting, changes: dict[str, object], word: str) -> None:
    answer = trusting.service.get(
        "/status", headers=bearer(trusting.issuer.token(**{"org": "acme", **changes}))
    )

    check_problem(answer, 401, "unauthenticated")
    assert word in answer.json()["detail"]
    assert "evil" not in answer.text


def test_a_token_by_another_key_or_none_is_refused(trusting: Trusting) -> None:
    thief = Issuer()
    thief.rollover("first", "RS256")
    unsigned = jwt.encode(claims(org="acme"), "", "none")

    for token in (thief.token(org="acme"), unsigned):
        check_problem(trusting.service.get("/status", headers=bearer(token)), 401, "unauthenticated")


def test_keys_roll_over_without_a_restart(trusting: Trusting) -> None:
    """The issuer adds a key, signs with it, and later takes the old one away."""
    issuer = trusting.issuer
    old = issuer.token("first", org="acme", sub="old")
    assert encrypt(trusting, old) == 200
    issuer.rollover("second", "ES256")
    until(lambda: encrypt(trusting, issuer.token("second", org="acme")) == 200, "the new key is known")
    assert encrypt(trusting, issuer.token("first", org="acme", sub="again")) == 200
    asked = issuer.asked
    for number in range(20):
        encrypt(trusting, issuer.token("second", org="acme", sub=f"ada{number}"))

    assert issuer.asked == asked


def test_an_issuer_that_is_away_is_told_as_such(tmp_path_factory: pytest.TempPathFactory) -> None:
    issuer = Issuer()
    issuer.rollover("only")
    issuer.broken = True
    with serving(issuer) as url:
        settings = issuer_settings(f'jwks_url = "{url}"')
        with Guarded(tmp_path_factory.mktemp("away"), settings, "unix:///nonexistent.sock") as service:
            service.start("api")
            answer = service.get("/status", headers=bearer(issuer.token()))
            check_problem(answer, 503, "unavailable")
            assert service.get("/status", headers=service.token("status")).status_code == 200
            issuer.broken = False

            until(
                lambda: service.get("/status", headers=bearer(issuer.token())).status_code == 200,
                "the issuer is asked again",
            )
