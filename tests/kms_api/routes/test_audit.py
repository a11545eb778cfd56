"""Reads of the audit log that its disk refuses, and what the documents say of the filters."""

import re
from pathlib import Path
from typing import Final

from kms_api.routes import audit
from support.authorization.application import Application

PAGE: Final = Path(__file__).parents[3] / "docs/audit.md"


def test_a_log_that_cannot_be_listed_is_unavailable(application: Application) -> None:
    folder, who = application.service.settings.kms.audit.path, application.with_token("audit:read")
    aside = folder.rename(folder.with_name("aside"))
    folder.symlink_to(folder)
    answer = application.ask(who, "GET", "/api/v1/kms/audit")
    folder.unlink()
    aside.rename(folder)

    assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")


def test_the_page_names_every_filter_and_no_other(application: Application) -> None:
    answer = application.ask(application.with_token("audit:read"), "GET", "/api/v1/kms/audit?no=1")
    taken = set(re.findall(r"\w+", answer.json()["detail"].partition(" are ")[2])) - {"after", "limit"}
    text = PAGE.read_text("utf-8").partition("Filters:")[2]
    listed, _, further = text.partition(". A service reads")
    named = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", listed, flags=re.DOTALL)))

    assert "`host`, which is a filter as well" in further
    assert {*named, "host"} == taken
    assert {each for each in taken if each in (audit.audit.__doc__ or "")} == taken, "nor the description"
