"""Logins of the Vault API: what is handed out, for how long, and confusions that get nothing."""

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kms_core.auth import tokens
from kms_protocol.errors import Unauthenticated
from support.audit_logs import AuditFolder
from support.credentials import ISSUER, Issuer, bearer, claims, serving
from support.openbao import ROOT_TOKEN, bao
from support.service import core_of
from support.vault_logins import CLUSTER, DEPLOY, HELLO, TTL_S, Logins, deploy_login, flux_login


@dataclass
class LoginService:
    """The service and its issuers; ``keys_of`` counts requests for keys that tokens name."""

    service: Logins
    corp: Issuer
    cluster: Issuer
    elsewhere: Issuer
    url: str

    def secret(self, tenant: str = "acme", ttl: timedelta | None = None) -> tuple[tokens.Token, str]:
        return self.service.new_token("encrypt,decrypt key=default", tenant=tenant, ttl=ttl)


@pytest.fixture(scope="module")
def login_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoginService]:
    corp, cluster, elsewhere = (Issuer(kid, "RS256") for kid in ("corp-1", "cluster-1", "corp-1"))
    with ExitStack() as held:
        urls = [held.enter_context(serving(issuer)) for issuer in (corp, cluster, elsewhere)]
        service = held.enter_context(Logins(tmp_path_factory.mktemp("logins"), urls[0], urls[1]))
        yield LoginService(service.start("api"), corp, cluster, elsewhere, urls[2])


# -- what is handed out --------------------------------------------------------------------------------


def test_a_role_gives_its_scopes_and_no_others(login_service: LoginService) -> None:
    body = deploy_login(login_service.corp, groups=["ops"], kms_scopes=["*"])
    auth = login_service.service.auth("jwt", body)
    token = auth["client_token"]
    as_ops = login_service.service.auth("jwt", {**body, "role": "ops"})["client_token"]

    assert auth["metadata"] == {"role": "deploy", "tenant": "acme"}
    assert (auth["renewable"], auth["token_type"]) == (False, "batch")
    assert auth["lease_duration"] == TTL_S
    assert login_service.service.encrypt_status(token) == 200
    assert login_service.service.encrypt_status(as_ops) == 403
    assert login_service.service.get("/status", headers=bearer(token)).status_code == 403
    assert login_service.service.get("/status", headers=bearer(str(body["jwt"]))).status_code == 200
    assert login_service.service.get("/audit", headers=bearer(as_ops)).status_code == 200


def test_a_token_of_a_login_is_of_the_tenant_that_was_brought(login_service: LoginService) -> None:
    acme, web = (
        login_service.service.auth("jwt", deploy_login(login_service.corp, org=org))["client_token"]
        for org in ("acme", "web")
    )
    secret = login_service.secret("web")[1]
    named = {
        "role_id": "web/" + tokens.read(login_service.service.token_file).tokens[-1].name,
        "secret_id": secret,
    }
    by_secret = login_service.service.auth("approle", named)["client_token"]
    sealed = login_service.service.call(acme, "transit/encrypt/default", HELLO).json()["data"]["ciphertext"]
    opened = [
        login_service.service.call(token, "transit/decrypt/default", {"ciphertext": sealed}).status_code
        for token in (acme, web, by_secret)
    ]

    assert opened == [200, 400, 400]


def test_a_token_lasts_no_longer_than_what_was_brought(login_service: LoginService) -> None:
    now = int(time.time())
    short = login_service.service.auth("jwt", deploy_login(login_service.corp, exp=now + 60))
    token, secret = login_service.secret(ttl=timedelta(seconds=90))
    of_secret = login_service.service.auth("approle", {"role_id": token.name, "secret_id": secret})
    looked = login_service.service.call(short["client_token"], "auth/token/lookup-self", method="GET").json()[
        "data"
    ]

    assert 0 < short["lease_duration"] <= 60
    assert 0 < of_secret["lease_duration"] <= 90
    assert 0 < looked["ttl"] <= 60
    assert (looked["type"], looked["renewable"]) == ("batch", False)
    assert (
        login_service.service.log_in("jwt", deploy_login(login_service.corp, exp=now - 2)).status_code == 403
    )  # in the leeway


def test_a_token_ends_with_the_secret_that_it_came_from(login_service: LoginService) -> None:
    path = login_service.service.token_file
    for end in (
        lambda name: tokens.revoke(path, name),
        lambda name: tokens.rotate(path, name, timedelta(0), None),
    ):
        token, secret = login_service.secret()
        body = {"role_id": token.id, "secret_id": secret}
        short = login_service.service.auth("approle", body)["client_token"]
        assert login_service.service.encrypt_status(short) == 200
        end(token.name)
        assert login_service.service.encrypt_status(short) == 403
        assert login_service.service.log_in("approle", body).status_code == 403


def test_another_process_of_the_install_takes_the_token(login_service: LoginService, tmp_path: Path) -> None:
    token, secret = login_service.secret()
    texts = [
        login_service.service.auth("jwt", deploy_login(login_service.corp))["client_token"],
        login_service.service.auth("approle", {"role_id": token.name, "secret_id": secret})["client_token"],
    ]
    other = core_of(login_service.service).authenticator
    elsewhere = core_of(Logins(tmp_path / "other", login_service.url, login_service.url)).authenticator
    assert other
    assert elsewhere
    found = [other.authenticate(text) for text in texts]

    assert [(who.name, who.tenant) for who in found] == [("corp:ada", "acme"), (token.name, "acme")]
    for text in texts:
        with pytest.raises(Unauthenticated):
            elsewhere.authenticate(text)


def test_a_login_is_recorded_by_what_was_brought(login_service: LoginService) -> None:
    body = deploy_login(login_service.corp, sub="recorded")
    token, secret = login_service.secret()
    login_service.service.auth("jwt", body)
    login_service.service.auth("approle", {"role_id": token.name, "secret_id": secret})
    digest = hashlib.sha256(str(body["jwt"]).encode()).hexdigest()[:16]
    seen = [
        {name: record[name] for name in ("principal", "tenant", "credential", "result")}
        for record in AuditFolder(login_service.service.state).operations()
        if record["operation"] == "login"
    ]

    for who, credential in (
        ("corp:recorded", f"jwt:corp:{digest}:deploy"),
        (token.name, f"token:{token.id}"),
    ):
        assert {"principal": who, "tenant": "acme", "credential": credential, "result": "ok"} in seen


# -- confusions ----------------------------------------------------------------------------------------
# What a JWT may have wrong whoever is shown it: tests/kms_core/auth/test_jwt_verifier.py.

Attempt = tuple[str, object] | tuple[str, object, dict[str, str]]
Make = Callable[[LoginService], Attempt]


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def of(**changes: object) -> Make:
    """A good JWT but for these claims, at its mount."""
    return lambda login_service: ("jwt", deploy_login(login_service.corp, **changes))


def role(name: object) -> Make:
    return lambda login_service: ("jwt", {**deploy_login(login_service.corp), "role": name})


def in_path(mount: str) -> Make:
    return lambda login_service: (mount, deploy_login(login_service.corp))


def with_header(name: str, value: str) -> Make:
    return lambda login_service: ("jwt", deploy_login(login_service.corp), {name: value})


def account(**changes: object) -> Make:
    return lambda login_service: ("kubernetes", flux_login(login_service.cluster, **changes))


def again(login_service: LoginService) -> Attempt:
    return "jwt", {
        "role": "deploy",
        "jwt": login_service.service.auth("jwt", deploy_login(login_service.corp))["client_token"],
    }


def secret_again(login_service: LoginService) -> Attempt:
    token, secret = login_service.secret()
    body = {"role_id": token.name, "secret_id": secret}
    return "approle", {**body, "secret_id": login_service.service.auth("approle", body)["client_token"]}


def secret_of_another(login_service: LoginService) -> Attempt:
    return "approle", {"role_id": login_service.secret()[0].name, "secret_id": login_service.secret()[1]}


def secret_of_another_tenant(login_service: LoginService) -> Attempt:
    token, secret = login_service.secret("web")
    return "approle", {"role_id": f"acme/{token.name}", "secret_id": secret}


def secret_expired(login_service: LoginService) -> Attempt:
    token, secret = login_service.secret(ttl=timedelta(seconds=-1))
    return "approle", {"role_id": token.name, "secret_id": secret}


def kms_token(login_service: LoginService) -> Attempt:
    return "jwt", {"role": "deploy", "jwt": login_service.secret()[1]}


def jwt_as_secret(login_service: LoginService) -> Attempt:
    return "approle", {"role_id": "deploy", "secret_id": deploy_login(login_service.corp)["jwt"]}


def at_the_mount_of_another_issuer(login_service: LoginService) -> Attempt:
    return "kubernetes", deploy_login(login_service.corp, sub="system:serviceaccount:deploy:a")


def by_a_stranger(login_service: LoginService) -> Attempt:
    return "jwt", deploy_login(login_service.elsewhere)


def own_keys(name: str) -> Make:
    """The header names the stranger's keys, which must not be fetched."""

    def make(login_service: LoginService) -> Attempt:
        key, _ = login_service.elsewhere.keys["corp-1"]
        header = {"kid": "corp-1", name: login_service.url}
        return "jwt", {"role": "deploy", "jwt": jwt.encode(claims(**DEPLOY), key, "RS256", header)}

    return make


CONFUSIONS: Final[dict[str, tuple[int, Make]]] = {
    "a stranger's key by the issuer's id": (403, by_a_stranger),
    "an address of keys": (403, own_keys("jku")),
    "an address of certificates": (403, own_keys("x5u")),
    "another audience": (403, of(aud="vault")),
    "a bound claim is missing": (403, of(ref=None)),
    "a bound claim of another value": (403, of(repository="evil/acme/infra")),
    "another tenant": (403, of(org="evil")),
    "role of another mount": (403, role("flux")),
    "role unknown": (403, role("nope")),
    "role in other case": (403, role("Deploy")),
    "role with a space": (403, role("deploy ")),
    "role that looks alike": (403, role("dеploy")),  # noqa: RUF001 -- a Cyrillic letter
    "role of other claims": (403, role("ops")),
    "no role": (400, role(None)),
    "role as a list": (400, role(["deploy"])),
    "no token": (400, lambda _: ("jwt", {"role": "deploy"})),
    "unknown fields": (
        400,
        lambda login_service: ("jwt", {**deploy_login(login_service.corp), "policies": ["root"]}),
    ),
    "no JSON": (400, lambda _: ("jwt", b"role=deploy")),
    "a body that is a list": (400, lambda _: ("jwt", [])),
    "a mount that is off": (403, in_path("oidc")),
    "a mount in other case": (403, in_path("JWT")),
    "a mount by its parent": (403, in_path("x%2F..%2Fjwt")),
    "a mount with a slash": (403, in_path("jwt%2F")),
    "a mount of tokens": (403, in_path("token")),
    "at the mount of another issuer": (403, at_the_mount_of_another_issuer),
    "a namespace of another tenant": (403, with_header("X-Vault-Namespace", "web")),
    "a wrapped answer": (400, with_header("X-Vault-Wrap-TTL", "60")),
    "a service account of another namespace": (403, account(sub="system:serviceaccount:flux-system2:a")),
    "a service account for the API server": (403, account(aud=CLUSTER)),
    "a token of this service as a JWT": (403, kms_token),
    "a JWT as a secret id": (403, jwt_as_secret),
    "a token of a login as a JWT": (403, again),
    "a token of a login as a secret id": (403, secret_again),
    "a secret id of another role": (403, secret_of_another),
    "a secret id of another tenant": (403, secret_of_another_tenant),
    "a secret id that expired": (403, secret_expired),
    "no secret id": (400, lambda _: ("approle", {"role_id": "ci"})),
}


@pytest.mark.parametrize(("status", "make"), CONFUSIONS.values(), ids=CONFUSIONS)
def test_a_confusion_hands_out_nothing(login_service: LoginService, status: int, make: Make) -> None:
    mount, body, *headers = make(login_service)
    asked = login_service.elsewhere.asked
    answer = login_service.service.log_in(mount, body, *headers)

    assert (answer.status_code, list(answer.json())) == (status, ["errors"]), answer.text
    assert login_service.elsewhere.asked == asked
    if isinstance(body, dict):
        secrets = [text for text in body.values() if isinstance(text, str) and len(text) > 20]
        assert not any(text in answer.text for text in secrets)


def test_the_table_would_see_a_login(login_service: LoginService) -> None:
    """The makers of the table give good attempts where nothing is changed."""
    rest = [of(), role("deploy"), account(), with_header("X-Vault-Namespace", "acme")]

    assert [login_service.service.log_in(*make(login_service)).status_code for make in rest] == [200] * len(
        rest
    )


def test_an_edited_token_is_refused(login_service: LoginService) -> None:
    text = login_service.service.auth("jwt", deploy_login(login_service.corp))["client_token"]
    head, _, tag = text.removeprefix("kmsl_").partition(".")
    raw = base64.urlsafe_b64decode(head + "==")
    edits = [
        f"kmsl_{b64url(raw.replace(b'acme', b'web!'))}.{tag}",
        f"kmsl_{b64url(raw + b'x')}.{tag}",
        *(f"kmsl_{head}.{tag[:at]}{'A' if tag[at] != 'A' else 'B'}{tag[at + 1 :]}" for at in range(len(tag))),
        f"kmsl_{head}",
        f"kmsl_{head}.",
        f"{text}=",
        text.replace("kmsl_", "kmsl-"),
        text.removeprefix("kmsl_"),
    ]

    assert [login_service.service.encrypt_status(each) for each in edits] == [403] * len(edits)
    assert login_service.service.encrypt_status(text) == 200


# -- limits --------------------------------------------------------------------------------------------


def test_failed_logins_are_limited_as_other_attempts_and_good_ones_pass(tmp_path: Path) -> None:
    issuer, thief = Issuer(), Issuer()
    with serving(issuer) as url, Logins(tmp_path, url, url, failures=1) as service:
        service.start("api")
        failed = [service.log_in("jwt", deploy_login(thief)) for _ in range(3)]
        good = service.log_in("jwt", deploy_login(issuer))
        records = "".join(path.read_text() for path in service.settings.kms.audit.path.glob("*.jsonl"))

    assert [answer.status_code for answer in failed] == [403, 429, 429]
    assert all("Retry-After" in answer.headers for answer in failed[1:])
    assert good.status_code == 200
    assert records.count('"result":"unauthenticated"') == 1


# -- the real one --------------------------------------------------------------------------------------


def test_answers_have_the_shape_of_the_real_one(login_service: LoginService) -> None:
    """For a role with tokens of the type ``batch``; what is refused is refused there, too."""
    server = bao()
    public = login_service.corp.keys["corp-1"][0].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    server.admin("POST", "sys/auth/jwt", {"type": "jwt"})
    server.admin(
        "POST", "auth/jwt/config", {"jwt_validation_pubkeys": [pem.decode()], "bound_issuer": ISSUER}
    )
    batch = {"token_type": "batch", "token_ttl": TTL_S, "token_policies": ["kms"]}
    bound = {"repository": "acme/infra", "ref": "refs/heads/main"}
    server.admin(
        "POST",
        "auth/jwt/role/deploy",
        {"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["kms-service"], "bound_claims": bound}
        | batch,
    )
    server.admin("POST", "sys/auth/approle", {"type": "approle"})
    server.admin("POST", "auth/approle/role/ci", batch)
    role_id = server.admin("GET", "auth/approle/role/ci/role-id")["data"]["role_id"]
    secret_id = server.admin("POST", "auth/approle/role/ci/secret-id", {})["data"]["secret_id"]
    token, secret = login_service.secret()
    bodies = {
        "jwt": (deploy_login(login_service.corp), deploy_login(login_service.corp)),
        "approle": (
            {"role_id": token.name, "secret_id": secret},
            {"role_id": role_id, "secret_id": secret_id},
        ),
    }
    with httpx.Client(base_url=f"{server.url}/v1/", trust_env=False) as theirs:
        for mount, (own, real) in bodies.items():
            one, other = (
                login_service.service.log_in(mount, own),
                theirs.post(f"auth/{mount}/login", json=real),
            )
            assert (one.status_code, other.status_code) == (200, 200), other.text
            assert kinds(one.json()) == kinds(other.json())
            tokens_ = [answer.json()["auth"]["client_token"] for answer in (one, other)]
            for method, path in (("GET", "lookup-self"), ("POST", "renew-self"), ("POST", "revoke-self")):
                mine = login_service.service.call(tokens_[0], f"auth/token/{path}", method=method)
                seen = theirs.request(method, f"auth/token/{path}", headers={"X-Vault-Token": tokens_[1]})
                assert mine.status_code == seen.status_code, (path, seen.text)
                if seen.status_code == 200:
                    assert mine.json()["data"].keys() >= seen.json()["data"].keys() - {"issue_time"}
                    assert mine.json()["data"]["type"] == seen.json()["data"]["type"]
        for body in (
            deploy_login(login_service.corp, ref="x"),
            deploy_login(login_service.elsewhere),
            deploy_login(login_service.corp, aud="x"),
        ):
            assert theirs.post("auth/jwt/login", json=body).status_code >= 400
            assert login_service.service.log_in("jwt", body).status_code >= 400
    server.admin("DELETE", "sys/auth/jwt", token=ROOT_TOKEN)
    server.admin("DELETE", "sys/auth/approle", token=ROOT_TOKEN)


def kinds(found: Any, where: str = "") -> set[str]:  # noqa: ANN401 -- JSON
    """The names of members and the kinds of their values; what metadata holds is each server's."""
    if not isinstance(found, dict) or where.endswith("metadata"):
        return {f"{where} {type(found).__name__}"}
    return {one for name, value in found.items() for one in kinds(value, f"{where}.{name}")}
