"""Every backend over the keys of a golden set: fresh servers that are given the key material of the set."""

import atexit
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from awsservers import started
from bao import bao, kv, transit
from contract.cosmian_double import ADMIN, NEW, OLD, CosmianDouble
from contract.cosmian_store import Key
from contract.rig_cosmian import Protocol, cosmian
from golden import manifest
from kms_core.backends import Backend
from kms_core.backends.age import AgeBackend, KeyFiles
from kms_core.backends.cosmian.backend import CosmianCipher
from kms_core.backends.cosmian.keys import CosmianKey
from kms_core.backends.remote import RemoteBackend
from ports import free_port

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


def _age(name: str) -> AgeBackend:
    return AgeBackend(KeyFiles(manifest.copied(f"keys/{name}.txt", _folder())), data_keys=True)


def _transit() -> RemoteBackend:
    given = manifest.keys()["transit"]
    bao().admin("POST", f"transit/restore/{given['name']}", {"backup": given["backup"], "force": True})
    return RemoteBackend(transit(bao(), given["name"]))


def _kv() -> RemoteBackend:
    bao().admin("POST", "secret/data/golden/v1", {"data": manifest.keys()["vault-kv"]})
    return RemoteBackend(kv(bao(), "golden/v1"))


def _aws() -> RemoteBackend:
    given, port = manifest.keys()["awskms"], free_port()
    program = str(Path(__file__).with_name("aws_server.py"))
    server = started([sys.executable, program, str(port), str(manifest.V1 / "keys/remote.json")], port)
    first, second = given["keys"]
    server.admin.create_alias(AliasName=f"{given['alias']}/{first}", TargetKeyId=first)
    server.admin.create_alias(AliasName=given["alias"], TargetKeyId=second)
    return RemoteBackend(server.cipher(given["alias"]))


def _cosmian(version: str, protocol: Protocol) -> RemoteBackend:
    double = CosmianDouble(version)
    atexit.register(double.stop)
    given = manifest.keys()["cosmian"]
    for held in given["versions"].values():
        octets = manifest.unb64(held["key"])
        double.store.add(held["uid"], Key(octets, ADMIN, frozenset({f"kms-service:{given['name']}"})))
    return RemoteBackend(CosmianCipher(CosmianKey(cosmian(double.url, protocol), given["name"])))


MAKERS: Final[Mapping[str, Callable[[], Backend]]] = {
    "age-x25519": lambda: _age("age-x25519"),
    "age-mlkem768x25519": lambda: _age("age-mlkem768x25519"),
    "transit": _transit,
    "vault-kv": _kv,
    "awskms": _aws,
    "cosmian-kmip": lambda: _cosmian(NEW, "kmip"),
    "cosmian-jose": lambda: _cosmian(NEW, "jose"),
    "cosmian-kmip-4": lambda: _cosmian(OLD, "kmip"),
}
