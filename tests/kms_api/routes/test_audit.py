"""Reads of the audit log that its disk refuses."""

from support.authorization.application import Application


def test_a_log_that_cannot_be_listed_is_unavailable(application: Application) -> None:
    folder, who = application.service.settings.kms.audit.path, application.with_token("audit:read")
    aside = folder.rename(folder.with_name("aside"))
    folder.symlink_to(folder)
    answer = application.ask(who, "GET", "/api/v1/kms/audit")
    folder.unlink()
    aside.rename(folder)

    assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")
