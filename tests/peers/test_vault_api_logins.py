"""hvac and the agent of ``bao`` log in, and call with what they got."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import hvac
import pytest

from kms_core.auth import tokens
from support.credentials import Issuer, serving
from support.openbao import binary
from support.programs import running
from support.service import b64
from support.vault_logins import Logins, deploy_login, flux_login

AGENT: Final = """
vault {{ address = "{url}" }}
auto_auth {{
  method "{method}" {{
    mount_path = "auth/{method}"
    config = {{ {config} }}
  }}
  sink "file" {{ config = {{ path = "{sink}" }} }}
}}
"""


@pytest.fixture(scope="module")
def corp() -> Issuer:
    return Issuer("corp-1", "RS256")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, corp: Issuer) -> Iterator[Logins]:
    """Both issuers have the same keys."""
    with serving(corp) as url, Logins(tmp_path_factory.mktemp("logins"), url, url) as running:
        yield running.start("api")


@pytest.mark.parametrize("method", ["approle", "jwt", "kubernetes"])
def test_hvac_logs_in_and_encrypts(service: Logins, corp: Issuer, method: str) -> None:
    client = hvac.Client(url=service.url)
    match method:
        case "approle":
            token, secret = service.new_token("encrypt,decrypt key=default")
            made = client.auth.approle.login(token.name, secret)
        case "jwt":
            made = client.auth.jwt.jwt_login("deploy", deploy_login(corp)["jwt"])
        case _:
            made = client.auth.kubernetes.login("flux", flux_login(corp)["jwt"])
    client.token = made["auth"]["client_token"]  # jwt_login and kubernetes may leave it to the caller

    transit = client.secrets.transit
    sealed = transit.encrypt_data("default", b64(b"hello"))["data"]["ciphertext"]
    assert transit.decrypt_data("default", sealed)["data"]["plaintext"] == b64(b"hello")
    assert client.lookup_token()["data"]["type"] == "batch"
    client.adapter.close()


@pytest.mark.parametrize("method", ["approle", "jwt", "kubernetes"])
def test_an_agent_logs_in(service: Logins, corp: Issuer, tmp_path: Path, method: str) -> None:
    files = {name: tmp_path / name for name in ("role", "secret", "sink")}
    secret = str({"jwt": deploy_login, "kubernetes": flux_login}.get(method, deploy_login)(corp)["jwt"])
    config = {
        "jwt": f'role = "deploy", path = "{files["secret"]}", remove_jwt_after_reading = false',
        "kubernetes": f'role = "flux", token_path = "{files["secret"]}"',
        "approle": (
            f'role_id_file_path = "{files["role"]}", secret_id_file_path = "{files["secret"]}", '
            "remove_secret_id_file_after_reading = false"
        ),
    }[method]
    if method == "approle":
        token, secret = service.new_token("encrypt,decrypt key=default")
        files["role"].write_text(token.name)
    files["secret"].write_text(secret)
    (tmp_path / "agent.hcl").write_text(
        AGENT.format(url=service.url, method=method, config=config, sink=files["sink"])
    )
    argv = [binary(), "agent", f"-config={tmp_path / 'agent.hcl'}"]
    with running(argv, tmp_path / "log", files["sink"].exists, {"HOME": str(tmp_path)}):
        short = files["sink"].read_text()

    assert tokens.PREFIX not in short
    assert service.encrypt_status(short) == 200, (tmp_path / "log").read_text()
