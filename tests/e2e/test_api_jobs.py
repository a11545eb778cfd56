"""Jobs over HTTP: bulk items and file references, what is listed and told, cancellation, retries."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from kms_client import Client
from kms_core.container import Core
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import Attempt, part_id
from kms_core.jobs.spec import BULK
from kms_protocol.wire import ENDED, PREFIX, JobOut
from support.service import CANARY, Json, Service, b64, check_problem, core_of, unb64
from support.waiting import until

NDJSON = {"Content-Type": "application/x-ndjson"}


def lines(service: Service, job_id: str) -> list[Json]:
    answer = service.get(f"/jobs/{job_id}/result")
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


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
    found = lines(service, sealed)
    again = [{"ciphertext": line["ciphertext"], "context": f"row={line['index']}"} for line in found]
    moved = service.submit({"kind": "rewrap", "items": again})
    service.wait(moved, "succeeded")
    again = [again[line["index"]] | {"ciphertext": line["ciphertext"]} for line in lines(service, moved)]
    back = service.submit({"kind": "decrypt", "items": again})
    service.wait(back, "succeeded")

    assert job["progress"] == job["progress"] | {"items": 30, "items_done": 30, "items_failed": 0}
    assert [line["index"] for line in found] == list(range(30))
    assert [unb64(line["plaintext"]) for line in lines(service, back)] == texts


def test_context_of_the_job_is_that_of_items_without_one(service: Service) -> None:
    items = [
        {"plaintext": b64(b"job's")},
        {"plaintext": b64(b"own"), "context": "a=own"},
        {"plaintext": "", "context": ""},
    ]

    job_id = service.submit({"kind": "encrypt", "items": items, "context": {"a": "job, with comma"}})
    service.wait(job_id, "succeeded")

    first, second, third = (unb64(line["ciphertext"]) for line in lines(service, job_id))
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

    assert job["error"] == {
        "code": "items_failed",
        "detail": "3 of 5 items failed, the first at index 1: decryption failed: wrong key, wrong context, "
        "or a damaged ciphertext",
        "hint": "give the context it was encrypted with; `kms inspect FILE` shows the key it names; "
        "`kms job result` shows which and why",
        "items": [
            {"index": 1, "code": "decrypt_failed"},
            {"index": 2, "code": "not_a_ciphertext"},
            {"index": 3, "code": "invalid_context"},
        ],
    }
    assert (job["progress"]["items_done"], job["progress"]["items_failed"]) == (5, 3)
    file_id = service.post("/decrypt", {"ciphertext": good, "context": "row=1"}).json()["file_id"]
    assert lines(service, job_id) == [
        {"index": 0, "plaintext": b64(b"good"), "file_id": file_id},
        {"index": 1, "error": {"code": "decrypt_failed"}},
        {"index": 2, "error": {"code": "not_a_ciphertext"}},
        {"index": 3, "error": {"code": "invalid_context"}},
        {"index": 4, "plaintext": b64(b"good"), "file_id": file_id},
    ]


def test_stream_of_many_items_is_one_job(service: Service) -> None:
    count = 20_000

    job_id = stream(
        service,
        "encrypt",
        ({"plaintext": b64(b"%d" % number)} for number in range(count)),
        X_KMS_Context="a=1",
    )
    job = service.wait(job_id, "succeeded")
    found = lines(service, job_id)

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
    before = service.spooled()

    check_problem(service.post(f"/jobs{query}", content=body, headers=NDJSON), status, code)
    assert service.spooled() == before


def test_more_items_than_json_takes_are_pointed_to_the_stream(service: Service) -> None:
    answer = service.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}] * 10_001})

    check_problem(answer, 413, "too_large")
    assert "ndjson" in answer.json()["detail"]


def test_most_items_that_json_takes(service: Service) -> None:
    job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}] * 10_000})

    assert service.wait(job_id, "succeeded")["progress"]["items_done"] == 10_000


@pytest.mark.parametrize(
    "change", [{"kind": "decrypt"}, {"context": "a=2"}, {"key_id": "default"}, {"ttl_s": 60}], ids=str
)
def test_idempotency_key_stands_for_one_request(idle: Service, change: Json) -> None:
    key = {"Idempotency-Key": f"jobs-{change}"}
    body = {"kind": "encrypt", "items": [{"plaintext": ""}], "context": "a=1"}
    if change == {"kind": "decrypt"}:
        change = {"kind": "decrypt", "items": [{"ciphertext": ""}]}

    first = idle.post("/jobs", body, headers=key).json()["job_id"]

    assert idle.post("/jobs", body, headers=key).json()["job_id"] == first
    assert idle.post("/jobs", body).json()["job_id"] != first
    check_problem(idle.post("/jobs", body | change, headers=key), 409, "idempotency_conflict")


# -- files


def test_file_jobs_work_under_the_root(service: Service) -> None:
    data = os.urandom(3_000_000)
    folder = service.files / "a folder"
    folder.mkdir(exist_ok=True)
    (folder / "ü.bin").write_bytes(data)
    here = f"file://{service.files}/a%20folder"

    sealed = service.submit(
        {"kind": "encrypt", "source": f"{here}/%C3%BC.bin", "target": f"{here}/x.age", "context": "a=1"}
    )
    job = service.wait(sealed, "succeeded")
    moved = service.submit(
        {
            "kind": "rewrap",
            "source": f"{here}/x.age",
            "target": f"{here}/y.age",
            "context": "a=1",
            "new_context": "b=2",
        }
    )
    service.wait(moved, "succeeded")
    back = service.submit(
        {"kind": "decrypt", "source": f"{here}/y.age", "target": f"{here}/back", "context": "b=2"}
    )
    service.wait(back, "succeeded")

    assert (folder / "back").read_bytes() == data
    assert job["progress"]["bytes_done"] == len(data)
    check_problem(service.get(f"/jobs/{sealed}/result"), 410, "result_expired")
    again = service.submit(
        {"kind": "decrypt", "source": f"{here}/y.age", "target": f"{here}/back", "context": "b=2"}
    )
    assert service.wait(again, "failed")["error"]["code"] == "target_exists"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://{root}/../spool.key",
        "file://{root}/%2e%2e/spool.key",
        "file://{root}%2f..%2fspool.key",
        "file://{root}/",
        "file://{root}",
        "file://elsewhere{root}/x",
        "{root}/x",
        "s3://bucket/key",
        "http://127.0.0.1/x",
        "file://{root}/x?y",
        "file://{root}/a%00b",
        "file://{root}/.kms-1-1.tmp",
        "",
    ],
)
def test_reference_outside_the_roots_is_refused(service: Service, url: str) -> None:
    named = url.format(root=service.files)
    (service.files / "in").write_bytes(b"x")
    inside = f"file://{service.files}/in"

    for source, target in ((named, f"file://{service.files}/new"), (inside, named)):
        check_problem(
            service.post("/jobs", {"kind": "encrypt", "source": source, "target": target}),
            403,
            "path_refused",
        )


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
def test_deadlines_are_told(idle: Service, way: str) -> None:
    asked: dict[str, object] = {"keep_for": 3600}
    soon = datetime.now(UTC) + timedelta(hours=1)
    asked |= {"start_by": soon.isoformat(), "run_by": (soon + timedelta(hours=1)).isoformat()}
    job = {"kind": "encrypt", "items": [{"plaintext": ""}]}
    if way == "body":
        job_id = idle.submit(job | asked)
    else:
        job_id = idle.upload("encrypt", b"x", **{f"X-KMS-{name}": str(text) for name, text in asked.items()})

    found = idle.job(job_id)

    times = [datetime.fromisoformat(found[name]) for name in ("start_by", "run_by", "expires_at")]
    for at, hours in zip(times, (0, 1, 2), strict=True):
        assert abs(at - soon - timedelta(hours=hours)) < timedelta(seconds=1)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"X-KMS-Run-By": "tomorrow"}, "invalid_request"),
        ({"X-KMS-Run-By": "2999-01-01T00:00:00"}, "invalid_request"),
        ({"X-KMS-Keep-For": "59"}, "invalid_request"),
        ({"X-KMS-Start-By": "2020-01-01T00:00:00Z"}, "invalid_deadline"),
        ({"X-KMS-Start-By": "2999-01-01T00:00:00Z"}, "invalid_deadline"),
        ({"X-KMS-Keep-For": "40000000"}, "invalid_deadline"),
    ],
    ids=str,
)
def test_wrong_deadlines_of_an_upload_leave_nothing(
    idle: Service, headers: dict[str, str], code: str
) -> None:
    before = idle.spooled()

    check_problem(idle.post("/files/encrypt", content=b"x", headers=headers), 422, code)

    assert idle.spooled() == before


def test_pages_hold_every_job_once_newest_first(idle: Service) -> None:
    made = [idle.submit({"kind": "encrypt", "items": [{"plaintext": ""}]}) for _ in range(12)]
    seen: list[Json] = []
    cursor: str | None = ""
    while cursor is not None:
        answer = idle.get("/jobs", params={"limit": "5"} | ({"cursor": cursor} if cursor else {})).json()
        seen += answer["jobs"]
        cursor = answer["next"]

    ids = [job["job_id"] for job in seen]
    assert len(set(ids)) == len(ids)
    assert ids[:12] == made[::-1]
    assert all(earlier["created_at"] >= later["created_at"] for earlier, later in pairwise(seen))


def test_listing_by_state(idle: Service) -> None:
    job_id = idle.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})
    idle.http.delete(f"{PREFIX}/jobs/{job_id}")

    cancelled = idle.get("/jobs?state=cancelled&limit=1000").json()["jobs"]

    assert job_id in {job["job_id"] for job in cancelled}
    assert {job["state"] for job in cancelled} == {"cancelled"}
    assert job_id not in {job["job_id"] for job in idle.get("/jobs?state=queued&limit=1000").json()["jobs"]}


def test_client_that_waits_sees_each_change_and_the_end(service: Service) -> None:
    job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(bytes(1000))}] * 3000})
    told: list[JobOut] = []
    with Client(service.url) as kms:
        assert kms.wait(job_id, progress=told.append) == told[-1]

    assert told[-1].state == "succeeded"
    assert all(job.state not in ENDED for job in told[:-1])
    assert all(a.progress.items_done <= b.progress.items_done for a, b in pairwise(told))


# -- cancelling and retrying


def test_queued_job_is_cancelled_at_once(idle: Service) -> None:
    job_id = idle.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})

    answer = idle.http.delete(f"{PREFIX}/jobs/{job_id}")

    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert not (idle.spool / job_id).exists()
    assert idle.http.delete(f"{PREFIX}/jobs/{job_id}").json()["state"] == "cancelled"


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


@pytest.fixture
def dead_letter(idle: Service) -> tuple[Core, str]:
    """A job that used up its attempts: five workers took it and died."""
    core = core_of(idle)
    job_id = idle.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"revived")}]})
    for _ in range(5):
        claim: Attempt | None = core.worker_context.store.claim(job_id, "w")
        assert claim
        core.worker_context.store.redis.hset(f"kms:job:{job_id}", "lease_until", 0)
    run_job(job_id, core.worker_context, "w")
    return core, job_id


def test_dead_letter_is_listed_and_can_be_retried(idle: Service, dead_letter: tuple[Core, str]) -> None:
    core, job_id = dead_letter

    job = idle.job(job_id)
    dead = idle.get("/jobs/dead").json()["jobs"]
    revived = idle.post(f"/jobs/{job_id}/retry").json()
    run_job(job_id, core.worker_context, "w")

    assert (job["state"], job["error"]["code"], job["attempt"]) == ("failed", "attempts_exhausted", 5)
    assert job_id in {letter["job_id"] for letter in dead}
    assert (revived["state"], revived["attempt"], revived["error"]) == ("queued", 0, None)
    assert idle.wait(job_id, "succeeded")["attempt"] == 1
    assert idle.decrypt(unb64(lines(idle, job_id)[0]["ciphertext"]), None) == b"revived"
    assert job_id not in {letter["job_id"] for letter in idle.get("/jobs/dead").json()["jobs"]}


def test_only_dead_letters_can_be_retried(idle: Service) -> None:
    job_id = idle.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})

    check_problem(idle.post(f"/jobs/{job_id}/retry"), 409, "job_not_dead")


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


def test_message_to_the_worker_says_nothing_of_the_job(idle: Service) -> None:
    store = core_of(idle).worker_context.store
    store.worker_seen("w", 1, [BULK])  # a process that would take it
    store.redis.delete("kms:kms.bulk", "kms:wakes:kms.bulk", "kms:draining:kms.bulk")
    job_id = idle.submit(
        {"kind": "encrypt", "items": [{"plaintext": b64(CANARY.encode())}], "context": f"a={CANARY}"}
    )

    waiting: list[bytes] = store.redis.lrange("kms:kms.bulk", 0, -1)  # type: ignore[assignment]  # sync
    (message,) = waiting
    found = json.loads(message)

    assert json.loads(found["body"]) == [[], {}, None]
    assert found["headers"] == {"task": "kms.run", "id": "wake-up"}
    assert job_id.encode() not in message
    assert CANARY.encode() not in message
