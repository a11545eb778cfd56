"""Redis is late, away or never there: what was accepted is done, and what needs no Redis goes on."""

import os
import re
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx

from kms_cli.local.directories import runtime_dir
from support.credentials import SecuredService, bearer
from support.frozen_disk import state_of
from support.service import Json, Service, b64, check_problem
from support.waiting import until


def submitted(service: Service, job: Json) -> str:
    """Submit as a careful client does: again, under the same key, until it is accepted."""
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    answers: list[httpx.Response] = []

    def accepted() -> bool:
        answers.append(service.post("/jobs", job, headers=headers))
        assert answers[-1].status_code in {202, 503}, answers[-1].text
        return answers[-1].status_code == 202

    until(accepted, "the job is accepted")
    return str(answers[-1].json()["job_id"])


def test_api_and_worker_start_without_redis_and_find_it_later(tmp_path: Path) -> None:
    state = tmp_path / "state"
    url = f"unix://{runtime_dir(state, {})}/valkey.sock?db=0"
    with Service(tmp_path, "[kms.jobs]\nlease_s = 2\n", url) as service:
        service.worker_probe = "/livez"  # it takes no jobs yet
        service.start()

        assert service.decrypt(service.encrypt(b"no need for Redis")) == b"no need for Redis"
        found = service.http.get("/readyz").json()
        assert found == {
            "status": "ready",
            "jobs": "unavailable",
            "audit": "available",
            "keys": "available",
            "spool": "available",
        }
        status = service.get("/status").json()
        assert (status["jobs"], status["queue_depth"], status["workers"]) == (None, None, None)
        assert "redis" in status["degraded"]
        for answer in (
            service.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}]}),
            service.post("/files/encrypt", content=b"x"),
            service.get("/jobs"),
            service.get("/jobs/dead"),
            service.get(f"/jobs/{uuid.uuid4()}"),
            service.get(f"/jobs/{uuid.uuid4()}/result"),
            service.post(f"/jobs/{uuid.uuid4()}/cancel"),
        ):
            check_problem(answer, 503, "jobs_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert service.spooled() == []

        service.valkey.start()

        until(lambda: service.http.get("/readyz").json()["jobs"] == "available", "Redis is found")
        service.wait(submitted(service, {"kind": "encrypt", "items": [{"plaintext": ""}]}), "succeeded")
        until(lambda: service.get("/status").json()["workers"] == 1, "the worker is seen")


def test_redis_that_goes_and_comes_back_costs_no_single_call(tmp_path: Path) -> None:
    with Service(tmp_path, "[kms.jobs]\nlease_s = 2\n") as service:
        service.start("api")
        before = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"kept")}]})

        service.valkey.stop()
        sealed = service.encrypt(b"while it is away")
        away = service.get("/jobs")
        service.valkey.start()
        service.start("worker")

        check_problem(away, 503, "jobs_unavailable")
        assert service.decrypt(sealed) == b"while it is away"
        assert service.wait(before, "succeeded")["progress"]["items_done"] == 1


def test_probes_do_not_wait_for_a_redis_that_hangs(tmp_path: Path) -> None:
    """Not even while more calls of jobs wait for it than have threads."""
    item, is_over = {"kind": "encrypt", "items": [{"plaintext": ""}]}, threading.Event()
    with Service(tmp_path) as service, ThreadPoolExecutor(60) as callers:
        service.start("api")
        os.kill(service.valkey.pid, signal.SIGSTOP)
        try:

            def submit() -> None:
                while not is_over.is_set():
                    assert service.post("/jobs", item, timeout=60).status_code in {202, 503}

            waiting = [callers.submit(submit) for _ in range(60)]
            until(lambda: service.http.get("/readyz").json()["jobs"] == "unavailable", "it is noticed")
            for _ in range(20):
                assert service.http.get("/readyz", timeout=2).status_code == 200
                assert service.get("/status", timeout=2).json()["jobs"] is None
                assert 'kms_redis_ok{what="answers"} 0' in service.http.get("/metrics", timeout=2).text
        finally:
            is_over.set()
            os.kill(service.valkey.pid, signal.SIGCONT)
        until(lambda: service.http.get("/readyz").json()["jobs"] == "available", "Redis is found")
        assert service.get("/status").json()["jobs"] is not None
        assert [each.result() for each in waiting] == [None] * 60


def test_pages_say_that_redis_hangs_without_waiting_for_it_and_come_back(tmp_path: Path) -> None:
    with SecuredService(tmp_path) as service, httpx.Client(base_url=service.url, trust_env=False) as browser:
        service.start("api")
        token = service.new_token("*,metrics")[1]
        stamp = re.search(r'name="stamp" value="(\w+)"', browser.get("/ui/login").text)
        assert stamp
        browser.post("/ui/login", data={"stamp": stamp[1], "token": token})
        assert browser.get("/ui").status_code == 200
        os.kill(service.valkey.pid, signal.SIGSTOP)
        try:
            for path in ("/ui", "/ui/jobs", "/ui/workers", "/ui/keys", "/ui/audit", "/ui/runbooks"):
                away = browser.get(path, timeout=4)  # calls to Redis end after five
                assert (away.status_code, away.headers["content-type"]) == (503, "text/html; charset=utf-8")
                assert "Redis does not answer" in away.text
            by_token = service.http.get("/ui", headers=bearer(token), timeout=4)
            assert (by_token.status_code, "Degraded" in by_token.text) == (200, True)
        finally:
            os.kill(service.valkey.pid, signal.SIGCONT)
        until(lambda: browser.get("/ui").status_code == 200, "the session is found")


def test_worker_outlives_a_redis_that_is_away_for_longer_than_connecting_may_take(tmp_path: Path) -> None:
    with Service(tmp_path, "[kms.jobs]\nlease_s = 2\n") as service:
        service.start()
        pid = service.pid("worker")

        service.valkey.stop()
        until(lambda: "Cannot connect" in service.output("worker") or not is_there(pid), "the worker notices")
        assert is_there(pid), service.output("worker")[-2000:]
        service.valkey.start()

        service.wait(submitted(service, {"kind": "encrypt", "items": [{"plaintext": ""}]}), "succeeded")
        assert is_there(pid)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    return state_of(pid) not in {"", "Z"}
