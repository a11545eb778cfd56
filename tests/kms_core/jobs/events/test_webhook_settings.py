"""Sections of webhook endpoints: what is refused before anything is sent."""

from pathlib import Path

import pytest

from kms_core.jobs.events import webhook
from kms_protocol.errors import ConfigurationError
from support.webhooks import SECRET, load_endpoint, secret_file


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("ftp://h/", "dev"),
        ("https://", "dev"),
        ("hooks.example.com", "dev"),
        ("https://u:hunter2@h/", "dev"),
        ("https://h/#hunter2", "dev"),
        ("https://h:99999/", "dev"),
        ("https://h:0/", "dev"),
        ("https://h/a b", "dev"),
        (f"https://{'a' * 64}.example/", "dev"),
        ("https://bücher.example/", "dev"),
        ("http://h.example/", "dev"),
        ("http://localhost.example/", "dev"),
        ("http://127.0.0.1/", "prod"),
        ("http://localhost/", "staging"),
    ],
)
def test_other_urls_than_https_are_refused_and_not_echoed(tmp_path: Path, url: str, environment: str) -> None:
    with pytest.raises(ConfigurationError, match=r"kms\.jobs\.endpoints\.ci\.url") as caught:
        load_endpoint(tmp_path, f"url = '{url}'\nsecret_file = '/s'", environment)

    assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/", "http://[::1]:9/", "http://localhost/h", "https://h.example/?a=b"]
)
def test_https_and_loopback_in_dev_are_fine(tmp_path: Path, url: str) -> None:
    found = load_endpoint(tmp_path, f"url = '{url}'\nsecret_file = '/s'").kms.jobs.endpoints["ci"]

    assert (found.events, found.allow_private) == (("succeeded", "failed", "cancelled"), False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("url = 'https://h/'", "secret_file is missing"),
        ("url = 'https://h/'\nsecret_file = '/s'\nsecret = 'x'", "secret is not a setting"),
        ("url = 'https://h/'\nsecret_file = '/s'\nevents = ['done']", "expected one of"),
        ("url = 'https://h/'\nsecret_file = '/s'\ntenants = []", "kms.jobs.endpoints.ci.tenants"),
        ("url = 'https://h/'\nsecret_file = '/s'\ntenants = ['a b']", "kms.jobs.endpoints.ci.tenants"),
        ("url = 'https://h/'\nsecret_file = '/s'\n[kms.jobs.endpoints.'a/b']\nurl = 'https://h/'", "name"),
    ],
    ids=["no-secret", "unknown", "event", "nobody", "no-tenant", "name"],
)
def test_sections_are_read_strictly(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_endpoint(tmp_path, body)


def test_a_secret_under_a_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="overlaps"):
        load_endpoint(
            tmp_path, "url = 'https://h/'\nsecret_file = '/srv/in/s'\n[kms.jobs]\nroots = ['/srv/in']"
        )


@pytest.mark.parametrize(
    ("secret", "mode", "message"),
    [
        (b"short\n", 0o600, "below 32 bytes"),
        (SECRET[1:] + b"\n", 0o600, "below 32 bytes"),
        (SECRET, 0o640, "chmod 600"),
    ],
    ids=["short", "31-and-newline", "open"],
)
def test_a_weak_or_open_secret_stops_the_start_in_prod(
    tmp_path: Path, secret: bytes, mode: int, message: str
) -> None:
    path = secret_file(tmp_path, secret, mode)
    found = load_endpoint(tmp_path, f"url = 'https://h/'\nsecret_file = '{path}'", "prod")

    with pytest.raises(ConfigurationError, match=message):
        webhook.endpoints(found)


def test_an_open_secret_is_a_warning_in_dev(tmp_path: Path) -> None:
    path = secret_file(tmp_path, mode=0o644)
    found = load_endpoint(tmp_path, f"url = 'https://h/'\nsecret_file = '{path}'")

    assert webhook.endpoints(found)["ci"].section.secret_file == path


def test_a_missing_secret_stops_the_start_and_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="openssl rand"):
        webhook.endpoints(load_endpoint(tmp_path, "url = 'https://h/'\nsecret_file = '/nonexistent/s'"))


@pytest.mark.parametrize("content", [None, "not a certificate"], ids=["absent", "no-pem"])
def test_a_ca_file_without_certificates_stops_the_start(tmp_path: Path, content: str | None) -> None:
    ca = tmp_path / "ca.pem"
    if content:
        ca.write_text(content)
    body = f"url = 'https://h/'\nsecret_file = '{secret_file(tmp_path)}'\nca_file = '{ca}'"

    with pytest.raises(ConfigurationError, match="ca_file"):
        webhook.endpoints(load_endpoint(tmp_path, body))
