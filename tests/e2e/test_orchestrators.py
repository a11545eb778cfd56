"""The API for programs that run many jobs: labels, metadata, waits, many states in one call, replays."""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kms_protocol.wire import PREFIX
from support.embedded_valkey import EmbeddedValkey
from support.service import Json, Service, b64, check_problem
from support.waiting import until

ITEM = {"plaintext": b64(b"x")}
WORD = "label-that-redis-must-not-see"


def unique() -> str:
    return uuid.uuid4().hex


def job_of(**more: object) -> Json:
    return {"kind": "encrypt", "items": [ITEM], **more}


def listed(service: Service, *labels: str, **more: str) -> list[str]:
    found = service.get("/jobs", params={"label": list(labels), **more})
    assert found.status_code == 200, found.text
    return [job["job_id"] for job in found.json()["jobs"]]


# -- labels and metadata


def test_answers_repeat_labels_and_metadata(service: Service) -> None:
    told = {"labels": {"team": "pay", "run": unique()}, "metadata": {"dag": "nächtlich", "note": "a=b, c"}}
    job_id = service.submit(job_of(**told))

    assert {name: service.job(job_id)[name] for name in told} == told
    assert [job["labels"] for job in service.get("/jobs").json()["jobs"] if job["job_id"] == job_id] == [
        told["labels"]
    ]


def test_streamed_bodies_have_them_in_headers(service: Service) -> None:
    run = unique()
    headers = {"X_KMS_Labels": f"team%3Dpay%2Crun={run}", "X_KMS_Metadata": "%7B%22dag%22%3A%22n%C3%A4%22%7D"}
    job_id = service.upload("encrypt", b"x", **headers)

    found = service.job(job_id)
    assert found["labels"] == {"team": "pay", "run": run}
    assert found["metadata"] == {"dag": "nä"}


def test_jobs_are_listed_by_all_their_labels(service: Service) -> None:
    run, other = unique(), unique()
    first = service.submit(job_of(labels={"run": run, "step": "1"}))
    second = service.submit(job_of(labels={"run": run, "step": "2"}))
    service.submit(job_of(labels={"run": other, "step": "2"}))
    service.submit(job_of())
    service.wait(second, "succeeded")
    service.wait(first, "succeeded")

    assert listed(service, f"run={run}") == [second, first]
    assert listed(service, f"run={run}", "step=2") == [second]
    assert listed(service, f"run={run}", state="succeeded") == [second, first]
    assert listed(service, f"run={run}", state="queued") == []
    assert listed(service, f"run={run}", "step=3") == []


def test_list_by_label_goes_on_at_its_cursor(service: Service) -> None:
    run = unique()
    made = [service.submit(job_of(labels={"run": run, "all": "yes"})) for _ in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        params = {"label": f"run={run}", "limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = service.get("/jobs", params=params).json()
        seen += [job["job_id"] for job in page["jobs"]]
        cursor = page["next"]
        if cursor is None:
            break

    assert seen == made[::-1]


def test_redis_holds_neither_labels_nor_metadata_in_the_clear(
    service: Service, valkey: EmbeddedValkey
) -> None:
    job_id = service.submit(job_of(labels={"who": WORD}, metadata={"who": WORD}))
    service.wait(job_id, "succeeded")
    assert listed(service, f"who={WORD}") == [job_id]

    written = b"".join(path.read_bytes() for path in valkey.files.data_dir.rglob("*") if path.is_file())
    assert job_id.encode() in written
    assert WORD.encode() not in written


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"-a": "x"},
        {"a": "with space"},
        {"a": "x" * 129},
        {"a" * 64: "x"},
        {"a\n": "x"},
        {"a": "x\n"},
        {f"a{number}": "x" for number in range(17)},
        {"a": 1},
        ["a=b"],
    ],
)
def test_bad_labels_are_refused(service: Service, labels: object) -> None:
    check_problem(service.post("/jobs", job_of(labels=labels)), 422, "invalid_request")


@pytest.mark.parametrize("text", ["nothing", "=x", "a=b,a=c", "a=%20", "%ff"])
def test_bad_labels_in_headers_and_lists_are_refused(service: Service, text: str) -> None:
    answer = service.post("/files/encrypt", content=b"x", headers={"X-KMS-Labels": text})
    check_problem(answer, 422, "invalid_request")


@pytest.mark.parametrize("text", ["[]", "{", '{"a":1}', "%ff", f'{{"a":"{"x" * 513}"}}'])
def test_bad_metadata_in_headers_is_refused(service: Service, text: str) -> None:
    answer = service.post("/files/encrypt", content=b"x", headers={"X-KMS-Metadata": text})
    check_problem(answer, 422, "invalid_request")


def test_bad_label_of_a_list_is_refused(service: Service) -> None:
    check_problem(service.get("/jobs", params={"label": "nothing"}), 422, "invalid_request")


# -- waits


def test_submission_that_waits_answers_with_the_end(service: Service) -> None:
    answer = service.post("/jobs?wait=30", job_of())

    assert answer.status_code == 200
    assert (answer.json()["state"], answer.json()["progress"]["items_done"]) == ("succeeded", 1)
    assert answer.headers["location"] == answer.json()["links"]["self"]


def test_upload_that_waits_answers_with_the_end(service: Service) -> None:
    answer = service.post("/files/encrypt?wait=30", content=b"x")

    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


def test_wait_for_a_job_ends_with_it(service: Service) -> None:
    job_id = service.submit(job_of())

    assert service.get(f"/jobs/{job_id}?wait=30").json()["state"] == "succeeded"


def test_wait_is_over_in_time(idle: Service) -> None:
    """No worker runs: the job is told as it is."""
    begun = time.monotonic()
    answer = idle.post("/jobs?wait=1", job_of())
    job = idle.get(f"/jobs/{answer.json()['job_id']}?wait=1")
    took_s = time.monotonic() - begun

    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    assert (job.status_code, job.json()["state"]) == (200, "queued")
    assert took_s >= 2


@pytest.mark.parametrize("wait", ["61", "-1", "1.5", "x", "9" * 30])
def test_bad_waits_are_refused_before_anything_is_submitted(idle: Service, wait: str) -> None:
    run = unique()
    check_problem(idle.post(f"/jobs?wait={wait}", job_of(labels={"run": run})), 422, "invalid_request")
    check_problem(idle.post(f"/files/encrypt?wait={wait}", content=b"x"), 422, "invalid_request")
    check_problem(idle.get(f"/jobs/{uuid.uuid4()}?wait={wait}"), 422, "invalid_request")

    assert listed(idle, f"run={run}") == []


# -- many jobs, replays, the answer


def test_states_of_many_jobs_in_one_call(service: Service) -> None:
    made = [service.submit(job_of()) for _ in range(3)]
    unknown = str(uuid.uuid4())
    for job_id in made:
        service.wait(job_id, "succeeded")

    found = service.post("/jobs/status", {"job_ids": [made[2], unknown, made[0], made[2], "no id"]}).json()

    assert [job["job_id"] for job in found["jobs"]] == [made[2], made[0]]
    assert found["jobs"][0] == service.job(made[2])
    assert found["unknown"] == [unknown, "no id"]


@pytest.mark.parametrize("ids", [[], ["x"] * 1001, "x", [1]])
def test_bad_lists_of_ids_are_refused(service: Service, ids: object) -> None:
    check_problem(service.post("/jobs/status", {"job_ids": ids}), 422, "invalid_request")


def test_replayed_submission_says_so(service: Service) -> None:
    key = unique()
    first, again = (service.post("/jobs", job_of(), headers={"Idempotency-Key": key}) for _ in range(2))

    assert first.json()["job_id"] == again.json()["job_id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    "change", [{"labels": {"a": "b"}}, {"metadata": {"a": "b"}}, {"release": "after_fetch"}]
)
def test_same_key_with_another_option_is_a_conflict(service: Service, change: Json) -> None:
    key = unique()
    service.post("/jobs", job_of(), headers={"Idempotency-Key": key})

    answer = service.post("/jobs", job_of(**change), headers={"Idempotency-Key": key})
    check_problem(answer, 409, "idempotency_conflict")


def test_job_tells_who_submitted_it_with_which_key_and_when_it_ran(service: Service) -> None:
    before = time.time()
    job_id = service.submit(job_of(key_id="default"))
    found = service.wait(job_id, "succeeded")

    assert (found["submitter"], found["key_id"]) == ("local", "default")
    assert found["created_at"] <= found["started_at"] <= found["ended_at"]
    assert time.strftime("%Y-%m-%dT%H", time.gmtime(before)) <= found["started_at"]


def test_failed_job_names_its_first_failed_items(service: Service) -> None:
    """Over three parts: each of the first ten, by its place among all items."""
    good, bad = b64(service.encrypt(b"x", "")), b64(b"no age file")
    items = [{"ciphertext": bad if number in range(240, 500, 5) else good} for number in range(600)]
    job_id = service.submit({"kind": "decrypt", "items": items})
    error = service.wait(job_id, "failed")["error"]

    assert error["code"] == "items_failed"
    assert error["items"] == [{"index": number, "code": "not_a_ciphertext"} for number in range(240, 290, 5)]


def test_failed_files_are_named_by_their_line_of_the_result(service: Service) -> None:
    folder = service.files / unique()
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(b"x")
    out = service.files / unique()
    out.mkdir()
    (out / "b.age").write_bytes(b"in the way")
    job = {"kind": "encrypt", "source": f"{folder.as_uri()}/**", "target": f"{out.as_uri()}/"}
    job_id = service.submit(job)

    error = service.wait(job_id, "failed")["error"]
    lines = [json.loads(line) for line in service.result(job_id).splitlines()]

    assert error["items"] == [{"index": 1, "code": "target_exists"}]
    assert lines[1]["source"].endswith("/b")


def test_waits_and_event_streams_end_when_the_api_stops(tmp_path: Path, redis_url: str) -> None:
    """A wait is answered with the state of the job: callers need not tell a stop from a broken connection."""
    with Service(tmp_path, redis=redis_url) as service, ThreadPoolExecutor() as pool:
        service.is_open_inside = True
        job_id = service.start("api").submit(job_of(group={"name": "of-two", "jobs": 2}))
        waits = [
            pool.submit(service.get, f"/{path}?wait=60") for path in (f"jobs/{job_id}", "job-groups/of-two")
        ]
        stream = pool.submit(service.get, "/jobs/events")
        until(lambda: service.held("streams") == 3, "all wait")

        begun = time.monotonic()
        service.stop("api")
        assert time.monotonic() - begun < 10
        assert [answer.result().status_code for answer in waits] == [200, 200]
        assert waits[0].result().json()["state"] == "queued"
        assert stream.result().text.startswith(": connected")


def test_wait_does_not_outlive_its_caller(idle: Service) -> None:
    """A caller that goes away gives its slot back."""
    job_id = idle.submit(job_of())
    for _ in range(3):
        with pytest.raises(Exception, match="timed out"):
            idle.http.get(f"{PREFIX}/jobs/{job_id}?wait=60", timeout=0.3)

    until(lambda: idle.held("streams") == 0, "the slots to be given back")
