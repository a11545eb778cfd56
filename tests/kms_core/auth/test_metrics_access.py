"""The metrics of a worker: a good credential is taken, however many bad ones are shown beside it."""

from pathlib import Path

import jwt

from kms_core.auth.authenticator import MetricsAccess
from kms_core.auth.policy import ByScopes
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from support.credentials import Issuer, authenticator_of, claims, required_with_issuer
from support.settings_files import read


def test_good_tokens_read_the_metrics_beside_a_hundred_times_as_many_bad_ones(tmp_path: Path) -> None:
    issuer, thief = Issuer(), Issuer()
    keys = tmp_path / "jwks.json"
    keys.write_bytes(issuer.jwks)
    settings = read(tmp_path, required_with_issuer(f'jwks_file = "{keys}"'))
    doors = authenticator_of(settings)
    assert doors
    scraping = MetricsAccess(
        "token", doors, ByScopes(doors.scopes_of, {}), Proxies(settings.kms.server.trusted_proxies)
    )
    before = metrics.AUTH_FAILURES.labels("signature")._value.get()  # noqa: SLF001 -- the library shows none
    known = []
    for number in range(1000):
        kid = "one" if number % 2 else f"kid{number}"
        junk = jwt.encode(claims(sub=f"eve{number}"), thief.keys["one"][0], "ES256", {"kid": kid})
        assert not scraping.allows(junk)
        if number % 100 == 0:
            known.append(scraping.allows(issuer.token(sub=f"ada{number}", kms_scopes=["metrics"])))
    after = metrics.AUTH_FAILURES.labels("signature")._value.get()  # noqa: SLF001 -- the library shows none

    assert known == [True] * 10
    assert after - before == 1000
    assert not scraping.allows(issuer.token(kms_scopes=["status"]))
