"""An install with logins of the Vault API: two issuers, one of a cluster, and tokens as secret ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx

from support.credentials import AUDIENCE, ISSUER, Issuer, SecuredService
from support.vault_api import NO_REDIS

CLUSTER: Final = "https://kubernetes.default.svc.cluster.local"
FLUX: Final = "system:serviceaccount:flux-system:source-controller"
TTL_S: Final = 300
HELLO: Final = {"plaintext": "aGVsbG8="}
SETTINGS: Final = f"""
[kms.auth]
mode = "required"
failures_per_minute = {{failures}}
[kms.auth.issuers.corp]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks_url = "{{corp}}"
leeway_s = 5
scopes = ["status"]
scopes_claim = "kms_scopes"
tenant_claim = "org"
tenants = ["acme", "web"]
[kms.auth.issuers.corp.grants.deploy]
when = {{{{ repository = "acme/*", ref = "refs/heads/main" }}}}
scopes = ["encrypt,decrypt key=default"]
[kms.auth.issuers.corp.grants.ops]
when = {{{{ groups = "ops" }}}}
scopes = ["audit:read"]
[kms.auth.issuers.cluster]
issuer = "{CLUSTER}"
audience = "{AUDIENCE}"
jwks_url = "{{cluster}}"
[kms.auth.issuers.cluster.grants.flux]
when = {{{{ sub = "system:serviceaccount:flux-system:*" }}}}
scopes = ["encrypt,decrypt"]
[kms.auth.issuers.cluster.grants.deploy]
when = {{{{ sub = "system:serviceaccount:deploy:*" }}}}
scopes = ["encrypt"]
[kms.auth.logins.jwt]
method = "jwt"
issuer = "corp"
ttl_s = {TTL_S}
[kms.auth.logins.kubernetes]
method = "jwt"
issuer = "cluster"
[kms.auth.logins.approle]
method = "approle"
[kms.facade]
enabled = true
"""
DEPLOY: Final[Mapping[str, object]] = {
    "org": "acme",
    "repository": "acme/infra",
    "ref": "refs/heads/main",
}


class Logins(SecuredService):
    """``corp`` and ``cluster`` are the URLs of the issuers' key sets; ``more`` are further settings."""

    def __init__(
        self,
        folder: Path,
        corp: str,
        cluster: str,
        failures: int = 100_000,
        more: str = "",
    ) -> None:
        text = SETTINGS.format(corp=corp, cluster=cluster, failures=failures)
        super().__init__(folder, text + more, NO_REDIS)

    def log_in(self, mount: str, body: object, headers: Mapping[str, str] | None = None) -> httpx.Response:
        more: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        return self.http.post(f"/v1/auth/{mount}/login", headers=dict(headers or {}), **more)

    def auth(self, mount: str, body: object) -> dict[str, Any]:
        """The part ``auth`` of a good answer."""
        answer = self.log_in(mount, body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["auth"]
        return found

    def call(self, token: str, path: str, body: object = None, method: str = "POST") -> httpx.Response:
        """A call of the Vault API."""
        more: dict[str, Any] = {} if body is None else {"json": body}
        return self.http.request(method, f"/v1/{path}", headers={"X-Vault-Token": token}, **more)

    def encrypt_status(self, token: str) -> int:
        return self.call(token, "transit/encrypt/default", HELLO).status_code


def deploy_login(issuer: Issuer, **changes: object) -> dict[str, object]:
    """The body of a good login by JWT, but for what is changed in its claims."""
    return {"role": "deploy", "jwt": issuer.token(**{**DEPLOY, **changes})}


def flux_login(issuer: Issuer, **changes: object) -> dict[str, object]:
    """As ``deploy_login``, of a service account."""
    return {"role": "flux", "jwt": issuer.token(**{"iss": CLUSTER, "sub": FLUX, **changes})}
