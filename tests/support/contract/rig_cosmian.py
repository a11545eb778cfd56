"""Keys of a Cosmian KMS server for the contract: the one at ``COSMIAN_KMS_URL``, else a double.

Each rig speaks one dialect, and has a double in its place where that server speaks another.
"""

import atexit
import functools
import os
from typing import Final, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2 as httpx
import pytest

from kms_core.backends import Backend
from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import CosmianServer
from kms_core.backends.file_token import FileToken
from kms_core.backends.remote import RemoteBackend
from kms_core.http_client import PeerServer
from support.contract.cosmian_double import NEW, CosmianDouble
from support.tcp_proxy import TcpProxy

Protocol = Literal["auto", "kmip", "jose"]
TIMEOUT_S: Final = 10.0


def real_url() -> str | None:
    """The address of a real server, if there is one."""
    return os.environ.get("COSMIAN_KMS_URL")


@functools.cache
def server_url(version: str = NEW) -> str:
    """A server of this major version: the real one, or a double for the session."""
    real = real_url()
    if real and major(httpx.get(f"{real}/version", trust_env=False).json()) == major(version):
        return real
    double = CosmianDouble(version)
    atexit.register(double.stop)
    return double.url


def major(version: str) -> str:
    return version.partition(".")[0]


def cosmian(url: str, protocol: Protocol = "auto", token: str | None = None) -> CosmianServer:
    """The server at ``url``, as the user of this token, else of the one in ``COSMIAN_API_KEY``."""
    given = token or (os.environ.get("COSMIAN_API_KEY") if real_url() else None)
    server = PeerServer(url, "Cosmian KMS", "kms.cosmian.server_url", TIMEOUT_S)
    return CosmianServer(server, FileToken(given, None, strict=False) if given else None, protocol)


def new_key(server: CosmianServer) -> CosmianKey:
    """A key that nobody had before."""
    key = CosmianKey(server, f"test-{uuid4().hex}")
    with key.call():
        key.init()
    return key


@functools.cache
def relayed(version: str, protocol: Protocol) -> tuple[TcpProxy, CosmianServer]:
    """A server behind a relay; one for all tests, and each new rig mends it."""
    url = urlsplit(server_url(version))
    if url.hostname != "127.0.0.1" or url.scheme != "http":
        pytest.skip("COSMIAN_KMS_URL is not http://127.0.0.1:…, and only such a line can be cut")
    relay = TcpProxy(url.port or 80)
    return relay, cosmian(relay.url, protocol)


class CosmianRig:
    """Two keys of one server; broken by cutting the line to it."""

    def __init__(self, version: str, protocol: Protocol) -> None:
        self._relay, server = relayed(version, protocol)
        self._relay.mend()
        self.backend: Backend = RemoteBackend(CosmianCipher(new_key(server)))
        self.other: Backend = RemoteBackend(CosmianCipher(new_key(server)))

    def rotate(self) -> None:
        self.backend.rotate()

    def break_it(self) -> None:
        self._relay.cut()

    def mend(self) -> None:
        self._relay.mend()
