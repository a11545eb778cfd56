"""The page for operators in a real browser: its policy holds, its script runs, its colours can be read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import pytest

from callers import Guarded
from chromium import Chromium, chromium
from kms_cli.local.valkey import EmbeddedValkey
from kms_core.jobs.execution.runner import run_job
from service import CONTEXT, Service, b64, core_of, until

Scheme = Literal["dark", "light"]
ITEMS: Final = [{"plaintext": b64(b"x"), "context": CONTEXT}] * 40
CONTRAST: Final = 4.5  # WCAG 2.2, 1.4.3
# The lowest contrast of any text of the page with what is behind it (WCAG 2.2, relative luminance).
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
  let lowest = 21;
  for (const place of document.querySelectorAll("body *")) {
    const own = Array.from(place.childNodes).some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !place.getClientRects().length || place.closest("option, datalist")) continue;
    const [one, two] = [light(getComputedStyle(place).color), light(behind(place))];
    lowest = Math.min(lowest, (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05));
  }
  return lowest;
})()
"""
HIDDEN: Final = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Guarded]:
    """An API that asks everybody; no worker runs, so that jobs stay queued."""
    folder = tmp_path_factory.mktemp("ui-browser")
    with Guarded(folder, redis=valkey.place.url_of(next(database_numbers))) as running:
        yield running.start("api")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with chromium(tmp_path) as started:
        yield started


def pictures(tmp_path: Path) -> Path:
    """Where pictures go: to be looked at, a folder of the environment; else nowhere that stays."""
    folder = Path(os.environ.get("KMS_TEST_PICTURES", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def seen(browser: Chromium, folder: Path, name: str) -> None:
    """Take a picture in each colour, wide and narrow, and check what can be measured of it."""
    schemes: tuple[Scheme, ...] = ("dark", "light")
    for scheme in schemes:
        browser.appear(scheme)
        browser.picture(folder / f"{name}-{scheme}.png")
        assert browser.evaluate(LOWEST) >= CONTRAST, f"{name} in {scheme}"
    browser.resize(360, 740)
    browser.picture(folder / f"{name}-narrow.png")
    assert browser.evaluate(HIDDEN) <= 0, f"{name} does not fit a narrow window"
    browser.resize(1280, 900)


def test_every_page_looks_right_in_dark_and_light_and_keeps_its_policy(
    guarded: Guarded, browser: Chromium, tmp_path: Path
) -> None:
    folder, token = pictures(tmp_path), guarded.make("*,metrics,rotate")[1]
    admin = guarded.token("*")
    job = {"kind": "encrypt", "items": ITEMS}
    made = [guarded.post("/jobs", job, headers=admin).json()["job_id"] for _ in range(6)]
    guarded.post(f"/jobs/{made[0]}/cancel", headers=admin)
    guarded.post("/decrypt", {"ciphertext": b64(b"no age file")}, headers=admin)
    guarded.post("/encrypt", {"plaintext": "aGk=", "context": "<b>=1"}, headers=admin)

    browser.open(f"{guarded.url}/ui")
    assert browser.evaluate("location.pathname") == "/ui/login"
    seen(browser, folder, "login")
    browser.evaluate(f"document.getElementById('token').value = {token!r}")
    browser.submit("form.login")
    assert browser.evaluate("location.pathname") == "/ui"
    assert browser.evaluate("document.cookie") == ""
    pages = {"": "overview", "/jobs": "jobs", f"/jobs/{made[1]}": "job", "/audit?period=all": "audit"}
    pages |= {
        "/keys": "keys",
        "/keys/default/rotate": "rotate",
        "/jobs/none": "refused",
        "/runbooks": "runbooks",
    }
    for path, name in pages.items():
        browser.open(f"{guarded.url}/ui{path}")
        seen(browser, folder, name)
    browser.open(f"{guarded.url}/docs")
    seen(browser, folder, "reference")

    expected = f"{guarded.url}/ui/jobs/none"  # the status of the page that refuses, on purpose
    assert [said for said in browser.complaints if expected not in said] == []
    browser.evaluate("document.body.setAttribute('style', 'color: red')")
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('style'), {textContent: '*{}'}))"
    )
    until(lambda: browser.evaluate("1") and len(browser.complaints) > 1, "a breach of the policy is noticed")


def test_progress_and_the_end_of_a_job_appear_without_loading_the_page_again(
    idle: Service, browser: Chromium
) -> None:
    job_id = idle.submit({"kind": "encrypt", "items": ITEMS})
    browser.open(f"{idle.url}/ui/jobs")
    browser.evaluate("window.loaded = 'once'")
    row = f"document.querySelector('[href$=\"{job_id}\"]').closest('tr')"
    assert browser.evaluate(f"{row}.querySelector('.state').textContent") == "queued"

    run_job(job_id, core_of(idle).shop, "w")
    until(lambda: browser.evaluate(f"{row}.querySelector('.state').textContent") == "succeeded", "its end")
    assert browser.evaluate(f"{row}.querySelector('.amount').textContent") == "40 of 40 items"
    assert browser.evaluate(f"{row}.querySelector('progress').position") == 1
    assert browser.evaluate("window.loaded") == "once"
    assert browser.complaints == []


def test_progress_of_many_large_jobs_arrives_while_others_call(
    service: Service, browser: Chromium, tmp_path: Path
) -> None:
    items = [{"plaintext": b64(b"x" * 2_000), "context": CONTEXT}] * 2_000
    ids = [service.submit({"kind": "encrypt", "items": items}) for _ in range(6)]
    browser.open(f"{service.url}/ui/jobs")
    browser.evaluate("window.loaded = 'once'")
    states = "Array.from(document.querySelectorAll('[data-events] .state'), (place) => place.textContent)"
    assert len(browser.evaluate(states)) >= 1

    seen(browser, pictures(tmp_path), "jobs-under-load")
    until(lambda: service.encrypt(b"x") and set(browser.evaluate(states)) == {"succeeded"}, "they all end")
    assert browser.evaluate("window.loaded") == "once"
    assert browser.complaints == []
    assert all(service.job(job_id)["progress"]["items_done"] == 2_000 for job_id in ids)


def test_the_end_of_a_job_is_told_aloud_and_the_keyboard_reaches_the_button_in_sight(
    guarded: Guarded, browser: Chromium
) -> None:
    token = guarded.make("*,rotate")[1]
    job = {"kind": "encrypt", "items": ITEMS}
    job_id = guarded.post("/jobs", job, headers=guarded.token("*")).json()["job_id"]
    browser.open(f"{guarded.url}/ui/login")
    browser.evaluate(f"document.getElementById('token').value = {token!r}")
    browser.submit("form.login")
    browser.open(f"{guarded.url}/ui/jobs")

    guarded.post(f"/jobs/{job_id}/cancel", headers=guarded.token("*"))
    heard = "document.getElementById('news').textContent"
    until(lambda: browser.evaluate(heard).startswith(f"Job {job_id}: cancelled"), "it is told aloud")
    browser.open(f"{guarded.url}/ui/keys/default/rotate")
    for _ in range(30):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        browser.call("Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        if browser.evaluate("document.activeElement.textContent.trim()") == "Rotate default":
            break
    assert browser.evaluate("document.activeElement.tagName") == "BUTTON"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
