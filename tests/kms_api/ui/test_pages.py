"""Pages of an application in this process, and templates with values that no install has on demand."""

from functools import cache
from typing import Final

import jinja2
import msgspec

from kms_api.routes import operations
from kms_api.ui import overview
from kms_api.ui.render import Screen
from kms_core.auth.policy import Principal
from kms_core.jobs.store.activity import survey_queues
from kms_core.observability.degraded import DEGRADED
from kms_protocol.admin import StatusOut
from support.authorization.application import Application

FRAME: Final = {
    "who": Principal("ada", "acme", "token:1"),
    "may": lambda _: True,
    "has_session": True,
    "stamp": "",
    "path": "/ui",
    "environment": "prod",
    "version": "",
    "request_id": "",
}


@cache
def templates() -> jinja2.Environment:
    return Screen.load(None, None).templates  # type: ignore[arg-type]  # templates need no sessions


def overview_of(**known: object) -> str:
    """The overview of a status; while Redis does not answer, but for what is ``known``."""
    unknown = dict.fromkeys(("jobs", "queue_depth", "workers", "spool", "install"))
    status = msgspec.convert(StatusOut.EXAMPLE | unknown | known, StatusOut)
    facts = {
        "status": status,
        "known": DEGRADED,
        "found": overview._Jobs(),  # noqa: SLF001 -- as it is while Redis does not answer
        "notices": [],
        "period": "6h",
        "periods": overview.PERIODS,
        "few": 8,
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
