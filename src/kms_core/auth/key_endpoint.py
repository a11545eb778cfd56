"""HTTPS requests for key sets, discovery documents and reviews of tokens, bounded in time and size."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2

from kms_core.http_client import DeadlineTransport, proxy_of
from kms_protocol.tls_client import client_context

ERRORS: Final = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.UnsupportedProtocol,
    OSError,
    ValueError,
)
_WITHIN_S: Final = 10.0
_SILENCE_S: Final = 5.0
_MOST_BYTES: Final = 256 * 1024
_OK: Final = frozenset({200, 201})
_URL_CHARACTERS: Final = "!$%&'()*+,/:;=?@[]"
_HEADERS: Final = [(b"Accept", b"application/json"), (b"Accept-Encoding", b"identity")]
_TIMEOUTS: Final = dict.fromkeys(("connect", "read", "write", "pool"), _SILENCE_S)


def fetching(
    ca_file: Path | None, setting: str = "ca_file", *, within_s: float = _WITHIN_S
) -> Callable[[str], bytes]:
    """A function that GETs a URL: no redirects, no compression, at most 256 KiB.

    The whole exchange takes at most ``within_s`` seconds (without the lookup of the host's name), and a read
    at most 5 seconds. The function raises one of ``ERRORS``. Proxies of the environment are used. Raises
    ConfigurationError, which names ``setting``, for a ``ca_file`` that cannot be used.
    """
    exchange = _exchanging(ca_file, setting, within_s)
    return lambda url: exchange("GET", url, {}, None)


def posting(ca_file: Path | None, setting: str, url: str) -> Callable[[bytes, str], bytes]:
    """A function that POSTs JSON with a bearer token to ``url``; bounds and errors as of ``fetching``."""
    exchange = _exchanging(ca_file, setting, _WITHIN_S)

    def post(body: bytes, token: str) -> bytes:
        headers = {b"Authorization": f"Bearer {token}".encode(), b"Content-Type": b"application/json"}
        return exchange("POST", url, headers, body)

    return post


def _exchanging(
    ca_file: Path | None, setting: str, within_s: float
) -> Callable[[str, str, Mapping[bytes, bytes], bytes | None], bytes]:
    context = client_context(ca_file, setting)

    def exchange(method: str, url: str, headers: Mapping[bytes, bytes], body: bytes | None) -> bytes:
        asked, network = _parsed(url), DeadlineTransport()
        sent, bounds = [*_HEADERS, *headers.items()], {"timeout": _TIMEOUTS}
        with (
            network.until(time.monotonic() + within_s),
            httpcore2.ConnectionPool(context, proxy=_proxy(asked), network_backend=network) as pool,
            pool.stream(method, asked, headers=sent, content=body, extensions=bounds) as answer,
        ):
            return _read(answer)

    return exchange


def _read(answer: httpcore2.Response) -> bytes:
    if answer.status not in _OK:
        raise ValueError("the issuer did not answer 200")
    if any(name.lower() == b"content-encoding" and value != b"identity" for name, value in answer.headers):
        raise ValueError("the issuer compressed its answer, which was not requested")
    data = bytearray()
    for chunk in answer.iter_stream():
        data += chunk
        if len(data) > _MOST_BYTES:
            raise ValueError("the answer is above 256 KiB")
    return bytes(data)


def _parsed(text: str) -> httpcore2.URL:
    """A URL with its host in the ASCII form of IDNA. Raises ValueError."""
    url = urlsplit(text)
    host = (url.hostname or "").encode("idna")
    target = quote(f"{url.path or '/'}{'?' if url.query else ''}{url.query}", safe=_URL_CHARACTERS)
    return httpcore2.URL(scheme=url.scheme, host=host, port=url.port, target=target)


def _proxy(url: httpcore2.URL) -> httpcore2.Proxy | None:
    proxies = getproxies()
    address = proxies.get(url.scheme.decode()) or proxies.get("all")
    return None if proxy_bypass(url.host.decode()) else proxy_of(address)
