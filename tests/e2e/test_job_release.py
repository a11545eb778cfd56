"""Results that are released: by their reader, or a minute after the first complete fetch."""

import pytest

from kms_core.container import Core
from kms_core.jobs.store import reader as job_store
from kms_protocol.wire import PREFIX
from support.service import CONTEXT, Service, b64, check_problem, core_of
from support.waiting import until

DATA = bytes(range(256)) * 1024


@pytest.fixture(scope="module")
def inside(service: Service) -> Core:
    """A core of the running service: its store and its spool."""
    return core_of(service)


def uploaded(service: Service, **headers: str) -> str:
    job_id = service.upload("encrypt", DATA, "env=prod", **headers)
    service.wait(job_id, "succeeded")
    return job_id


def release(service: Service, job_id: str, status: int = 200) -> dict[str, object]:
    answer = service.http.delete(f"{PREFIX}/jobs/{job_id}/result")
    assert answer.status_code == status, answer.text
    found: dict[str, object] = answer.json()
    return found


def blobs(service: Service, job_id: str) -> list[str]:
    return [path for path in service.spooled() if path.startswith(job_id)]


def test_released_result_is_gone_at_once_and_the_record_and_the_audit_log_say_so(service: Service) -> None:
    job_id = uploaded(service)
    assert blobs(service, job_id)

    told, again = release(service, job_id), release(service, job_id)

    assert blobs(service, job_id) == []
    assert (told["state"], told["job_id"]) == ("succeeded", job_id)
    assert service.job(job_id)["released_at"] == told["released_at"] == again["released_at"]
    check_problem(service.get(f"/jobs/{job_id}/result"), 410, "result_released")
    found = service.audited(operation="job.release", job_id=job_id)
    assert ("job.release", "ok") in [(each["operation"], each["result"]) for each in found]


def test_job_that_runs_or_waits_has_nothing_to_release(no_worker: Service) -> None:
    job_id = no_worker.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})

    answer = no_worker.http.delete(f"{PREFIX}/jobs/{job_id}/result")

    check_problem(answer, 409, "job_not_finished")
    assert blobs(no_worker, job_id)


def test_job_without_a_result_has_nothing_to_release(service: Service, no_worker: Service) -> None:
    failed = service.upload("decrypt", service.encrypt(b"x", "row=1"), "row=2")
    service.wait(failed, "failed")
    cancelled = no_worker.upload("encrypt", b"x")
    no_worker.http.delete(f"{PREFIX}/jobs/{cancelled}")

    for install, job_id in ((service, failed), (no_worker, cancelled)):
        check_problem(install.http.delete(f"{PREFIX}/jobs/{job_id}/result"), 410, "result_expired")
    check_problem(service.http.delete(f"{PREFIX}/jobs/{'0' * 8}/result"), 404, "unknown_job")


def test_file_that_a_job_wrote_is_no_result_to_release(service: Service) -> None:
    source, target = service.files / "release-me", service.files / "release-me.age"
    source.write_bytes(DATA)
    job = {"kind": "encrypt", "source": source.as_uri(), "target": target.as_uri(), "context": CONTEXT}
    job_id = service.submit(job)
    service.wait(job_id, "succeeded")

    check_problem(service.http.delete(f"{PREFIX}/jobs/{job_id}/result"), 410, "result_expired")
    assert target.exists()


# -- after a fetch


def test_result_goes_a_minute_after_it_was_fetched_whole(
    service: Service, inside: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The minute is for a reader whose last bytes got lost: the answer can be fetched again."""
    job_id = uploaded(service, X_KMS_Release="after_fetch")
    whole = service.result(job_id)

    until(lambda: "released_at" in service.job(job_id), "the release")
    assert service.result(job_id) == whole
    monkeypatch.setattr(job_store, "FETCHED_S", 0.0)
    inside.submitter.store.fetched(inside.submitter.store.get(job_id, "default"), 0, 1, 1)

    check_problem(service.get(f"/jobs/{job_id}/result"), 410, "result_released")
    until(lambda: not blobs(service, job_id), "the reaper to delete it")


def test_result_of_many_ranges_counts_once_no_byte_is_missing(service: Service) -> None:
    job_id = uploaded(service, X_KMS_Release="after_fetch")
    size = int(service.http.head(f"{PREFIX}/jobs/{job_id}/result").headers["content-length"])

    def fetch(first: int, last: int) -> None:
        headers = {"Range": f"bytes={first}-{last}"}
        assert service.get(f"/jobs/{job_id}/result", headers=headers).status_code == 206

    fetch(size // 2, size - 1)
    fetch(0, size // 3)
    assert "released_at" not in service.job(job_id)
    fetch(size // 3, size - 1)
    until(lambda: "released_at" in service.job(job_id), "the release")


def test_a_fetch_that_breaks_off_at_its_end_is_not_complete(service: Service) -> None:
    """It is longer than the buffers between the two, or the service could not tell."""
    job_id = service.upload("encrypt", bytes(32 * 1024**2), X_KMS_Release="after_fetch")
    service.wait(job_id, "succeeded")
    with service.http.stream("GET", f"{PREFIX}/jobs/{job_id}/result") as answer:
        next(answer.iter_raw(1000))

    service.wait(uploaded(service))  # whatever the answer to the broken one still does, is done
    assert "released_at" not in service.job(job_id)
    service.result(job_id)
    until(lambda: "released_at" in service.job(job_id), "the release")


def test_a_result_without_a_byte_goes_after_its_fetch_and_not_after_a_look(service: Service) -> None:
    job_id = service.upload(
        "decrypt", service.encrypt(b"", "env=prod"), "env=prod", X_KMS_Release="after_fetch"
    )
    service.wait(job_id, "succeeded")
    looked = service.http.head(f"{PREFIX}/jobs/{job_id}/result")
    before = service.job(job_id)

    assert (looked.status_code, looked.headers["content-length"]) == (200, "0")
    assert service.audited(operation="job.result", job_id=job_id) == [], "nothing was read"
    assert service.result(job_id) == b""
    until(lambda: "released_at" in service.job(job_id), "the release")
    assert "released_at" not in before
    assert len(service.audited(operation="job.result", job_id=job_id)) == 1


def test_job_that_did_not_ask_for_it_keeps_its_result(service: Service) -> None:
    job_id = uploaded(service)
    service.result(job_id)
    service.result(job_id)

    assert "released_at" not in service.job(job_id)


def test_bulk_job_asks_in_its_body(service: Service) -> None:
    job = {"kind": "encrypt", "items": [{"plaintext": b64(b"x")}], "release": "after_fetch"}
    job_id = service.submit(job)
    service.wait(job_id, "succeeded")

    assert service.result(job_id)
    until(lambda: "released_at" in service.job(job_id), "the release")


# -- a process that dies in between


def test_blobs_of_a_release_that_a_killed_api_left_are_deleted(service: Service, inside: Core) -> None:
    """The script marks the result first: the reaper finds it."""
    job_id = uploaded(service)

    inside.submitter.store.release(inside.submitter.store.get(job_id, "default"))

    check_problem(service.get(f"/jobs/{job_id}/result"), 410, "result_released")
    until(lambda: not blobs(service, job_id), "the reaper to delete it")
