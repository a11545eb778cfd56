"""Client certificates: their names, each with its kind, and which are revoked."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509

from kms_core.auth import client_certificates
from kms_core.auth.client_certificates import Revocations
from support.credentials import DAY, HOUR, Authority, Pair, der_of, shown

NAME: Final = "a CA that was re-keyed"


class Site:
    """A re-keyed authority (``old`` and ``new`` have one name), and the files of the settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, self.new = Authority(folder / "old", NAME), Authority(folder / "new", NAME)
        self.ca, self.crl = folder / "clients.pem", folder / "clients.crl"
        self.trust(self.old, self.new)
        self.put(self.old.crl(), self.new.crl())

    def trust(self, *authorities: Authority) -> None:
        self._replace(self.ca, b"".join(one.ca_file.read_bytes() for one in authorities))

    def put(self, *lists: bytes) -> None:
        self._replace(self.crl, b"".join(lists))

    def _replace(self, path: Path, content: bytes) -> None:
        made = path.with_suffix(".made")
        made.write_bytes(content)
        made.replace(path)

    def lists(self) -> Revocations:
        return Revocations(self.crl, self.ca)

    def authorities_only(self) -> Revocations:
        return Revocations(None, self.ca)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def issued(authority: Authority, file: str = "leaf") -> tuple[Pair, str]:
    """A certificate, and its identity on a connection."""
    pair = authority.issue(file, x509.DNSName(file))
    return pair, shown(pair, authority).identity


@pytest.mark.parametrize("is_last", [True, False])
def test_lists_of_authorities_of_one_name_all_count(site: Site, is_last: bool) -> None:
    (of_old, revoked), (_, good) = issued(site.old), issued(site.new)
    found = site.lists()
    assert not found.is_revoked(revoked)
    both = [site.new.crl(), site.old.crl(of_old.cert)]
    site.put(*both if is_last else reversed(both))

    assert found.is_revoked(revoked)
    assert not found.is_revoked(good)


def test_each_authority_of_one_name_needs_a_list(site: Site) -> None:
    for text in (site.old.crl(), site.new.crl()):
        site.put(text)
        with pytest.raises(ValueError, match="there is no list of CN=a CA that was re-keyed, serial number"):
            client_certificates.read_lists(site.crl, site.ca)


@pytest.mark.parametrize(
    ("lasts", "ago"), [(timedelta(seconds=-10), HOUR), (DAY, -HOUR)], ids=["expired", "begins later"]
)
@pytest.mark.parametrize("is_old", [True, False])
def test_each_list_of_authorities_of_one_name_must_be_current(
    site: Site, is_old: bool, lasts: timedelta, ago: timedelta
) -> None:
    found = site.lists()
    assert found.is_current()
    changed, current = (site.old, site.new) if is_old else (site.new, site.old)
    site.put(changed.crl(lasts=lasts, ago=ago), current.crl())

    assert not found.is_current()


@pytest.mark.parametrize("name", [NAME, "another CA"])
@pytest.mark.parametrize("of", [Site.lists, Site.authorities_only])
def test_certificates_of_an_authority_removed_from_client_ca_are_revoked(
    site: Site, name: str, of: Callable[[Site], Revocations]
) -> None:
    other = Authority(site.folder / "other", name)
    site.trust(other, site.new)
    site.put(other.crl(), site.new.crl())
    (_, gone), (_, kept), found = issued(other), issued(site.new), of(site)
    assert not found.is_revoked(gone)
    site.trust(site.new)
    site.put(site.new.crl())

    assert found.is_revoked(gone)
    assert not found.is_revoked(kept)


def below(site: Site) -> tuple[Authority, str]:
    """An intermediate below the old authority, and the identity of a certificate that it issued."""
    middle = Authority(site.folder / "middle", "an intermediate CA", site.old)
    return middle, shown(middle.issue("leaf", x509.DNSName("leaf")), middle, site.old).identity


def test_certificates_below_an_authority_removed_from_client_ca_are_revoked(site: Site) -> None:
    """An intermediate is no root: with its root gone, TLS lets none of its certificates in."""
    middle, identity = below(site)
    site.trust(site.old, site.new, middle)
    site.put(site.old.crl(), site.new.crl(), middle.crl())
    both = (site.lists(), site.authorities_only())
    assert [found.is_revoked(identity) for found in both] == [False, False]
    site.trust(site.new, middle)
    site.put(site.new.crl(), middle.crl())

    assert [found.is_revoked(identity) for found in both] == [True, True]


def test_without_lists_an_intermediate_that_the_client_sends_is_trusted_by_its_root(site: Site) -> None:
    _, identity = below(site)

    assert not site.authorities_only().is_revoked(identity)
    assert site.lists().is_revoked(identity)  # TLS refuses it, too: its authority has no list


def test_a_certificate_whose_authorities_are_not_known_is_revoked(site: Site) -> None:
    number, authority, _ = issued(site.new)[1].split(":")

    assert site.authorities_only().is_revoked(f"{number}:{authority}")
    assert site.lists().is_revoked(f"{number}:{authority}")


def test_a_client_ca_that_cannot_be_used_leaves_the_authorities_as_they_are(site: Site) -> None:
    found, identity = site.authorities_only(), issued(site.new)[1]
    for change in (lambda: site.ca.write_bytes(b"no PEM"), site.ca.unlink):
        change()

        assert not found.is_revoked(identity)
    site.trust(site.old)
    assert found.is_revoked(identity)


def test_files_that_several_parts_of_a_process_ask_for_are_read_once(site: Site) -> None:
    first = client_certificates.read_lists(site.crl, site.ca)
    assert client_certificates.read_lists(site.crl, site.ca) is first
    site.put(site.old.crl(issued(site.old)[0].cert), site.new.crl())

    assert client_certificates.read_lists(site.crl, site.ca).revoked


def test_each_name_has_its_kind(tmp_path: Path) -> None:
    """As ``[kms.auth.certificates]`` writes them: one kind never stands for another."""
    names = (
        x509.RFC822Name("ci@example.com"),
        x509.DNSName("ci.example.com"),
        x509.UniformResourceIdentifier("spiffe://acme/ci"),
    )
    pair = Authority(tmp_path).issue("ci", *names, subject="builder")
    read = client_certificates.read(der_of(pair.cert))

    assert sorted(read.subjects) == [
        "DNS:ci.example.com",
        "URI:spiffe://acme/ci",
        "email:ci@example.com",
        "subject:CN=builder",
    ]
    assert read.until == x509.load_der_x509_certificate(der_of(pair.cert)).not_valid_after_utc.timestamp()


def test_what_is_no_certificate_has_no_names_and_has_expired() -> None:
    assert client_certificates.read(b"no certificate") == client_certificates.PresentedCertificate((), 0.0)
