"""HTTPS GET of an issuer's key set or discovery document, bounded in time and size."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from kms_core.http_client import peer
from kms_core.http_client.deadline import DeadlineTransport
from kms_protocol.tls_client import client_context

ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    httpx.InvalidURL,
    OSError,
    ValueError,
)
_SILENCE_S: Final = 5.0
_MOST_BYTES: Final = 256 * 1024
_OK: Final = 200
_HEADERS: Final = [(b"Accept", b"application/json"), (b"Accept-Encoding", b"identity")]
_TIMEOUTS: Final = dict.fromkeys(("connect", "read", "write", "pool"), _SILENCE_S)


def fetching(
    ca_file: Path | None, setting: str = "ca_file", *, within_s: float = 10.0
) -> Callable[[str], bytes]:
    """How to get what is at a URL: no redirects, no compression, at most 256 KiB.

    The whole exchange ends ``within_s`` after its beginning (looking up the host's name is the system's own
    time), and after 5 seconds of silence. The result raises one of ``ERRORS``. Proxies of the environment are
    used. Raises ConfigurationError, which names ``setting``, for a ``ca_file`` that cannot be used.
    """
    context = client_context(ca_file, setting)

    def fetch(url: str) -> bytes:
        at, network = httpx.URL(url), DeadlineTransport()
        asked = httpcore.URL(scheme=at.raw_scheme, host=at.raw_host, port=at.port, target=at.raw_path)
        with (
            network.until(time.monotonic() + within_s),
            httpcore.ConnectionPool(context, proxy=_proxy(at), network_backend=network) as pool,
            pool.stream(
                "GET", asked, headers=[(b"Host", at.netloc), *_HEADERS], extensions={"timeout": _TIMEOUTS}
            ) as answer,
        ):
            return _read(answer)

    return fetch


def _read(answer: httpcore.Response) -> bytes:
    if answer.status != _OK:
        raise ValueError("the issuer did not answer 200")
    if any(name.lower() == b"content-encoding" and value != b"identity" for name, value in answer.headers):
        raise ValueError("the issuer compressed its answer, which was not asked for")
    data = bytearray()
    for piece in answer.iter_stream():
        data += piece
        if len(data) > _MOST_BYTES:
            raise ValueError("the answer is above 256 KiB")
    return bytes(data)


def _proxy(at: httpx.URL) -> httpcore.Proxy | None:
    proxies = getproxies()
    address = proxies.get(at.scheme) or proxies.get("all")
    return None if proxy_bypass(at.host) else peer.proxy_of(address)
