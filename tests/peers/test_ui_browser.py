"""The page for operators in a real browser: its policy holds, its script runs, its colours can be read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kms_core.jobs.model import new_attempt_id
from kms_core.jobs.store.heartbeats import Heartbeat
from kms_protocol.wire import PREFIX
from support.chromium import SCHEMES, Chromium, Scheme
from support.core_jobs import run_job
from support.credentials import SecuredService
from support.service import CONTEXT, Service, b64, core_of
from support.waiting import until

ITEMS: Final = [{"plaintext": b64(b"x"), "context": CONTEXT}] * 40
CONTRAST: Final = 4.5  # WCAG 2.2, 1.4.3
# The lowest contrast of any text of the page, and of any bar of a chart, with what is behind it (WCAG 2.2,
# relative luminance).
LOWEST: Final = """
(() => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (place) => {
    for (; place; place = place.parentElement) {
      const colour = getComputedStyle(place).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (colour, place) => {
    const [one, two] = [light(colour), light(behind(place))];
    return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  };
  const lowest = [21, 21];
  for (const place of document.querySelectorAll("body *")) {
    const own = Array.from(place.childNodes).some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !place.getClientRects().length || place.closest("option, datalist")) continue;
    lowest[0] = Math.min(lowest[0], contrast(getComputedStyle(place).color, place));
  }
  for (const place of document.querySelectorAll(".chart rect:not(.whole)")) {
    lowest[1] = Math.min(lowest[1], contrast(getComputedStyle(place).fill, place.closest(".chart")));
  }
  return lowest;
})()
"""
GRAPHICS: Final = 3.0  # WCAG 2.2, 1.4.11
RESOURCES: Final = "performance.getEntriesByType('resource').map((each) => new URL(each.name).origin)"
# What moves from now on without a hand at it (Layout Instability API).
SHIFTS: Final = """
window.moved = [];
new PerformanceObserver((found) => moved.push(...found.getEntries().flatMap(
  (entry) => entry.sources.map((source) => source.node?.nodeName ?? "")
))).observe({type: "layout-shift"});
"""
CUT_OFF: Final = (
    "Math.max(0, ...Array.from(document.querySelectorAll('.scroll'), (table) => "
    "table.scrollWidth - table.clientWidth))"
)
HIDDEN: Final = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[SecuredService]:
    """An API that asks everybody; no worker runs, so that jobs stay queued."""
    with SecuredService(tmp_path_factory.mktemp("ui-browser"), redis=module_redis) as running:
        yield running.start("api")


def log_in(browser: Chromium, url: str, token: str) -> None:
    browser.open(f"{url}/ui/login")
    browser.evaluate(f"document.getElementById('token').value = {token!r}")
    browser.submit("form.login")


def check_contrast(browser: Chromium, name: str) -> None:
    text, bars = browser.evaluate(LOWEST)
    assert text >= CONTRAST, f"text of {name}"
    assert bars >= GRAPHICS, f"charts of {name}"


def seen(browser: Chromium, name: str) -> None:
    """Take a picture in each colour, wide and narrow, and check what can be measured of it."""
    for scheme in SCHEMES:
        browser.appear(scheme)
        browser.picture(f"{name}-{scheme}")
        check_contrast(browser, f"{name} in {scheme}")
    for width in (400, 360):
        browser.resize(width, 740)
        browser.picture(f"{name}-{width}")
        assert browser.evaluate(HIDDEN) <= 0, f"{name} does not fit a window of {width} pixels"
        assert width < 400 or browser.evaluate(CUT_OFF) == 0, f"columns of {name} are cut off"
    browser.resize(1280, 900)


def test_every_page_looks_right_in_dark_and_light_and_keeps_its_policy(
    secured: SecuredService, browser: Chromium
) -> None:
    token = secured.new_token("*,metrics,rotate")[1]
    admin = secured.token_header("*")
    job = {"kind": "encrypt", "items": ITEMS}
    made = [secured.post("/jobs", job, headers=admin).json()["job_id"] for _ in range(6)]
    secured.post(f"/jobs/{made[0]}/cancel", headers=admin)
    secured.post("/decrypt", {"ciphertext": b64(b"no age file")}, headers=admin)
    secured.post("/encrypt", {"plaintext": "aGk=", "context": "<b>=1"}, headers=admin)

    browser.open(f"{secured.url}/ui")
    assert browser.evaluate("location.pathname") == "/ui/login"
    seen(browser, "login")
    browser.evaluate(f"document.getElementById('token').value = {token!r}")
    browser.submit("form.login")
    assert browser.evaluate("location.pathname") == "/ui"
    assert browser.evaluate("document.cookie") == ""
    pages = {"": "overview", "/jobs": "jobs", f"/jobs/{made[1]}": "job", "/audit?period=all": "audit"}
    pages |= {
        "/workers": "workers",
        "/keys": "keys",
        "/keys/default/rotate": "rotate",
        "/jobs/none": "refused",
        "/runbooks": "runbooks",
    }
    for path, name in pages.items():
        browser.open(f"{secured.url}/ui{path}")
        seen(browser, name)

    expected = f"{secured.url}/ui/jobs/none"  # the status of the page that refuses, on purpose
    assert [said for said in browser.complaints if expected not in said] == []
    browser.evaluate("document.body.setAttribute('style', 'color: red')")
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('style'), {textContent: '*{}'}))"
    )
    until(lambda: browser.evaluate("1") and len(browser.complaints) > 1, "a breach of the policy is noticed")


def test_api_viewer_shows_encrypt_and_decrypt_first_and_tries_a_call(
    no_worker: Service, browser: Chromium
) -> None:
    shown = "Array.from(document.querySelectorAll('.opblock-summary-path'), (p) => p.dataset.path)"
    browser.open(f"{no_worker.url}/docs")
    until(lambda: browser.evaluate(shown), "the API is shown")
    assert browser.evaluate(shown)[:2] == [f"{PREFIX}/encrypt", f"{PREFIX}/decrypt"]
    seen(browser, "docs")

    for button in (".opblock-summary-control", ".try-out__btn", ".btn.execute"):
        until(lambda button=button: browser.evaluate(f"!!document.querySelector('{button}')"), button)  # type: ignore[misc]
        browser.evaluate(f"document.querySelector('{button}').click()")
    status = "document.querySelector('.live-responses-table tbody .response-col_status')?.textContent"
    until(lambda: browser.evaluate(status) == "200", "the call is answered")
    seen(browser, "docs-tried")
    assert browser.complaints == []


@pytest.mark.parametrize("width", [1280, 400])
def test_progress_and_the_end_of_a_job_appear_without_loading_the_page_again(
    no_worker: Service, browser: Chromium, width: int
) -> None:
    browser.resize(width, 900)
    job_id = no_worker.submit({"kind": "encrypt", "items": ITEMS})
    browser.open(f"{no_worker.url}/ui/jobs")
    browser.evaluate("window.loaded = 'once'")
    browser.evaluate(SHIFTS)
    row = f"document.querySelector('[href$=\"{job_id}\"]').closest('tr')"
    assert browser.evaluate(f"{row}.querySelector('.state').textContent") == "queued"

    run_job(job_id, core_of(no_worker).worker_context, "w")
    until(lambda: browser.evaluate(f"{row}.querySelector('.state').textContent") == "succeeded", "its end")
    assert browser.evaluate(f"{row}.querySelector('.amount').textContent") == "40 of 40 items"
    assert browser.evaluate(f"{row}.querySelector('progress').position") == 1
    assert browser.evaluate("window.loaded") == "once"
    assert browser.evaluate("moved") == []

    job_id = no_worker.submit({"kind": "encrypt", "items": ITEMS})
    browser.open(f"{no_worker.url}/ui/jobs/{job_id}")
    browser.evaluate("window.loaded = 'once'")
    run_job(job_id, core_of(no_worker).worker_context, "w")
    until(lambda: browser.evaluate("window.loaded || 'again'") == "again", "its own page is loaded again")
    assert browser.complaints == []


def test_the_end_of_a_job_is_told_aloud_and_the_keyboard_reaches_the_button_in_sight(
    secured: SecuredService, browser: Chromium
) -> None:
    token = secured.new_token("*,rotate")[1]
    job = {"kind": "encrypt", "items": ITEMS}
    job_id = secured.post("/jobs", job, headers=secured.token_header("*")).json()["job_id"]
    log_in(browser, secured.url, token)
    browser.open(f"{secured.url}/ui/jobs")

    secured.post(f"/jobs/{job_id}/cancel", headers=secured.token_header("*"))
    heard = "document.getElementById('news').textContent"
    until(lambda: browser.evaluate(heard).startswith(f"Job {job_id}: cancelled"), "it is told aloud")
    browser.open(f"{secured.url}/ui/keys/default/rotate")
    reach(browser, "Rotate default")
    assert browser.evaluate("document.activeElement.tagName") == "BUTTON"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"


# -- workers, queues and charts ------------------------------------------------------------------------------

BARS: Final = "document.querySelectorAll('.plot g rect:not(.whole)')"
SEEN: Final = "document.querySelector('.as-of').innerText.replace(/\\s+/g, ' ')"
TEXT: Final = "document.querySelector('main').textContent.replace(/\\s+/g, ' ')"


@pytest.fixture
def busy(secured: SecuredService) -> Iterator[tuple[str, str]]:
    """The token of a tenant with jobs of each state, 25 of them equal failures, and the host of a worker.

    The worker runs one of them.
    """
    core, admin = core_of(secured), secured.token_header("*", tenant="busy")
    store, job = core.worker_context.store, {"kind": "encrypt", "items": ITEMS}

    def submitted(body: object) -> str:
        return str(secured.post("/jobs", body, headers=admin).json()["job_id"])

    bad = {"kind": "decrypt", "items": [{"ciphertext": b64(b"no age file")}]}
    for body in (*[bad] * 25, job, job):
        run_job(submitted(body), core.worker_context, "w")
    secured.post(f"/jobs/{submitted(job)}/cancel", headers=admin)
    host = f"host-{new_attempt_id()[:8]}"  # the jobs of the test before have their leases still
    heartbeat = Heartbeat(store, f"{host}:aa")
    heartbeat.start()
    heartbeat.serve()
    assert store.claim(submitted(job), f"{host}:aa/7")
    submitted(job)
    yield secured.new_token("*,metrics,rotate", tenant="busy")[1], host
    heartbeat.stop()
    heartbeat.join()


def lose_a_worker(secured: SecuredService) -> None:
    """A worker that Redis heard of for the last time ten seconds ago."""
    store = core_of(secured).worker_context.store
    store.redis.zadd("kms:workers", {"host-2:bb": store.now() - 10})


def press(browser: Chromium, key: str, code: int) -> None:
    """Press a key, and let it go."""
    given = {"key": key, "code": key, "windowsVirtualKeyCode": code} | (
        {"text": "\r"} if key == "Enter" else {}
    )
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, **given)


def reach(browser: Chromium, label: str) -> None:
    """Press the Tab key, from the top of the page, until what has this text has the focus, which is seen."""
    browser.evaluate("document.querySelector('.skip').focus()")
    for _ in range(80):
        press(browser, "Tab", 9)
        if browser.evaluate("document.activeElement.textContent.trim()") == label:
            assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    raise AssertionError(f"the keyboard does not reach {label}")


def follow(browser: Chromium, label: str, expected: str) -> None:
    """Follow a link by the keyboard, and check what can be measured of its page."""
    reach(browser, label)
    before = browser.evaluate("performance.timeOrigin")
    press(browser, "Enter", 13)
    loaded = f"performance.timeOrigin !== {before} && document.readyState === 'complete'"
    until(lambda: browser.evaluate(loaded), f"{label} is loaded")
    origin = browser.evaluate("location.origin")
    assert browser.evaluate("location.pathname + location.search") == expected
    assert set(browser.evaluate(RESOURCES)) == {origin}
    check_contrast(browser, label)
    assert browser.evaluate(HIDDEN) <= 0, f"{label} is too wide"


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
)
def test_keyboard_leads_through_the_charts_to_workers_and_keys(
    secured: SecuredService, browser: Chromium, busy: tuple[str, str], width: int, scheme: Scheme
) -> None:
    token, host = busy
    browser.resize(width, 900)
    browser.appear(scheme)
    lose_a_worker(secured)
    log_in(browser, secured.url, token)
    assert "Worker host-2:bb ended without a word" in browser.evaluate(TEXT)

    follow(browser, "hour", "/ui?period=1h")
    drawn = browser.evaluate(f"Array.from({BARS}, (each) => each.classList[0])")
    assert {"failed", "succeeded", "cancelled", "open"} <= set(drawn)
    heights = browser.evaluate(f"Array.from({BARS}, (each) => each.getBoundingClientRect().height)")
    assert min(heights) >= 1
    table = "document.querySelector('.chart details')"
    assert not browser.evaluate(f"{table}.open")
    reach(browser, "Jobs by time of submission as a table")
    press(browser, "Enter", 13)
    until(lambda: browser.evaluate(f"{table}.open"), "the table opens")
    check_contrast(browser, "the table of a chart")

    lose_a_worker(secured)
    follow(browser, "Workers", "/ui/workers")
    assert f"{host} aa working 1 of 2 slots in use" in browser.evaluate(TEXT)
    assert "host-2 bb not seen" in browser.evaluate(TEXT)
    follow(browser, "Keys", "/ui/keys")
    assert browser.complaints == []


def test_folded_failures_are_opened_searched_and_charted(
    secured: SecuredService, browser: Chromium, busy: tuple[str, str]
) -> None:
    token, _ = busy
    rows = "Array.from(document.querySelectorAll('.fold tr'), (row) => row.checkVisibility())"
    bars = "document.querySelectorAll('#chart-operations ~ .plot g rect:not(.whole)')"
    kinds = "document.querySelectorAll('tbody tr td:nth-child(2)')"
    store = core_of(secured).worker_context.store
    for ago_s, succeeded, failed in ((60, 5, 1), (1, 25, 3)):
        at = f"{(store.now() - ago_s) * 1000:.0f}-0"
        store.redis.xadd("kms:operations", {"succeeded": succeeded, "failed": failed}, id=at)
    log_in(browser, secured.url, token)
    assert "jobs failed in the last hour" in browser.evaluate(TEXT)
    drawn = browser.evaluate(f"Array.from({bars}, (each) => each.classList[0])")
    assert set(drawn) == {"failed", "succeeded"}
    seen(browser, "overview-busy")

    follow(browser, "failed jobs", "/ui/jobs?state=failed")
    assert browser.evaluate(rows) == [True] + [False] * (len(browser.evaluate(rows)) - 1)
    assert len(browser.evaluate(rows)) >= 26
    reach(browser, f"{len(browser.evaluate(rows)) - 1} jobs")
    press(browser, "Enter", 13)
    until(lambda: all(browser.evaluate(rows)), "the failures are opened")
    seen(browser, "jobs-opened")

    browser.evaluate("document.querySelector('[name=kind]').value = 'encrypt'")
    browser.submit("form.filter")
    assert browser.evaluate("location.search") == "?state=failed&kind=encrypt&cause=&key=&by=&before=&search="
    assert "No jobs of kind encrypt that are failed." in browser.evaluate(TEXT)
    as_of = r"UTC, \d+ s ago Refreshes itself every 30 seconds\. Refresh now"
    assert re.search(as_of, browser.evaluate(SEEN))
    follow(browser, "all", "/ui/jobs?kind=encrypt")
    assert set(browser.evaluate(f"Array.from({kinds}, (cell) => cell.textContent)")) == {"encrypt"}
    seen(browser, "jobs-by-kind")
    assert browser.complaints == []


# -- pages that refresh themselves ------------------------------------------------------------------------

REFRESH: Final = "document.getElementById('main').dataset.live = '0.1'; void refresh()"


def test_a_page_left_open_refreshes_itself_unless_a_form_is_half_filled_in(
    secured: SecuredService, browser: Chromium
) -> None:
    token, admin = (
        secured.new_token("*", tenant="left-open")[1],
        secured.token_header("*", tenant="left-open"),
    )
    job = {"kind": "encrypt", "items": ITEMS[:1]}
    log_in(browser, secured.url, token)
    browser.open(f"{secured.url}/ui/jobs")
    browser.evaluate("window.loaded = 'once'")
    browser.evaluate("document.querySelector('[name=cause]').value = 'half'")
    browser.evaluate(REFRESH)
    first = secured.post("/jobs", job, headers=admin).json()["job_id"]
    browser.evaluate("new Promise((resume) => setTimeout(resume, 500))")
    assert not browser.evaluate(f"document.body.textContent.includes('{first}')")
    assert browser.evaluate("document.querySelector('[name=cause]').value") == "half"

    browser.evaluate("document.querySelector('[name=cause]').value = ''")
    until(lambda: browser.evaluate(f"document.body.textContent.includes('{first}')"), "the new job appears")
    assert browser.evaluate("window.loaded") == "once"
    assert browser.complaints == []


def test_a_page_left_open_says_that_the_service_is_gone_and_what_is_open_stays_open(
    tmp_path: Path, redis_url: str, browser: Chromium
) -> None:
    with Service(tmp_path, redis=redis_url) as own:
        own.start("api")
        own.encrypt(b"an operation, whose table can be opened")
        browser.open(f"{own.url}/ui")
        as_of = "document.querySelector('.as-of time').dateTime"
        before = browser.evaluate(as_of)
        browser.evaluate("document.querySelector('summary').parentElement.open = true")
        browser.evaluate(REFRESH)
        until(lambda: browser.evaluate(as_of) != before, "it is refreshed")
        assert browser.evaluate("document.querySelector('summary').parentElement.open")
        assert browser.evaluate("!!document.getElementById('refused')")
        browser.evaluate(REFRESH)
    said = "document.querySelector('.as-of').textContent"
    until(lambda: browser.evaluate(said).startswith("The service does not answer"), "it is noticed")
    until(lambda: re.search("UTC, [2-9] s ago", browser.evaluate(said)), "it says how old it is")


def test_a_link_to_a_runbook_is_followed_after_the_login(secured: SecuredService, browser: Chromium) -> None:
    browser.open(f"{secured.url}/ui/runbooks#kmsredisdown")
    assert browser.evaluate("location.pathname") == "/ui/login"

    browser.evaluate(f"document.getElementById('token').value = {secured.new_token('*')[1]!r}")
    browser.submit("form.login")

    assert browser.evaluate("location.pathname + location.hash") == "/ui/runbooks#kmsredisdown"
