"""Whose address a request behind proxies has: every list is read from its right end."""

import pytest

from kms_core.auth.authenticator import MetricsAccess
from kms_core.auth.policy import AllowAll
from kms_core.proxies import Proxies

PEER = "10.0.0.1"


def proxies() -> Proxies:
    return Proxies(("10.0.0.0/8", "2001:db8:1::/48", "192.0.2.7"))


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
        ("203.0.113.9" + " " * 5000 + ", 10.2.3.4", "203.0.113.9"),
        ("0" * 60_000 + "1::9, 10.2.3.4", "10.2.3.4"),  # no address is so long
        ("x" * 60_000 + ", 203.0.113.9", "203.0.113.9"),
    ],
)
def test_the_first_address_from_the_right_that_is_no_proxy(text: str, client: str) -> None:
    assert proxies().client(PEER, text) == client


def test_what_is_trusted_is_told_by_address() -> None:
    trusted = proxies()

    assert [trusted.trust(text) for text in (PEER, "::ffff:10.0.0.1", "192.0.2.7", "2001:db8:1::1")] == [
        True
    ] * 4
    assert not any(trusted.trust(text) for text in ("11.0.0.1", "192.0.2.8", "2001:db8:2::1", "", "local"))
    assert not Proxies(()).trust(PEER)


def test_a_trusted_proxy_is_never_this_machine() -> None:
    local = Proxies(("127.0.0.1", "::1"))
    of_proxy, without = (MetricsAccess("loopback", None, AllowAll(), each) for each in (local, Proxies(())))

    assert not of_proxy.is_open_to("127.0.0.1", [])
    assert of_proxy.is_open_to("127.0.0.2", [])
    assert without.is_open_to("127.0.0.1", [])
    assert not without.is_open_to("127.0.0.1", ["x-forwarded-for"])
