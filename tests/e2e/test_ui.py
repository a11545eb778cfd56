"""The page for operators, as a browser without scripts meets it: real processes, forms as they are sent."""

import html
import re
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import quote

import anyio
import httpx2 as httpx
import pytest
from pyrage import x25519

from kms_api import app
from kms_api.ui.render import STATIC_FILES
from kms_api.ui.sessions import LASTS_S
from kms_core.auth import tokens
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.heartbeats import worker_left, worker_seen
from kms_protocol import __version__
from kms_protocol.wire import PREFIX
from support.core_jobs import run_job
from support.credentials import REQUIRED, Issuer, SecuredService, bearer, required_with_issuer
from support.service import CONTEXT, Json, Service, b64, core_of
from support.waiting import until

IMAGES: Final = "img-src 'self'"
CSP: Final = (
    f"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; {IMAGES}; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGES: Final = (
    *("/ui", "/ui/jobs", "/ui/jobs?state=dead", "/ui/workers"),
    *("/ui/audit", "/ui/keys", "/ui/keys/default/rotate", "/ui/runbooks"),
)
FILES: Final = tuple(f"/ui/static/{name}" for name in STATIC_FILES)
HOSTILE: Final = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
BAD: Final[Json] = {"kind": "decrypt", "items": [{"ciphertext": b64(b"no age file")}]}
ITEMS: Final = {"kind": "encrypt", "items": [{"plaintext": b64(b"x"), "context": CONTEXT}]}


def policy_of(path: str) -> str:
    """The policy of a page; Swagger UI shows icons of its own styles."""
    return CSP.replace(IMAGES, f"{IMAGES} data:") if path == "/docs" else CSP


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def words(answer: httpx.Response) -> str:
    """What a reader reads, with single spaces."""
    return " ".join(Parsed(answer.text).text.split())


class Browser:
    """Keeps cookies, follows nothing, and sends the forms that it was given."""

    opened: ClassVar[list[httpx.Client]] = []

    def __init__(self, service: Service) -> None:
        self.http = httpx.Client(base_url=service.url, timeout=60, trust_env=False)
        self.stamp = ""
        self.opened.append(self.http)

    def get(self, path: str) -> httpx.Response:
        answer = self.http.get(path)
        if found := re.search(r'name="stamp" value="(\w+)"', answer.text):
            self.stamp = found[1]
        return answer

    def send(self, path: str, **fields: str) -> httpx.Response:
        return self.http.post(path, data={"stamp": self.stamp} | fields)

    def log_in(self, token: str) -> httpx.Response:
        self.get("/ui/login")
        return self.send("/ui/login", token=token)

    def is_in(self) -> bool:
        answer = self.get("/ui")
        assert answer.status_code == 200 or answer.headers["location"] == "/ui/login"
        return answer.status_code == 200


@pytest.fixture(autouse=True)
def browsers() -> Iterator[None]:
    """None of them is left open."""
    yield
    while Browser.opened:
        Browser.opened.pop().close()


def browser_of(secured: SecuredService, *scopes: str, tenant: str = "default") -> Browser:
    made = Browser(secured)
    answer = made.log_in(secured.new_token(*scopes or ("*",), tenant=tenant)[1])
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui"), answer.text
    return made


def submitted(secured: SecuredService, tenant: str = "default", **options: Json) -> str:
    """A job that waits for ever, and whose tenant is the given one."""
    answer = secured.post("/jobs", ITEMS | options, headers=secured.token_header("*", tenant=tenant))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


# -- every page ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/docs", *FILES])
def test_pages_answer_on_loopback_with_strict_headers(service: Service, path: str) -> None:
    answer = service.http.get(path)

    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == policy_of(path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["content-type"].startswith("text/html" if path in PAGES else ("text/", "image/"))


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_nothing_inline_name_no_other_host_and_have_landmarks(service: Service, path: str) -> None:
    page = Parsed(service.http.get(path).text)

    assert [script.keys() for script in page.all("script")] == [{"src", "defer"}]
    assert not page.all("style")
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        for name in ("href", "src", "action"):
            assert (attributes.get(name) or "/ui").startswith(("/ui", "#")), attributes
    assert all(page.all(tag) for tag in ("header", "nav", "main", "h1", "footer"))
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in cell for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_all_is_read_without_a_script(service: Service) -> None:
    job_id = service.submit(ITEMS)
    service.wait(job_id, "succeeded")

    assert f"{job_id} encrypt succeeded 1 of 1 items" in words(service.http.get("/ui/jobs"))
    assert "State succeeded Progress 1 of 1 items" in words(service.http.get(f"/ui/jobs/{job_id}"))
    healthy = "the backend, Redis, the workers and the audit log work."
    assert healthy in words(service.http.get("/ui")), service.get("/status").text
    assert "encrypt ok local none default" in words(service.http.get("/ui/audit?operation=encrypt"))
    keys = service.get("/keys").json()["keys"][0]
    assert keys["current_version"] in words(service.http.get("/ui/keys"))
    assert "Health answers Version in use" in words(service.http.get("/ui/keys"))
    assert "Next version due" in words(service.http.get("/ui/keys"))
    intact = "Intact: each record follows from the one before it, up to"
    until(lambda: intact in words(service.http.get("/ui")), "the audit log is checked")
    assert intact in words(service.http.get("/ui/audit"))
    assert "kms audit verify --public-key" in words(service.http.get("/ui/audit"))


def test_changed_audit_log_is_reported_on_pages_in_status_and_in_metrics(
    tmp_path: Path, redis_url: str
) -> None:
    with Service(tmp_path, redis=redis_url) as service:
        service.start("api")
        service.encrypt(b"on record")
        until(lambda: "Intact" in words(service.http.get("/ui/audit")), "the audit log is checked")
        (file,) = (service.state / "audit").glob("*.jsonl")
        file.write_bytes(file.read_bytes().replace(b'"encrypt"', b'"decrypt"', 1))

        until(lambda: "audit_chain" in service.degraded, "it is noticed")
        page = service.http.get("/ui/audit")
        assert "Broken: records of the audit log were changed" in words(page)
        assert "a line was changed after it was written" in words(page)
        assert 'href="/ui/runbooks#kmsauditbroken"' in page.text
        assert "audit chain: its audit log was changed" in words(service.http.get("/ui"))
        assert 'kms_audit_ok{what="chain"} 0.0' in service.http.get("/metrics").text


def test_every_name_on_the_page_leads_to_a_runbook(service: Service, no_redis: Service) -> None:
    runbooks = service.http.get("/ui/runbooks").text
    ids = set(re.findall(r'id="(kms\w+)"', runbooks))
    pages = [no_redis.http.get("/ui").text, runbooks]
    named = {name for page in pages for name in re.findall(r'href="(?:/ui/runbooks)?#(kms\w+)"', page)}

    assert "kmsredisdown" in named
    assert named <= ids


def test_without_redis_the_overview_says_so_and_a_list_of_jobs_is_a_503_page(no_redis: Service) -> None:
    overview = no_redis.http.get("/ui")
    listing = no_redis.http.get("/ui/jobs")

    assert overview.status_code == 200
    assert "Degraded: redis: Redis does not answer" in words(overview)
    assert "Redis does not answer" in words(overview)
    assert listing.status_code == 503
    assert "jobs_unavailable" in words(listing)
    assert int(listing.headers["retry-after"]) >= 1


NOT_UNDERSTOOD: Final = (
    *(
        "/ui?period=odd",
        "/ui/jobs?state=odd",
        "/ui/jobs?cursor=odd",
        "/ui/jobs?kind=odd",
        "/ui/jobs?search=%3d",
    ),
    *("/ui/audit?period=odd", "/ui/audit?until=odd", "/ui/audit/odd/receipt"),
)
NOT_THERE: Final = (
    *("/ui/jobs/no-such-job", "/ui/keys/no-such-key/rotate"),
    *("/ui/static/../rules.py", "/ui/static/page.html"),
)


@pytest.mark.parametrize(
    ("path", "status"), [*((path, 422) for path in NOT_UNDERSTOOD), *((path, 404) for path in NOT_THERE)]
)
def test_what_cannot_be_shown_is_a_page_that_says_why(service: Service, path: str, status: int) -> None:
    answer = service.http.get(path)

    assert answer.status_code == status
    assert answer.headers["content-security-policy"] == CSP
    assert answer.headers["cache-control"] == "no-store"


def test_the_list_of_jobs_is_paged_and_filtered(secured: SecuredService) -> None:
    browser = browser_of(secured, "*", tenant="many")
    made = [submitted(secured, "many") for _ in range(51)]

    first = browser.get("/ui/jobs?state=queued")
    older = re.search(r'href="([^"]+cursor=[^"]+)"', first.text)
    assert older
    second = browser.get(html.unescape(older[1]))
    assert [job_id for job_id in made if job_id in second.text] == made[:1]
    assert all(job_id in first.text for job_id in made[1:])
    assert "No jobs that are running" in words(browser.get("/ui/jobs?state=running"))


def test_jobs_are_found_by_label_and_by_id(secured: SecuredService) -> None:
    browser = browser_of(secured, "*", tenant="sought")
    ours, other = (
        submitted(secured, "sought", labels={"team": team, "run": "1"}) for team in ("ops", "billing")
    )

    whole = browser.get("/ui/jobs")
    assert "all 2 queued 2 running" in words(whole)
    assert "team=ops run=1" in words(whole)
    link = f"/ui/jobs?search={quote('team=ops', safe='')}"
    assert link in [attributes.get("href") for _, attributes in Parsed(whole.text).tags]

    found = browser.get(link)
    assert (ours in found.text, other in found.text) == (True, False)
    assert "queued 2" not in words(found)  # counts are those of all jobs
    empty = words(browser.get(f"{link}&state=failed"))
    assert "No jobs that are failed with the label team=ops." in empty
    assert browser.get(f"/ui/jobs?search={ours}").headers["location"] == f"/ui/jobs/{ours}"
    page = words(browser.get(f"/ui/jobs/{ours}"))
    assert "Labels team=ops run=1" in page
    assert "Submitted by" in page


def test_jobs_are_found_by_kind(secured: SecuredService) -> None:
    browser = browser_of(secured, "*", tenant="kinds")
    labels = {"team": "ops"}
    ours, plain = (submitted(secured, "kinds", **kind, labels=labels) for kind in (BAD, {}))

    found = browser.get("/ui/jobs?kind=decrypt&search=team%3Dops")
    assert (ours in found.text, plain in found.text) == (True, False)
    links = [attributes.get("href") for _, attributes in Parsed(found.text).tags]
    assert "/ui/jobs?state=failed&kind=decrypt&search=team%3Dops" in links
    assert "<option selected>decrypt</option>" in found.text
    empty = browser.get("/ui/jobs?kind=rewrap&state=queued")
    assert "No jobs of kind rewrap that are queued." in words(empty)


def test_equal_failures_are_folded_and_the_overview_says_how_many_failed_and_why(
    secured: SecuredService,
) -> None:
    core, browser = core_of(secured), browser_of(secured, "*", tenant="failing")
    assert "no job failed in the last hour" in words(browser.get("/ui"))
    made = [submitted(secured, "failing", **BAD) for _ in range(60)]
    for job_id in made:
        run_job(job_id, core.worker_context, "w")
    waiting = submitted(secured, "failing")

    for path in ("/ui/jobs", "/ui/jobs?state=failed"):
        page = browser.get(path)
        parsed = Parsed(page.text)
        assert "60 jobs decrypt failed not_a_ciphertext 60 refused" in words(page)
        assert len(parsed.all("details")) == 1
        assert [job_id for job_id in made if f'href="/ui/jobs/{job_id}"' in page.text] == made
        assert len([body for body in parsed.all("tbody") if body.get("class") == "fold"]) == 1
    assert waiting in browser.get("/ui/jobs").text
    told = words(browser.get("/ui"))
    failed = "60 jobs failed in the last hour (not_a_ciphertext 60), and 61 were submitted: failed jobs"
    assert failed in told
    assert "Failed, 1 hour 60" in told
    assert "Nothing:" not in told
    calm = words(browser_of(secured, "*", tenant="calm").get("/ui"))
    assert "failed in the last hour (" not in calm


def test_operations_of_all_tenants_are_charted_for_the_scope_metrics_only(secured: SecuredService) -> None:
    store = core_of(secured).worker_context.store
    for ago_s, succeeded, failed in ((120, 5, 1), (60, 25, 3)):
        at = f"{(store.now() - ago_s) * 1000:.0f}-0"
        store.redis.xadd("kms:operations", {"succeeded": succeeded, "failed": failed}, id=at)
    summary = "Of the 22 operations in the last 6 hours: 2 failed, 20 succeeded."

    assert summary in words(browser_of(secured, "status,metrics").get("/ui"))
    assert summary in words(browser_of(secured, "*,metrics").get("/ui"))
    assert "Operations of all tenants" not in words(browser_of(secured, "*").get("/ui"))
    store.redis.delete("kms:operations")


def test_a_failed_job_shows_its_cause_and_a_bar_of_what_went_well(service: Service) -> None:
    items = [{"ciphertext": b64(b"no age file")}, {"ciphertext": b64(b"nor this")}]
    job_id = service.submit({"kind": "decrypt", "items": items})
    service.wait(job_id, "failed")

    listing = service.http.get("/ui/jobs?state=failed")

    assert f"{job_id} decrypt failed not_a_ciphertext 2 of 2 items, 2 refused" in words(listing)
    page = words(service.http.get(f"/ui/jobs/{job_id}"))
    assert "Error items_failed 2 of 2 items failed, the first at index 0: " in page
    assert "What to do Give what kms encrypt or kms encrypt-file wrote; kms job result shows" in page
    assert "First failed items 0: not_a_ciphertext, 1: not_a_ciphertext" in page
    assert re.search(r"Started \d.* Ended \d.*, after \d+ ", page)
    told = words(service.http.get("/ui"))
    assert "Running, but jobs fail: the backend, Redis, the workers and the audit log work." in told
    assert "Healthy" not in told
    bars = {bar["aria-label"]: bar for bar in Parsed(listing.text).all("progress")}
    assert bars[f"Progress of job {job_id}"].items() >= {"max": "2", "value": "0"}.items()


def test_audit_log_is_filtered_and_each_record_has_a_receipt(secured: SecuredService) -> None:
    browser = browser_of(secured, "*", tenant="audited")
    sealing = secured.token_header("encrypt", tenant="audited")
    answer = secured.post("/encrypt", {"plaintext": "aGk=", "context": CONTEXT}, headers=sealing)
    audit_id = answer.headers["x-kms-audit-id"]
    link = f"/ui/audit/{audit_id}/receipt"

    assert audit_id in browser.get("/ui/audit?operation=encrypt").text
    assert "context keys env, service" in words(browser.get("/ui/audit?operation=encrypt"))
    assert audit_id not in browser.get("/ui/audit?operation=decrypt").text
    assert audit_id not in browser.get("/ui/audit?result=failed").text
    until(lambda: browser.get(link).status_code == 200, "a checkpoint follows the record")
    receipt = browser.get(link)
    assert receipt.json()["id"] == audit_id
    assert receipt.headers["content-disposition"].startswith("attachment")
    assert browser_of(secured, "*", tenant="another").get(link).status_code == 422


# -- hostile names -----------------------------------------------------------------------------------------


def test_hostile_names_are_shown_as_text(secured: SecuredService) -> None:
    wish = tokens.TokenRequest(HOSTILE, "hostile", ("*",), timedelta(days=1))
    _, token = tokens.create(secured.token_file, wish)
    body = {"plaintext": "aGk=", "context": {HOSTILE: HOSTILE}}
    assert secured.post("/encrypt", body, headers=bearer(token)).status_code == 200
    browser = Browser(secured)
    browser.log_in(token)

    pages = [browser.get(path) for path in PAGES]
    pages += [browser.http.get("/ui/audit", params={name: HOSTILE}) for name in ("operation", "principal")]
    pages += [
        browser.http.get("/ui/jobs", params={"done": HOSTILE}),
        browser.get(f"/ui/jobs/{quote(HOSTILE.replace('/', ''))}"),
    ]
    for page in pages:
        parsed = Parsed(page.text)
        assert len(parsed.all("script")) == 1
        assert not parsed.all("img")
        assert HOSTILE in parsed.text or page.status_code == 404
    assert f"context keys {HOSTILE}" in words(browser.get("/ui/audit"))
    assert {"name": "principal", "value": HOSTILE}.items() <= dict(
        Parsed(pages[-3].text).all("input")[3]
    ).items()


# -- forms --------------------------------------------------------------------------------------------------


def test_a_form_without_its_stamp_changes_nothing_and_is_on_record(secured: SecuredService) -> None:
    def denials() -> int:
        reader = secured.token_header("audit:read")
        denied = secured.get("/audit?operation=denied&result=forbidden&limit=1000", headers=reader)
        routes = [event["route"] for event in denied.json()["events"]]
        return routes.count("POST /ui/jobs/{job_id}/cancel")

    job_id = submitted(secured)
    path = f"/ui/jobs/{job_id}/cancel"
    browser, other = browser_of(secured), browser_of(secured)
    other.get("/ui")
    before = denials()

    for stamp in ("", "0" * 64, "é", other.stamp):
        answer = browser.send(path, stamp=stamp)
        assert answer.status_code == 403
        assert "load the page again" in words(answer)
    assert browser.http.post(path, content=b"\xff").status_code == 422
    assert browser.http.post(path, content=b"stamp=" + b"0" * 20_000).status_code == 413
    assert (
        secured.get(f"/jobs/{job_id}", headers=secured.token_header("jobs:read")).json()["state"] == "queued"
    )
    assert denials() == before + 4


def test_on_loopback_a_job_is_cancelled_by_a_form_that_says_what_it_does(no_worker: Service) -> None:
    job_id = no_worker.submit(ITEMS)
    browser = Browser(no_worker)

    assert "Cancel this job" in words(browser.get(f"/ui/jobs/{job_id}"))
    assert browser.http.post(f"/ui/jobs/{job_id}/cancel").status_code == 403
    answer = browser.send(f"/ui/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/jobs/{job_id}?done=cancelled")
    page = browser.get(answer.headers["location"])
    assert "State cancelled" in words(page)
    assert "Cancel this job" not in words(page)
    assert browser.send(f"/ui/jobs/{job_id}/retry").status_code == 409


def test_a_dead_letter_is_listed_and_retried(no_worker: Service) -> None:
    job_id = no_worker.submit(ITEMS)
    core = core_of(no_worker)
    for _ in range(5):  # workers that took it and died
        assert core.worker_context.store.claim(job_id, "w")
        core.worker_context.store.redis.hset(f"kms:job:{job_id}", "lease_until", 0)
    run_job(job_id, core.worker_context, "w")
    browser = Browser(no_worker)

    assert f"{job_id} encrypt failed attempts_exhausted" in words(browser.get("/ui"))
    listing = browser.get("/ui/jobs?state=dead")
    assert f'action="/ui/jobs/{job_id}/retry"' in listing.text
    assert re.search(r"dead letters [1-9]", words(listing))
    assert browser.send(f"/ui/jobs/{job_id}/retry", stamp="").status_code == 403
    answer = browser.send(f"/ui/jobs/{job_id}/retry")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/jobs/{job_id}?done=retried")
    assert no_worker.job(job_id)["state"] == "queued"
    assert job_id not in browser.get("/ui/jobs?state=dead").text


def test_a_key_is_rotated_after_it_was_confirmed(secured: SecuredService) -> None:
    browser = browser_of(secured, "*,rotate")
    admin = secured.token_header("*")

    def version() -> Json:
        found: Json = secured.get("/keys/default", headers=admin).json()
        return found

    before = version()["current_version"]
    assert 'href="/ui/keys/default/rotate"' in browser.get("/ui/keys").text
    assert "Rotate default?" in words(browser.get("/ui/keys/default/rotate"))
    assert version()["current_version"] == before
    answer = browser.send("/ui/keys/default/rotate")
    assert answer.status_code == 303, words(answer)
    assert answer.headers["location"] == "/ui/keys?done=rotated"
    after = version()["current_version"]
    assert after != before
    page = words(browser.get("/ui/keys?done=rotated"))
    assert "The key has a new version" in page
    assert f"{after} encrypts and decrypts" in page
    assert f"{before} decrypts" in page


def test_page_reads_the_state_of_a_job_as_the_api_tells_it(secured: SecuredService) -> None:
    job_id = submitted(secured)
    browser = browser_of(secured)
    browser.get("/ui")
    before = browser.get(f"/ui/jobs/{job_id}/state?wait=1")
    assert before.json() == secured.get(f"/jobs/{job_id}", headers=secured.token_header("*")).json()
    assert (before.json()["state"], before.headers["retry-after"]) == ("queued", "1")

    assert browser.send(f"/ui/jobs/{job_id}/cancel").status_code == 303
    assert browser.get(f"/ui/jobs/{job_id}/state?wait=60").json()["state"] == "cancelled"
    browser.send("/ui/logout")
    assert browser.get(f"/ui/jobs/{job_id}/state").status_code == 303


# -- who sees what -------------------------------------------------------------------------------------------


# Which page and form needs which permission: tests/kms_api/test_permissions.py.


def test_jobs_of_other_tenants_are_unseen(secured: SecuredService) -> None:
    job_id = submitted(secured, "theirs")
    browser = browser_of(secured, "*", tenant="ours")

    for path in (*PAGES, "/ui/audit?operation=job.submit"):
        assert job_id not in browser.get(path).text
    unknown = browser.get(f"/ui/jobs/{job_id}")
    assert (
        words(unknown).split("UTC")[1].split("Code")[0]
        == (words(browser.get("/ui/jobs/0")).split("UTC")[1].split("Code")[0])
    )


def test_what_the_credential_does_not_allow_is_not_shown(secured: SecuredService) -> None:
    job_id = submitted(secured)
    reader, nobody = browser_of(secured, "jobs:read"), browser_of(secured, "encrypt key=other")

    assert "Cancel this job" not in words(reader.get(f"/ui/jobs/{job_id}"))
    assert "Newest jobs" in words(reader.get("/ui"))
    overview = words(nobody.get("/ui"))
    assert not [word for word in ("Newest jobs", "Status", "refused or failed") if word in overview]


def test_pages_lead_only_to_what_the_credential_may_see(secured: SecuredService) -> None:
    def links(*scopes: str) -> list[str | None]:
        page = Parsed(browser_of(secured, *scopes).get("/ui").text)
        return [each.get("href") for each in page.all("a") if "/ui" in (each.get("href") or "")][:6]

    assert links("*,metrics") == ["/ui", "/ui/jobs", "/ui/workers", "/ui/keys", "/ui/audit", "/ui/runbooks"]
    assert links("encrypt") == ["/ui", "/ui/keys", "/ui/runbooks"]


# -- workers, queues and charts ---------------------------------------------------------------------------


def test_workers_page_tells_what_each_worker_does_and_counts_jobs_of_other_tenants_only(
    secured: SecuredService,
) -> None:
    store = core_of(secured).worker_context.store
    browser, operator = (browser_of(secured, scope, tenant="wt-a") for scope in ("*", "*,metrics"))
    ours, theirs = submitted(secured, "wt-a"), submitted(secured, "wt-b")
    worker_seen(store, "host-7:aa", 4, QUEUES, "9.9.1 1700000000")
    for job_id in (ours, theirs):
        assert store.claim(job_id, "host-7:aa/71")

    page = operator.get("/ui/workers")
    told = words(page)
    assert "host-7 aa working 2 of 4 slots in use" in told
    assert "Version 9.9.1" in told
    assert f"{ours} encrypt 0 of 1 items 1 of other tenants" in told
    assert theirs not in page.text
    assert browser.get("/ui/workers").status_code == 403
    worker_left(store, "host-7:aa")
    assert "host-7 aa stopping It was told to stop" in words(operator.get("/ui/workers"))


def test_it_is_told_that_a_worker_was_killed_and_that_no_worker_takes_the_jobs(tmp_path: Path) -> None:
    with Service(tmp_path) as own:
        own.start()
        until(lambda: "idle 0 of" in words(own.http.get("/ui/workers")), "the worker is seen and serves")
        told = words(own.http.get("/ui/workers"))
        assert f"Version {__version__}" in told
        assert "No worker" not in told
        assert "Nothing: no key is due" in words(own.http.get("/ui"))

        own.kill("worker")
        until(lambda: "No worker is seen." in words(own.http.get("/ui/workers")), "its end is noticed")
        job_id = own.submit(ITEMS)
        told = words(own.http.get("/ui/workers"))
        assert "Jobs that wait: 1." in told
        assert "It was killed, or its host or network has gone" in told
        overview = words(own.http.get("/ui"))
        assert "1 job waits in kms.bulk, which no worker serves: workers" in overview
        assert "ended without a word" in overview

        own.start("worker")
        own.wait(job_id, "succeeded")
        assert "which no worker serves" not in words(own.http.get("/ui"))


def test_failed_job_counts_in_the_chart_and_the_table_of_its_tenant(secured: SecuredService) -> None:
    core = core_of(secured)
    browser, other = browser_of(secured, "*", tenant="charted"), browser_of(secured, "*", tenant="uncharted")
    assert "No jobs in the last 6 hours." in words(browser.get("/ui"))
    for _ in range(2):
        run_job(submitted(secured, "charted", **BAD), core.worker_context, "w")
    run_job(submitted(secured, "charted"), core.worker_context, "w")
    waiting = submitted(secured, "charted")

    for period, length in (("1h", "hour"), ("6h", "6 hours"), ("24h", "24 hours")):
        page = browser.get(f"/ui?period={period}")
        summary = f"Of the 4 jobs submitted in the last {length}: 2 failed, 1 succeeded, 0 cancelled, 1 open."
        assert summary in words(page)
        drawn = [each.get("class") for each in Parsed(page.text).all("rect") if each.get("x")]
        assert {"failed", "succeeded", "open"} <= set(drawn)
    cursor = re.search(r"cursor=([0-9]+-f{8}[0-9a-f-]+)", browser.get("/ui").text)
    assert cursor
    assert waiting in browser.get(f"/ui/jobs?cursor={cursor[1]}").text
    assert "No jobs in the last 6 hours." in words(other.get("/ui"))
    assert "No job of the last 6 hours has succeeded." in words(other.get("/ui"))


def test_what_is_due_is_told_on_the_overview_and_first_among_the_keys(tmp_path: Path, redis_url: str) -> None:
    old = tmp_path / "old"
    old.mkdir(mode=0o700)
    settings = (
        f'[kms.keys]\nold = "age://{old}/key.txt?public={old}/key.pub"\n[kms.rotation]\nevery_days = 90\n'
    )
    identity = x25519.Identity.generate()
    for name, text in (
        ("key.txt", f"# created: 2020-01-01T00:00:00Z\n{identity}\n"),
        ("key.pub", f"{identity.to_public()}\n"),
    ):
        (old / name).write_text(text)
        (old / name).chmod(0o600)
    with Service(tmp_path, settings, redis_url) as own:
        own.start("api")
        page = own.http.get("/ui")
        assert "Key old, a new version is due: rotate old" in words(page)
        assert 'href="/ui/keys/old/rotate"' in page.text
        own.encrypt(b"counted")
        until(
            lambda: re.search(r"default age \d+ seconds 1 < 1 %", words(own.http.get("/ui/keys"))), "the use"
        )
        keys = words(own.http.get("/ui/keys"))
        assert keys.index("old age") < keys.index("default age")


def test_spool_is_told_with_its_limit_and_a_warning_when_it_is_nearly_full(
    tmp_path: Path, redis_url: str
) -> None:
    with Service(tmp_path, "[kms.jobs]\nspool_max_bytes = 1_048_576\n", redis_url) as own:
        own.start("api")
        assert "of 1.0 MiB used, < 1 %" in words(own.http.get("/ui/workers"))
        own.upload("encrypt", b"x" * 1_000_000, CONTEXT)
        until(lambda: "full. At 100 %" in words(own.http.get("/ui/workers")), "the spool is counted")
        told = words(own.http.get("/ui/workers"))
        assert "Limit [kms.jobs] spool_max_bytes" in told
        assert "Uploads and items 976.6 KiB of all tenants" in told


# -- sessions ----------------------------------------------------------------------------------------------


def test_a_login_gives_a_cookie_that_opens_the_page_and_nothing_else(secured: SecuredService) -> None:
    _, token = secured.new_token("*")
    browser = Browser(secured)
    assert not browser.is_in()
    assert browser.get("/ui").headers["content-security-policy"] == CSP

    answer = browser.log_in(token)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui")
    (cookie,) = [text for text in answer.headers.get_list("set-cookie") if text.startswith("kms_session=")]
    value, *attributes = cookie.split("; ")
    assert {"HttpOnly", "Path=/ui", "SameSite=strict", f"Max-Age={LASTS_S}"} == set(attributes)
    session = value.removeprefix("kms_session=")
    assert not [part for part in token.split("_", 2)[1:] if part in session]  # its name, and its secret
    assert browser.is_in()
    for headers in ({"Cookie": f"kms_session={session}"}, bearer(session), {"X-API-Key": session}):
        for path in (f"{PREFIX}/jobs", f"{PREFIX}/status", "/metrics", "/uix", "/UI"):
            answer = secured.http.get(path, headers={"X-Forwarded-For": "10.0.0.1", **headers})
            assert answer.status_code in {401, 429}, path


@pytest.mark.parametrize("wrong", ["", "kms_aaaaaaaaaa_" + "A" * 43, "a.b.c", HOSTILE])
def test_a_wrong_token_is_refused_and_not_repeated(secured: SecuredService, wrong: str) -> None:
    answer = (browser := Browser(secured)).log_in(wrong)

    assert answer.status_code == 401
    assert not wrong or wrong not in html.unescape(answer.text)
    assert Parsed(answer.text).all("input")[-1]["name"] == "token"
    assert not browser.is_in()


def test_a_login_that_another_page_forged_is_refused(secured: SecuredService) -> None:
    _, token = secured.new_token("*")
    victim, attacker = Browser(secured), Browser(secured)
    attacker.get("/ui/login")

    assert victim.send("/ui/login", token=token).status_code == 403
    assert victim.send("/ui/login", token=token, stamp=attacker.stamp).status_code == 403
    assert not victim.is_in()


def test_too_many_wrong_tokens_from_one_address_are_refused_at_the_page_as_at_the_api(tmp_path: Path) -> None:
    with SecuredService(tmp_path, '[kms.auth]\nmode = "required"\nfailures_per_minute = 3\n') as own:
        own.start("api")
        browser = Browser(own)
        answers = [browser.log_in("kms_aaaaaaaaaa_" + "A" * 43) for _ in range(4)]

        assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
        assert "Too many failed attempts" in words(answers[-1])
        assert int(answers[-1].headers["retry-after"]) >= 1


def test_logging_out_ends_the_session_also_for_who_kept_the_cookie(secured: SecuredService) -> None:
    browser, thief = browser_of(secured), Browser(secured)
    thief.http.cookies = httpx.Cookies(browser.http.cookies)
    assert browser.is_in()
    assert thief.is_in()
    assert browser.http.post("/ui/logout").status_code == 403
    assert thief.is_in()
    ended = ends_of_sessions(secured)

    answer = browser.send("/ui/logout")
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
    assert not browser.http.cookies.get("kms_session")
    assert not thief.is_in()
    assert ends_of_sessions(secured) == ended + 1


def ends_of_sessions(secured: SecuredService) -> int:
    events = secured.get("/audit?limit=1000", headers=secured.token_header("audit:read")).json()["events"]
    return [event["operation"] for event in events].count("session.end")


@pytest.mark.parametrize("tossed", ["", "junk", "A" * 43], ids=["empty", "junk", "shape of an id"])
def test_a_cookie_that_another_site_set_beside_ours_does_not_log_out(
    secured: SecuredService, tossed: str
) -> None:
    """A sibling subdomain or another port of this machine can set one with a longer path; it comes first."""
    session = browser_of(secured).http.cookies["kms_session"]
    for header in (
        f"kms_session={tossed}; kms_session={session}",
        f"kms_session={session}; kms_session={tossed}",
    ):
        with httpx.Client(base_url=secured.url, trust_env=False) as http:
            assert http.get("/ui", headers={"Cookie": header}).status_code == 200


def test_a_session_ends_with_its_token(secured: SecuredService) -> None:
    revoked, expiring = Browser(secured), Browser(secured)
    expiring.log_in(secured.new_token("*", ttl=timedelta(seconds=5))[1])
    token, text = secured.new_token("*")
    revoked.log_in(text)
    assert revoked.is_in()

    tokens.revoke(secured.token_file, token.id)
    until(lambda: not revoked.is_in(), "the session of a revoked token ends")
    until(lambda: not expiring.is_in(), "the session of an expired token ends")


def test_a_session_of_a_jwt_ends_with_it_and_its_jobs_go_on(tmp_path: Path, redis_url: str) -> None:
    """``job_grace_s`` is for jobs alone."""
    issuer = Issuer()
    (tmp_path / "jwks.json").write_bytes(issuer.jwks)
    keys = f'jwks_file = "{tmp_path / "jwks.json"}"'
    with SecuredService(tmp_path, required_with_issuer(keys, "job_grace_s = 3_600"), redis_url) as service:
        service.start("api")
        token = issuer.token(exp=int(time.time()), kms_scopes=["*"])  # for its leeway of 5 s
        browser = Browser(service)
        assert browser.log_in(token).headers["location"] == "/ui"
        job_id = service.post("/jobs", ITEMS, headers=bearer(token)).json()["job_id"]
        assert browser.is_in()

        until(lambda: not browser.is_in(), "the session of an expired JWT ends")
        service.start("worker")
        read = service.token_header("jobs:read")
        until(lambda: service.get(f"/jobs/{job_id}", headers=read).json()["state"] == "succeeded", "it runs")


def test_a_form_whose_session_ends_while_it_is_sent_leads_to_the_login(secured: SecuredService) -> None:
    job_id = submitted(secured)
    token, text = secured.new_token("*")
    browser = Browser(secured)
    browser.log_in(text)
    browser.get(f"/ui/jobs/{job_id}")
    body = f"stamp={browser.stamp}".encode()
    head = (
        f"POST /ui/jobs/{job_id}/cancel HTTP/1.1\r\nHost: 127.0.0.1:{secured.port}\r\n"
        f"Cookie: kms_session={browser.http.cookies['kms_session']}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )

    with (
        socket.create_connection(("127.0.0.1", secured.port), timeout=60) as peer,
        peer.makefile("rb") as lines,
    ):
        peer.sendall(head.encode())
        assert lines.readline().startswith(b"HTTP/1.1 100 ")  # the gate has let it in, and the body is read
        tokens.revoke(secured.token_file, token.id)
        until(lambda: not browser.is_in(), "the session of a revoked token ends")
        peer.sendall(body)
        answer = lines.read().decode()
    assert " 303 " in answer
    assert "location: /ui/login" in answer
    state = secured.get(f"/jobs/{job_id}", headers=secured.token_header("*")).json()["state"]
    assert state == "queued"


def test_a_login_at_one_process_is_used_at_another(secured: SecuredService, tmp_path: Path) -> None:
    """Two API hosts have Redis, the spool and its key in common, and no other files."""
    browser = browser_of(secured)
    shared = f'{REQUIRED}[kms.jobs]\nspool_dir = "{secured.spool}"\n'
    elsewhere = SecuredService(tmp_path, shared, redis=secured.settings.kms.redis.url)
    for name in ("spool.key", "tokens.json"):
        shutil.copy(secured.state / name, elsewhere.state / name)
    with elsewhere:
        elsewhere.start("api")
        beside = Browser(elsewhere)
        beside.http.cookies = httpx.Cookies(browser.http.cookies)
        assert beside.is_in()

        browser.get("/ui")
        assert beside.send("/ui/logout", stamp=browser.stamp).status_code == 303
        assert not browser.is_in()
    # Its note would refuse a rotation for ten seconds: it has key files of its own.
    core_of(secured).worker_context.store.redis.delete("kms:hosts")


def test_without_redis_there_is_no_login_and_no_answer_to_a_session(tmp_path: Path) -> None:
    own = SecuredService(tmp_path, redis="unix:///nonexistent/valkey.sock")
    with own:
        own.start("api")
        browser = Browser(own)
        answer = browser.log_in(own.new_token("*")[1])
        assert answer.status_code == 503
        assert "Away: Redis." in words(answer)
        assert int(answer.headers["retry-after"]) >= 1

        held = own.http.get("/ui", headers={"Cookie": f"kms_session={'A' * 43}"})
        assert held.status_code == 503
        assert "A session cannot be looked up without it" in words(held)
        assert own.http.get("/ui").headers["location"] == "/ui/login"
        assert own.get("/keys", headers=own.token_header("*")).status_code == 200


@pytest.mark.parametrize(
    ("url", "headers", "secure"),
    [
        ("https://localhost", {}, True),
        ("http://localhost", {}, False),
        ("http://localhost", {"Origin": "https://localhost"}, True),
    ],
    ids=["tls", "clear", "tls ended by a proxy"],
)
def test_the_cookie_never_goes_over_a_connection_in_clear_if_there_was_tls(
    tmp_path: Path, redis_url: str, url: str, headers: dict[str, str], secure: bool
) -> None:
    own = SecuredService(tmp_path, redis=redis_url)
    token = own.new_token("*")[1]
    transport = httpx.ASGITransport(app.build(own.settings))

    async def logged_in() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url=url) as http:
            page = await http.get("/ui/login")
            stamp = Parsed(page.text).all("input")[0]["value"]
            return await http.post("/ui/login", data={"stamp": stamp, "token": token}, headers=headers)

    answer = anyio.run(logged_in)
    own.http.close()
    assert answer.status_code == 303
    (cookie,) = [text for text in answer.headers.get_list("set-cookie") if text.startswith("kms_session=")]
    assert ("; Secure" in cookie) is secure
