"""The page for operators, as a browser without scripts meets it: real processes, forms as they are sent."""

import hmac
import html
import json
import re
import socket
from collections.abc import Iterator
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import quote

import anyio
import httpx
import pytest

from callers import Guarded, bearer
from kms_api import app
from kms_api.routing import UI_RULES, ScopedRoute
from kms_api.transport.sessions import LASTS_S, Sessions
from kms_cli.local.valkey import EmbeddedValkey
from kms_core.auth import tokens
from kms_core.jobs.execution.runner import run_job
from kms_protocol.wire import PREFIX
from service import CONTEXT, Json, Service, b64, core_of, until

CSP: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGES: Final = (
    "/ui",
    "/ui/jobs",
    "/ui/jobs?state=dead",
    "/ui/audit",
    "/ui/keys",
    "/ui/keys/default/rotate",
    "/ui/runbooks",
)
PUBLIC: Final = ("/ui/login", "/ui/static/{name}", "/docs")
FILES: Final = ("/ui/static/page.css", "/ui/static/page.js", "/ui/static/icon.svg")
HOSTILE: Final = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
ITEMS: Final = {"kind": "encrypt", "items": [{"plaintext": b64(b"x"), "context": CONTEXT}]}


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


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Guarded]:
    """An API that asks everybody; no worker runs, so that jobs stay queued."""
    with Guarded(tmp_path_factory.mktemp("ui"), redis=valkey.place.url_of(next(database_numbers))) as running:
        yield running.start("api")


def browser_of(guarded: Guarded, *scopes: str, tenant: str = "default") -> Browser:
    made = Browser(guarded)
    answer = made.log_in(guarded.make(*scopes or ("*",), tenant=tenant)[1])
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui"), answer.text
    return made


def submitted(guarded: Guarded, tenant: str = "default") -> str:
    """A job that waits for ever, and whose tenant is the given one."""
    answer = guarded.post("/jobs", ITEMS, headers=guarded.token("*", tenant=tenant))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


# -- every page ------------------------------------------------------------------------------------------


def test_every_route_of_the_page_stands_in_its_table_and_none_on_the_openapi_page(service: Service) -> None:
    routes = [route for router in (*app.UI, *app.REFERENCE) for route in router.routes]
    served = {
        (method, route.path) for route in routes if isinstance(route, ScopedRoute) for method in route.rules
    }

    assert served == UI_RULES.keys()
    assert all(isinstance(route, ScopedRoute) for route in routes)
    assert "/ui" not in service.http.get("/openapi.json").text


@pytest.mark.parametrize("path", [*PAGES, "/docs", *FILES])
def test_pages_answer_on_loopback_with_strict_headers(service: Service, path: str) -> None:
    answer = service.http.get(path)

    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == CSP
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
    assert "All well" in words(service.http.get("/ui")), service.get("/status").text
    assert "encrypt ok local none default" in words(service.http.get("/ui/audit?operation=encrypt"))
    keys = service.get("/keys").json()["keys"][0]
    assert keys["current_version"] in words(service.http.get("/ui/keys"))
    assert "Health answers Version in use" in words(service.http.get("/ui/keys"))
    assert "Next version due" in words(service.http.get("/ui/keys"))


def test_the_state_of_the_trail_is_shown_and_how_to_verify_all_of_it(service: Service) -> None:
    service.encrypt(b"on record")

    whole = "Whole: every line follows from those before it, up to the one of"
    until(lambda: whole in words(service.http.get("/ui")), "the trail is read back")
    page = service.http.get("/ui/audit")
    assert whole in words(page)
    assert "kms audit verify --public-key" in words(page)


def test_a_trail_that_somebody_changed_is_told_on_the_page_in_status_and_in_metrics(
    tmp_path: Path, redis_url: str
) -> None:
    with Service(tmp_path, redis=redis_url) as service:
        service.start("api")
        service.encrypt(b"on record")
        until(lambda: "Whole" in words(service.http.get("/ui/audit")), "the trail is read back")
        (file,) = (service.state / "audit").glob("*.jsonl")
        file.write_bytes(file.read_bytes().replace(b'"encrypt"', b'"decrypt"', 1))

        until(lambda: "audit_chain" in service.get("/status").json()["degraded"], "it is noticed")
        page = service.http.get("/ui/audit")
        assert "Broken: lines of the audit trail were changed" in words(page)
        assert "a line was changed after it was written" in words(page)
        assert 'href="/ui/runbooks#kmsauditbroken"' in page.text
        assert "audit chain: the trail was changed" in words(service.http.get("/ui"))
        assert "kms_audit_chain_ok 0.0" in service.http.get("/metrics").text


def test_every_name_on_the_page_leads_to_a_runbook(service: Service, strict: Service) -> None:
    runbooks = service.http.get("/ui/runbooks").text
    ids = set(re.findall(r'id="(kms\w+)"', runbooks))
    pages = [strict.http.get("/ui").text, runbooks]
    named = {name for page in pages for name in re.findall(r'href="(?:/ui/runbooks)?#(kms\w+)"', page)}

    assert "kmsredisdown" in named
    assert named <= ids


def test_without_redis_the_overview_says_so_and_a_list_of_jobs_is_a_503_page(strict: Service) -> None:
    overview = strict.http.get("/ui")
    listing = strict.http.get("/ui/jobs")

    assert overview.status_code == 200
    assert "Degraded: redis: does not answer" in words(overview)
    assert "Redis does not answer" in words(overview)
    assert listing.status_code == 503
    assert "jobs_unavailable" in words(listing)
    assert int(listing.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/ui/jobs?state=odd", 422),
        ("/ui/jobs?cursor=odd", 422),
        ("/ui/jobs/no-such-job", 404),
        ("/ui/audit?period=odd", 422),
        ("/ui/audit?until=odd", 422),
        ("/ui/audit/odd/receipt", 422),
        ("/ui/keys/no-such-key/rotate", 404),
        ("/ui/static/../rules.py", 404),
        ("/ui/static/page.html", 404),
    ],
)
def test_what_cannot_be_shown_is_a_page_that_says_why(service: Service, path: str, status: int) -> None:
    answer = service.http.get(path)

    assert answer.status_code == status
    assert answer.headers["content-security-policy"] == CSP
    assert answer.headers["cache-control"] == "no-store"


def test_the_list_of_jobs_is_paged_and_filtered(guarded: Guarded) -> None:
    browser = browser_of(guarded, "*", tenant="many")
    made = [submitted(guarded, "many") for _ in range(51)]

    first = browser.get("/ui/jobs?state=queued")
    older = re.search(r'href="([^"]+cursor=[^"]+)"', first.text)
    assert older
    second = browser.get(html.unescape(older[1]))
    assert [job_id for job_id in made if job_id in second.text] == made[:1]
    assert all(job_id in first.text for job_id in made[1:])
    assert "No jobs that are running" in words(browser.get("/ui/jobs?state=running"))


def test_the_audit_trail_is_filtered_and_each_record_has_a_receipt(guarded: Guarded) -> None:
    browser = browser_of(guarded, "*", tenant="audited")
    sealing = guarded.token("encrypt", tenant="audited")
    answer = guarded.post("/encrypt", {"plaintext": "aGk=", "context": CONTEXT}, headers=sealing)
    audit_id = answer.headers["x-kms-audit-id"]
    link = f"/ui/audit/{audit_id}/receipt"

    assert audit_id in browser.get("/ui/audit?operation=encrypt").text
    assert "context of env, service" in words(browser.get("/ui/audit?operation=encrypt"))
    assert audit_id not in browser.get("/ui/audit?operation=decrypt").text
    assert audit_id not in browser.get("/ui/audit?result=failed").text
    until(lambda: browser.get(link).status_code == 200, "a checkpoint follows the record")
    receipt = browser.get(link)
    assert receipt.json()["id"] == audit_id
    assert receipt.headers["content-disposition"].startswith("attachment")
    assert browser_of(guarded, "*", tenant="another").get(link).status_code == 422


# -- hostile names -----------------------------------------------------------------------------------------


def test_hostile_names_are_shown_as_text(guarded: Guarded) -> None:
    wish = tokens.TokenRequest(HOSTILE, "hostile", ("*",), timedelta(days=1))
    _, token = tokens.create(guarded.token_file, wish)
    body = {"plaintext": "aGk=", "context": {HOSTILE: HOSTILE}}
    assert guarded.post("/encrypt", body, headers=bearer(token)).status_code == 200
    browser = Browser(guarded)
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
    assert f"context of {HOSTILE}" in words(browser.get("/ui/audit"))
    assert {"name": "principal", "value": HOSTILE}.items() <= dict(
        Parsed(pages[-3].text).all("input")[3]
    ).items()


# -- forms --------------------------------------------------------------------------------------------------


def test_a_form_without_its_stamp_changes_nothing_and_is_on_record(guarded: Guarded) -> None:
    job_id = submitted(guarded)
    path = f"/ui/jobs/{job_id}/cancel"
    browser, other = browser_of(guarded), browser_of(guarded)
    other.get("/ui")

    for stamp in ("", "0" * 64, "é", other.stamp):
        answer = browser.send(path, stamp=stamp)
        assert answer.status_code == 403
        assert "load the page again" in words(answer)
    assert browser.http.post(path, content=b"\xff").status_code == 422
    assert browser.http.post(path, content=b"stamp=" + b"0" * 20_000).status_code == 413
    assert guarded.get(f"/jobs/{job_id}", headers=guarded.token("jobs:read")).json()["state"] == "queued"
    denied = guarded.get("/audit?operation=denied&result=forbidden", headers=guarded.token("audit:read"))
    assert [event["route"] for event in denied.json()["events"]].count("POST /ui/jobs/{job_id}/cancel") == 4


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}]
)
def test_another_site_cannot_send_a_form_even_with_its_stamp(idle: Service, headers: dict[str, str]) -> None:
    job_id = idle.submit(ITEMS)
    browser = Browser(idle)
    browser.get(f"/ui/jobs/{job_id}")

    answer = browser.http.post(f"/ui/jobs/{job_id}/cancel", data={"stamp": browser.stamp}, headers=headers)
    assert answer.status_code == 403
    assert idle.job(job_id)["state"] == "queued"


def test_on_loopback_a_job_is_cancelled_by_a_form_that_says_what_it_does(idle: Service) -> None:
    job_id = idle.submit(ITEMS)
    browser = Browser(idle)

    assert "Cancel this job" in words(browser.get(f"/ui/jobs/{job_id}"))
    assert browser.http.post(f"/ui/jobs/{job_id}/cancel").status_code == 403
    answer = browser.send(f"/ui/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/jobs/{job_id}?done=cancelled")
    page = browser.get(answer.headers["location"])
    assert "State cancelled" in words(page)
    assert "Cancel this job" not in words(page)
    assert browser.send(f"/ui/jobs/{job_id}/retry").status_code == 409


def test_a_dead_letter_is_listed_and_retried(idle: Service) -> None:
    job_id = idle.submit(ITEMS)
    core = core_of(idle)
    for _ in range(5):  # workers that took it and died
        assert core.shop.store.claim(job_id, "w")
        core.shop.store.redis.hset(f"kms:job:{job_id}", "lease_until", 0)
    run_job(job_id, core.shop, "w")
    browser = Browser(idle)

    assert f"{job_id} encrypt failed attempts_exhausted" in words(browser.get("/ui"))
    assert f'action="/ui/jobs/{job_id}/retry"' in browser.get("/ui/jobs?state=dead").text
    assert browser.send(f"/ui/jobs/{job_id}/retry", stamp="").status_code == 403
    answer = browser.send(f"/ui/jobs/{job_id}/retry")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/jobs/{job_id}?done=retried")
    assert idle.job(job_id)["state"] == "queued"
    assert job_id not in browser.get("/ui/jobs?state=dead").text


def test_a_key_is_rotated_after_it_was_confirmed(guarded: Guarded) -> None:
    browser = browser_of(guarded, "*,rotate")
    admin = guarded.token("*")

    def version() -> Json:
        found: Json = guarded.get("/keys/default", headers=admin).json()
        return found

    before = version()["current_version"]
    assert 'href="/ui/keys/default/rotate"' in browser.get("/ui/keys").text
    assert "Rotate default?" in words(browser.get("/ui/keys/default/rotate"))
    assert version()["current_version"] == before
    answer = browser.send("/ui/keys/default/rotate")
    assert answer.headers["location"] == "/ui/keys?done=rotated"
    after = version()["current_version"]
    assert after != before
    page = words(browser.get("/ui/keys?done=rotated"))
    assert "The key has a new version" in page
    assert f"{after} seals and opens" in page
    assert f"{before} opens" in page


def test_progress_is_streamed_to_the_page(guarded: Guarded) -> None:
    job_id = submitted(guarded)
    browser = browser_of(guarded)
    browser.get("/ui")
    with browser.http.stream("GET", f"/ui/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        states = []
        for line in answer.iter_lines():
            if line.startswith("data: "):
                states.append(json.loads(line.removeprefix("data: "))["state"])
                if states == ["queued"]:
                    assert browser.send(f"/ui/jobs/{job_id}/cancel").status_code == 303
    assert states == ["queued", "cancelled"]


# -- who sees what -------------------------------------------------------------------------------------------


def test_jobs_of_other_tenants_are_unseen(guarded: Guarded) -> None:
    job_id = submitted(guarded, "theirs")
    browser = browser_of(guarded, "*", tenant="ours")

    for path in PAGES:
        assert job_id not in browser.get(path).text
    unknown = browser.get(f"/ui/jobs/{job_id}")
    assert unknown.status_code == 404
    assert words(unknown).split("Code")[0] == words(browser.get("/ui/jobs/0")).split("Code")[0]
    assert browser.get(f"/ui/jobs/{job_id}/events").status_code == 404
    assert browser.send(f"/ui/jobs/{job_id}/cancel").status_code == 404
    assert job_id not in browser.get("/ui/audit?operation=job.submit").text
    assert (
        guarded.get(f"/jobs/{job_id}", headers=guarded.token("*", tenant="theirs")).json()["state"]
        == "queued"
    )


def test_what_the_credential_does_not_allow_is_neither_shown_nor_done(guarded: Guarded) -> None:
    job_id = submitted(guarded)
    reader, nobody = browser_of(guarded, "jobs:read"), browser_of(guarded, "encrypt key=other")

    assert "Cancel this job" not in words(reader.get(f"/ui/jobs/{job_id}"))
    assert reader.send(f"/ui/jobs/{job_id}/cancel").status_code == 403
    assert "Newest jobs" in words(reader.get("/ui"))
    overview = words(nobody.get("/ui"))
    assert not [word for word in ("Newest jobs", "Condition", "Refused or failed") if word in overview]
    for path in ("/ui/jobs", f"/ui/jobs/{job_id}", "/ui/audit"):
        assert nobody.get(path).status_code == 403
    assert nobody.get("/ui/keys/default/rotate").status_code == 404
    assert nobody.send("/ui/keys/default/rotate").status_code == 403


# -- sessions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", sorted(UI_RULES), ids=str)
def test_nobody_passes_without_a_session(guarded: Guarded, route: tuple[str, str]) -> None:
    method, path = route
    address = path.format(job_id="0", audit_id="0", key_id="default", name="page.css")
    for cookie in ("", "kms_session=", "kms_session=AAAA", "kms_login=AAAA"):
        answer = guarded.http.request(method, address, headers={"Cookie": cookie})
        if path not in PUBLIC:
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
        elif method == "GET":
            assert answer.status_code == 200
        else:
            assert answer.status_code == 403
        assert answer.headers["content-security-policy"] == CSP
        assert answer.headers["cache-control"] == "no-store"


def test_a_login_gives_a_cookie_that_opens_the_page_and_nothing_else(guarded: Guarded) -> None:
    _, token = guarded.make("*")
    browser = Browser(guarded)
    assert not browser.is_in()

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
            answer = guarded.http.get(path, headers={"X-Forwarded-For": "10.0.0.1", **headers})
            assert answer.status_code in {401, 429}, path


@pytest.mark.parametrize("wrong", ["", "kms_aaaaaaaaaa_" + "A" * 43, "a.b.c", HOSTILE])
def test_a_wrong_token_is_refused_and_not_repeated(guarded: Guarded, wrong: str) -> None:
    answer = (browser := Browser(guarded)).log_in(wrong)

    assert answer.status_code == 401
    assert not wrong or wrong not in html.unescape(answer.text)
    assert Parsed(answer.text).all("input")[-1]["name"] == "token"
    assert not browser.is_in()


def test_a_login_that_another_page_forged_is_refused(guarded: Guarded) -> None:
    _, token = guarded.make("*")
    victim, attacker = Browser(guarded), Browser(guarded)
    attacker.get("/ui/login")

    assert victim.send("/ui/login", token=token).status_code == 403
    assert victim.send("/ui/login", token=token, stamp=attacker.stamp).status_code == 403
    assert not victim.is_in()


def test_too_many_wrong_tokens_from_one_address_are_refused_at_the_page_as_at_the_api(tmp_path: Path) -> None:
    with Guarded(tmp_path, '[kms.auth]\nmode = "required"\nfailures_per_minute = 3\n') as own:
        own.start("api")
        browser = Browser(own)
        answers = [browser.log_in("kms_aaaaaaaaaa_" + "A" * 43) for _ in range(4)]

        assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
        assert "Too many failed attempts" in words(answers[-1])
        assert int(answers[-1].headers["retry-after"]) >= 1


def test_logging_out_ends_the_session_also_for_who_kept_the_cookie(guarded: Guarded) -> None:
    browser, thief = browser_of(guarded), Browser(guarded)
    thief.http.cookies = httpx.Cookies(browser.http.cookies)
    assert browser.is_in()
    assert thief.is_in()
    assert browser.http.post("/ui/logout").status_code == 403
    assert thief.is_in()

    answer = browser.send("/ui/logout")
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
    assert not browser.http.cookies.get("kms_session")
    assert not thief.is_in()
    events = guarded.get("/audit?limit=1000", headers=guarded.token("audit:read")).json()["events"]
    done = [event["operation"] for event in events if event["operation"].startswith("session.")]
    assert done.count("session.end") == 1


@pytest.mark.parametrize("tossed", ["", "junk", "0" * 32 + "A" * 43], ids=["empty", "junk", "shape of an id"])
def test_a_cookie_that_another_site_set_beside_ours_does_not_log_out(guarded: Guarded, tossed: str) -> None:
    """A sibling subdomain or another port of this machine can set one with a longer path; it comes first."""
    session = browser_of(guarded).http.cookies["kms_session"]
    for header in (
        f"kms_session={tossed}; kms_session={session}",
        f"kms_session={session}; kms_session={tossed}",
    ):
        with httpx.Client(base_url=guarded.url, trust_env=False) as http:
            assert http.get("/ui", headers={"Cookie": header}).status_code == 200


def test_a_session_ends_with_its_token(guarded: Guarded) -> None:
    revoked, expiring = Browser(guarded), Browser(guarded)
    expiring.log_in(guarded.make("*", ttl=timedelta(seconds=5))[1])
    token, text = guarded.make("*")
    revoked.log_in(text)
    assert revoked.is_in()

    tokens.revoke(guarded.token_file, token.id)
    until(lambda: not revoked.is_in(), "the session of a revoked token ends")
    until(lambda: not expiring.is_in(), "the session of an expired token ends")


def test_a_form_whose_session_ends_while_it_is_sent_leads_to_the_login(guarded: Guarded) -> None:
    job_id = submitted(guarded)
    token, text = guarded.make("*")
    browser = Browser(guarded)
    browser.log_in(text)
    browser.get(f"/ui/jobs/{job_id}")
    body = f"stamp={browser.stamp}".encode()
    head = (
        f"POST /ui/jobs/{job_id}/cancel HTTP/1.1\r\nHost: 127.0.0.1:{guarded.port}\r\n"
        f"Cookie: kms_session={browser.http.cookies['kms_session']}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )

    with (
        socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as peer,
        peer.makefile("rb") as lines,
    ):
        peer.sendall(head.encode())
        assert lines.readline().startswith(b"HTTP/1.1 100 ")  # the gate has let it in, and the body is read
        tokens.revoke(guarded.token_file, token.id)
        until(lambda: not browser.is_in(), "the session of a revoked token ends")
        peer.sendall(body)
        answer = lines.read().decode()
    assert " 303 " in answer
    assert "location: /ui/login" in answer
    state = guarded.get(f"/jobs/{job_id}", headers=guarded.token("*")).json()["state"]
    assert state == "queued"


@pytest.mark.parametrize("cut", [b"", b"\0" * 31], ids=["empty", "short"])
def test_a_key_of_stamps_that_a_crash_has_cut_is_made_anew(tmp_path: Path, cut: bytes) -> None:
    (tmp_path / "stamping").write_bytes(cut)

    one, other = Sessions(tmp_path), Sessions(tmp_path)

    assert (
        one.stamp("cert:ada") == other.stamp("cert:ada") != hmac.new(cut, b"cert:ada", "sha256").hexdigest()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["stamping"]


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
    tmp_path: Path, url: str, headers: dict[str, str], secure: bool
) -> None:
    own = Guarded(tmp_path, redis="unix:///nonexistent/valkey.sock")
    token = own.make("*")[1]
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
