"""Keys of an issuer are fetched once for all who need them, and only those wait who do."""

import json
import threading
from collections.abc import Iterator

import jwt
import pytest

from kms_core.auth import jwks
from kms_core.auth.jwks import AGAIN_S, KEEP_S, STALE_S, WAIT_S, KeysPending, RemoteKeys
from kms_core.auth.jwt_verifier import Jwts, Trusted
from kms_core.settings.model import IssuerSection as Section
from kms_protocol.errors import Unauthenticated, Unavailable
from support.clock import Clock
from support.credentials import AUDIENCE, ISSUER, Issuer, claims, counted_signatures, verified
from support.waiting import until

OTHER = "https://other.example.com"


class TrustedIssuers:
    """An issuer, another issuer, and the verifier that trusts both."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.corp, self.other = Issuer(), Issuer()
        trusted = (("corp", ISSUER, self.corp), ("other", OTHER, self.other))
        self.jwts = Jwts(
            [
                Trusted(
                    name,
                    Section(issuer=url, audience=AUDIENCE, jwks_url="-"),
                    RemoteKeys(issuer.fetched, clock=self.clock),
                )
                for name, url, issuer in trusted
            ]
        )

    def name(self, token: str) -> str:
        """The principal of a token, after one look-up if that is needed."""
        return verified(self.jwts, token).name

    def name_at_once(self, token: str) -> str:
        """The principal of a token for whose key nobody waits."""
        return self.jwts.verify(token).name

    def junk(self, kid: str | None) -> str:
        """A token of the first issuer by a key that the issuer does not have."""
        thief = self.other.keys["one"][0]
        return jwt.encode(claims(), thief, "ES256", {"kid": kid} if kid else None)


@pytest.fixture
def issuers() -> Iterator[TrustedIssuers]:
    made = TrustedIssuers()
    yield made
    made.corp.resume()


@pytest.fixture
def known(issuers: TrustedIssuers) -> TrustedIssuers:
    """One whose keys of the first issuer have been fetched."""
    issuers.name(issuers.corp.token())
    return issuers


# -- keys that change, and issuers that are away -------------------------------------------------------


def test_keys_are_fetched_once_and_again_for_a_key_that_is_new(issuers: TrustedIssuers) -> None:
    for number in range(5):
        issuers.name(issuers.corp.token(sub=f"ada{number}"))
    assert issuers.corp.asked == 1
    issuers.corp.rollover("two")
    issuers.clock.now += AGAIN_S

    assert issuers.name(issuers.corp.token()) == "corp:ada"
    assert issuers.name(issuers.corp.token("one", sub="eve")) == "corp:eve"
    assert issuers.corp.asked == 2


def test_a_key_that_the_issuer_took_away_signs_no_more(known: TrustedIssuers) -> None:
    old = known.corp.token("one", sub="eve")
    known.corp.rollover("two", keep=False)
    known.clock.now += KEEP_S + 1

    with pytest.raises(Unauthenticated) as caught:
        known.name(old)
    assert caught.value.reason == "signature"


def test_while_the_issuer_is_away_its_keys_are_used_for_a_day(known: TrustedIssuers) -> None:
    known.corp.broken = True
    known.clock.now += STALE_S - 1
    assert known.name(known.corp.token(sub="eve")) == "corp:eve"
    known.clock.now += 10

    with pytest.raises(Unavailable):
        known.name(known.corp.token(sub="late"))


def test_an_issuer_that_was_never_reached_is_no_refusal(issuers: TrustedIssuers) -> None:
    issuers.corp.broken = True
    token = issuers.corp.token()
    with pytest.raises(Unavailable):
        issuers.name(token)
    issuers.corp.broken = False
    issuers.clock.now += AGAIN_S

    assert issuers.name(token) == "corp:ada"


def test_an_unknown_key_id_is_no_refusal_while_the_issuer_is_away(known: TrustedIssuers) -> None:
    known.corp.rollover("two")
    known.corp.broken = True
    known.clock.now += AGAIN_S
    for _ in range(3):  # the first one waits for the fetch that fails
        with pytest.raises(Unavailable):
            known.name(known.corp.token())
    assert known.corp.asked == 2
    known.corp.broken = False
    known.clock.now += AGAIN_S

    assert known.name(known.corp.token()) == "corp:ada"


# -- who waits -----------------------------------------------------------------------------------------


def test_a_hanging_endpoint_delays_only_tokens_that_need_it(known: TrustedIssuers) -> None:
    known.corp.hang()
    known.clock.now += AGAIN_S
    with pytest.raises(KeysPending):
        known.jwts.verify(known.junk("x"))

    assert known.name_at_once(known.corp.token(sub="eve")) == "corp:eve"  # the key is known
    assert known.name(known.other.token(iss=OTHER)) == "other:ada"
    known.clock.now += KEEP_S + 1  # also when the set is old and its fetch is late
    assert known.name_at_once(known.corp.token(sub="bob")) == "corp:bob"


def test_one_fetch_serves_all_who_wait(issuers: TrustedIssuers) -> None:
    issuers.corp.hang()
    found: list[str] = []

    def call(number: int) -> None:
        found.append(issuers.name(issuers.corp.token(sub=f"ada{number}")))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: issuers.corp.asked, "the fetch has begun")
    issuers.corp.resume()
    for thread in threads:
        thread.join()

    assert sorted(found) == sorted(f"corp:ada{number}" for number in range(20))
    assert issuers.corp.asked == 1


def test_a_fetch_that_does_not_end_is_the_only_one_and_no_caller_waits_longer_than_five_seconds(
    issuers: TrustedIssuers,
) -> None:
    issuers.corp.hang()
    with pytest.raises(KeysPending) as pending:
        issuers.jwts.verify(issuers.corp.token())
    issuers.clock.now += WAIT_S  # while it waited for a thread
    pending.value.look_up()  # returns at once
    for _ in range(3):
        with pytest.raises(Unavailable) as late:
            issuers.jwts.verify(issuers.corp.token())
        assert not isinstance(late.value, KeysPending)
        issuers.clock.now += 60
    assert issuers.corp.asked == 1
    issuers.corp.resume()
    until(lambda: not any(thread.name == "jwks" for thread in threading.enumerate()), "the end of the fetch")

    assert issuers.name(issuers.corp.token()) == "corp:ada"


def test_a_set_that_was_not_used_for_long_is_fetched_before_it_is_believed(known: TrustedIssuers) -> None:
    known.corp.hang()
    known.clock.now += KEEP_S + 1

    with pytest.raises(KeysPending):
        known.jwts.verify(known.corp.token(sub="eve"))


def test_a_set_is_fetched_before_it_is_old_and_no_caller_waits(known: TrustedIssuers) -> None:
    known.corp.hang()
    known.clock.now += KEEP_S / 2 + 1

    for name in ("eve", "bob"):
        assert known.name_at_once(known.corp.token(sub=name)) == f"corp:{name}"
    until(lambda: known.corp.asked == 2, "the fetch in the background")


def test_no_caller_with_a_known_key_waits_for_an_issuer_that_is_away(known: TrustedIssuers) -> None:
    known.corp.broken = True
    known.clock.now += KEEP_S + 1
    assert known.name(known.corp.token(sub="eve")) == "corp:eve"  # waits for the fetch that fails
    known.corp.hang()
    known.clock.now += AGAIN_S

    assert known.name_at_once(known.corp.token(sub="bob")) == "corp:bob"
    until(lambda: known.corp.asked == 3, "another fetch in the background")


def test_keys_for_other_things_are_passed_over() -> None:
    issuer = Issuer()
    issuer.rollover("two", "RS256")
    known = json.loads(issuer.jwks)["keys"]
    odd = [
        {"kty": "oct", "k": "AAAA", "kid": "shared"},
        {**known[0], "use": "enc", "kid": "enc"},
        {**known[0], "alg": "ES384", "kid": "wrong"},
        {"kty": "EC", "crv": "secp256k1", "x": known[0]["x"], "y": known[0]["y"], "kid": "curve"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "point"},
        {"kty": "AKP", "alg": "ML-DSA-65", "pub": "AA", "kid": "later"},
        {},
    ]
    found = jwks.parse(json.dumps({"keys": [*odd, *known]}).encode())

    usable = {key.kid: key.algorithms for key in found if key.algorithms}
    assert usable["one"] == {"ES256"}
    assert usable["two"] >= {"RS256", "PS512"}
    assert usable.keys() <= {"one", "two"}


# -- junk ------------------------------------------------------------------------------------------------


def test_an_error_that_is_not_foreseen_begins_no_flood_of_fetches(
    issuers: TrustedIssuers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "parse", lambda _: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for number in range(20):
        with pytest.raises(Unavailable):
            issuers.name(issuers.junk(f"kid{number}"))

    assert issuers.corp.asked == 1


@pytest.mark.parametrize("after_s", [0, AGAIN_S])
def test_junk_with_any_key_id_costs_one_fetch_at_most_and_no_signature_check(
    known: TrustedIssuers, after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    known.clock.now += after_s
    signatures, before = counted_signatures(monkeypatch), known.corp.asked
    for number in range(200):
        with pytest.raises(Unauthenticated) as caught:
            known.name(known.junk(f"kid{number}"))
        assert caught.value.reason == "signature"

    assert (known.corp.asked - before, signatures.call_count) == (1 if after_s else 0, 0)


def test_a_token_without_a_key_id_is_tried_with_eight_keys(
    issuers: TrustedIssuers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        issuers.corp.rollover(f"k{number}")
    issuers.name(issuers.corp.token("one"))
    signatures = counted_signatures(monkeypatch)
    with pytest.raises(Unauthenticated):
        issuers.jwts.verify(issuers.junk(None))

    assert signatures.call_count == 8


@pytest.mark.parametrize("text", ["a.b", "a.b.c.d", ".b.c", "a..c", "a=.b.c", "a. b.c", "ä.b.c", "a" * 9000])
def test_what_has_not_the_shape_of_a_jwt_is_refused_before_it_is_parsed(
    issuers: TrustedIssuers, text: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        issuers.jwts.verify(text)

    assert caught.value.reason == "malformed"
