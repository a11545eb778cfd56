"""JWTs: who is let in, and every way in which a token may be wrong (RFC 8725)."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kms_core.auth.authenticator import Authenticator
from kms_core.auth.jwks import FileKeys, RemoteKeys
from kms_core.auth.jwt_verifier import Jwts, Trusted
from kms_core.auth.policy import ByScopes, Principal, allows
from kms_core.auth.tokens import TokenFile
from kms_core.scopes import NOT_IN_STAR
from kms_core.settings.model import CertificateSection, ClaimGrant
from kms_core.settings.model import IssuerSection as Section
from kms_protocol.errors import ConfigurationError, Unauthenticated, Unavailable
from support.credentials import AUDIENCE, ISSUER, Issuer, claims, counted_signatures, public_jwk, verified

LEEWAY_S: Final = 5
MOST_CHARS: Final = 8192
MOST_REMEMBERED: Final = 4096
Change = Callable[[Issuer], str]


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


def stranger() -> Issuer:
    """One that nobody trusts; its key has the same id."""
    return Issuer()


def section(**changes: Any) -> Section:  # noqa: ANN401 -- fields of the section
    plain = Section(
        issuer=ISSUER, audience=AUDIENCE, jwks_url="-", leeway_s=LEEWAY_S, scopes_claim="kms_scopes"
    )
    return msgspec.structs.replace(plain, **changes)


def door(issuer: Issuer, **changes: Any) -> Jwts:  # noqa: ANN401 -- as above
    return Jwts([Trusted("corp", section(**changes), RemoteKeys(lambda: issuer.jwks))])


def refusal(jwts: Jwts, token: str) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as caught:
        verified(jwts, token)
    assert "ada" not in str(caught.value)
    return caught.value


def reason(jwts: Jwts, token: str) -> str:
    return refusal(jwts, token).reason


# -- let in ----------------------------------------------------------------------------------------------


def test_a_token_becomes_a_principal(issuer: Issuer) -> None:
    who = verified(door(issuer), issuer.token())

    assert (who.name, who.tenant) == ("corp:ada", "default")
    assert who.credential.startswith("jwt:corp:")
    assert who.grant is not None
    assert who.grant.scopes == ("encrypt,decrypt", "jobs:read,jobs:write", "status")
    assert who.grant.until == pytest.approx(time.time() + 600 + LEEWAY_S, abs=30)


@pytest.mark.parametrize("algorithm", ["RS256", "PS384", "ES256", "EdDSA"])
def test_signatures_by_a_private_key_are_taken(algorithm: str) -> None:
    issuer = Issuer("k", algorithm)

    assert verified(door(issuer, algorithms=(algorithm,)), issuer.token()).name == "corp:ada"


@pytest.mark.parametrize(
    ("changes", "said", "expected"),
    [
        ({"scopes": ("status",), "scopes_claim": None}, {}, ("status",)),
        ({"scopes_claim": None}, {}, ()),
        ({}, {"kms_scopes": "encrypt"}, ()),
        ({}, {"kms_scopes": ["encrypt", "no such", 7, "decrypt key=a"]}, ("encrypt", "decrypt key=a")),
        ({}, {"kms_scopes": ["encrypt"] * 300}, ("encrypt",) * 64),
    ],
    ids=["settings", "nobody's", "text", "odd", "many"],
)
def test_scopes_are_of_settings_and_of_the_token(
    issuer: Issuer, changes: dict[str, Any], said: dict[str, Any], expected: tuple[str, ...]
) -> None:
    who = verified(door(issuer, **changes), issuer.token(**said))

    assert who.grant is not None
    assert who.grant.scopes == expected


STARS: Final[dict[str, dict[str, Any]]] = {
    "all callers": {"scopes": ("*",), "scopes_claim": None},
    "grants": {"grants": {"g": ClaimGrant(when={"sub": "*"}, scopes=("*",))}, "scopes_claim": None},
    "a claim": {},
}


@pytest.mark.parametrize("source", [*STARS, "certificate"])
def test_a_star_is_not_everything_wherever_it_stands(issuer: Issuer, tmp_path: Path, source: str) -> None:
    jwts = door(issuer, **STARS.get(source, {}))
    builder = CertificateSection(subject="DNS:builder", scopes=("*",))
    policy = ByScopes(Authenticator(TokenFile(tmp_path / "none"), jwts, {"builder": builder}).scopes_of, {})
    who = Principal("cert:builder", credential="cert:builder")
    if source != "certificate":
        who = verified(jwts, issuer.token(kms_scopes=["*"]))

    assert allows(policy, who, "encrypt", "k")
    assert allows(policy, who, "audit:read")
    assert {"rotate", "wrap", "unwrap", "metrics"} == NOT_IN_STAR
    assert [operation for operation in sorted(NOT_IN_STAR) if allows(policy, who, operation, "k")] == []


@pytest.mark.parametrize(
    ("said", "granted"),
    [
        ({"repository": "acme/infra", "groups": ["dev", "ops"]}, True),
        ({"repository": "acme/other", "groups": ["ops"]}, True),
        ({"repository": "evil/infra", "groups": ["ops"]}, False),
        ({"repository": "evil/acme/infra", "groups": ["ops"]}, False),
        ({"repository": "acme/infra", "groups": ["ops-not"]}, False),
        ({"repository": "acme/infra", "groups": "not-ops"}, False),
        ({"repository": "acme/infra", "groups": ["dev"]}, False),
        ({"repository": "acme/infra", "groups": "ops"}, True),
        ({"repository": ["acme/infra"], "groups": [["ops"]]}, False),
        ({"repository": "acme/infra"}, False),
        ({"repository": 7, "groups": {"ops": 1}}, False),
    ],
    ids=str,
)
def test_a_grant_is_for_those_whose_claims_fit(
    issuer: Issuer, said: dict[str, Any], *, granted: bool
) -> None:
    grant = ClaimGrant(when={"repository": "acme/*", "groups": "ops"}, scopes=("rotate",))
    who = verified(door(issuer, grants={"ops": grant}, scopes_claim=None), issuer.token(**said))

    assert who.grant is not None
    assert who.grant.scopes == (("rotate",) if granted else ())


@pytest.mark.parametrize("said", [{"org": "evil"}, {"org": 7}, {}, {"org": ["web"]}], ids=str)
def test_a_token_names_a_tenant_among_those_of_its_issuer(issuer: Issuer, said: dict[str, Any]) -> None:
    jwts = door(issuer, tenant_claim="org", tenants=("web", "payments"))

    assert verified(jwts, issuer.token(org="web")).tenant == "web"
    assert reason(jwts, issuer.token(**said)) == "claims"


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 201, 7, None, ["ada"]], ids=repr)
def test_a_name_is_a_line_of_text(issuer: Issuer, name: object) -> None:
    assert reason(door(issuer, principal_claim="email"), issuer.token(email=name)) == "claims"


# -- not let in ------------------------------------------------------------------------------------------


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claiming(**changes: object) -> Change:
    """A token of the issuer with other claims."""
    return lambda issuer: issuer.token(**changes)


def headed(**header: object) -> Change:
    """A token by the issuer's key with another header."""
    return lambda issuer: jwt.encode(claims(), issuer.keys["one"][0], "ES256", header)


def spliced(header: dict[str, object] | None = None, body: dict[str, object] | None = None) -> Change:
    """A token whose parts were exchanged without the key."""

    def made(issuer: Issuer) -> str:
        parts = issuer.token().split(".")
        for at, part in enumerate((header, body)):
            if part is not None:
                parts[at] = b64url(json.dumps(part).encode())
        return ".".join(parts)

    return made


def unsigned(issuer: Issuer) -> str:
    del issuer
    return jwt.encode(claims(), "", "none")


def hmac_by_public_key(issuer: Issuer) -> str:
    """The public key, which everybody has, taken for a shared secret."""
    public = issuer.keys["one"][0].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    parts = ({"alg": "HS256", "kid": "one"}, claims())
    body = ".".join(b64url(json.dumps(part).encode()) for part in parts)
    return f"{body}.{b64url(hmac.digest(pem, body.encode(), hashlib.sha256))}"


def own_key_in_header(issuer: Issuer) -> str:
    del issuer
    key, algorithm = stranger().keys["one"]
    return jwt.encode(claims(), key, algorithm, headers={"kid": "one", "jwk": public_jwk(key, "one")})


LATER: Final = int(time.time()) + 1_000_000
WRONG: Final[dict[str, tuple[Change, str]]] = {
    "unsigned": (unsigned, "untrusted"),
    "hmac": (hmac_by_public_key, "untrusted"),
    "own key": (own_key_in_header, "signature"),
    "other key": (lambda _: stranger().token(), "signature"),
    "other key, expired, another audience": (lambda _: stranger().token(exp=1, aud="another"), "signature"),
    "unknown kid": (headed(kid="two"), "signature"),
    "algorithm": (spliced({"alg": "ES384", "kid": "one"}), "untrusted"),
    "algorithm of another key": (spliced({"alg": "RS256", "kid": "one"}), "signature"),
    "algorithm none": (spliced({"alg": "None", "kid": "one"}), "untrusted"),
    "no algorithm": (spliced({"kid": "one"}), "untrusted"),
    "list of algorithms": (spliced({"alg": ["ES256"]}), "untrusted"),
    "critical": (headed(crit=["x"], x=1), "malformed"),
    "type": (headed(typ="dpop+jwt"), "untrusted"),
    "claims exchanged": (spliced(body=claims(sub="root")), "signature"),
    "no signature": (lambda issuer: issuer.token().rpartition(".")[0] + ".", "signature"),
    "issuer": (claiming(iss="https://id.example.com/"), "untrusted"),
    "issuers": (claiming(iss=[ISSUER]), "untrusted"),
    "no issuer": (claiming(iss=None), "untrusted"),
    "audience": (claiming(aud="another"), "claims"),
    "audience prefix": (claiming(aud=AUDIENCE + "x"), "claims"),
    "no audience": (claiming(aud=None), "claims"),
    "no subject": (claiming(sub=None), "claims"),
    "expired": (lambda issuer: issuer.token(exp=int(time.time()) - LEEWAY_S - 60), "expired"),
    "no expiry": (claiming(exp=None), "claims"),
    "expiry of text": (claiming(exp="never"), "malformed"),
    "endless expiry": (claiming(exp=1e400), "malformed"),
    "not yet": (claiming(nbf=LATER), "claims"),
    "issued later": (claiming(iat=LATER), "claims"),
    "large": (claiming(pad="x" * 10_000), "malformed"),
    "two parts": (lambda issuer: issuer.token().rpartition(".")[0], "malformed"),
    "no JSON": (lambda _: "e30.bm8.c2ln", "malformed"),
    "empty parts": (lambda _: "..", "malformed"),
    "no text": (lambda _: "\udcff.\udcff.\udcff", "malformed"),
}


def test_a_token_is_8192_characters_long_at_most(issuer: Issuer) -> None:
    """Four more characters of base64 are three of a claim."""
    bare = len(issuer.token(pad=""))
    room = (MOST_CHARS - bare) // 4 * 3
    longest, longer = issuer.token(pad="x" * (room - 3)), issuer.token(pad="x" * (room + 6))
    assert MOST_CHARS - 8 <= len(longest) <= MOST_CHARS < len(longer)

    assert verified(door(issuer), longest).name == "corp:ada"
    assert reason(door(issuer), longer) == "malformed"


@pytest.mark.parametrize("grace_s", [0, 900])
def test_jobs_of_a_token_may_run_for_its_grace(issuer: Issuer, grace_s: int) -> None:
    expiry = int(time.time()) + 60
    who = verified(door(issuer, job_grace_s=grace_s), issuer.token(exp=expiry))

    assert who.grant
    assert who.grant.until == expiry + LEEWAY_S + grace_s


TOLD: Final = {
    "issuer": "The issuer of this token is not accepted here",
    "unknown kid": "The issuer of this token has no key with its key id and algorithm",
    "other key": "The signature of this token is not by a key of its issuer",
    "algorithm": "The issuer of this token may not use its algorithm or type",
    "audience": "This token is for another audience",
    "no audience": "This token lacks the claim aud",
    "expired": "This token has expired: ask for a new one",
    "not yet": "This token is not valid yet: compare the clocks",
    "two parts": "The credential is unknown, was revoked, or is not for this service",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_token_lets_nobody_in(issuer: Issuer, name: str) -> None:
    make, why = WRONG[name]
    refused = refusal(door(issuer), make(issuer))

    assert refused.reason in {why, "claims" if why == "malformed" else why}
    assert refused.detail == TOLD.get(name, refused.detail)


def test_clocks_may_differ_a_little(issuer: Issuer) -> None:
    now = int(time.time())
    jwts = door(issuer)

    assert verified(jwts, issuer.token(exp=now - 1)).name == "corp:ada"
    assert verified(jwts, issuer.token(nbf=now + 2, iat=now + 2)).name == "corp:ada"


def test_one_issuer_does_not_speak_for_another(issuer: Issuer) -> None:
    other = stranger()
    jwts = Jwts(
        [
            Trusted("corp", section(), RemoteKeys(lambda: issuer.jwks)),
            Trusted("ci", section(issuer="https://ci.example.com"), RemoteKeys(lambda: other.jwks)),
        ]
    )

    assert verified(jwts, other.token(iss="https://ci.example.com")).name == "ci:ada"
    assert reason(jwts, other.token()) == "signature"
    assert jwts.is_configured("ci")
    assert not jwts.is_configured("gone")


def test_a_weak_key_is_no_key(issuer: Issuer) -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 -- it shall be refused
    issuer.keys = {"weak": (weak, "RS256")}
    with pytest.warns(UserWarning, match="below"):
        token = issuer.token()

    assert reason(door(issuer), token) in {"claims", "signature"}


# -- what is remembered ----------------------------------------------------------------------------------


def test_a_token_is_remembered_until_it_expires(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    jwts, now = door(issuer, leeway_s=0), time.time()
    token = issuer.token(exp=int(now) + 30)
    verified(jwts, token)
    signatures = counted_signatures(monkeypatch)
    for _ in range(10):
        assert jwts.verify(token).name == "corp:ada"
    assert signatures.call_count == 0
    jwts.verify(issuer.token(sub="eve"))
    assert signatures.call_count == 1

    monkeypatch.setattr(time, "time", lambda: int(now) + 30.0)
    jwts.verify(token)
    assert signatures.call_count == 2


def test_the_oldest_of_too_many_tokens_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = Issuer("fast", "EdDSA")
    jwts = door(issuer, algorithms=("EdDSA",))
    tokens = [issuer.token(sub=f"ada{number}") for number in range(MOST_REMEMBERED + 2)]
    for token in tokens:
        verified(jwts, token)
    signatures = counted_signatures(monkeypatch)

    for token in tokens[2:]:
        verified(jwts, token)
    assert signatures.call_count == 0
    for token in tokens[:2]:
        verified(jwts, token)
    assert signatures.call_count == 2


# -- keys ------------------------------------------------------------------------------------------------


def test_a_key_file_is_read_again_when_it_changes(issuer: Issuer, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(issuer.jwks)
    jwts = Jwts([Trusted("corp", section(), FileKeys(file))])
    assert verified(jwts, issuer.token()).name == "corp:ada"
    issuer.rollover("two", keep=False)
    file.write_bytes(issuer.jwks)

    assert verified(jwts, issuer.token(sub="eve")).name == "corp:eve"
    file.write_bytes(b"{}")
    with pytest.raises(Unavailable):
        verified(jwts, issuer.token(sub="late"))


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "AA"}]}']
)
def test_a_key_file_without_keys_is_refused_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "jwks.json"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigurationError):
        FileKeys(file)
