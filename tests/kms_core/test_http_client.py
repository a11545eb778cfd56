"""The HTTP that backends share: whom it trusts, what it makes of httpcore2's errors, how forks stay apart."""

import os
import ssl
import subprocess
import sys
from typing import Final

import httpcore2
import pytest

from kms_core.http_client import Busy, Peer, PeerServer, Tls, Unreachable, transport_errors
from kms_protocol.errors import BackendUnavailable
from support.contract.faults import answer, faulty
from support.webhooks import LocalhostTls, make_localhost_tls

JSON: Final = answer(200, b"{}")
TIMEOUT_S: Final = 10.0
INTERNAL: Final = {"ConnectionNotAvailable", "UnsupportedProtocol"}
"""What a pool does not let out, and what an address that the settings let in does not cause."""

ERRORS: Final = sorted(
    name
    for name in httpcore2.__all__
    if isinstance(getattr(httpcore2, name), type)
    and issubclass(getattr(httpcore2, name), Exception)
    and name not in INTERNAL
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> LocalhostTls:
    return make_localhost_tls(tmp_path_factory.mktemp("authority"))


def peer(url: str, tls: Tls | None = None) -> Peer:
    return Peer(PeerServer(url, "Something", "kms.something.address", TIMEOUT_S, tls or Tls()))


# -- TLS -----------------------------------------------------------------------------------------------


def test_a_server_of_the_named_authority_is_trusted_and_any_without_verification(
    authority: LocalhostTls,
) -> None:
    with faulty(JSON, authority.serving()) as server:
        for tls in (Tls(ca_file=authority.ca_file), Tls(verify=False)):
            assert peer(server.url, tls).call("GET", "/").ok


def test_a_server_that_is_not_trusted_is_not_asked(authority: LocalhostTls) -> None:
    """That of an unknown authority, that of another name, and one that is addressed without TLS."""
    named = Tls(ca_file=authority.ca_file)
    with faulty(JSON, authority.serving()) as server:
        with pytest.raises(BackendUnavailable, match=r"not trusted: .* in kms\.something\.ca_file") as caught:
            peer(server.url).call("GET", "/")
        assert not isinstance(caught.value, Unreachable | Busy)
        with pytest.raises(BackendUnavailable, match="is for another name or not trusted"):
            peer(server.url.replace("localhost", "127.0.0.1"), named).call("GET", "/")
        with pytest.raises(Unreachable):
            peer(server.url.replace("https", "http")).call("GET", "/")

        assert not server.requests


def test_a_server_that_wants_a_client_certificate_is_shown_ours_and_refuses_us_without(
    authority: LocalhostTls,
) -> None:
    context = authority.serving()
    context.load_verify_locations(authority.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    with faulty(JSON, context) as server:
        with pytest.raises(Unreachable):
            peer(server.url, Tls(ca_file=authority.ca_file)).call("GET", "/")
        assert not server.requests

        own = Tls(
            ca_file=authority.ca_file, client_cert=authority.cert_and_key, client_key=authority.cert_and_key
        )
        assert peer(server.url, own).call("GET", "/").ok


# -- the environment, connections, forks ---------------------------------------------------------------


def test_no_proxy_is_taken_from_the_environment() -> None:
    with faulty(JSON) as proxy, faulty(JSON) as server:
        script = f"""
from kms_core.http_client import Peer, PeerServer
assert Peer(PeerServer({server.url!r}, "Something", "kms.x.address", 10.0)).call("GET", "/").ok
"""
        environ = {**os.environ, "HTTP_PROXY": proxy.url, "http_proxy": proxy.url, "ALL_PROXY": proxy.url}
        subprocess.run([sys.executable, "-c", script], env=environ, check=True, timeout=60)

        assert not proxy.requests
        assert server.requests


def test_a_connection_is_used_again() -> None:
    with faulty(JSON) as server:
        ours = peer(server.url)
        for _ in range(3):
            ours.call("POST", "/", b"{}")

        assert len(server.requests) == 3
        assert server.connections == 1


def test_calls_within_one_timeout_share_it() -> None:
    with faulty(JSON) as server:
        ours = peer(server.url)
        with ours.one_timeout():
            before = ours.in_time(float)
            ours.call("GET", "/")

            assert ours.in_time(float) < before <= TIMEOUT_S


FORKING: Final = """
import os, sys
from kms_core.http_client import Peer, PeerServer

peer = Peer(PeerServer(sys.argv[1], "Something", "kms.x.address", 30.0))
peer.call("GET", "/")
child = os.fork()
peer.call("GET", "/")
if child == 0:
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


def test_a_child_makes_a_connection_of_its_own() -> None:
    """On one connection it would read the answers to its parent."""
    with faulty(JSON) as server:
        subprocess.run([sys.executable, "-c", FORKING, server.url], check=True, timeout=60)

        assert len(server.requests) == 3
        assert server.connections == 2


# -- httpcore2's errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_of_httpcore_is_one_of_ours(name: str) -> None:
    place = PeerServer("http://u:secret@127.0.0.1:1", "Something", "kms.x.address", TIMEOUT_S)
    raised: Exception = getattr(httpcore2, name)("a canary")
    with pytest.raises(BackendUnavailable) as caught, transport_errors(place):
        raise raised

    assert isinstance(caught.value, Unreachable | Busy) or name == "LocalProtocolError"
    assert "secret" not in caught.value.detail
