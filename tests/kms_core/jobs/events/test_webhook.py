"""Webhooks without Redis: sections of settings, addresses, signature, and the request to a real server."""

import base64
import hmac
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kms_core.jobs.events import webhook
from kms_core.jobs.events.address_classes import Address, is_public
from kms_core.jobs.events.webhook import (
    DeliveryOutcome,
    WebhookEndpoint,
    WebhookRequest,
    post,
    sign,
    sign_standard,
)
from kms_core.jobs.model import Job
from kms_core.jobs.spec import SignedEnd
from kms_protocol.errors import ConfigurationError
from support.ports import free_port
from support.waiting import until
from support.webhooks import (
    PATH,
    SECRET,
    LocalhostTls,
    Receiver,
    changed,
    dripping,
    endpoint,
    load_endpoint,
    make_localhost_tls,
    receiving,
    secret_file,
)

MESSAGE = WebhookRequest(
    "7b0e1c9a-0000-5000-8000-000000000001", "11111111-2222-4333-8444-555555555555", b'{"a": 1}'
)
DOC = Path(__file__).parents[4] / "docs/webhooks.md"
lookups: list[str] | None = None


def note_lookups(event: str, details: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and lookups is not None:
        lookups.append(str(details[0]))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> LocalhostTls:
    return make_localhost_tls(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def receiver(authority: LocalhostTls) -> Iterator[Receiver]:
    with receiving(authority) as found:
        yield found


@pytest.fixture
def webhook_endpoint(tmp_path: Path, authority: LocalhostTls, receiver: Receiver) -> WebhookEndpoint:
    return endpoint(tmp_path, receiver.url(), authority)


# -- addresses ---------------------------------------------------------------------------------------

OF_HOSTS = {
    "links": "169.254.0.1 fe80::1 fe80::a9fe:a9fe%eth0",
    "metadata": "100.100.100.200 169.254.169.254 169.254.170.2 192.0.0.192",
    "metadata by IPv6": "fd00:42::42 fd00:c1::a9fe:a9fe fd00:ec2::23 fd00:ec2::254 fd20:ce::254",
    "wire server": "168.63.129.16 ::ffff:168.63.129.16",
    "mapped": "::ffff:169.254.169.254 ::ffff:0:a9fe:a9fe ::a9fe:a9fe",
    "translated": "64:ff9b::a9fe:a9fe 64:ff9b:1::a9fe:a9fe 2002:a9fe:a9fe::1 2002:6464:64c8::1",
}
"""Where clouds and links answer for one machine."""

FORBIDDEN = OF_HOSTS | {
    "this host": "0.0.0.1 127.0.0.1 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:0:7f00:1",
    "private": "10.0.0.1 172.16.0.1 192.168.1.1 ::ffff:10.0.0.1 fc00::1 fec0::1",
    "shared": "100.64.0.1 100.127.255.255",
    "reserved": "192.0.0.8 192.88.99.1 198.18.0.1 240.0.0.1 255.255.255.255",
    "reserved by IPv6": "100::1 2001:0:1::1 2001:20::1 5f00::1",
    "documentation": "192.0.2.1 203.0.113.1 2001:db8::1 3fff::1",
    "multicast": "224.0.0.1 ff0e::1",
    "translators": "64:ff9b::7f00:1 64:ff9b::101:101 2002:7f00:1:: 2002:101:101::",
}
PUBLIC = {
    "IPv4": "1.1.1.1 192.0.1.1 ::ffff:1.1.1.1",
    "neighbours": "100.63.255.255 100.128.0.1 168.63.129.15 168.63.129.17 169.253.255.255",
    "IPv6": "2606:4700:4700::1111 2001:4860:4860::8888",
}


def addresses(text: str) -> list[Address]:
    return list(map(ipaddress.ip_address, text.split()))


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_addresses_off_the_open_internet_are_told(kind: str) -> None:
    assert [each for each in addresses(FORBIDDEN[kind]) if is_public(each)] == []


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_addresses_are_public(kind: str) -> None:
    assert [each for each in addresses(PUBLIC[kind]) if not is_public(each)] == []


@pytest.mark.parametrize("kind", OF_HOSTS)
def test_metadata_of_a_cloud_is_refused_whatever_is_allowed(tmp_path: Path, kind: str) -> None:
    found = endpoint(tmp_path, "https://a.example/", None)
    private = addresses("10.0.0.1 fd00:ec3::254 64:ff9b::10.0.0.1")

    assert [each for each in (*addresses(OF_HOSTS[kind]), *private) if found.allows(each)] == private


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_name_that_stands_for_loopback_is_refused(
    tmp_path: Path, authority: LocalhostTls, receiver: Receiver, host: str
) -> None:
    found = endpoint(tmp_path, receiver.url(host), authority, allow_private=False)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "address_refused")
    assert receiver.requests == []


@pytest.mark.parametrize(("environment", "result"), [("dev", "delivered"), ("staging", "failed")])
def test_loopback_needs_allow_private_except_in_dev(
    tmp_path: Path, authority: LocalhostTls, receiver: Receiver, environment: str, result: str
) -> None:
    body = (
        f"url = '{receiver.url()}'\nsecret_file = '{secret_file(tmp_path)}'\nca_file = '{authority.ca_file}'"
    )
    found = webhook.endpoints(load_endpoint(tmp_path, body, environment))["ci"]

    assert post(found, MESSAGE).result == result


def test_what_dev_allows_is_loopback_alone(tmp_path: Path) -> None:
    found = load_endpoint(
        tmp_path, f"url = 'http://localhost/'\nsecret_file = '{secret_file(tmp_path)}'\nallow_private = true"
    )
    allowed = webhook.endpoints(found)["ci"].allows

    assert allowed(ipaddress.ip_address("127.0.0.1"))
    assert not allowed(ipaddress.ip_address("10.0.0.1"))


def test_the_name_is_looked_up_once_and_kept_for_tls_and_host(
    webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    global lookups  # noqa: PLW0603 -- an audit hook cannot be taken out, only silenced
    lookups = []
    sys.addaudithook(note_lookups)
    outcome = post(webhook_endpoint, MESSAGE)
    seen, lookups = [host for host in lookups if host == "localhost"], None

    assert outcome == DeliveryOutcome("delivered")
    assert seen == ["localhost"]
    assert receiver.sni_names == ["localhost"]
    assert receiver.requests[0].headers["Host"] == f"localhost:{receiver.port}"


# -- the request -------------------------------------------------------------------------------------


def test_the_request_is_signed_and_whole(webhook_endpoint: WebhookEndpoint, receiver: Receiver) -> None:
    assert post(webhook_endpoint, MESSAGE) == DeliveryOutcome("delivered")

    [request] = receiver.requests
    assert (request.path, request.body) == (PATH, MESSAGE.body)
    assert request.headers["Content-Type"] == "application/cloudevents+json"
    assert request.headers["X-KMS-Delivery"] == MESSAGE.delivery_id
    assert request.headers["X-KMS-Job"] == MESSAGE.job_id
    stamp = int(request.headers["X-KMS-Timestamp"])
    assert request.headers["X-KMS-Signature"] == sign(SECRET, stamp, MESSAGE)


def test_the_signature_is_hmac_sha256_over_the_documented_bytes() -> None:
    signed = b'1767225600.7b0e1c9a-0000-5000-8000-000000000001.11111111-2222-4333-8444-555555555555.{"a": 1}'

    assert sign(SECRET, 1767225600, MESSAGE) == "v1=" + hmac.new(SECRET, signed, "sha256").hexdigest()


def test_the_standard_signature_is_that_of_the_published_example() -> None:
    """Of docs.svix.com/receiving/verifying-payloads/how-manual, whose scheme Standard Webhooks took over."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    message = WebhookRequest("msg_p5jXN8AQM9LWM0D4loKWxJek", "", b'{"test": 2432232314}')

    assert sign_standard([secret], 1614265330, message) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("has_kms_headers", [True, False])
def test_while_a_secret_is_replaced_requests_have_two_signatures(
    tmp_path: Path, webhook_endpoint: WebhookEndpoint, receiver: Receiver, *, has_kms_headers: bool
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(SECRET + b"\n")
    new.write_bytes(b"whsec_" + base64.b64encode(b"n" * 24) + b"\n")
    changes = {"secret_file": new, "previous_secret_file": old, "kms_headers": has_kms_headers}
    assert post(changed(webhook_endpoint, **changes), MESSAGE) == DeliveryOutcome("delivered")

    headers = receiver.requests[0].headers
    signed = f"{MESSAGE.delivery_id}.{headers['webhook-timestamp']}.".encode() + MESSAGE.body
    macs = [hmac.new(key, signed, "sha256").digest() for key in (b"n" * 24, SECRET)]
    assert headers["webhook-id"] == MESSAGE.delivery_id
    assert headers["webhook-signature"].split(" ") == [f"v1,{base64.b64encode(mac).decode()}" for mac in macs]
    own = {name for name in headers if name.startswith("X-KMS-")}
    assert len(own) == (4 if has_kms_headers else 0)


def test_a_new_secret_needs_no_restart(webhook_endpoint: WebhookEndpoint, receiver: Receiver) -> None:
    new = b"n" * 32
    webhook_endpoint.section.secret_file.write_bytes(new)
    post(webhook_endpoint, MESSAGE)

    headers = receiver.requests[0].headers
    assert headers["X-KMS-Signature"] == sign(new, int(headers["X-KMS-Timestamp"]), MESSAGE)


@pytest.mark.parametrize(
    ("result", "statuses"),
    [
        ("delivered", [200, 202, 204, 299]),
        ("failed", [301, 302, 304, 307, 308, 400, 401, 404, 429, 500, 503]),
        ("gone", [410]),
    ],
)
def test_an_answer_is_judged_by_its_status_and_no_redirect_is_followed(
    webhook_endpoint: WebhookEndpoint, receiver: Receiver, result: str, statuses: list[int]
) -> None:
    receiver.answers = [(status, "/elsewhere") for status in statuses]
    outcomes = [post(webhook_endpoint, MESSAGE) for _ in statuses]

    reasons = ["" if result == "delivered" else f"http_{status}" for status in statuses]
    assert [(outcome.result, outcome.reason) for outcome in outcomes] == [(result, each) for each in reasons]
    assert [request.path for request in receiver.requests] == [PATH] * len(statuses)


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "other").mkdir()
    other = make_localhost_tls(tmp_path / "other")

    assert post(endpoint(tmp_path, receiver.url(), other), MESSAGE) == DeliveryOutcome("failed", "tls_failed")
    assert receiver.requests == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://127.0.0.1:{port}/", "tls_failed"),
        ("https://localhost:{free}/", "connect_failed"),
        ("https://nobody.invalid/", "name_not_found"),
    ],
    ids=["certificate of another name", "nobody listens", "unknown name"],
)
def test_a_server_that_is_not_reached_is_told_apart(
    tmp_path: Path, authority: LocalhostTls, receiver: Receiver, url: str, reason: str
) -> None:
    found = endpoint(tmp_path, url.format(port=receiver.port, free=free_port()), authority)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", reason)
    assert receiver.requests == []


def test_a_secret_that_went_away(webhook_endpoint: WebhookEndpoint) -> None:
    webhook_endpoint.section.secret_file.unlink()

    assert post(webhook_endpoint, MESSAGE) == DeliveryOutcome("failed", "secret_unreadable")


def test_no_time_is_left_to_connect(tmp_path: Path, receiver: Receiver) -> None:
    found = endpoint(tmp_path, receiver.url("127.0.0.1"), None)

    assert post(found, MESSAGE, total_s=0) == DeliveryOutcome("failed", "timeout")
    assert receiver.requests == []


def test_a_server_that_drips_is_left_at_the_deadline(tmp_path: Path) -> None:
    with dripping() as port:
        found = endpoint(tmp_path, f"http://127.0.0.1:{port}/", None)

        assert post(found, MESSAGE, total_s=0.5) == DeliveryOutcome("failed", "timeout")


# -- the event ---------------------------------------------------------------------------------------


def test_the_event_is_a_cloud_event_without_anything_secret() -> None:
    job = Job(
        job_id=MESSAGE.job_id,
        tenant="acme",
        kind="encrypt",
        state="failed",
        attempt=2,
        items=3,
        items_done=3,
        items_failed=1,
        error="items_failed",
        end=SignedEnd(fence=2, attempt=2, state="failed", failures=((2, "cancelled"),), kept_until=0.0),
    )

    assert json.loads(webhook.event_body(MESSAGE.delivery_id, job, 1767225600.25)) == {
        "specversion": "1.0",
        "id": MESSAGE.delivery_id,
        "type": "kms.job.failed",
        "source": "/api/v1/kms/jobs",
        "subject": MESSAGE.job_id,
        "time": "2026-01-01T00:00:00.250Z",
        "datacontenttype": "application/json",
        "data": {
            "job_id": MESSAGE.job_id,
            "kind": "encrypt",
            "state": "failed",
            "attempt": 2,
            "error": {
                "code": "items_failed",
                "detail": "1 of 3 items failed, the first at index 2: it was cancelled",
                "hint": "submit it again if it should still run; `kms job result` shows which and why",
                "items": [{"index": 2, "code": "cancelled"}],
            },
            "progress": {"items": 3, "items_done": 3, "items_failed": 1, "bytes": 0, "bytes_done": 0},
        },
    }


# -- the receiver of the document --------------------------------------------------------------------


@pytest.fixture
def documented(tmp_path: Path) -> Iterator[str]:
    """The URL of the receiver in docs/webhooks.md, running."""
    [code] = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    port, folder = free_port(), tmp_path / "receiver"
    folder.mkdir()
    (folder / "hook.secret").write_bytes(b"whsec_" + base64.b64encode(SECRET) + b"\n")
    source = code.replace("9000", str(port))
    assert source != code
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", source],
            cwd=folder,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ["PATH"]},
        )
    url = f"http://127.0.0.1:{port}/"
    probe = endpoint(tmp_path, url, None)
    until(lambda: post(probe, MESSAGE).reason != "connect_failed", "the receiver listens")
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def test_the_documented_receiver_accepts_what_is_genuine_alone(tmp_path: Path, documented: str) -> None:
    message = WebhookRequest(MESSAGE.delivery_id, MESSAGE.job_id, b'{"type": "kms.job.succeeded"}')
    found = endpoint(tmp_path, documented, None)

    assert post(found, message) == DeliveryOutcome("delivered")
    until(lambda: "kms.job.succeeded" in (tmp_path / "output").read_text(), "the receiver tells of it")

    (tmp_path / "other").write_bytes(b"x" * 32)
    other = changed(found, secret_file=tmp_path / "other")
    assert post(other, message) == DeliveryOutcome("failed", "http_401")


# -- sections --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("secret", "mode", "environment", "refusal"),
    [
        (None, 0o600, "dev", "openssl rand"),
        (b"whsec_" + base64.b64encode(SECRET[:23]), 0o600, "prod", "below 24 bytes"),
        (b"whsec_no base64 at all", 0o600, "prod", "no base64"),
        (b"whsec_" + base64.b64encode(SECRET[:24]), 0o600, "prod", ""),
        (b"short\n", 0o600, "prod", "below 32 bytes"),
        (SECRET[1:] + b"\n", 0o600, "prod", "below 32 bytes"),
        (SECRET, 0o640, "prod", "chmod 600"),
        (SECRET, 0o644, "dev", ""),
    ],
    ids=["missing", "whsec-short", "whsec-odd", "whsec", "short", "31-and-newline", "open", "open-in-dev"],
)
def test_a_missing_or_weak_secret_stops_the_start_and_an_open_one_except_in_dev(
    tmp_path: Path, secret: bytes | None, mode: int, environment: str, refusal: str
) -> None:
    path = secret_file(tmp_path, secret or b"", mode)
    if secret is None:
        path.unlink()
    found = load_endpoint(tmp_path, f"url = 'https://h/'\nsecret_file = '{path}'", environment)

    with pytest.raises(ConfigurationError, match=refusal) if refusal else nullcontext():
        assert webhook.endpoints(found)["ci"].section.secret_file == path


@pytest.mark.parametrize("content", [None, "not a certificate"], ids=["absent", "no-pem"])
def test_a_ca_file_without_certificates_stops_the_start(tmp_path: Path, content: str | None) -> None:
    ca = tmp_path / "ca.pem"
    if content:
        ca.write_text(content)
    body = f"url = 'https://h/'\nsecret_file = '{secret_file(tmp_path)}'\nca_file = '{ca}'"

    with pytest.raises(ConfigurationError, match="ca_file"):
        webhook.endpoints(load_endpoint(tmp_path, body))
