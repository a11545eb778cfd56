"""Files of any size over HTTP: uploads that stream, downloads with ranges, and what failures leave behind."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from kms_protocol.wire import PREFIX
from support.service import CANARY, Service, check_problem
from support.waiting import until

MIB = 1024 * 1024
SIZES = [0, 1, 65_535, 65_536, 65_537, MIB - 1, MIB, MIB + 1, 20 * MIB]


def pieces(data: bytes, step: int = 100_000) -> Iterator[bytes]:
    for start in range(0, len(data), step):
        yield data[start : start + step]


def sealed(service: Service, data: bytes, context: str = "") -> bytes:
    job_id = service.upload("encrypt", data, context)
    service.wait(job_id, "succeeded")
    return service.result(job_id)


def opened(service: Service, data: bytes, context: str = "") -> str:
    """The id of a finished decrypt job."""
    job_id = service.upload("decrypt", data, context)
    service.wait(job_id, "succeeded")
    return job_id


# -- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_upload_of_any_size_comes_back(service: Service, size: int, *, chunked: bool) -> None:
    data = os.urandom(size)

    job_id = service.upload("encrypt", pieces(data) if chunked else data, "env=prod")
    job = service.wait(job_id, "succeeded")
    answer = service.get(f"/jobs/{job_id}/result")
    back = opened(service, answer.content, "env=prod")

    assert job["progress"]["bytes"] == job["progress"]["bytes_done"] == size
    assert job["file_id"] == answer.headers["x-kms-file-id"] == service.job(back)["file_id"]
    assert service.result(back) == data
    assert service.job(back)["progress"]["bytes"] == len(answer.content)


def test_single_call_opens_what_a_job_sealed_and_the_reverse(service: Service) -> None:
    assert service.decrypt(sealed(service, b"small", "a=1"), "a=1") == b"small"
    assert service.result(opened(service, service.encrypt(b"small", "a=1"), "a=1")) == b"small"


def test_context_and_key_travel_in_headers(service: Service) -> None:
    context = "größe=1 2,b=ü"
    job_id = service.upload("encrypt", b"x", quote(context), X_KMS_Key_Id="default")
    service.wait(job_id, "succeeded")

    assert service.decrypt(service.result(job_id), {"größe": "1 2", "b": "ü"}) == b"x"


def test_accepted_upload_names_where_to_look(service: Service) -> None:
    answer = service.post("/files/encrypt", content=b"x")

    body = answer.json()
    assert answer.status_code == 202
    assert body["state"] == "queued"
    assert answer.headers["location"] == body["links"]["self"] == f"{PREFIX}/jobs/{body['job_id']}"
    assert body["links"].keys() == {"self", "result"}
    assert answer.headers["retry-after"]


# -- what cannot be opened -------------------------------------------------------------------------------


def test_upload_of_a_plaintext_to_decrypt_is_refused_at_once(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, redis=redis_url) as alone:  # jobs of other tests would come and go in the spool
        alone.start("api")
        for body in (CANARY.encode(), b"", CANARY.encode() * 100_000, b"age-encryption.org/v1"):
            check_problem(alone.post("/files/decrypt", content=body), 422, "not_a_ciphertext")

        assert alone.spooled() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole[:-65_552],
        lambda whole: whole + b"x",
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    ],
    ids=["cut", "longer", "tag"],
)
def test_upload_that_does_not_open_ends_as_failed_and_has_no_result(
    service: Service, change: Callable[[bytes], bytes]
) -> None:
    job_id = service.upload("decrypt", change(sealed(service, bytes(2 * 65_536))))

    assert service.wait(job_id, "failed")["error"]["code"] == "decrypt_failed"
    check_problem(service.get(f"/jobs/{job_id}/result"), 410, "result_expired")
    assert not [name for name in service.spooled() if name.startswith(f"{job_id}/result")]


def test_context_is_required_before_a_byte_is_taken(service: Service, no_redis: Service) -> None:
    check_problem(no_redis.post("/files/encrypt", content=b"x"), 422, "context_required")
    check_problem(
        no_redis.post("/files/encrypt", content=b"x", headers={"X-KMS-Context": "a=1"}),
        503,
        "jobs_unavailable",
    )
    assert no_redis.spooled() == []
    assert service.http.get("/livez").status_code == 200


@pytest.mark.parametrize("kind", ["encrypt", "decrypt"])
@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_upload_that_breaks_off_leaves_nothing(service: Service, kind: str, *, declared: bool) -> None:
    until(lambda: not any(service.get("/status").json()["jobs"].values()), "jobs of other tests have ended")
    before, newest, told = set(service.spooled()), service.get("/jobs?limit=1").json(), service.output("api")
    framing = "Content-Length: 500000" if declared else "Transfer-Encoding: chunked"
    body = b"age-encryption.org/v1\n" + bytes(70_000 if declared else 3_000_000)
    head = f"POST {PREFIX}/files/{kind} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", service.port)) as peer:
        peer.sendall(head + (body if declared else b"%x\r\n%s\r\n" % (len(body), body)))
        until(lambda: set(service.spooled()) - before, "the upload has begun")

    until(lambda: not set(service.spooled()) - before, lambda: f"left: {set(service.spooled()) - before}")
    after = service.get("/jobs?limit=1").json()
    assert [job["job_id"] for job in after["jobs"]] == [job["job_id"] for job in newest["jobs"]]
    assert "crashed" not in service.output("api").removeprefix(told)


# -- downloads -------------------------------------------------------------------------------------------

DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def downloads(service: Service) -> dict[str, tuple[str, bytes]]:
    """Finished jobs and their results: a plaintext, a ciphertext, lines, and an empty plaintext."""
    ciphertext = service.upload("encrypt", DATA)
    service.wait(ciphertext, "succeeded")
    lines = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}] * 300})
    service.wait(lines, "succeeded")
    found = {
        "plaintext": opened(service, service.result(ciphertext)),
        "ciphertext": ciphertext,
        "lines": lines,
        "empty": opened(service, sealed(service, b"")),
    }
    return {name: (job_id, service.result(job_id)) for name, job_id in found.items()}


@pytest.mark.parametrize("name", ["plaintext", "ciphertext", "lines"])
@pytest.mark.parametrize(
    "asked",
    ["0-", "0-0", "5-9", "100-70000", "65535-65536", "-1", "-70000", "-99999999", "1000-99999999"],
    ids=str,
)
def test_range_is_that_part_of_the_whole(
    service: Service, downloads: dict[str, tuple[str, bytes]], name: str, asked: str
) -> None:
    job_id, whole = downloads[name]
    first, last = asked.split("-")
    start = int(first) if first else max(0, len(whole) - int(last))
    stop = min(len(whole), int(last) + 1) if first and last else len(whole)

    answer = service.get(f"/jobs/{job_id}/result", headers={"Range": f"bytes={asked}"})

    assert answer.status_code == 206
    assert answer.content == whole[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert int(answer.headers["content-length"]) == stop - start


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=", "bytes=x", "bytes=-", "bytes 0-1", "items=0-1"], ids=str
)
def test_range_of_another_form_is_answered_with_the_whole(
    service: Service, downloads: dict[str, tuple[str, bytes]], asked: str
) -> None:
    job_id, whole = downloads["plaintext"]

    answer = service.get(f"/jobs/{job_id}/result", headers={"Range": asked})

    assert (answer.status_code, answer.content) == (200, whole)
    assert "content-range" not in answer.headers
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("name", "asked"),
    [("plaintext", "256000-"), ("plaintext", "9999999-99999999"), ("plaintext", "-0"), ("empty", "0-")],
    ids=str,
)
def test_range_beyond_the_end_cannot_be_satisfied(
    service: Service, downloads: dict[str, tuple[str, bytes]], name: str, asked: str
) -> None:
    job_id, whole = downloads[name]

    answer = service.get(f"/jobs/{job_id}/result", headers={"Range": f"bytes={asked}"})

    check_problem(answer, 416, "invalid_request")
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"


def test_range_is_kept_only_for_the_same_result(
    service: Service, downloads: dict[str, tuple[str, bytes]]
) -> None:
    job_id, whole = downloads["plaintext"]
    etag = service.get(f"/jobs/{job_id}/result").headers["etag"]

    same = service.get(f"/jobs/{job_id}/result", headers={"Range": "bytes=1-2", "If-Range": etag})
    other = service.get(f"/jobs/{job_id}/result", headers={"Range": "bytes=1-2", "If-Range": '"another"'})

    assert (same.status_code, same.content) == (206, whole[1:3])
    assert (other.status_code, other.content) == (200, whole)


def test_result_is_described_and_never_cached(
    service: Service, downloads: dict[str, tuple[str, bytes]]
) -> None:
    answers = {name: service.get(f"/jobs/{job_id}/result") for name, (job_id, _) in downloads.items()}

    types = {name: answer.headers["content-type"] for name, answer in answers.items()}
    assert types == {
        "plaintext": "application/octet-stream",
        "ciphertext": "application/octet-stream",
        "lines": "application/x-ndjson",
        "empty": "application/octet-stream",
    }
    assert {answer.headers["cache-control"] for answer in answers.values()} == {"no-store"}
    assert {answer.headers["content-disposition"] for answer in answers.values()} == {"attachment"}


def open_blobs(service: Service) -> list[str]:
    """The files of the spool that the API has open."""
    found = []
    for fd in Path(f"/proc/{service.pid('api')}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return [name for name in found if name.startswith(str(service.spool))]


def test_download_that_breaks_off_is_forgotten(service: Service) -> None:
    data = os.urandom(20 * MIB)
    job_id = opened(service, sealed(service, data))
    for _ in range(5):
        with service.http.stream("GET", f"{PREFIX}/jobs/{job_id}/result") as answer:
            assert next(answer.iter_raw(1000)) == data[:1000]

    until(lambda: open_blobs(service) == [], "no file stays open")
    assert service.result(job_id) == data


def test_same_upload_with_one_key_is_one_job(service: Service) -> None:
    first = service.upload("encrypt", b"once", "a=1", Idempotency_Key="upload-1")

    assert service.upload("encrypt", pieces(b"once", 1), "a=1", Idempotency_Key="upload-1") == first
    headers = {"Idempotency-Key": "upload-1", "X-KMS-Context": "a=1"}
    answer = service.post("/files/encrypt", content=b"other", headers=headers)
    check_problem(answer, 409, "idempotency_conflict")
