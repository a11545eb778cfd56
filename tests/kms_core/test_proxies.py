"""Whose address a request behind proxies has: every list is read from its right end."""

from typing import Literal

import pytest

from kms_core.auth.metrics_access import MetricsAccess
from kms_core.auth.policy import AllowAll
from kms_core.proxies import Proxies
from kms_core.settings.model import ServerSection

PEER = "10.0.0.1"


def proxies(header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for") -> Proxies:
    networks = ("10.0.0.0/8", "2001:db8:1::/48", "192.0.2.7")
    return Proxies.of(ServerSection(trusted_proxies=networks, proxy_header=header, docs=True))


@pytest.mark.parametrize(
    ("text", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("127.0.0.1, 203.0.113.9", "203.0.113.9"),  # what the client sent itself
        ("203.0.113.9, 10.2.3.4", "203.0.113.9"),
        ("203.0.113.9,192.0.2.7 ,\t10.2.3.4", "203.0.113.9"),
        ("203.0.113.9:51234", "203.0.113.9"),
        ("[2001:db8::9]:443, 10.1.1.1:80", "2001:db8::9"),
        ("[2001:db8::9]", "2001:db8::9"),
        ("2001:DB8:0::9, 2001:db8:1::5", "2001:db8::9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("203.0.113.9, ::ffff:10.9.9.9", "203.0.113.9"),
        ("10.3.3.3, 10.2.2.2", "10.3.3.3"),  # all trusted: the leftmost
        ("203.0.113.9,, 10.2.3.4, ", "203.0.113.9"),
        ("", PEER),
        (" , ", PEER),
        ("203.0.113.9, unknown", PEER),
        ("203.0.113.9, _hidden, 10.2.3.4", "10.2.3.4"),
        ("203.0.113.9, 10.2.3", PEER),
        ("203.0.113.9, 010.2.3.4", PEER),
        ("203.0.113.9:port", PEER),
        ("fe80::1%eth0", PEER),
        ("[203.0.113.9", PEER),
        ("٢٠٣.0.113.9", PEER),
        ("203.0.113.9, " + ", ".join(["10.0.0.2"] * 31), "203.0.113.9"),
        ("203.0.113.9, " + ", ".join(["10.0.0.2"] * 32), "10.0.0.2"),  # the 33rd is not looked at
        ("203.0.113.9" + " " * 5000 + ", 10.2.3.4", "10.2.3.4"),
        ("x" * 60_000 + ", 203.0.113.9", "203.0.113.9"),
    ],
)
def test_the_first_address_from_the_right_that_is_no_proxy(text: str, client: str) -> None:
    assert proxies().client(PEER, text) == client


@pytest.mark.parametrize(
    ("text", "client"),
    [
        ("for=203.0.113.9", "203.0.113.9"),
        ("FOR=203.0.113.9;proto=https;by=10.0.0.9", "203.0.113.9"),
        ('for="203.0.113.9:4711", for=10.2.3.4', "203.0.113.9"),
        ('for="[2001:db8::9]:4711";host="a,b;c"', "2001:db8::9"),
        ('proto=https;for="[2001:db8::9]", for="10.2.3.4"', "2001:db8::9"),
        ("for=127.0.0.1, for=203.0.113.9", "203.0.113.9"),
        ('for="127.0.0.1, for=203.0.113.9', "203.0.113.9"),  # a quote left open by the client
        (r'for=203.0.113.9;host="a\", for=127.0.0.1;x=\"b"', "203.0.113.9"),  # and one in a Host
        (r'for=203.0.113.9, for=10.2.3.4;by="a\\"', "203.0.113.9"),  # the backslash is escaped, not the quote
        ("for=203.0.113.9, for=unknown", PEER),
        ("for=203.0.113.9, for=_gazonk, for=10.2.3.4", "10.2.3.4"),
        ("for=203.0.113.9;for=127.0.0.1", PEER),
        ("by=10.0.0.9;proto=https", PEER),
        ("203.0.113.9", PEER),
        ('for="203.0.113.9', PEER),
        ('for="\\"203.0.113.9"', PEER),
        ("for=203.0.113.9 proto=https", PEER),
        ("", PEER),
        ('for="' + '"\\' * 30_000, PEER),
    ],
)
def test_forwarded_is_read_as_rfc_7239_says(text: str, client: str) -> None:
    assert proxies("forwarded").client(PEER, text) == client


def test_what_is_trusted_is_told_by_address() -> None:
    trusted = proxies()

    assert [trusted.trust(text) for text in (PEER, "::ffff:10.0.0.1", "192.0.2.7", "2001:db8:1::1")] == [
        True
    ] * 4
    assert not any(trusted.trust(text) for text in ("11.0.0.1", "192.0.2.8", "2001:db8:2::1", "", "local"))
    assert not Proxies.of(ServerSection(docs=True)).trust(PEER)


def test_a_trusted_proxy_is_never_this_machine() -> None:
    local = Proxies.of(ServerSection(trusted_proxies=("127.0.0.1", "::1"), docs=True))
    of_proxy, without = (
        MetricsAccess("loopback", None, AllowAll(), each)
        for each in (local, Proxies.of(ServerSection(docs=True)))
    )

    assert not of_proxy.is_open_to("127.0.0.1", [])
    assert of_proxy.is_open_to("127.0.0.2", [])
    assert without.is_open_to("127.0.0.1", [])
    assert not without.is_open_to("127.0.0.1", ["x-forwarded-for"])
