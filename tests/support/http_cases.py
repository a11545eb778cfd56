"""Requests that no port of the service may accept, as bytes. Each begins a connection of its own."""

from typing import Final

MALFORMED: Final = {
    "bare-lf": b"GET / HTTP/1.1\nHost: localhost\n\n",
    "bare-lf-in-head": b"GET / HTTP/1.1\r\nHost: localhost\nX-A: b\r\n\r\n",
    "folded": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n c\r\n\r\n",
    "two-lengths-in-one": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3, 3\r\n\r\nabc",
    "two-lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "signed-length": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +3\r\n\r\nabc",
    "length-and-chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "chunked-is-not-last": b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked, gzip\r\n\r\nabc",
    "bare-lf-in-chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
    "space-before-colon": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A : b\r\n\r\n",
    "null-in-value": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: b\x00c\r\n\r\n",
    "version": b"GET / HTTP/1.2\r\nHost: localhost\r\n\r\n",
    "version-2": b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "connect": b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
    "unknown-method": b"LISTEN / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "lower-case-list": b"list / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no-http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}
