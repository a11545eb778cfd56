"""Equal failures in lists of jobs: which rows become one."""

from kms_api.ui.job_pages import JobRow, folded
from kms_protocol import wire

NONE = wire.JobProgress(items=1, items_done=1, items_failed=1, bytes=0, bytes_done=0)


def row(number: int, *codes: str, kind: wire.JobKind = "decrypt", key: str = "default") -> JobRow:
    """A job that failed with the first code, its first item with the second; without codes it succeeded."""
    items = [wire.FailedItem(index=0, code=code) for code in codes[1:]]
    job = wire.JobOut(
        job_id=str(number),
        kind=kind,
        state="failed" if codes else "succeeded",
        attempt=1,
        progress=NONE,
        created_at="2027-01-31T12:00:00.000Z",
        expires_at="2027-02-01T12:00:00.000Z",
        key_id=key,
        error=wire.JobError(code=codes[0], items=items) if codes else None,
        links=wire.JobLinks(self_="", result=""),
    )
    return JobRow(job, "", None)


def ids(rows: list[JobRow]) -> list[list[str]]:
    return [[each.job.job_id for each in fold] for fold in folded(rows)]


def test_equal_failures_are_one_fold_wherever_they_stand_and_the_order_stays() -> None:
    rows = [row(number, "items_failed", "decrypt_failed") for number in range(25)]

    assert ids([row(90), *rows, row(91), row(92), row(93, "items_failed", "decrypt_failed")]) == [
        ["90"],
        [*(str(number) for number in range(25)), "93"],
        ["91"],
        ["92"],
    ]
    assert ids([]) == []


def test_failures_of_another_kind_key_error_or_first_item_stay_apart() -> None:
    rows = [
        row(0, "items_failed", "decrypt_failed"),
        row(1, "items_failed", "context_mismatch"),
        row(2, "decrypt_failed"),
        row(3, "decrypt_failed", kind="rewrap"),
        row(4, "decrypt_failed", kind="rewrap", key="other"),
    ]

    assert ids(rows) == [["0"], ["1"], ["2"], ["3"], ["4"]]
