"""Jobs over HTTP: bulk items and file references, what is listed and told, cancellation, retries."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from kms_core.jobs.model import part_id
from kms_protocol.wire import PREFIX
from support.core_jobs import run_job
from support.service import CANARY, Json, Service, b64, check_problem, core_of, unb64
from support.waiting import until

NDJSON = {"Content-Type": "application/x-ndjson"}


def stream(service: Service, kind: str, items: Iterator[Json], **headers: str) -> str:
    body = (json.dumps(item).encode() + b"\n" for item in items)
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    answer = service.post(f"/jobs?kind={kind}", content=body, headers=NDJSON | named)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


# -- bulk


def test_items_go_there_and_back_with_their_own_contexts(service: Service) -> None:
    texts = [f"row {number}".encode() for number in range(30)]
    items = [{"plaintext": b64(text), "context": f"row={number}"} for number, text in enumerate(texts)]

    sealed = service.submit({"kind": "encrypt", "items": items})
    job = service.wait(sealed, "succeeded")
    found = service.lines(sealed)
    again = [{"ciphertext": line["ciphertext"], "context": f"row={line['index']}"} for line in found]
    moved = service.submit({"kind": "rewrap", "items": again})
    service.wait(moved, "succeeded")
    again = [again[line["index"]] | {"ciphertext": line["ciphertext"]} for line in service.lines(moved)]
    back = service.submit({"kind": "decrypt", "items": again})
    service.wait(back, "succeeded")

    assert job["progress"] == job["progress"] | {"items": 30, "items_done": 30, "items_failed": 0}
    assert [line["index"] for line in found] == list(range(30))
    assert [unb64(line["plaintext"]) for line in service.lines(back)] == texts


def test_context_of_the_job_is_that_of_items_without_one(service: Service) -> None:
    items = [
        {"plaintext": b64(b"job's")},
        {"plaintext": b64(b"own"), "context": "a=own"},
        {"plaintext": "", "context": ""},
    ]

    job_id = service.submit({"kind": "encrypt", "items": items, "context": {"a": "job, with comma"}})
    service.wait(job_id, "succeeded")

    first, second, third = (unb64(line["ciphertext"]) for line in service.lines(job_id))
    assert service.decrypt(first, {"a": "job, with comma"}) == b"job's"
    assert service.decrypt(second, "a=own") == b"own"
    assert service.decrypt(third, None) == b""


def test_refused_items_fail_the_job_and_leave_the_others_readable(service: Service) -> None:
    good = b64(service.encrypt(b"good", "row=1"))
    items = [
        {"ciphertext": good, "context": "row=1"},
        {"ciphertext": good, "context": "row=2"},
        {"ciphertext": b64(b"not an age file"), "context": "row=1"},
        {"ciphertext": good, "context": "no equals sign"},
        {"ciphertext": good, "context": "row=1"},
    ]

    job_id = service.submit({"kind": "decrypt", "items": items})
    job = service.wait(job_id, "failed")

    codes = {1: "decrypt_failed", 2: "not_a_ciphertext", 3: "invalid_context"}
    assert job["error"]["code"] == "items_failed"
    assert {item["index"]: item["code"] for item in job["error"]["items"]} == codes
    assert (job["progress"]["items_done"], job["progress"]["items_failed"]) == (5, 3)
    file_id = service.post("/decrypt", {"ciphertext": good, "context": "row=1"}).json()["file_id"]
    readable = {"plaintext": b64(b"good"), "file_id": file_id}
    assert service.lines(job_id) == [
        {"index": number, **({"error": {"code": codes[number]}} if number in codes else readable)}
        for number in range(5)
    ]


def test_stream_of_many_items_is_one_job(service: Service) -> None:
    count = 20_000

    items = ({"plaintext": b64(b"%d" % number)} for number in range(count))
    job_id = stream(service, "encrypt", items, X_KMS_Context="a=1")
    job = service.wait(job_id, "succeeded")
    found = service.lines(job_id)

    assert job["progress"]["items_done"] == count
    assert [line["index"] for line in found] == list(range(count))
    for number in (0, 499, 500, 12_345, count - 1):
        assert service.decrypt(unb64(found[number]["ciphertext"]), "a=1") == b"%d" % number


def test_stream_may_lack_its_last_newline_and_hold_empty_lines(service: Service) -> None:
    answer = service.post(
        "/jobs?kind=encrypt", content=b'\n{"plaintext": "QQ=="}\n\n\n{"plaintext": "Qg=="}', headers=NDJSON
    )
    job_id = answer.json()["job_id"]

    assert service.wait(job_id, "succeeded")["progress"]["items"] == 2


@pytest.mark.parametrize(
    ("query", "body", "status", "code"),
    [
        ("", b'{"plaintext": ""}', 422, "invalid_request"),
        (f"?kind={CANARY}", b'{"plaintext": ""}', 422, "invalid_request"),
        ("?kind=encrypt", b"", 422, "invalid_request"),
        ("?kind=encrypt", b"\n\n", 422, "invalid_request"),
        ("?kind=encrypt", b'{"plaintext": ""}\n{"plaintext": "Kanarienvogel-4711"}', 422, "invalid_request"),
        ("?kind=encrypt", b'{"plaintext": ""}\n{"Kanarienvogel-4711": 1}', 422, "invalid_request"),
        ("?kind=encrypt", b'{"plaintext": ""}\nKanarienvogel-4711', 422, "invalid_request"),
        ("?kind=encrypt", b'{"plaintext": ""}\n' + b"[" * 300_000, 422, "invalid_request"),
        ("?kind=encrypt", b'{"plaintext": ""}\n\xff', 422, "invalid_request"),
        ("?kind=decrypt", b'{"plaintext": ""}', 422, "invalid_request"),
        ("?kind=encrypt", b'{"plaintext": "' + b"A" * 1_500_000 + b'"}', 413, "too_large"),
        ("?kind=encrypt", b" " * 5_000_000, 413, "too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_stream_that_is_not_understood_leaves_nothing(
    service: Service, query: str, body: bytes, status: int, code: str
) -> None:
    before = set(service.spooled())

    check_problem(service.post(f"/jobs{query}", content=body, headers=NDJSON), status, code)
    assert set(service.spooled()) <= before


def test_json_takes_ten_thousand_items_and_points_to_the_stream_for_more(service: Service) -> None:
    job = {"kind": "encrypt", "items": [{"plaintext": ""}] * 10_000}
    more = service.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}] * 10_001})

    assert service.wait(service.submit(job), "succeeded")["progress"]["items_done"] == 10_000
    check_problem(more, 413, "too_large")
    assert "ndjson" in more.json()["detail"]


def test_idempotency_key_stands_for_one_request(no_worker: Service) -> None:
    """What tells requests apart: tests/kms_core/jobs/store/test_store.py."""
    key = {"Idempotency-Key": "jobs-1"}
    body = {"kind": "encrypt", "items": [{"plaintext": ""}], "context": "a=1"}
    first, again = (no_worker.post("/jobs", body, headers=key) for _ in range(2))

    assert first.json()["job_id"] == again.json()["job_id"] != no_worker.post("/jobs", body).json()["job_id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = body | {"context": "a=2"}
    check_problem(no_worker.post("/jobs", other, headers=key), 409, "idempotency_conflict")


# -- many files


def test_report_of_a_dry_run_is_told(service: Service) -> None:
    """Of the work on many files: tests/kms_core/jobs/execution/test_tree.py, tests/chaos/test_kills.py."""
    (service.files / "dry").write_bytes(service.encrypt(b"x", "env=prod"))
    job = {"kind": "rewrap", "source": f"file://{service.files}/dr*", "context": "env=prod", "dry_run": True}
    dry = service.wait(service.submit(job | {"priority": "low"}), "succeeded")

    report = {"dry_run": True, "changed": 0, "newest": 1, "foreign": 0, "failed": 0, "older": []}
    assert (dry["report"], dry["priority"]) == (report, "low")
    assert {"index": 0, "outcome": "newest"}.items() <= service.lines(dry["job_id"])[0].items()


# -- looking


def test_job_is_described(service: Service) -> None:
    job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}], "ttl_s": 600})
    job = service.wait(job_id, "succeeded")

    assert job.keys() == {
        "job_id", "kind", "state", "priority", "attempt", "progress",
        "created_at", "expires_at", "start_by", "run_by", "started_at", "ended_at", "submitter", "error",
        "links",
    }  # fmt: skip
    assert (job["kind"], job["attempt"], job["error"]) == ("encrypt", 1, None)
    assert job["progress"].keys() == {"items", "items_done", "items_failed", "bytes", "bytes_done"}
    assert job["created_at"].endswith("Z")
    assert job["links"]["result"] == f"{PREFIX}/jobs/{job_id}/result"
    assert service.http.get(job["links"]["result"]).status_code == 200


@pytest.mark.parametrize("way", ["body", "headers"])
def test_deadlines_are_told(no_worker: Service, way: str) -> None:
    asked: dict[str, object] = {"keep_for": 3600}
    soon = datetime.now(UTC) + timedelta(hours=1)
    asked |= {"start_by": soon.isoformat(), "run_by": (soon + timedelta(hours=1)).isoformat()}
    job = {"kind": "encrypt", "items": [{"plaintext": ""}]}
    if way == "body":
        job_id = no_worker.submit(job | asked)
    else:
        job_id = no_worker.upload(
            "encrypt", b"x", **{f"X-KMS-{name}": str(text) for name, text in asked.items()}
        )

    found = no_worker.job(job_id)

    times = [datetime.fromisoformat(found[name]) for name in ("start_by", "run_by", "expires_at")]
    for at, hours in zip(times, (0, 1, 2), strict=True):
        assert abs(at - soon - timedelta(hours=hours)) < timedelta(seconds=1)


# -- cancelling and retrying


def test_running_job_stops_and_leaves_nothing(service: Service) -> None:
    items = ({"plaintext": b64(bytes(20_000))} for _ in range(4_000))
    job_id = stream(service, "encrypt", items)
    until(lambda: service.job(job_id)["state"] != "queued", "the job runs")

    service.post(f"/jobs/{job_id}/cancel")
    job = service.wait(job_id)

    assert job["state"] == "cancelled"
    assert job["progress"]["items_done"] < 4_000 or job["progress"]["items_failed"] > 0
    check_problem(service.get(f"/jobs/{job_id}/result"), 410, "result_expired")
    until(lambda: not any(name.startswith(job_id) for name in service.spooled()), "the spool is clean")


def test_dead_letter_is_listed_and_can_be_retried(no_worker: Service) -> None:
    """A job that used up its attempts: five workers took it and died."""
    core = core_of(no_worker)
    store = core.worker_context.store
    job_id = no_worker.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"revived")}]})
    for _ in range(5):
        assert store.claim(job_id, "w")
        store.redis.hset(f"kms:job:{job_id}", "lease_until", 0)
    run_job(job_id, core.worker_context, "w")

    job = no_worker.job(job_id)
    dead = no_worker.get("/jobs/dead").json()["jobs"]
    revived = no_worker.post(f"/jobs/{job_id}/retry").json()
    run_job(job_id, core.worker_context, "w")

    assert (job["state"], job["error"]["code"], job["attempt"]) == ("failed", "attempts_exhausted", 5)
    assert job_id in {letter["job_id"] for letter in dead}
    assert (revived["state"], revived["attempt"], revived["error"]) == ("queued", 0, None)
    assert no_worker.wait(job_id, "succeeded")["attempt"] == 1
    assert no_worker.decrypt(unb64(no_worker.lines(job_id)[0]["ciphertext"]), None) == b"revived"
    assert job_id not in {letter["job_id"] for letter in no_worker.get("/jobs/dead").json()["jobs"]}


def test_only_dead_letters_can_be_retried(no_worker: Service) -> None:
    job_id = no_worker.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})

    check_problem(no_worker.post(f"/jobs/{job_id}/retry"), 409, "job_not_dead")


def test_parts_of_a_job_are_nobody_s_to_touch(service: Service) -> None:
    job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}] * 1_001})
    service.wait(job_id, "succeeded")

    part = part_id(job_id, 0)
    for answer in (
        service.get(f"/jobs/{part}"),
        service.get(f"/jobs/{part}/result"),
        service.post(f"/jobs/{part}/cancel"),
        service.post(f"/jobs/{part}/retry"),
    ):
        check_problem(answer, 404, "unknown_job")
    assert part not in {job["job_id"] for job in service.get("/jobs?limit=1000").json()["jobs"]}
