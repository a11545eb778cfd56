"""What each route is asked for with, full of secrets: a good body for each, by the route."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from support.canary.service import CanaryService
from support.routes import RULES, UI_RULES, VAULT_RULES
from support.service import b64

Route = tuple[str, str]
Body = Callable[[CanaryService], Mapping[str, object] | None]


def nothing(install: CanaryService) -> None:
    del install


def encrypt_body(install: CanaryService) -> dict[str, object]:
    return {"plaintext": b64(install.plaintext.encode()), "context": install.context}


def decrypt_body(install: CanaryService) -> dict[str, object]:
    return {"ciphertext": install.sealed(), "context": install.context}


def wrapped(install: CanaryService) -> dict[str, object]:
    made = install.api(
        "POST", "/wrap", {"file_key": b64(install.secrets["file key"]), "context": install.context}
    )
    return {"stanzas": made["stanza"], "context": install.context}


def payloads(install: CanaryService) -> dict[str, object]:
    return {
        "payloads": [{"metadata": {"encoding": b64(b"json/plain")}, "data": b64(install.plaintext.encode())}]
    }


def for_vault(install: CanaryService) -> dict[str, object]:
    data = b64(install.context_secret.encode())
    return {"plaintext": b64(install.plaintext.encode()), "context": data, "associated_data": data}


def of_vault(install: CanaryService) -> dict[str, object]:
    made = install.ask("POST", "/v1/transit/encrypt/default", for_vault(install)).json()["data"]
    return {**for_vault(install), "ciphertext": made["ciphertext"]} | {"plaintext": None}


def without_body(routes: Iterable[Route]) -> dict[Route, Body]:
    """Of these routes all to which nothing is sent, those that change nothing first."""
    found = [route for route in routes if route[0] not in {"POST", "PUT"}]
    return dict.fromkeys(sorted(found, key=lambda route: route[0] == "DELETE"), nothing)


CALLS: Final[dict[Route, Body]] = {
    ("POST", "/encrypt"): encrypt_body,
    ("POST", "/decrypt"): decrypt_body,
    ("POST", "/generate-key"): lambda install: {"context": install.context},
    ("POST", "/rewrap"): lambda install: {
        **decrypt_body(install),
        "new_context": {"now": install.context_secret},
    },
    ("POST", "/wrap"): lambda install: {
        "file_key": b64(install.secrets["file key"]),
        "context": install.context,
    },
    ("POST", "/unwrap"): wrapped,
    ("POST", "/batch"): lambda install: {"operation": "decrypt", "items": [decrypt_body(install)] * 3},
    ("POST", "/codec/encode"): payloads,
    ("POST", "/codec/decode"): lambda install: install.api("POST", "/codec/encode", payloads(install)),
    ("POST", "/jobs"): lambda install: {
        "kind": "encrypt",
        "items": [encrypt_body(install)],
        "callback": "hook",
    },
    ("POST", "/jobs/status"): lambda install: {
        "job_ids": [install.job_of({"kind": "encrypt", "items": [encrypt_body(install)]})["job_id"]]
    },
    **dict.fromkeys(
        [
            ("POST", "/files/encrypt"),
            ("POST", "/files/decrypt"),
            ("POST", "/keys/{key_id}/rotate"),
            ("POST", "/jobs/{job_id}/cancel"),
            ("POST", "/jobs/{job_id}/retry"),
            ("POST", "/webhooks/dead/{delivery_id}/resend"),
        ],
        nothing,
    ),
    **without_body(RULES),
}
_VAULT_BODIES: Final[dict[str, Body]] = {
    "encrypt": for_vault,
    "decrypt": of_vault,
    "rewrap": of_vault,
    "{mount}": lambda install: {"role_id": install.root.split("_")[1], "secret_id": install.root},
    "datakey": lambda install: {**for_vault(install), "plaintext": None},
}
VAULT_CALLS: Final[dict[Route, Body]] = {
    (method, f"/v1/{path}"): _VAULT_BODIES.get(path.split("/")[1], lambda _: {})
    for method in ("POST", "PUT")
    for path in (
        "{mount}/encrypt/{name}",
        "{mount}/decrypt/{name}",
        "{mount}/rewrap/{name}",
        "{mount}/datakey/plaintext/{name}",
        "{mount}/datakey/wrapped/{name}",
        "{mount}/keys/{name}",
        "{mount}/keys/{name}/rotate",
        "{mount}/keys/{name}/config",
        "auth/token/renew-self",
        "auth/token/revoke-self",
        "auth/{mount}/login",
        "sys/capabilities-self",
    )
} | without_body(VAULT_RULES)
_LOGIN: Final = (("GET", "/ui/login"), ("POST", "/ui/login"))
_LOGOUT: Final = ("POST", "/ui/logout")
UI_CALLS: Final[tuple[Route, ...]] = (*_LOGIN, *sorted(UI_RULES.keys() - {*_LOGIN, _LOGOUT}), _LOGOUT)
PARAMETER: Final = re.compile(r"\{(\w+)\}")
