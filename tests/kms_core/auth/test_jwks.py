"""Keys of an issuer are fetched once for all who need them, and only those wait who do."""

import threading
from collections.abc import Iterator

import jwt
import pytest

from kms_core.auth import jwt_verifier
from kms_core.auth.jwt_verifier import Jwts, KeysPending, RemoteKeys, Trusted
from kms_core.settings.model import IssuerSection as Section
from kms_protocol.errors import Unauthenticated, Unavailable
from support.credentials import AUDIENCE, Issuer, claims, counted_signatures, verified
from support.waiting import until

OTHER = "https://other.example.com"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Endpoint:
    """A key endpoint that can hang (``open`` is cleared) or be away."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer, self.count, self.away = issuer, 0, False
        self.open = threading.Event()
        self.open.set()

    def __call__(self) -> bytes:
        self.count += 1
        assert self.open.wait(60)
        if self.away:
            raise OSError("away")
        return self.issuer.jwks


class World:
    """Two issuers and the verifier that trusts both."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.issuers = {"corp": Issuer(), "other": Issuer()}
        for issuer in self.issuers.values():
            issuer.rollover("one")
        self.endpoints = {name: Endpoint(issuer) for name, issuer in self.issuers.items()}
        self.jwts = Jwts([self._trusted("corp", "https://id.example.com"), self._trusted("other", OTHER)])

    def _trusted(self, name: str, url: str) -> Trusted:
        section = Section(issuer=url, audience=AUDIENCE, jwks_url="-")
        return Trusted(name, section, RemoteKeys(self.endpoints[name], clock=self.clock))

    def junk(self, kid: str) -> str:
        """A token of the first issuer by a key that the issuer does not have."""
        thief = self.issuers["other"].keys["one"][0]
        return jwt.encode(claims(), thief, "ES256", {"kid": kid})


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    for endpoint in made.endpoints.values():
        endpoint.open.set()


def test_a_hanging_endpoint_delays_only_tokens_that_need_it(world: World) -> None:
    corp, other = world.issuers.values()
    verified(world.jwts, corp.token())
    world.endpoints["corp"].open.clear()
    world.clock.now += jwt_verifier.AGAIN_S
    with pytest.raises(KeysPending):
        world.jwts.verify(world.junk("x"))

    assert world.jwts.verify(corp.token(sub="eve")).name == "corp:eve"  # the key is known
    assert verified(world.jwts, other.token(iss=OTHER)).name == "other:ada"
    world.clock.now += jwt_verifier.KEEP_S + 1  # also when the set is old and its fetch is late
    assert world.jwts.verify(corp.token(sub="bob")).name == "corp:bob"


def test_one_fetch_serves_all_who_wait(world: World) -> None:
    corp, endpoint = world.issuers["corp"], world.endpoints["corp"]
    endpoint.open.clear()
    found: list[str] = []

    def call(number: int) -> None:
        found.append(verified(world.jwts, corp.token(sub=f"ada{number}")).name)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: endpoint.count, "the fetch has begun")
    endpoint.open.set()
    for thread in threads:
        thread.join()

    assert sorted(found) == sorted(f"corp:ada{number}" for number in range(20))
    assert endpoint.count == 1


def test_no_caller_waits_longer_than_five_seconds(world: World) -> None:
    world.endpoints["corp"].open.clear()
    with pytest.raises(KeysPending) as caught:
        world.jwts.verify(world.junk("x"))
    world.clock.now += jwt_verifier.WAIT_S  # while it waited for a thread

    caught.value.look_up()  # returns at once
    with pytest.raises(Unavailable) as late:
        world.jwts.verify(world.junk("x"))
    assert not isinstance(late.value, KeysPending)


def test_a_set_that_was_not_used_for_long_is_fetched_before_it_is_believed(world: World) -> None:
    corp = world.issuers["corp"]
    verified(world.jwts, corp.token())
    world.endpoints["corp"].open.clear()
    world.clock.now += jwt_verifier.KEEP_S + 1

    with pytest.raises(KeysPending):
        world.jwts.verify(corp.token(sub="eve"))


def test_an_error_that_is_not_foreseen_begins_no_flood_of_fetches(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = world.endpoints["corp"]
    monkeypatch.setattr(jwt_verifier, "parse", lambda _: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for number in range(20):
        with pytest.raises(Unavailable):
            verified(world.jwts, world.junk(f"kid{number}"))

    assert endpoint.count == 1


def test_junk_with_any_key_id_costs_one_fetch_and_no_signature_check(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified(world.jwts, world.issuers["corp"].token())
    world.clock.now += jwt_verifier.AGAIN_S
    signatures, endpoint = counted_signatures(monkeypatch), world.endpoints["corp"]
    before = endpoint.count
    for number in range(200):
        with pytest.raises(Unauthenticated) as caught:
            verified(world.jwts, world.junk(f"kid{number}"))
        assert caught.value.reason == "signature"

    assert (endpoint.count - before, signatures.call_count) == (1, 0)


def test_an_unknown_key_id_is_no_refusal_while_the_issuer_is_away(world: World) -> None:
    corp, endpoint = world.issuers["corp"], world.endpoints["corp"]
    verified(world.jwts, corp.token())
    corp.rollover("two")
    endpoint.away = True
    world.clock.now += jwt_verifier.AGAIN_S
    for _ in range(3):  # the first one waits for the fetch that fails
        with pytest.raises(Unavailable):
            verified(world.jwts, corp.token())
    assert endpoint.count == 2
    endpoint.away = False
    world.clock.now += jwt_verifier.AGAIN_S

    assert verified(world.jwts, corp.token()).name == "corp:ada"


def test_a_set_is_fetched_before_it_is_old_and_no_caller_waits(world: World) -> None:
    corp, endpoint = world.issuers["corp"], world.endpoints["corp"]
    verified(world.jwts, corp.token())
    endpoint.open.clear()
    world.clock.now += jwt_verifier.KEEP_S / 2 + 1

    for name in ("eve", "bob"):
        assert world.jwts.verify(corp.token(sub=name)).name == f"corp:{name}"
    until(lambda: endpoint.count == 2, "the fetch in the background")


def test_no_caller_with_a_known_key_waits_for_an_issuer_that_is_away(world: World) -> None:
    corp, endpoint = world.issuers["corp"], world.endpoints["corp"]
    verified(world.jwts, corp.token())
    endpoint.away = True
    world.clock.now += jwt_verifier.KEEP_S + 1
    assert verified(world.jwts, corp.token(sub="eve")).name == "corp:eve"  # waits for the fetch that fails
    endpoint.open.clear()
    world.clock.now += jwt_verifier.AGAIN_S

    assert world.jwts.verify(corp.token(sub="bob")).name == "corp:bob"
    until(lambda: endpoint.count == 3, "another fetch in the background")


def test_a_fetch_that_does_not_end_is_the_only_one_and_no_caller_waits_for_it(world: World) -> None:
    corp, endpoint = world.issuers["corp"], world.endpoints["corp"]
    endpoint.open.clear()
    with pytest.raises(KeysPending):
        world.jwts.verify(corp.token())
    world.clock.now += jwt_verifier.WAIT_S + 1
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            world.jwts.verify(corp.token())
        assert not isinstance(caught.value, KeysPending)
        world.clock.now += 60
    assert endpoint.count == 1
    endpoint.open.set()
    until(lambda: not any(thread.name == "jwks" for thread in threading.enumerate()), "the end of the fetch")

    assert verified(world.jwts, corp.token()).name == "corp:ada"


def test_a_token_without_a_key_id_is_tried_with_eight_keys(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    corp = world.issuers["corp"]
    for number in range(20):
        corp.rollover(f"k{number}")
    verified(world.jwts, corp.token("one"))
    signatures = counted_signatures(monkeypatch)
    with pytest.raises(Unauthenticated):
        world.jwts.verify(jwt.encode(claims(), world.issuers["other"].keys["one"][0], "ES256"))

    assert signatures.call_count == 8


@pytest.mark.parametrize("text", ["a.b", "a.b.c.d", ".b.c", "a..c", "a=.b.c", "a. b.c", "ä.b.c", "a" * 9000])
def test_what_has_not_the_shape_of_a_jwt_is_refused_before_it_is_parsed(world: World, text: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        world.jwts.verify(text)

    assert caught.value.reason == "malformed"
