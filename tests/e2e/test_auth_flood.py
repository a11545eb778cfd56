"""Good credentials beside a flood of bad ones from the same address: no good one is refused."""

import threading
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path
from typing import Final

import httpx2 as httpx
import jwt
import pytest

from support.credentials import Issuer, SecuredService, bearer, claims, required_with_issuer, serving

RATIO: Final = 100
ROUNDS: Final = 12
LIMIT: Final = 5
PROXY: Final = 'trusted_proxies = ["127.0.0.1/32"]\n'
_numbers: Final = count()


class FloodedService:
    """A service that trusts an issuer, and a thief who knows everything about it but a key."""

    def __init__(self, folder: Path, url: str, issuer: Issuer, redis_url: str, more: str = "") -> None:
        self.issuer = issuer
        self.thief = Issuer()
        text = required_with_issuer(
            f'jwks_url = "{url}"', f"[kms.facade]\nenabled = true\n[kms.server]\n{more}"
        )
        text = text.replace('mode = "required"\n', f'mode = "required"\nfailures_per_minute = {LIMIT}\n')
        self.service = SecuredService(folder, text, redis_url)

    def good(self) -> str:
        """A token that the service has not seen."""
        return self.issuer.token(sub=f"ada{next(_numbers)}", kms_scopes=["*", "metrics"])

    def junk(self) -> Iterator[str]:
        """Bad tokens, each kind in turn, none twice."""
        key = self.thief.keys["one"][0]
        for number in count():
            said = claims(sub=f"eve{number}")
            yield f"kms_{'a' * 10}_{number:043d}"
            yield f"e30.e30.{number}"
            yield jwt.encode(said, key, "ES256", {"kid": f"kid{number}"})
            yield jwt.encode(said, key, "ES256", {"kid": "one"})
            yield jwt.encode(claims(iss="https://evil.example.com"), key, "ES256", {"kid": "one"})
            yield jwt.encode(said, "x" * 32, "HS256", {"kid": "one"})


@pytest.fixture(params=["one address", "one proxy"])
def flooded(tmp_path: Path, redis_url: str, request: pytest.FixtureRequest) -> Iterator[FloodedService]:
    issuer = Issuer()
    with serving(issuer) as url:
        made = FloodedService(tmp_path, url, issuer, redis_url, PROXY if request.param == "one proxy" else "")
        with made.service as running:
            running.has_test_metrics = True
            running.start("api")
            yield made


def test_no_good_credential_is_refused_for_anothers_bad_ones(flooded: FloodedService) -> None:
    """A hundred bad ones for each good one, from one address, at every place where credentials are shown."""
    service, junk = flooded.service, flooded.junk()
    api, vault = (
        f"{service.url}/api/v1/kms/status",
        f"{service.url}/v1/auth/token/lookup-self",
    )
    token = service.new_token("status")[1]
    headers = {"X-Forwarded-For": "203.0.113.9"}
    refused, answers, asked = set(), [], 0
    with httpx.Client(timeout=60, trust_env=False, headers=headers) as http:
        for _ in range(ROUNDS):
            for bad, url in zip(
                islice(junk, RATIO), cycle((api, vault, f"{service.url}/metrics")), strict=False
            ):
                refused.add(http.get(url, headers={"X-Vault-Token": bad}).status_code)
                asked += 1
            shown = [
                (api, bearer(flooded.good())),
                (vault, {"X-Vault-Token": flooded.good()}),
                (f"{service.url}/metrics", {"X-API-Key": flooded.good()}),
                (api, bearer(token)),
            ]
            answers += [http.get(url, headers=each).status_code for url, each in shown]
            answers.append(
                http.post(f"{service.url}/ui/login", data=login(http, service, flooded.good())).status_code
            )
    signatures = service.metric("test_jwt_signatures_total", headers=bearer(flooded.good()))

    assert refused == {401, 403, 429}  # 403 is what Vault's clients expect
    assert answers == [200, 200, 200, 200, 303] * ROUNDS
    assert asked == ROUNDS * RATIO
    assert signatures <= asked / 6 + 4 * ROUNDS + 2  # one kind of junk in six, and each good JWT
    assert flooded.issuer.asked <= 10  # one in five seconds
    assert records(service).count('"denied"') < asked / 4
    assert service.output("api").count("auth.refused") < asked / 4


def login(http: httpx.Client, service: SecuredService, token: str) -> dict[str, str]:
    page = http.get(f"{service.url}/ui/login").text
    return {"token": token, "stamp": page.partition('name="stamp" value="')[2].partition('"')[0]}


def records(own: SecuredService) -> str:
    return "".join(path.read_text() for path in (own.state / "audit").rglob("*.jsonl"))


def test_forwarded_headers_of_a_stranger_change_nothing(tmp_path: Path) -> None:
    """Those of a proxy that is trusted: tests/peers/test_auth_proxies.py."""
    settings = (
        f'[kms.auth]\nmode = "required"\nfailures_per_minute = {LIMIT}\n'
        '[kms.server]\ntrusted_proxies = ["10.0.0.0/8"]\n'
    )
    with SecuredService(tmp_path, settings, "unix:///nonexistent.sock").start("api") as own:
        codes = [
            own.get("/status", headers={"X-Forwarded-For": f"203.0.113.{n}", **bearer("kms_bad")}).status_code
            for n in range(LIMIT + 3)
        ]

        assert codes[-1] == 429
        assert "203.0.113" not in records(own)
        assert own.http.get("/metrics").status_code == 200
        assert own.http.get("/metrics", headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401


def test_good_tokens_pass_while_key_endpoints_hang_and_junk_waits(tmp_path: Path, redis_url: str) -> None:
    """Junk that needs keys waits for them; a JWT whose key is known, and a token, do not."""
    issuer = Issuer()
    with serving(issuer) as url:
        flooded = FloodedService(tmp_path, url, issuer, redis_url)
        with flooded.service as own:
            own.start("api")
            assert own.get("/status", headers=bearer(flooded.good())).status_code == 200
            issuer.hang()
            try:
                codes = during_a_hang(flooded)
            finally:
                issuer.resume()

    assert codes == [200] * 40


def during_a_hang(flooded: FloodedService) -> list[int]:
    """The answers to good tokens while 40 requests with unknown key ids wait."""
    key, own = flooded.thief.keys["one"][0], flooded.service

    def stuck(number: int) -> None:
        token = jwt.encode(claims(), key, "ES256", {"kid": f"kid{number}"})
        httpx.get(f"{own.url}/api/v1/kms/status", headers=bearer(token), timeout=60, trust_env=False)

    threads = [threading.Thread(target=stuck, args=(number,)) for number in range(40)]
    assert flooded.issuer.asked == 1
    while flooded.issuer.asked == 1:  # until a fetch may begin, which then hangs
        stuck_one = threading.Thread(target=stuck, args=(-1,))
        stuck_one.start()
        threads.append(stuck_one)
        stuck_one.join(0.5)
    for thread in threads:
        if thread.ident is None:
            thread.start()
    headers = [bearer(flooded.good()) for _ in range(20)] + [own.token_header("status") for _ in range(20)]
    codes = [own.get("/status", headers=each).status_code for each in headers]
    assert any(thread.is_alive() for thread in threads)
    flooded.issuer.resume()
    for thread in threads:
        thread.join()
    return codes
