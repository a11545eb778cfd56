"""An issuer that settings know by its name alone: where its keys are, and how it may say so wrongly."""

import ipaddress
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509

from kms_core.auth.authenticator import Authenticator
from kms_protocol.errors import Unauthenticated, Unavailable
from support.credentials import AUDIENCE, Authority, Issuer, SecuredService, authenticator_of, bearer
from support.http_servers import QuietHandler, served
from support.service import check_problem
from support.waiting import until

WELL_KNOWN: Final = "/tenant/.well-known/openid-configuration"
NO_REDIS: Final = "unix:///nonexistent.sock"
MORE_THAN_IS_READ: Final = 1100 * 1024


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    location: str = ""


@dataclass
class Provider:
    """An identity provider over HTTPS; ``answers`` says by path what it says otherwise than it should."""

    origin: str
    ca_file: Path
    keys: Issuer = field(default_factory=Issuer)
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def issuer(self) -> str:
        return f"{self.origin}/tenant"

    def document(self, **changes: object) -> bytes:
        return json.dumps({"issuer": self.issuer, "jwks_uri": f"{self.origin}/keys", **changes}).encode()

    def answer(self, path: str) -> Answer:
        self.asked.append(path)
        usual = {WELL_KNOWN: self.document, "/keys": lambda: self.keys.jwks}
        if path in self.answers:
            return self.answers[path]
        return Answer(body=usual[path]()) if path in usual else Answer(404)

    def token(self, kid: str | None = None, /, **changes: object) -> str:
        return self.keys.token(kid, **{"iss": self.issuer, **changes})

    def settings(self, issuer: str | None = None) -> str:
        return (
            '[kms.auth]\nmode = "required"\nfailures_per_minute = 1000\n'
            f'[kms.auth.issuers.corp]\nissuer = "{issuer or self.issuer}"\naudience = "{AUDIENCE}"\n'
            f'ca_file = "{self.ca_file}"\nscopes_claim = "kms_scopes"\n'
        )


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("id", x509.IPAddress(ipaddress.ip_address("127.0.0.1")), server=True)
    made = Provider("", authority.ca_file)

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 -- the library's name
            answer = made.answer(self.path)
            self.reply(answer.status, answer.body, location=answer.location)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    with served(Handler, context) as port:
        made.origin = f"https://127.0.0.1:{port}"
        yield made


def authenticator_for(tmp_path: Path, provider: Provider, issuer: str | None = None) -> Authenticator:
    """The doors of an install that trusts the provider, in this process."""
    made = authenticator_of(SecuredService(tmp_path / "kms", provider.settings(issuer), NO_REDIS).settings)
    assert made is not None
    return made


def test_keys_are_found_by_the_issuers_name_and_roll_over_without_a_restart(
    tmp_path: Path, provider: Provider
) -> None:
    with SecuredService(tmp_path / "kms", provider.settings(), NO_REDIS) as service:
        service.start("api")
        assert provider.asked == []

        def status(token: str) -> int:
            return service.get("/status", headers=bearer(token)).status_code

        assert status(provider.token()) == 200
        assert status(provider.token(sub="eve")) == 200
        assert provider.asked == [WELL_KNOWN, "/keys"]
        provider.keys.rollover("second", "RS256", keep=False)
        provider.answers = {
            WELL_KNOWN: Answer(body=provider.document(jwks_uri=f"{provider.origin}/moved")),
            "/moved": Answer(body=provider.keys.jwks),
        }
        until(lambda: status(provider.token()) == 200, "the new key is known, from where it is now")

        assert provider.asked[2:] == [WELL_KNOWN, "/moved"]


def test_a_provider_that_is_away_is_told_as_such_tokens_are_let_in_and_it_is_asked_again(
    tmp_path: Path, provider: Provider
) -> None:
    provider.answers[WELL_KNOWN] = Answer(503)
    with SecuredService(tmp_path / "kms", provider.settings(), NO_REDIS) as service:
        service.start("api")

        check_problem(service.get("/status", headers=bearer(provider.token())), 503, "unavailable")
        assert service.get("/status", headers=service.token_header("status")).status_code == 200
        assert "answers 503" in service.output("api")
        provider.answers.clear()
        until(
            lambda: service.get("/status", headers=bearer(provider.token())).status_code == 200,
            "the provider is asked again",
        )


def elsewhere(provider: Provider) -> None:
    """The same words at another place, to which it leads."""
    provider.answers["/other"] = Answer(body=provider.document())
    provider.answers[WELL_KNOWN] = Answer(302, location=f"{provider.origin}/other")


def keys_elsewhere(provider: Provider) -> None:
    provider.answers["/other"] = Answer(body=provider.keys.jwks)
    provider.answers["/keys"] = Answer(302, location=f"{provider.origin}/other")


def oversized(provider: Provider) -> None:
    provider.answers[WELL_KNOWN] = Answer(body=provider.document(pad="x" * MORE_THAN_IS_READ))


WRONG: Final[dict[str, Callable[[Provider], bytes]]] = {
    "another issuer": lambda provider: provider.document(issuer="https://id.example.com"),
    "the issuer with a slash": lambda provider: provider.document(issuer=f"{provider.issuer}/"),
    "the issuer in capitals": lambda provider: provider.document(issuer=provider.issuer.upper()),
    "no issuer": lambda provider: json.dumps({"jwks_uri": f"{provider.origin}/keys"}).encode(),
    "no keys": lambda provider: json.dumps({"issuer": provider.issuer}).encode(),
    "keys without TLS": lambda provider: provider.document(jwks_uri="http://id.example.com/keys"),
    "keys in a file": lambda provider: provider.document(jwks_uri="file:///etc/hostname"),
    "keys behind a password": lambda provider: provider.document(
        jwks_uri=provider.origin.replace("//", "//u:p@") + "/keys"
    ),
    "keys at no address": lambda provider: provider.document(jwks_uri="https://[keys"),
    "keys at no port": lambda provider: provider.document(jwks_uri="https://127.0.0.1:99999/keys"),
    "a list of keys": lambda provider: provider.document(jwks_uri=[f"{provider.origin}/keys"]),
    "no JSON": lambda _: b"<html>",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_document_that_is_not_as_it_should_be_lets_nobody_in(
    tmp_path: Path, provider: Provider, name: str
) -> None:
    provider.answers[WELL_KNOWN] = Answer(body=WRONG[name](provider))

    with pytest.raises(Unavailable):
        authenticator_for(tmp_path, provider).principal(provider.token())
    assert provider.asked == [WELL_KNOWN]


@pytest.mark.parametrize("make", [elsewhere, keys_elsewhere, oversized])
def test_no_redirect_is_followed_and_no_more_read_than_is_needed(
    tmp_path: Path, provider: Provider, make: Callable[[Provider], None]
) -> None:
    make(provider)

    with pytest.raises(Unavailable):
        authenticator_for(tmp_path, provider).principal(provider.token())
    assert "/other" not in provider.asked


def test_a_slash_at_the_end_of_an_issuer_is_not_doubled(tmp_path: Path, provider: Provider) -> None:
    name = f"{provider.issuer}/"
    provider.answers[WELL_KNOWN] = Answer(body=provider.document(issuer=name))

    assert authenticator_for(tmp_path, provider, name).principal(provider.token(iss=name)).name == "corp:ada"


def test_a_provider_of_an_authority_that_is_not_trusted_lets_nobody_in(
    tmp_path: Path, provider: Provider
) -> None:
    provider.ca_file = Authority(tmp_path / "other").ca_file

    with pytest.raises(Unavailable):
        authenticator_for(tmp_path, provider).principal(provider.token())
    assert provider.asked == []


def test_keys_of_one_issuer_are_no_keys_of_another_that_says_so(tmp_path: Path, provider: Provider) -> None:
    """A token that names an issuer of the settings is believed by that one's keys alone."""
    thief = Issuer()
    made = authenticator_for(tmp_path, provider)

    assert made.principal(provider.token()).name == "corp:ada"
    with pytest.raises(Unauthenticated):
        made.principal(thief.token(iss=provider.issuer))
