"""What is remembered of verified JWTs: never past their expiry, a bounded number, and no longer texts."""

import time
from typing import Final

import pytest

from kms_core.auth.jwt_verifier import Jwts, RemoteKeys, Trusted
from kms_core.settings.model import IssuerSection as Section
from kms_protocol.errors import Unauthenticated
from support.credentials import AUDIENCE, ISSUER, Issuer, counted_signatures, verified

MOST_REMEMBERED: Final = 4096
MOST_CHARS: Final = 8192


@pytest.fixture
def issuer() -> Issuer:
    made = Issuer()
    made.rollover("one", "EdDSA")
    return made


@pytest.fixture
def jwts(issuer: Issuer) -> Jwts:
    section = Section(issuer=ISSUER, audience=AUDIENCE, jwks_url="-", leeway_s=0, algorithms=("EdDSA",))
    return Jwts([Trusted("corp", section, RemoteKeys(lambda: issuer.jwks))])


def reason(jwts: Jwts, token: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        verified(jwts, token)
    return caught.value.reason


def test_a_remembered_token_expires_when_it_says(issuer: Issuer, jwts: Jwts) -> None:
    expiry = int(time.time()) + 2
    token = issuer.token(exp=expiry)
    assert verified(jwts, token).name == "corp:ada"
    while time.time() < expiry:
        time.sleep(0.05)

    assert reason(jwts, token) == "expired"


def test_the_oldest_of_too_many_tokens_is_forgotten(
    issuer: Issuer, jwts: Jwts, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_token_has_a_longest_length(issuer: Issuer, jwts: Jwts) -> None:
    """Four more characters of base64 are three of a claim."""
    bare = len(issuer.token(pad=""))
    room = (MOST_CHARS - bare) // 4 * 3
    longest, longer = issuer.token(pad="x" * (room - 3)), issuer.token(pad="x" * (room + 6))
    assert MOST_CHARS - 8 <= len(longest) <= MOST_CHARS < len(longer)

    assert verified(jwts, longest).name == "corp:ada"
    assert reason(jwts, longer) == "malformed"
