"""Client certificates: their names, each with its kind, and which are revoked."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from structlog.testing import capture_logs

from kms_core.auth import client_certificates
from kms_core.auth.client_certificates import Revocations
from kms_core.observability import metrics
from support.credentials import DAY, HOUR, Authority, CertAndKey, der_of, shown

NAME: Final = "a CA that was re-keyed"


class ClientCa:
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
def client_ca(tmp_path: Path) -> ClientCa:
    return ClientCa(tmp_path)


def issued(authority: Authority, file: str = "leaf") -> tuple[CertAndKey, str]:
    """A certificate, and its identity on a connection."""
    pair = authority.issue(file, x509.DNSName(file))
    return pair, shown(pair, authority).identity


@pytest.mark.parametrize("is_last", [True, False])
def test_lists_of_authorities_of_one_name_all_count(client_ca: ClientCa, is_last: bool) -> None:
    (of_old, revoked), (_, good) = issued(client_ca.old), issued(client_ca.new)
    found = client_ca.lists()
    assert not found.is_revoked(revoked)
    both = [client_ca.new.crl(), client_ca.old.crl(of_old.cert)]
    client_ca.put(*both if is_last else reversed(both))

    assert found.is_revoked(revoked)
    assert not found.is_revoked(good)


def test_each_authority_of_one_name_needs_a_list(client_ca: ClientCa) -> None:
    for text in (client_ca.old.crl(), client_ca.new.crl()):
        client_ca.put(text)
        with pytest.raises(ValueError, match="there is no list of CN=a CA that was re-keyed, serial number"):
            client_certificates.read_lists(client_ca.crl, client_ca.ca)


@pytest.mark.parametrize(
    ("lasts", "ago"), [(timedelta(seconds=-10), HOUR), (DAY, -HOUR)], ids=["expired", "begins later"]
)
@pytest.mark.parametrize("is_old", [True, False])
def test_each_list_of_authorities_of_one_name_must_be_current(
    client_ca: ClientCa, is_old: bool, lasts: timedelta, ago: timedelta
) -> None:
    found = client_ca.lists()
    assert found.is_current()
    changed, current = (client_ca.old, client_ca.new) if is_old else (client_ca.new, client_ca.old)
    client_ca.put(changed.crl(lasts=lasts, ago=ago), current.crl())

    assert not found.is_current()


def end_of(text: bytes) -> float:
    """When the next list is due, in seconds since the epoch."""
    end = x509.load_pem_x509_crl(text).next_update_utc
    assert end is not None
    return end.timestamp()


def test_a_list_is_not_current_at_the_time_of_the_next(
    client_ca: ClientCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = client_ca.new.crl()
    client_ca.put(client_ca.old.crl(lasts=2 * DAY), text)
    found, end = client_ca.lists(), end_of(text)

    monkeypatch.setattr(time, "time", lambda: end - 1)
    assert found.is_current()
    monkeypatch.setattr(time, "time", lambda: end)
    assert not found.is_current()


def test_the_metric_has_the_first_end_from_the_start_on(client_ca: ClientCa) -> None:
    text = client_ca.new.crl()
    client_ca.put(client_ca.old.crl(lasts=2 * DAY), text)
    metrics.CLIENT_CRL_EXPIRES.set(0)
    client_ca.lists()

    assert metrics.CLIENT_CRL_EXPIRES._value.get() == end_of(text)  # noqa: SLF001 -- the library shows none


def test_each_list_that_expired_is_logged_once(client_ca: ClientCa) -> None:
    found = client_ca.lists()
    with capture_logs() as logs:
        for ago in (10, 20):
            client_ca.put(client_ca.old.crl(lasts=timedelta(seconds=-ago)), client_ca.new.crl())
            for _ in range(2):
                assert not found.is_current()

    assert [each["event"] for each in logs].count("client_crl.expired") == 2


@pytest.mark.parametrize("name", [NAME, "another CA"])
@pytest.mark.parametrize("of", [ClientCa.lists, ClientCa.authorities_only])
def test_certificates_of_an_authority_removed_from_client_ca_are_revoked(
    client_ca: ClientCa, name: str, of: Callable[[ClientCa], Revocations]
) -> None:
    other = Authority(client_ca.folder / "other", name)
    client_ca.trust(other, client_ca.new)
    client_ca.put(other.crl(), client_ca.new.crl())
    (_, gone), (_, kept), found = issued(other), issued(client_ca.new), of(client_ca)
    assert not found.is_revoked(gone)
    client_ca.trust(client_ca.new)
    client_ca.put(client_ca.new.crl())

    assert found.is_revoked(gone)
    assert not found.is_revoked(kept)


def below(client_ca: ClientCa) -> tuple[Authority, str]:
    """An intermediate below the old authority, and the identity of a certificate that it issued."""
    middle = Authority(client_ca.folder / "middle", "an intermediate CA", client_ca.old)
    return middle, shown(middle.issue("leaf", x509.DNSName("leaf")), middle, client_ca.old).identity


def test_certificates_below_an_authority_removed_from_client_ca_are_revoked(client_ca: ClientCa) -> None:
    """An intermediate is no root: with its root gone, TLS lets none of its certificates in."""
    middle, identity = below(client_ca)
    client_ca.trust(client_ca.old, client_ca.new, middle)
    client_ca.put(client_ca.old.crl(), client_ca.new.crl(), middle.crl())
    both = (client_ca.lists(), client_ca.authorities_only())
    assert [found.is_revoked(identity) for found in both] == [False, False]
    client_ca.trust(client_ca.new, middle)
    client_ca.put(client_ca.new.crl(), middle.crl())

    assert [found.is_revoked(identity) for found in both] == [True, True]


def test_without_lists_an_intermediate_that_the_client_sends_is_trusted_by_its_root(
    client_ca: ClientCa,
) -> None:
    _, identity = below(client_ca)

    assert not client_ca.authorities_only().is_revoked(identity)
    assert client_ca.lists().is_revoked(identity)  # TLS refuses it, too: its authority has no list


def test_a_certificate_whose_authorities_are_not_known_is_revoked(client_ca: ClientCa) -> None:
    number, authority, _ = issued(client_ca.new)[1].split(":")

    assert client_ca.authorities_only().is_revoked(f"{number}:{authority}")
    assert client_ca.lists().is_revoked(f"{number}:{authority}")


def test_a_client_ca_that_cannot_be_used_leaves_the_authorities_as_they_are(client_ca: ClientCa) -> None:
    found, identity = client_ca.authorities_only(), issued(client_ca.new)[1]
    for change in (lambda: client_ca.ca.write_bytes(b"no PEM"), client_ca.ca.unlink):
        change()

        assert not found.is_revoked(identity)
    client_ca.trust(client_ca.old)
    assert found.is_revoked(identity)


def test_files_that_several_parts_of_a_process_ask_for_are_read_once(client_ca: ClientCa) -> None:
    first = client_certificates.read_lists(client_ca.crl, client_ca.ca)
    assert client_certificates.read_lists(client_ca.crl, client_ca.ca) is first
    client_ca.put(client_ca.old.crl(issued(client_ca.old)[0].cert), client_ca.new.crl())

    assert client_certificates.read_lists(client_ca.crl, client_ca.ca).revoked


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
