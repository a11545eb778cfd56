"""Logins of service accounts by TokenReview, against a server that answers as Kubernetes documents."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import pytest

from support.credentials import AUDIENCE, Issuer, bearer, serving
from support.http_servers import QuietHandler, served
from support.ports import free_port
from support.vault_logins import CLUSTER, FLUX, Logins, flux_login

PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
REVIEWER: Final = "the reviewer's own token"
SETTINGS: Final = """
[kms.auth.issuers.reviewed]
issuer = "https://reviewed.example.com"
audience = "{audience}"
review_url = "{url}/"
review_token_file = "{token_file}"
[kms.auth.issuers.reviewed.grants.flux]
when = {{ sub = "system:serviceaccount:flux-system:*" }}
scopes = ["encrypt"]
[kms.auth.logins.reviewed]
method = "jwt"
issuer = "reviewed"
"""


class ApiServer:
    """Authenticates known tokens; ``say`` changes the status of its answers, ``instead`` is all of one."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.say: dict[str, Any] = {}
        self.instead: tuple[int, bytes] | None = None

    def answer(self, review: dict[str, Any]) -> dict[str, Any]:
        """As the API server: the review with a status; audiences are those that are asked for and fit."""
        user = self.known.get(review["spec"]["token"])
        status: dict[str, Any] = {"user": {}}
        if user:
            status = {
                "authenticated": True,
                "user": {"username": user, "uid": "0b5e", "groups": ["system:serviceaccounts"], "extra": {}},
                "audiences": [name for name in review["spec"]["audiences"] if name == AUDIENCE],
            }
        status = {name: value for name, value in {**status, **self.say}.items() if value is not None}
        return {**review, "metadata": {"creationTimestamp": None}, "status": status}


@contextmanager
def reviewing(server: ApiServer) -> Iterator[str]:
    class Handler(QuietHandler):
        def do_POST(self) -> None:  # noqa: N802 -- the library's name
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            code, data = 201, json.dumps(server.answer(body)).encode()
            if self.headers["Authorization"] != f"Bearer {REVIEWER}" or self.path != PATH:
                code, data = 401, b'{"kind":"Status","apiVersion":"v1","status":"Failure","code":401}'
            code, data = server.instead or (code, data)
            self.reply(code, data, "application/json")

    with served(Handler) as port:
        yield f"http://127.0.0.1:{port}"


class Cluster:
    """The service, the API server, and an issuer whose keys the service does not know."""

    def __init__(self, service: Logins, server: ApiServer, token_file: Path) -> None:
        self.service, self.server, self.token_file = service, server, token_file
        self.issuer = Issuer("k", "RS256")
        self._number = 0

    def body(self, **changes: object) -> dict[str, object]:
        """The body of a login with a new token, which the API server knows."""
        self._number += 1
        claims = {"iss": "https://reviewed.example.com", "jti": str(self._number), **changes}
        body = flux_login(self.issuer, **claims)
        self.server.known[str(body["jwt"])] = FLUX
        return body

    def log_in(self, body: object) -> httpx.Response:
        return self.service.log_in("reviewed", body)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder, server, keys = tmp_path_factory.mktemp("reviewed"), ApiServer(), Issuer("k", "RS256")
    token_file = folder / "reviewer"
    with serving(keys) as url, reviewing(server) as reviews:
        more = SETTINGS.format(audience=AUDIENCE, url=reviews, token_file=token_file)
        with Logins(folder, url, url, more=more) as service:
            yield Cluster(service.start("api"), server, token_file)


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    running.server.say, running.server.instead = {}, None
    running.token_file.write_text(f"{REVIEWER}\n")
    running.token_file.chmod(0o600)
    running.server.asked.clear()
    return running


def test_a_service_account_is_reviewed_once_and_at_logins_only(cluster: Cluster) -> None:
    body = cluster.body()
    assert cluster.service.get("/keys", headers=bearer(str(body["jwt"]))).status_code == 401
    assert cluster.server.asked == []
    answers = [cluster.log_in(body) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert cluster.server.asked == [
        {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": body["jwt"], "audiences": [AUDIENCE]},
        }
    ]
    assert cluster.service.encrypt_status(answers[0].json()["auth"]["client_token"]) == 200


SAID: Final[dict[str, dict[str, Any]]] = {
    "not authenticated": {"authenticated": False},
    "not said": {"authenticated": None},
    "with an error": {"error": "token has been invalidated"},
    "other audiences": {"audiences": [CLUSTER]},
    "an audience with more behind it": {"audiences": [f"{AUDIENCE}-2"]},
    "no audiences": {"audiences": None},
    "an empty list of audiences": {"audiences": []},
    "another service account": {"user": {"username": "system:serviceaccount:flux-system:other"}},
    "an admin": {"user": {"username": "system:admin", "groups": ["system:masters"]}},
    "no user": {"user": None},
    "a user without a name": {"user": {"uid": "1"}},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_a_review_that_does_not_accept_refuses(cluster: Cluster, said: dict[str, Any]) -> None:
    cluster.server.say = said
    body = cluster.body()
    answer = cluster.log_in(body)

    assert (answer.status_code, list(answer.json())) == (403, ["errors"])
    assert len(cluster.server.asked) == 1


def review(kind: str = "TokenReview", version: str = "v1", **status: object) -> dict[str, object]:
    """A review that accepts, but for what is changed in its status."""
    good = {"authenticated": True, "user": {"username": FLUX}, "audiences": [AUDIENCE]}
    return {"apiVersion": f"authentication.k8s.io/{version}", "kind": kind, "status": good | status}


AWAY: Final[dict[str, tuple[int, object]]] = {
    "no rights": (403, {"kind": "Status"}),
    "a review in an error": (403, review()),
    "an error of the server": (500, {}),
    "no content": (200, b""),
    "no JSON": (201, b"<html>"),
    "another kind": (201, review("SelfSubjectReview")),
    "another version": (201, review(version="v9")),
    "no status": (201, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}),
    "authenticated as text": (201, review(authenticated="true")),
    "a redirect": (302, {}),
    "a large answer": (201, b" " * 1_100_000),
}


@pytest.mark.parametrize("instead", AWAY.values(), ids=AWAY)
def test_an_api_server_that_answers_otherwise_lets_nothing_in(
    cluster: Cluster, instead: tuple[int, object]
) -> None:
    code, said = instead
    cluster.server.instead = code, said if isinstance(said, bytes) else json.dumps(said).encode()
    body = cluster.body()
    answer = cluster.log_in(body)
    cluster.server.instead = None

    assert (answer.status_code, "Retry-After" in answer.headers) == (503, True), answer.text
    assert cluster.log_in(body).status_code == 200  # what was away is not remembered


def test_without_the_reviewers_token_nothing_is_let_in(cluster: Cluster) -> None:
    cluster.token_file.write_text("wrong")
    wrong = cluster.log_in(cluster.body())
    cluster.token_file.unlink()
    missing = cluster.log_in(cluster.body())

    assert (wrong.status_code, missing.status_code) == (503, 503)


@pytest.mark.parametrize(
    "changes",
    [{"aud": CLUSTER}, {"exp": 1_000_000_000}, {"exp": None}, {"nbf": 4_000_000_000}, {"iss": CLUSTER}],
    ids=str,
)
def test_what_its_claims_refuse_is_not_reviewed(cluster: Cluster, changes: dict[str, object]) -> None:
    assert cluster.log_in(cluster.body(**changes)).status_code == 403
    assert cluster.server.asked == []


def test_another_text_with_the_same_claims_is_another_token(cluster: Cluster) -> None:
    """What was accepted is the whole text: its signature is not checked here."""
    body = cluster.body()
    assert cluster.log_in(body).status_code == 200
    text = str(body["jwt"])
    forged = f"{text.rpartition('.')[0]}.{'A' * 342}"

    assert cluster.log_in({**body, "jwt": forged}).status_code == 403
    assert len(cluster.server.asked) == 2


def test_an_api_server_that_is_away_lets_nothing_in(tmp_path: Path) -> None:
    keys = Issuer("k", "RS256")
    (tmp_path / "reviewer").write_text(REVIEWER)
    url = f"http://127.0.0.1:{free_port()}"
    more = SETTINGS.format(audience=AUDIENCE, url=url, token_file=tmp_path / "reviewer")
    with serving(keys) as corp, Logins(tmp_path, corp, corp, more=more) as service:
        service.start("api")
        token = flux_login(keys, iss="https://reviewed.example.com")
        answers = [service.log_in("reviewed", token), service.log_in("kubernetes", flux_login(keys))]

    assert [answer.status_code for answer in answers] == [503, 200]
