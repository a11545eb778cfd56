"""What each route is asked for with, full of secrets: a good body for each, by the route."""

import re
from collections.abc import Callable, Mapping
from typing import Final

from canaryhouse import House
from service import b64

Route = tuple[str, str]
Body = Callable[[House], Mapping[str, object] | None]


def nothing(house: House) -> None:
    del house


def items(house: House) -> dict[str, object]:
    return {"plaintext": b64(house.plaintext.encode()), "context": house.context}


def sealed(house: House) -> dict[str, object]:
    return {"ciphertext": house.sealed(), "context": house.context}


def wrapped(house: House) -> dict[str, object]:
    made = house.api("POST", "/wrap", {"file_key": b64(house.secrets["file key"]), "context": house.context})
    return {"stanzas": made["stanza"], "context": house.context}


def payloads(house: House) -> dict[str, object]:
    return {
        "payloads": [{"metadata": {"encoding": b64(b"json/plain")}, "data": b64(house.plaintext.encode())}]
    }


def for_vault(house: House) -> dict[str, object]:
    data = b64(house.value.encode())
    return {"plaintext": b64(house.plaintext.encode()), "context": data, "associated_data": data}


def of_vault(house: House) -> dict[str, object]:
    made = house.ask("POST", "/v1/transit/encrypt/default", for_vault(house)).json()["data"]
    return {**for_vault(house), "ciphertext": made["ciphertext"]} | {"plaintext": None}


CALLS: Final[dict[Route, Body]] = {
    ("POST", "/encrypt"): items,
    ("POST", "/decrypt"): sealed,
    ("POST", "/generate-key"): lambda house: {"context": house.context},
    ("POST", "/rewrap"): lambda house: {**sealed(house), "new_context": {"now": house.value}},
    ("POST", "/wrap"): lambda house: {"file_key": b64(house.secrets["file key"]), "context": house.context},
    ("POST", "/unwrap"): wrapped,
    ("POST", "/batch"): lambda house: {"operation": "decrypt", "items": [sealed(house)] * 3},
    ("POST", "/codec/encode"): payloads,
    ("POST", "/codec/decode"): lambda house: house.api("POST", "/codec/encode", payloads(house)),
    ("POST", "/jobs"): lambda house: {"kind": "encrypt", "items": [items(house)], "callback": "hook"},
    **dict.fromkeys(
        [
            ("POST", "/files/encrypt"),
            ("POST", "/files/decrypt"),
            ("GET", "/keys"),
            ("GET", "/keys/{key_id}"),
            ("POST", "/keys/{key_id}/rotate"),
            ("GET", "/jobs"),
            ("GET", "/jobs/dead"),
            ("GET", "/jobs/{job_id}"),
            ("GET", "/jobs/{job_id}/events"),
            ("GET", "/jobs/{job_id}/result"),
            ("DELETE", "/jobs/{job_id}"),
            ("POST", "/jobs/{job_id}/cancel"),
            ("POST", "/jobs/{job_id}/retry"),
            ("GET", "/webhooks/dead"),
            ("POST", "/webhooks/dead/{delivery_id}/resend"),
            ("GET", "/intake"),
            ("GET", "/audit"),
            ("GET", "/status"),
            ("GET", "/health"),
            ("GET", "/livez"),
            ("GET", "/readyz"),
            ("GET", "/metrics"),
        ],
        nothing,
    ),
}
_VAULT_BODIES: Final[dict[str, Body]] = {
    "encrypt": for_vault,
    "decrypt": of_vault,
    "rewrap": of_vault,
    "datakey": lambda house: {**for_vault(house), "plaintext": None},
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
        "sys/capabilities-self",
    )
} | dict.fromkeys(
    [
        ("GET", "/v1/{mount}/keys"),
        ("LIST", "/v1/{mount}/keys"),
        ("GET", "/v1/{mount}/keys/{name}"),
        ("DELETE", "/v1/{mount}/keys/{name}"),
        ("GET", "/v1/auth/token/lookup-self"),
        ("GET", "/v1/sys/mounts"),
        ("GET", "/v1/sys/internal/ui/mounts"),
        ("GET", "/v1/sys/internal/ui/mounts/{mount}"),
        ("GET", "/v1/sys/health"),
        ("HEAD", "/v1/sys/health"),
        ("GET", "/v1/sys/init"),
        ("GET", "/v1/sys/seal-status"),
        ("GET", "/v1/sys/leader"),
    ],
    nothing,
)
UI_CALLS: Final[tuple[Route, ...]] = (
    ("GET", "/ui/login"),
    ("POST", "/ui/login"),
    ("GET", "/ui"),
    ("GET", "/ui/jobs"),
    ("GET", "/ui/jobs/{job_id}"),
    ("GET", "/ui/jobs/{job_id}/events"),
    ("POST", "/ui/jobs/{job_id}/cancel"),
    ("POST", "/ui/jobs/{job_id}/retry"),
    ("GET", "/ui/audit"),
    ("GET", "/ui/audit/{audit_id}/receipt"),
    ("GET", "/ui/keys"),
    ("GET", "/ui/keys/{key_id}/rotate"),
    ("POST", "/ui/keys/{key_id}/rotate"),
    ("GET", "/ui/runbooks"),
    ("GET", "/docs"),
    ("GET", "/ui/static/{name}"),
    ("POST", "/ui/logout"),
)
PARAMETER: Final = re.compile(r"\{(\w+)\}")
