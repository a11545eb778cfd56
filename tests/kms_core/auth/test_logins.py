"""Short tokens of logins: what ends them, and what they carry."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kms_core.auth.authenticator import Authenticator
from kms_core.auth.jwks import FileKeys
from kms_core.auth.jwt_verifier import Jwts, Trusted
from kms_core.auth.logins import Issued, Logins
from kms_core.auth.policy import ByScopes, allows
from kms_core.auth.tokens import TokenFile
from kms_core.settings.model import AuthSection, ClaimGrant, IssuerSection, LoginSection
from kms_protocol.errors import Unauthenticated
from support.credentials import AUDIENCE, ISSUER, Issuer

KEY: Final = bytes(range(32))
GRACE_S: Final = 1000
BASE: Final = AuthSection(
    tokens_path=Path("/nonexistent"),
    issuers={
        "corp": IssuerSection(
            issuer=ISSUER,
            audience=AUDIENCE,
            job_grace_s=GRACE_S,
            grants={"deploy": ClaimGrant(when={"sub": "a*"}, scopes=("encrypt",))},
        )
    },
    logins={
        "jwt": LoginSection(method="jwt", issuer="corp"),
        "approle": LoginSection(method="approle"),
    },
)
Change = Callable[[AuthSection], AuthSection]
MakeAuthenticator = Callable[..., Authenticator]


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def make_authenticator(issuer: Issuer, tmp_path: Path) -> MakeAuthenticator:
    """What another process with these settings has."""
    keys = tmp_path / "jwks.json"
    keys.write_bytes(issuer.jwks)

    def made(auth: AuthSection = BASE, key: bytes = KEY) -> Authenticator:
        jwts = Jwts([Trusted(name, section, FileKeys(keys)) for name, section in auth.issuers.items()])
        tokens = TokenFile(tmp_path / "tokens.json")
        return Authenticator(tokens, jwts, {}, None, Logins(key, auth, jwts, tokens))

    return made


def log_in(login_authenticator: Authenticator, issuer: Issuer, **changes: object) -> Issued:
    assert login_authenticator.logins
    return login_authenticator.logins.by_jwt("jwt", "deploy", issuer.token(**changes))


def issuers(**changes: Any) -> Change:  # noqa: ANN401 -- fields of the section
    def change(auth: AuthSection) -> AuthSection:
        return msgspec.structs.replace(
            auth, issuers={"corp": msgspec.structs.replace(auth.issuers["corp"], **changes)}
        )

    return change


def grants(**changes: Any) -> Change:  # noqa: ANN401 -- as above
    plain = ClaimGrant(when={"sub": "a*"}, scopes=("encrypt",))
    return issuers(grants={"deploy": msgspec.structs.replace(plain, **changes)})


def logins(**sections: LoginSection) -> Change:
    return lambda auth: msgspec.structs.replace(auth, logins=sections)


ENDS: Final[dict[str, Change]] = {
    "no login": logins(),
    "a login by another name": logins(oidc=LoginSection(method="jwt", issuer="corp")),
    "a login by another method": logins(jwt=LoginSection(method="approle")),
    "no issuer": lambda auth: msgspec.structs.replace(auth, issuers={}),
    "another issuer": issuers(issuer="https://other.example.com"),
    "another audience": issuers(audience="other"),
    "other algorithms": issuers(algorithms=("RS256",)),
    "keys elsewhere": issuers(jwks_url="https://other.example.com/keys"),
    "another tenant": issuers(tenant="other"),
    "no role": issuers(grants={}),
    "a role by another name": issuers(grants={"other": ClaimGrant(when={"sub": "a*"}, scopes=("encrypt",))}),
    "a role for others": grants(when={"sub": "b*"}),
    "a role for fewer": grants(when={"sub": "a*", "ref": "main"}),
}


@pytest.mark.parametrize("change", ENDS.values(), ids=ENDS)
def test_a_token_ends_with_its_role(
    issuer: Issuer, make_authenticator: MakeAuthenticator, change: Change
) -> None:
    text = log_in(make_authenticator(), issuer).text

    assert make_authenticator().authenticate(text).name == "corp:ada"
    with pytest.raises(Unauthenticated):
        make_authenticator(change(BASE)).authenticate(text)


def test_the_key_decides(issuer: Issuer, make_authenticator: MakeAuthenticator) -> None:
    with pytest.raises(Unauthenticated):
        make_authenticator(key=bytes(32)).authenticate(log_in(make_authenticator(), issuer).text)


def test_scopes_are_those_of_the_settings_now(issuer: Issuer, make_authenticator: MakeAuthenticator) -> None:
    later = make_authenticator(grants(scopes=("decrypt",))(BASE))
    who = later.authenticate(log_in(make_authenticator(), issuer).text)

    assert allows(ByScopes(later.scopes_of, {}), who, "decrypt", "k")
    assert not allows(ByScopes(later.scopes_of, {}), who, "encrypt", "k")


def test_a_shorter_ttl_ends_older_tokens_too(
    issuer: Issuer, make_authenticator: MakeAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, now = make_authenticator(), time.time()
    made = log_in(first, issuer, exp=int(now) + 3000)
    shorter = make_authenticator(logins(jwt=LoginSection(method="jwt", issuer="corp", ttl_s=60))(BASE))
    assert 2900 < made.ttl_s <= 3000
    assert shorter.authenticate(made.text).name
    monkeypatch.setattr(time, "time", lambda: now + 61)

    assert first.authenticate(made.text).name
    with pytest.raises(Unauthenticated, match="log in again"):
        shorter.authenticate(made.text)


def test_a_token_expires(
    issuer: Issuer, make_authenticator: MakeAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of what was brought, without the leeway that a JWT has."""
    login_authenticator, now = make_authenticator(), int(time.time())
    text = log_in(login_authenticator, issuer, exp=now + 600).text
    monkeypatch.setattr(time, "time", lambda: now + 599.0)
    assert login_authenticator.authenticate(text).name
    monkeypatch.setattr(time, "time", lambda: now + 600.0)

    with pytest.raises(Unauthenticated, match="log in again"):
        login_authenticator.authenticate(text)


def test_a_job_of_a_login_ends_with_it_and_its_role(
    issuer: Issuer, make_authenticator: MakeAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The principal rests in the job's record: grace is for jobs, and the time that is told leaves it out."""
    first, now = make_authenticator(), time.time()
    made = log_in(first, issuer)
    who = first.authenticate(made.text)

    assert first.until(who) == pytest.approx(now + made.ttl_s, abs=2)
    assert not allows(
        ByScopes(make_authenticator(issuers(grants={})(BASE)).scopes_of, {}), who, "encrypt", "k"
    )
    for later_s, is_allowed in ((0, True), (GRACE_S - 5, True), (GRACE_S + 5, False)):
        monkeypatch.setattr(time, "time", lambda: now + made.ttl_s + later_s)  # noqa: B023 -- called in the round
        assert allows(ByScopes(first.scopes_of, {}), who, "encrypt", "k") == is_allowed
