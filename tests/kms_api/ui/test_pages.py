"""Pages of an application in this process, and templates with values that no install has on demand."""

import asyncio
import html
import re
from collections import Counter
from collections.abc import Iterable
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
from kms_api.transport.page_layer import PageLayer
from kms_api.transport.request_context import RequestContext
from kms_api.ui import charts, overview
from kms_api.ui.job_pages import job_row
from kms_api.ui.render import Screen, refused
from kms_core.auth.policy import Principal
from kms_core.jobs.store import workers
from kms_core.jobs.store.condition import StoreCondition, StoreProbe
from kms_core.jobs.store.gauges import survey_queues
from kms_core.jobs.store.heartbeats import processes_stuck, worker_left, worker_seen
from kms_core.jobs.store.tenants import TenantJobs
from kms_core.observability.degraded import DEGRADED
from kms_protocol.admin import StatusOut
from kms_protocol.wire import PREFIX
from support.authorization.application import Application, Caller
from support.core_jobs import run_job
from support.job_stores import forge, resealed, take
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
    return Screen.load(None).templates  # type: ignore[arg-type]  # templates need no sessions


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
        "period": "6h",
        "periods": charts.PERIODS,
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

    assert '<a href="/ui/runbooks#kmsredisdown">redis</a></strong>: Redis does not answer' in page
    assert "of a later version</strong>: this page does not know this name" in page
    assert "<strong>&lt;b&gt;</strong>" in page


def test_a_backend_that_is_down_is_shown_where_the_status_has_it() -> None:
    down = {"key_id": "payroll", "backend": "transit", "root": True, "since": "2027-01-31T12:00:00Z"}
    macro = templates().get_template("parts.html").module.degraded  # type: ignore[attr-defined]  # of the template

    assert "Degraded" not in overview_of()
    shown = macro([], {}, [down])
    assert '<a href="/ui/runbooks#kmsrootdown">root payroll</a></strong>: transit does not wrap and' in shown


def test_nothing_is_healthy_while_jobs_of_others_fail() -> None:
    jobs = {"jobs": {"queued": 1, "running": 2, "committing": 0}, "degraded": []}
    causes = Counter(items_failed=9, target_exists=5, path_refused=4, record_refused=1, attempts_exhausted=1)
    calm, failing = TenantJobs("acme", 1, 2, 0, 0), TenantJobs("beta", 0, 0, 20, 3, causes, unseen=49)
    idle = workers.Activity([], [], has_more=False, results=0, expires=0.0)

    healthy = overview_of(overview._Jobs([], [], activity=idle, tenants=[calm]), **jobs)  # noqa: SLF001 -- as above
    wrong = overview_of(overview._Jobs([], [], activity=idle, tenants=[failing, calm]), **jobs)  # noqa: SLF001 -- as above

    assert ("Healthy" in healthy, "no job failed in the last hour, of any tenant" in healthy) == (True, True)
    assert ("Healthy" in wrong, "Nothing:" in wrong) == (False, False)
    assert "Running, but jobs fail of other tenants" in wrong
    assert "the newest 20 of 69" in wrong
    assert re.search(r"path_refused</span> 4, others 2</td>", wrong)


def test_runbooks_have_no_markup_left_and_are_found_by_names_in_degraded(
    application: Application,
) -> None:
    page = application.ask(application.master, "GET", "/ui/runbooks")
    text = html.unescape(re.sub("<code>.*?</code>|<[^>]*>", " ", page.text))

    assert re.findall(r"[*`#]|\]\(|__", text) == []
    assert "<strong>Full</strong> (<code>redis_full</code>): used memory" in page.text
    ids = set(re.findall(r'<h2 id="(kms\w+)"', page.text))
    named = re.findall(r'<a href="#(kms\w+)">([a-z ]+)</a>', page.text)
    assert {name.replace(" ", "_") for _, name in named} == DEGRADED.keys()
    assert {anchor for anchor, _ in named} <= ids


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

    refresh = r"Refreshes itself every 30 seconds\. Refreshes itself every 5 minutes\. Refresh now"
    assert re.search(f"As of {TIME} {refresh}", words(page)), "with a script, and without"
    assert 'data-live="30"' in page.text
    audit = words(application.ask(application.master, "GET", "/ui/audit"))
    assert "Does not refresh itself. Refresh now" in audit
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
    assert "Attempt Host Worker Process Began Ended How it ended 1 host-7 aa 71" in told
    assert re.search(rf"1 host-7 aa 71 {TIME} {TIME} failed not_a_ciphertext", told)
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
    assert "4 <i> bb 8 2025-12-02 14:24:41 UTC 2025-12-02 14:25:12 UTC" in words(page)
    assert '<td data-label="Host">&lt;i&gt;</td>' in page.text
    caller = application.with_token("*", tenant="attempts")
    assert "14:24:41" not in words(application.ask(caller, "GET", f"/ui/jobs/{job_id}"))


@pytest.mark.parametrize("how", ["lease_lost", "stalled"])
def test_the_last_attempt_of_a_dead_letter_was_the_last_and_that_of_others_was_followed(
    application: Application, how: str
) -> None:
    who = application.with_token("*,metrics", tenant="attempts")
    store = application.core.worker_context.store
    job_id = dead(application, who)
    lines = [f'[{number},"{how}","signal_11",1,1.0,2.0,"host-7:bb/8",0]' for number in (1, 2)]
    forge(store, job_id, attempt_id="", history="\n".join(lines))

    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}")).partition("How it ended")[2]
    first, last = told.split(" 2 host-7 bb 8 ")
    assert "dead letter" not in first
    assert "It was the last attempt: the job is a dead letter." in last
    assert "queued again" not in last
    forge(store, job_id, error="expired")
    assert "No attempt followed." in words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))


def test_a_job_that_is_put_off_tells_its_submitter_what_is_away(application: Application) -> None:
    who = application.with_token("*", tenant="attempts")
    job_id = submitted(application, who, run=False)
    store = application.core.worker_context.store
    store.defer(take(store, job_id, "host-7:aa/71"), 600, "backend_unavailable")

    page = application.ask(who, "GET", f"/ui/jobs/{job_id}")
    expected = "when it is tried again: the backend of its key did not answer backend_unavailable"
    assert re.search(rf"Why it waits Until {TIME} \( in [^)]*\), {expected}", words(page))
    assert "host-7" not in page.text
    assert not re.search("Took|Started", words(page)), "it is not at work, and no attempt counts"
    assert job_row(store.get(job_id, who.tenant)).took_s is None


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
    status, attention = words(application.ask(who, "GET", "/ui")).split(" Needs attention ")
    for name in names:
        processes_stuck(store, name, 0, 0, [])
        worker_left(store, name)
        store.redis.delete(f"kms:stalls:{name}")
    assert re.search("2 of 3 workers leave root:[^ ]* alone, since .*: host-7:aa, host-8:bb. Jobs that", told)
    assert told.count("alone, since") == 1
    expected = "Degraded: .*2 of 3 workers leave root:[^ ]* alone, since .*: host-7:aa, host-8:bb. Jobs"
    assert re.search(expected, status)
    assert attention.count("alone, since") == 1


def test_a_job_of_an_older_version_shows_the_process_of_its_last_attempt(application: Application) -> None:
    who = application.with_token("*,metrics", tenant="attempts")
    job_id = submitted(application, who, run=False)
    forge(application.core.worker_context.store, job_id, worker="host-7:aa/71", attempt_id="")

    told = words(application.ask(who, "GET", f"/ui/jobs/{job_id}"))
    assert "host-7 aa 71 It did not end the job." in told


# -- dead letters ----------------------------------------------------------------------------------------


def dead(application: Application, who: Caller, code: str = "attempts_exhausted", **more: object) -> str:
    """A dead letter, and its id."""
    job_id, store = submitted(application, who, run=False, **more), application.core.worker_context.store
    store.finish(take(store, job_id, "host-7:aa/71"), "failed", code)
    return job_id


def buttons(page: httpx.Response) -> dict[str, dict[str, str]]:
    """The fields of each form that retries several jobs, by the label of its button."""
    form = r'<form method="post" action="/ui/jobs/retry">(.*?)<button>(.*?)</button>'
    hidden = r'<input type="hidden" name="(\w+)" value="([^"]*)">'
    return {
        label: {name: html.unescape(value) for name, value in re.findall(hidden, body)}
        for body, label in re.findall(form, page.text, re.DOTALL)
    }


def states(application: Application, who: Caller, ids: Iterable[str]) -> list[str]:
    store = application.core.worker_context.store
    return [store.get(job_id, who.tenant).state for job_id in ids]


def test_the_button_of_a_row_retries_all_dead_letters_of_its_cause_and_no_others(
    application: Application,
) -> None:
    who = application.with_token("*", tenant="rows")
    alike = [dead(application, who, labels={"run": run}) for run in ("a", "a", "b")]
    others = [dead(application, who, "record_refused") for _ in range(2)]
    sender, _ = application.in_form(who)
    page = application.ask(sender, "GET", "/ui/jobs?state=dead&search=run%3Da")
    assert buttons(page).keys() == {"Retry all 2 of this filter", "Retry these 2"}
    page = application.ask(sender, "GET", "/ui/jobs?state=dead")
    assert buttons(page).keys() == {"Retry all 5 dead letters", "Retry these 3", "Retry these 2"}
    assert {"Retry these 3", "Retry these 2"} == buttons(application.ask(sender, "GET", "/ui")).keys()

    row = buttons(page)["Retry these 3"]
    assert application.ask(sender, "POST", "/ui/jobs/retry", data=row | {"stamp": ""}).status_code == 403
    answer = application.ask(sender, "POST", "/ui/jobs/retry", data=row)
    assert states(application, who, [*alike, *others]) == ["queued"] * 3 + ["failed"] * 2
    assert answer.headers["location"] == "/ui/jobs?state=dead&retried=3&done=retried_all"
    told = words(application.ask(sender, "GET", answer.headers["location"]))
    assert "3 jobs are queued again , with all their attempts: queued jobs" in told
    assert "could not be retried" not in told


def test_a_list_of_a_cause_of_dead_letters_retries_them_and_one_of_another_cause_says_why_not(
    application: Application,
) -> None:
    who = application.with_token("*", tenant="listed")
    alike, other = [dead(application, who) for _ in range(2)], dead(application, who, "record_refused")
    failed = submitted(application, who)
    sender, stamp = application.in_form(who)
    found = {}
    for state in ("", "failed"):
        page = application.ask(sender, "GET", f"/ui/jobs?state={state}&cause=attempts_exhausted")
        found = buttons(page)
        assert found.keys() == {"Retry all 2 of this filter"}
    page = application.ask(sender, "GET", "/ui/jobs?state=failed&cause=not_a_ciphertext")
    assert failed in page.text
    assert buttons(page) == {}
    assert "Only dead letters can be retried, and these jobs are none" in words(page)

    for none in ({"state": "failed"}, {"state": "succeeded", "cause": "attempts_exhausted"}):
        answer = application.ask(sender, "POST", "/ui/jobs/retry", data={"stamp": stamp, **none})
        assert "0 jobs are queued again" in words(application.ask(sender, "GET", answer.headers["location"]))
    application.ask(sender, "POST", "/ui/jobs/retry", data=found["Retry all 2 of this filter"])
    assert states(application, who, [*alike, other, failed]) == ["queued", "queued", "failed", "failed"]


def test_it_is_said_how_many_dead_letters_could_not_be_retried_and_why(application: Application) -> None:
    who = application.with_token("*", tenant="refusing")
    store = application.core.worker_context.store
    _, expired, *unsealed = (dead(application, who) for _ in range(4))
    forge(store, expired, sealed=resealed(store, expired, expires_at=1.0))
    for job_id in unsealed:
        forge(store, job_id, sealed=b"\x01" + bytes(200))
    sender, stamp = application.in_form(who)

    form = {"stamp": stamp, "state": "dead"}
    answer = application.ask(sender, "POST", "/ui/jobs/retry", data=form)
    told = words(application.ask(sender, "GET", answer.headers["location"]))

    assert "1 job is queued again , with all its attempts" in told
    reasons = (
        "3 could not be retried: 2, since this service did not write their records: submit them again "
        "1 is no dead letter any more: retried by another caller, or expired"
    )
    assert reasons in told
    left = application.ask(sender, "GET", "/ui/jobs?state=dead")
    assert words(left).count("Submit again: the record is not of this service") == len(unsealed)
    assert application.ask(sender, "GET", "/ui/jobs?done=retried_all&retried=many").status_code == 422


def test_a_dead_letter_leads_to_its_retry_and_to_all_of_its_cause(application: Application) -> None:
    who = application.with_token("*", tenant="alike")
    ids = [dead(application, who) for _ in range(3)]
    dead(application, who, "record_refused")
    reader = application.with_token("jobs:read", tenant="alike")

    page = application.ask(application.in_form(who)[0], "GET", f"/ui/jobs/{ids[0]}")
    expected = "State failed , a dead letter: no attempts are left. Retry it, or all 3 with this cause"
    assert expected in words(page)
    assert f'action="/ui/jobs/{ids[0]}/retry"' in page.text
    assert '<a class="button" href="/ui/jobs?state=dead&amp;cause=attempts_exhausted">All 3 with' in page.text
    assert "Retry" not in words(application.ask(reader, "GET", f"/ui/jobs/{ids[0]}"))


def test_all_dead_jobs_of_a_filter_are_retried_and_no_others(application: Application) -> None:
    who = application.with_token("*", tenant="dead")
    store = application.core.worker_context.store
    letters = {kind: dead(application, who, labels={"run": kind}) for kind in ("a", "b")}
    sender, stamp = application.in_form(who)
    assert "Retry all 2 dead letters" in words(application.ask(sender, "GET", "/ui/jobs?state=dead"))
    early = application.ask(sender, "GET", "/ui/jobs?state=dead&before=2020-01-31T12:00")
    assert "No jobs among the dead letters before 2020-01-31T12:00 UTC." in words(early)

    form = {"stamp": stamp, "state": "dead", "search": "run=a"}
    answer = application.ask(sender, "POST", "/ui/jobs/retry", data=form)

    assert answer.headers["location"] == "/ui/jobs?state=dead&search=run%3Da&retried=1&done=retried_all"
    found = {kind: store.get(job_id, "dead").state for kind, job_id in letters.items()}
    assert found == {"a": "queued", "b": "failed"}


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
