"""Webhooks without Redis: settings, addresses, signature, and the request to a real server."""

import hmac
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kms_core.jobs.events import webhook
from kms_core.jobs.events.outbox import FIRST_DELAY_S, LONGEST_DELAY_S, delay_s
from kms_core.jobs.events.webhook import DeliveryOutcome, WebhookRequest, event_body, is_public, post, sign
from kms_core.jobs.model import Job
from support.ports import free_port
from support.waiting import until
from support.webhooks import (
    PATH,
    SECRET,
    Authority,
    Receiver,
    dripping,
    endpoint,
    load_endpoint,
    make_authority,
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
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def receiver(authority: Authority) -> Iterator[Receiver]:
    with receiving(authority) as found:
        yield found


# -- addresses ---------------------------------------------------------------------------------------

OF_HOSTS = [
    "100.100.100.200",
    "168.63.129.16",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "192.0.0.192",
    "::ffff:168.63.129.16",
    "::ffff:169.254.169.254",
    "fd00:42::42",
    "fd00:c1::a9fe:a9fe",
    "fd00:ec2::23",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::a9fe:a9fe%eth0",
    "::a9fe:a9fe",
    "::ffff:0:a9fe:a9fe",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "2002:6464:64c8::1",
]
"""Where clouds and links answer for one machine."""

FORBIDDEN = [
    *OF_HOSTS,
    "0.0.0.1",
    "10.0.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "172.16.0.1",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "203.0.113.1",
    "192.168.1.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::101:101",
    "100::1",
    "2001:0:1::1",
    "2001:20::1",
    "2002:7f00:1::",
    "2002:101:101::",
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fec0::1",
    "ff0e::1",
]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_addresses_off_the_open_internet_are_told(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "100.63.255.255", "100.128.0.1", "168.63.129.15", "168.63.129.17", "169.253.255.255"),
        *("192.0.1.1", "::ffff:1.1.1.1", "2606:4700:4700::1111", "2001:4860:4860::8888"),
    ],
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OF_HOSTS)
def test_metadata_of_a_cloud_is_refused_whatever_is_allowed(tmp_path: Path, address: str) -> None:
    found = endpoint(tmp_path, "https://a.example/", None)

    assert not found.allows(ipaddress.ip_address(address))
    assert found.allows(ipaddress.ip_address("10.0.0.1"))
    assert found.allows(ipaddress.ip_address("fd00:ec3::254"))
    assert found.allows(ipaddress.ip_address("64:ff9b::10.0.0.1"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_name_that_stands_for_loopback_is_refused(
    tmp_path: Path, authority: Authority, receiver: Receiver, host: str
) -> None:
    found = endpoint(tmp_path, receiver.url(host), authority, allow_private=False)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "address_refused")
    assert receiver.requests == []


@pytest.mark.parametrize(("environment", "result"), [("dev", "delivered"), ("staging", "failed")])
def test_loopback_needs_allow_private_except_in_dev(
    tmp_path: Path, authority: Authority, receiver: Receiver, environment: str, result: str
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
    tmp_path: Path, authority: Authority, receiver: Receiver
) -> None:
    global lookups  # noqa: PLW0603 -- an audit hook cannot be taken out, only silenced
    lookups = []
    sys.addaudithook(note_lookups)
    outcome = post(endpoint(tmp_path, receiver.url(), authority), MESSAGE)
    seen, lookups = [host for host in lookups if host == "localhost"], None

    assert outcome == DeliveryOutcome("delivered")
    assert seen == ["localhost"]
    assert receiver.names == ["localhost"]
    assert receiver.requests[0].headers["Host"] == f"localhost:{receiver.port}"


# -- the request -------------------------------------------------------------------------------------


def test_the_request_is_signed_and_whole(tmp_path: Path, authority: Authority, receiver: Receiver) -> None:
    assert post(endpoint(tmp_path, receiver.url(), authority), MESSAGE) == DeliveryOutcome("delivered")

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


def test_a_new_secret_needs_no_restart(tmp_path: Path, authority: Authority, receiver: Receiver) -> None:
    found = endpoint(tmp_path, receiver.url(), authority)
    new = b"n" * 32
    found.section.secret_file.write_bytes(new)
    post(found, MESSAGE)

    headers = receiver.requests[0].headers
    assert headers["X-KMS-Signature"] == sign(new, int(headers["X-KMS-Timestamp"]), MESSAGE)


@pytest.mark.parametrize("status", [200, 202, 204, 299])
def test_2xx_is_delivered(tmp_path: Path, authority: Authority, receiver: Receiver, status: int) -> None:
    receiver.answers = [status]

    assert post(endpoint(tmp_path, receiver.url(), authority), MESSAGE) == DeliveryOutcome("delivered")


@pytest.mark.parametrize("status", [304, 400, 401, 404, 429, 500, 503])
def test_other_answers_are_failures(
    tmp_path: Path, authority: Authority, receiver: Receiver, status: int
) -> None:
    receiver.answers = [status]

    assert post(endpoint(tmp_path, receiver.url(), authority), MESSAGE) == DeliveryOutcome(
        "failed", f"http_{status}"
    )


def test_410_means_gone(tmp_path: Path, authority: Authority, receiver: Receiver) -> None:
    receiver.answers = [410]

    assert post(endpoint(tmp_path, receiver.url(), authority), MESSAGE).result == "gone"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(
    tmp_path: Path, authority: Authority, receiver: Receiver, status: int
) -> None:
    receiver.answers = [(status, "/elsewhere")]
    outcome = post(endpoint(tmp_path, receiver.url(), authority), MESSAGE)

    assert outcome == DeliveryOutcome("failed", f"http_{status}")
    assert [request.path for request in receiver.requests] == [PATH]


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "other").mkdir()
    other = make_authority(tmp_path / "other")

    assert post(endpoint(tmp_path, receiver.url(), other), MESSAGE) == DeliveryOutcome("failed", "tls_failed")
    assert receiver.requests == []


def test_a_certificate_for_another_name_is_refused(
    tmp_path: Path, authority: Authority, receiver: Receiver
) -> None:
    found = endpoint(tmp_path, receiver.url("127.0.0.1"), authority)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "tls_failed")
    assert receiver.requests == []


def test_nobody_listens(tmp_path: Path, authority: Authority) -> None:
    found = endpoint(tmp_path, f"https://localhost:{free_port()}/", authority)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "connect_failed")


def test_an_unknown_name(tmp_path: Path, authority: Authority) -> None:
    found = endpoint(tmp_path, "https://nobody.invalid/", authority)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "name_not_found")


def test_a_secret_that_went_away(tmp_path: Path, authority: Authority, receiver: Receiver) -> None:
    found = endpoint(tmp_path, receiver.url(), authority)
    found.section.secret_file.unlink()

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "secret_unreadable")


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
    )

    assert json.loads(event_body(MESSAGE.delivery_id, job, 1767225600.25)) == {
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
            "error": {"code": "items_failed"},
            "progress": {"items": 3, "items_done": 3, "items_failed": 1, "bytes": 0, "bytes_done": 0},
        },
    }


@pytest.mark.parametrize(
    ("attempts", "longest"),
    [(1, FIRST_DELAY_S), (2, 2.0), (10, 512.0), (11, LONGEST_DELAY_S), (19, LONGEST_DELAY_S)],
)
def test_delays_double_up_to_a_quarter_of_an_hour(attempts: int, longest: float) -> None:
    assert all(longest / 2 <= delay_s(attempts) <= longest for _ in range(50))


# -- the receiver of the document --------------------------------------------------------------------


@pytest.fixture
def documented(tmp_path: Path) -> Iterator[str]:
    """The URL of the receiver in docs/webhooks.md, running."""
    [code] = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    port = free_port()
    (tmp_path / "hook.secret").write_bytes(SECRET + b"\n")
    source = code.replace("9000", str(port))
    assert source != code
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", source],
            cwd=tmp_path,
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


def test_the_documented_receiver_accepts_what_is_genuine(tmp_path: Path, documented: str) -> None:
    message = WebhookRequest(MESSAGE.delivery_id, MESSAGE.job_id, b'{"type": "kms.job.succeeded"}')

    assert post(endpoint(tmp_path, documented, None), message) == DeliveryOutcome("delivered")
    until(lambda: "kms.job.succeeded" in (tmp_path / "output").read_text(), "the receiver tells of it")


def test_the_documented_receiver_refuses_another_secret(tmp_path: Path, documented: str) -> None:
    (tmp_path / "other").mkdir()
    found = endpoint(tmp_path / "other", documented, None)
    found.section.secret_file.write_bytes(b"x" * 32)

    assert post(found, MESSAGE) == DeliveryOutcome("failed", "http_401")
