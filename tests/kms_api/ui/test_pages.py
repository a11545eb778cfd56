"""Pages of an application in this process, and templates with values that no install has on demand."""

import asyncio
import html
import re
from dataclasses import replace
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import httpx2 as httpx
import jinja2
import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from kms_api.routes import operations
from kms_api.transport.request_context import RequestContext
from kms_api.ui import overview
from kms_api.ui.render import PageLayer, Screen, refused
from kms_core.auth.policy import Principal
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.store import workers
from kms_core.jobs.store.condition import StoreCondition, StoreProbe
from kms_core.jobs.store.gauges import survey_queues
from kms_core.jobs.store.heartbeats import processes_stuck, worker_left, worker_seen
from kms_core.jobs.store.tenants import TenantJobs
from kms_core.observability.degraded import DEGRADED
from kms_protocol.admin import StatusOut
from kms_protocol.wire import PREFIX
from support.authorization.application import Application, Caller
from support.job_stores import forge, take
from support.openapi_check import example_of
from support.service import b64

TIME: Final = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
FRAME: Final = {
    "who": Principal("ada", "acme", "token:1"),
    "may": lambda _: True,
    "has_session": True,
    "stamp": "",
    "path": "/ui",
    "environment": "prod",
    "version": "",
    "request_id": "",
    "as_of": "2027-01-31T12:00:00Z",
    "method": "GET",
}


@cache
def templates() -> jinja2.Environment:
    return Screen.load(None, None).templates  # type: ignore[arg-type]  # templates need no sessions


def overview_of(found: object = None, **known: object) -> str:
    """The overview of a status; while Redis does not answer, but for what is ``known``."""
    unknown = dict.fromkeys(("jobs", "queue_depth", "workers", "spool", "install"))
    status = msgspec.convert(example_of(StatusOut) | unknown | known, StatusOut)
    facts = {
        "status": status,
        "known": DEGRADED,
        "found": found or overview._Jobs(),  # noqa: SLF001 -- as it is while Redis does not answer
        "due": [],
        "weak": [],
        "old_s": 600,
        "most_failed": 20,
        "period": "6h",
        "periods": overview.PERIODS,
        "few": 8,
        "many": 50,
        "audit_log": None,
        "events": None,
        "is_log_unreadable": False,
    }
    return templates().get_template("overview.html").render(FRAME | facts)


# -- what is degraded ------------------------------------------------------------------------------------


def test_the_service_names_no_other_parts_than_the_table(application: Application) -> None:
    service = application.service

    for queues in (None, survey_queues(service.submitter.store)):
        assert operations.parts(service, queues).keys() == DEGRADED.keys()


def test_a_name_of_a_later_version_is_shown_as_text() -> None:
    page = overview_of(degraded=["redis", "of_a_later_version", "<b>"])

    assert "redis</strong>: Redis does not answer" in page
    assert "of a later version</strong>: this page does not know this name" in page
    assert "<strong>&lt;b&gt;</strong>" in page


def test_a_backend_that_is_down_is_shown_where_the_status_has_it() -> None:
    down = {"key_id": "payroll", "backend": "transit", "root": True, "since": "2027-01-31T12:00:00Z"}
    macro = templates().get_template("parts.html").module.degraded  # type: ignore[attr-defined]  # of the template

    assert "Degraded" not in overview_of()
    assert "root payroll</strong>: transit does not wrap and unwrap, since" in macro([], {}, [down])


def test_nothing_is_healthy_while_jobs_of_others_fail() -> None:
    jobs = {"jobs": {"queued": 1, "running": 2, "committing": 0}, "degraded": []}
    calm, failing = TenantJobs("acme", 1, 2, 0, 0), TenantJobs("beta", 0, 0, 20, 3)
    idle = workers.Activity([], [], has_more=False, results=0, expires=0.0)

    healthy = overview_of(overview._Jobs([], [], "0", "0", activity=idle, tenants=[calm]), **jobs)  # noqa: SLF001 -- as above
    wrong = overview_of(overview._Jobs([], [], "0", "0", activity=idle, tenants=[failing, calm]), **jobs)  # noqa: SLF001 -- as above

    assert ("Healthy" in healthy, "no job failed in the last hour, of any tenant" in healthy) == (True, True)
    assert ("Healthy" in wrong, "Nothing:" in wrong) == (False, False)
    assert "Running, but jobs fail of other tenants" in wrong
    assert "20 or more" in wrong


# -- what cannot be shown, and who may not see it -------------------------------------------------------


BROWSER: Final = {"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}


def test_a_browser_gets_pages_for_the_root_and_for_unknown_addresses(application: Application) -> None:
    root = application.ask(Caller(), "GET", "/", headers=BROWSER)
    unknown = application.ask(application.master, "GET", "/ui/nosuch", headers=BROWSER)
    other_method = application.ask(application.master, "DELETE", "/ui/jobs")

    assert (root.status_code, root.headers["location"]) == (307, "/ui")
    assert application.ask(Caller(), "GET", "/").json()["code"] == "unauthenticated"
    for answer, status in ((unknown, 404), (other_method, 405)):
        assert answer.status_code == status
        assert answer.headers["content-type"].startswith("text/html")
        assert "<main" in answer.text
    assert other_method.headers["allow"] == "GET, HEAD"


def words(answer: httpx.Response) -> str:
    """The text of a page, with single spaces."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", answer.text)).split())


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("/ui/runbooks", "/ui/runbooks"),
        ("/ui/jobs?state=failed&search=a%3Db", "/ui/jobs?state=failed&search=a%3Db"),
        ("/ui/login", "/ui"),
        ("//example.org/ui/", "/ui"),
        ("https://example.org/ui/jobs", "/ui"),
        ("", "/ui"),
    ],
)
def test_a_login_leads_to_the_page_that_was_asked_for_if_it_is_ours(
    application: Application, page: str, shown: str
) -> None:
    stamp, cookie = application.visitor()
    login = httpx.URL("/ui/login", params={"next": page})
    form = {"token": application.everything, "stamp": stamp}
    answer = application.ask(Caller(), "POST", str(login), data=form, headers={"Cookie": cookie})

    assert (answer.status_code, answer.headers["location"]) == (303, shown)
    if page == shown:
        led = application.ask(Caller(), "GET", page).headers["location"]
        assert (urlsplit(led).path, parse_qs(urlsplit(led).query)) == ("/ui/login", {"next": [page]})


# -- while Redis hangs -----------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("knows", [True, False], ids=["before", "while it waits"])
async def test_a_page_of_a_session_does_not_wait_for_a_redis_that_hangs(
    application: Application, monkeypatch: pytest.MonkeyPatch, *, knows: bool
) -> None:
    is_over, begun = asyncio.Event(), []
    probe, pages = StoreProbe(lambda: "available"), application.pages
    assert probe.condition() == "available"
    monkeypatch.setattr(pages, "service", replace(pages.service, store_probe=probe))
    found: list[StoreCondition] = ["unavailable"] if knows else ["available", "unavailable"]

    async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive, send
        begun.append(1)
        await is_over.wait()

    def look() -> StoreCondition:
        return found.pop(0) if len(found) > 1 else found[0]

    layer = RequestContext(PageLayer(hanging, {"/ui/login"}, look), ["kms"], pages=refused)

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        await layer({**scope, "app": pages}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://kms") as http:
        answer = await http.get("/ui/jobs", headers={"Cookie": "kms_session=" + "A" * 43})
    is_over.set()

    assert (answer.status_code, len(begun)) == (503, 0 if knows else 1)
    assert answer.headers["content-type"].startswith("text/html")
    assert int(answer.headers["retry-after"]) >= 1
    assert "Away: Redis. Redis does not answer" in words(answer)
    assert '<meta http-equiv="refresh" content="10">' in answer.text
    assert probe.condition() == "unavailable", "no page waits for what was known a moment ago"


def test_pages_say_as_of_when_they_are_and_a_refresh_searches_no_audit_log(application: Application) -> None:
    page = application.ask(application.master, "GET", "/ui")
    fresh = application.ask(application.master, "GET", "/ui", headers={"X-KMS-Refresh": "1"})

    assert re.search(r"As of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC Refresh", words(page))
    assert 'data-live="30"' in page.text
    assert ('id="refused"' in page.text, 'id="refused"' in fresh.text) == (True, False)
    reads = application.ask(application.master, "GET", f"{PREFIX}/audit?operation=audit.read&limit=1000")
    ids = {event["request_id"] for event in reads.json()["events"]}
    assert {page.headers["x-request-id"] in ids, fresh.headers["x-request-id"] in ids} == {True, False}


# -- jobs ----------------------------------------------------------------------------------------------


def submitted(application: Application, who: Caller, *, run: bool = True, **more: Any) -> str:  # noqa: ANN401 -- JSON
    """A job of a file that is none, which has failed if it is run."""
    body = {"kind": "decrypt", "items": [{"ciphertext": b64(b"no age file")}]} | more
    answer = application.ask(who, "POST", f"{PREFIX}/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job_id = str(answer.json()["job_id"])
    if run:
        run_job(job_id, application.core.worker_context, "host-7:aa/71")
    return job_id


def test_who_may_read_metrics_sees_whose_jobs_fail_and_others_only_their_own(
    application: Application,
) -> None:
    everyone = ("*",)
    operator = application.with_token("*,metrics", tenant="watching")
    caller = application.with_token(*everyone, tenant="watching")
    failing = application.with_token(*everyone, tenant="failing")
    ids = [submitted(application, failing) for _ in range(3)]

    page = application.ask(operator, "GET", "/ui")
    told = words(page)
    assert "failing 0 0 3 0 items_failed 3" in told
    assert re.search(r"Jobs of \d+ other tenants? failed in the last hour", told)
    assert "Jobs and operations are those of all tenants" in told
    assert not [job_id for job_id in ids if job_id in page.text]
    own = words(application.ask(caller, "GET", "/ui"))
    assert "failing" not in own
    assert "Jobs and operations are those of tenant watching" in own
    assert "no job failed in the last hour, of tenant watching" in own


@pytest.fixture(scope="module")
def causes(application: Application) -> tuple[Caller, list[str], str]:
    """A tenant with jobs of two causes in turn, and the ids of the first and of one of the second."""
    who = application.with_token("*,metrics", tenant="causes")
    first = [submitted(application, who)]
    second = submitted(application, who, items=[{"ciphertext": b64(application.sealed("pay-1"))}])
    first.append(submitted(application, who))
    return who, first, second


def test_jobs_are_found_by_cause_key_submitter_and_time(
    application: Application, causes: tuple[Caller, list[str], str]
) -> None:
    who, first, second = causes
    every = {*first, second}

    def found(query: str) -> set[str]:
        page = application.ask(who, "GET", f"/ui/jobs?{query}")
        assert page.status_code == 200, page.text
        return {job_id for job_id in every if job_id in page.text}

    assert found("cause=not_a_ciphertext") == set(first)
    assert found("cause=items_failed&state=failed") == every
    assert found("cause=nosuch") == found("key=nosuch") == found("by=nosuch") == set()
    assert found(f"by={who.name}") == every
    assert found("before=2020-01-31T12:00") == set()
    assert found("before=2099-01-31T12:00") == every
    assert application.ask(who, "GET", "/ui/jobs?before=odd").status_code == 422


def test_a_failed_job_tells_operators_which_worker_made_each_attempt(
    application: Application, causes: tuple[Caller, list[str], str]
) -> None:
    who, (job_id, _), _ = causes
    caller = application.with_token("*", tenant="causes")

    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))
    assert re.search(rf"1 host-7 aa , process 71 {TIME} {TIME} failed not_a_ciphertext", told)
    assert "host-7" not in application.ask(caller, "GET", f"/ui/jobs/{job_id}").text


@pytest.mark.parametrize(
    ("how", "cause", "expected"),
    [
        ("deferred", "backend_unavailable", "Put off 3 times in a row: the backend of its key did not"),
        ("deferred", "a_new_cause", "what it needs was not available a_new_cause ."),
        ("stalled", "", "gave up : it hung, without progress for"),
        ("retried", "record_refused", "failed record_refused ; then the job was retried"),
        ("lease_lost", "signal_9", "died : its process was killed by signal 9 (SIGKILL)"),
        ("lease_lost", "signal_64", "died : its process was killed by signal 64. The lease"),
        ("lease_lost", "status_3", "died : its process ended with status 3."),
        ("lease_lost", "worker_gone", "died : its worker was gone:"),
        ("lease_lost", "", "died : its worker stopped renewing the lease"),
        ("a_new_word", "", "died : its worker stopped renewing the lease"),
    ],
)
def test_a_job_tells_operators_how_each_attempt_ended(
    application: Application, how: str, cause: str, expected: str
) -> None:
    who = application.with_token("*,metrics", tenant="attempts")
    job_id = submitted(application, who)
    line = f'[4,"{how}","{cause}",3,1764685481.500,1764685512.250,"<i>:bb/8",0]'
    forge(application.core.worker_context.store, job_id, history=line)

    page = application.ask(who, "GET", f"/ui/jobs/{job_id}")
    assert expected in words(page)
    assert "4 <i> bb , process 8 2025-12-02 14:24:41 UTC 2025-12-02 14:25:12 UTC" in words(page)
    assert "&lt;i&gt; <span" in page.text
    caller = application.with_token("*", tenant="attempts")
    assert "process 8" not in words(application.ask(caller, "GET", f"/ui/jobs/{job_id}"))


def test_a_job_that_is_put_off_tells_its_submitter_what_is_away(application: Application) -> None:
    who = application.with_token("*", tenant="attempts")
    job_id = submitted(application, who, run=False)
    store = application.core.worker_context.store
    store.defer(take(store, job_id, "host-7:aa/71"), 600, "backend_unavailable")

    page = application.ask(who, "GET", f"/ui/jobs/{job_id}")
    expected = "when it is tried again: the backend of its key did not answer backend_unavailable"
    assert re.search(rf"Why it waits Until {TIME} \( in [^)]*\), {expected}", words(page))
    assert "host-7" not in page.text
    assert "Took" not in words(page), "it is not at work"


def test_a_job_that_workers_leave_alone_tells_how_many_do(application: Application) -> None:
    who = application.with_token(f"*,metrics {application.files_rules}", tenant="attempts")
    source, target = application.url("in/one"), application.new_target(is_folder=False)
    body = {"kind": "encrypt", "source": source, "target": target}
    job_id = application.ask(who, "POST", f"{PREFIX}/jobs", json=body).json()["job_id"]
    store = application.core.worker_context.store
    names = ("host-7:aa", "host-8:bb", "host-9:cc")
    for name in names:
        worker_seen(store, name, 4, ("kms.files",))
    for name in names[:2]:
        processes_stuck(store, name, 1, 60, store.resources(job_id))

    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))
    for name in names:
        processes_stuck(store, name, 0, 0, [])
        worker_left(store, name)
        store.redis.delete(f"kms:stalls:{name}")
    assert re.search("2 of 3 workers leave root:[^ ]* alone, since .*: host-7:aa, host-8:bb. Runbook", told)
    assert told.count("alone, since") == 1


def test_a_job_of_an_older_version_shows_the_process_of_its_last_attempt(application: Application) -> None:
    who = application.with_token("*,metrics", tenant="attempts")
    job_id = submitted(application, who, run=False)
    forge(application.core.worker_context.store, job_id, worker="host-7:aa/71", attempt_id="")

    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))
    assert "host-7 aa , process 71 It did not end the job." in told


def test_all_dead_jobs_of_a_filter_are_retried_and_no_others(application: Application) -> None:
    who = application.with_token("*", tenant="dead")
    store = application.core.worker_context.store
    dead = {kind: submitted(application, who, run=False, labels={"run": kind}) for kind in ("a", "b")}
    for job_id in dead.values():
        attempt = store.claim(job_id, "host-7:aa/71")
        assert attempt
        store.finish(attempt, "failed", "attempts_exhausted")
    sender, stamp = application.in_form(who)
    assert "Retry all (2)" in words(application.ask(sender, "GET", "/ui/jobs?state=dead"))
    early = application.ask(sender, "GET", "/ui/jobs?state=dead&before=2020-01-31T12:00")
    assert "No jobs among the dead letters before 2020-01-31T12:00 UTC." in words(early)

    form = {"stamp": stamp, "state": "dead", "search": "run=a"}
    answer = application.ask(sender, "POST", "/ui/jobs/retry", data=form)

    assert answer.headers["location"] == "/ui/jobs?state=dead&search=run%3Da&done=retried_all"
    states = {kind: store.get(job_id, "dead").state for kind, job_id in dead.items()}
    assert states == {"a": "queued", "b": "failed"}


def test_a_queued_job_says_why_it_waits_and_a_job_over_files_has_its_source(application: Application) -> None:
    who = application.with_token(f"*,metrics {application.files_rules}")
    body = {
        "kind": "encrypt",
        "source": application.url("in/one"),
        "target": application.new_target(is_folder=False),
    }
    made = application.ask(who, "POST", f"{PREFIX}/jobs", json=body)
    job_id = made.json()["job_id"]

    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))
    assert "Why it waits No worker runs." in told
    assert f"Source {application.url('in/one')} Target" in told
    store = application.core.worker_context.store
    worker_seen(store, "host-7:aa", 4, ("kms.bulk",))
    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))
    assert "No worker serves its queue, kms.files." in told
    worker_left(store, "host-7:aa")
