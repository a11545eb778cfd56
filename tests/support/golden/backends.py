"""Every backend over the keys of a golden set: fresh servers that are given the key material of the set."""

import atexit
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from kms_core.backends import Backend
from kms_core.backends.age import AgeBackend
from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from kms_core.backends.key_files import KeyFiles
from kms_core.backends.remote import RemoteBackend
from support.aws_servers import started
from support.contract.cosmian_double import ADMIN, NEW, OLD, CosmianDouble
from support.contract.cosmian_store import Key
from support.contract.rig_cosmian import Protocol, cosmian
from support.golden import golden_set, reference
from support.openbao import bao, kv, transit
from support.ports import free_port

AGE: Final = ("age-x25519", "age-mlkem768x25519")
REMOTE: Final = ("transit", "vault-kv", "awskms", "cosmian-kmip", "cosmian-jose", "cosmian-kmip-4")


@functools.cache
def of(name: str) -> Backend:
    """A backend with all versions of its golden key. Skips at home, and fails in CI, without its server."""
    return MAKERS[name]()


atexit.register(of.cache_clear)  # their connections close with them


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="kms-golden-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)


def age(name: str, *, native: bool = True) -> AgeBackend:
    """An age key of the set."""
    return AgeBackend(
        KeyFiles(golden_set.copied(f"keys/{name}.txt", _folder())), data_keys=True, native=native
    )


def _transit() -> RemoteBackend:
    given = golden_set.keys()["transit"]
    bao().admin("POST", f"transit/restore/{given['name']}", {"backup": given["backup"], "force": True})
    return RemoteBackend(transit(bao(), given["name"]))


def _kv() -> RemoteBackend:
    bao().admin("POST", "secret/data/golden/v1", {"data": golden_set.keys()["vault-kv"]})
    return RemoteBackend(kv(bao(), "golden/v1"))


def _aws() -> RemoteBackend:
    given, port = golden_set.keys()["awskms"], free_port()
    program = str(Path(__file__).with_name("aws_server.py"))
    server = started([sys.executable, program, str(port), str(golden_set.V1 / "keys/remote.json")], port)
    first, second = given["keys"]
    server.admin.create_alias(AliasName=f"{given['alias']}/{first}", TargetKeyId=first)
    server.admin.create_alias(AliasName=given["alias"], TargetKeyId=second)
    return RemoteBackend(server.cipher(given["alias"]))


def _cosmian(version: str, protocol: Protocol) -> RemoteBackend:
    double = CosmianDouble(version)
    atexit.register(double.stop)
    given = golden_set.keys()["cosmian"]
    for held in given["versions"].values():
        octets = golden_set.unb64(held["key"])
        double.store.add(held["uid"], Key(octets, ADMIN, frozenset({f"kms-service:{given['name']}"})))
    return RemoteBackend(CosmianCipher(CosmianKey(cosmian(double.url, protocol), given["name"])))


MAKERS: Final[Mapping[str, Callable[[], Backend]]] = {
    "age-x25519": lambda: age("age-x25519"),
    "age-mlkem768x25519": lambda: age("age-mlkem768x25519"),
    "transit": _transit,
    "vault-kv": _kv,
    "awskms": _aws,
    "cosmian-kmip": lambda: _cosmian(NEW, "kmip"),
    "cosmian-jose": lambda: _cosmian(NEW, "jose"),
    "cosmian-kmip-4": lambda: _cosmian(OLD, "kmip"),
}


def peer_opens(scheme: str, version: str, wrapped: bytes, aad: bytes) -> bytes:
    """What the server of a backend makes of a wrap, without the code under test."""
    given = golden_set.keys()
    match scheme:
        case "vault-kv":
            held = given["vault-kv"][version]
            return reference.kv_open(
                golden_set.unb64(held if isinstance(held, str) else held["key"]), wrapped, aad
            )
        case "awskms":
            return reference.moto_open(golden_set.unb64(given["awskms"]["keys"][version]), wrapped, aad)
        case "cosmian":
            held = given["cosmian"]["versions"][version]
            return reference.cosmian_open(golden_set.unb64(held["key"]), held["uid"], wrapped, aad)
    of("transit")
    body = {
        "ciphertext": f"vault:v{version}:{golden_set.b64(wrapped)}",
        "associated_data": golden_set.b64(aad),
    }
    answer = bao().admin("POST", f"transit/decrypt/{given['transit']['name']}", body)
    return golden_set.unb64(answer["data"]["plaintext"])
