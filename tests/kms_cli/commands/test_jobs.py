"""``kms job``: what is printed about jobs."""

from datetime import UTC, datetime, timedelta
from typing import Final

import click
import msgspec
import pytest

from kms_cli import terminal
from kms_cli.commands import jobs
from kms_cli.commands.files import require_success
from kms_protocol.errors import KmsError
from kms_protocol.units import GiB, time_text
from kms_protocol.wire import JobList, JobOut
from support.openapi_check import example_of

JOB_ID: Final = "0b7c1d2e-4f5a-4b6c-8d7e-9f0a1b2c3d4e"
MOST: Final = {"items": 0, "items_done": 0, "items_failed": 0, "bytes": 1023 * GiB, "bytes_done": 1021 * GiB}
MANY: Final = {"items": 100_000, "items_done": 99_999, "items_failed": 99_998, "bytes": 9, "bytes_done": 8}


def job(**changes: object) -> JobOut:
    return msgspec.convert(example_of(JobOut) | {"job_id": JOB_ID} | changes, JobOut)


def failed(code: str, **error: object) -> dict[str, object]:
    return {"state": "failed", "error": {"code": code, **error}}


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"state": "queued"}, "queued 5 B"),
        ({"state": "committing", "progress": MOST}, "committing 100%"),
        ({"state": "running", "progress": MANY | {"items_failed": 0}}, "running 100%"),
        ({"progress": MOST}, "succeeded 1023.0 GiB"),
        ({"progress": MANY | {"items_failed": 0}}, "succeeded 100,000 items"),
        (failed("items_failed") | {"progress": MANY}, "failed 99,998 of 100,000"),
        (failed("attempts_exhausted"), "failed attempts_exhausted"),
        ({"state": "cancelled", "error": {"code": "cancelled"}}, "cancelled 5 B"),
    ],
)
def test_a_listed_job_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], changes: dict[str, object], state: str
) -> None:
    created = time_text(datetime.now(UTC) - timedelta(days=400), "milliseconds")
    with click.Context(jobs.list_command):
        jobs._rows(JobList(jobs=[job(created_at=created, kind="encrypt", **changes)]), "")  # noqa: SLF001 -- what the command prints with

    head, line = capsys.readouterr().out.splitlines()
    assert head == f"{'JOB':<36}  KIND     AGE   STATE"
    assert line == f"{JOB_ID}  encrypt  400d  {state}"
    assert len(line) <= 80


def test_a_job_is_shown_with_who_submitted_it_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"detail": "It is why", "hint": "do that", "items": [{"index": 3, "code": "decrypt_failed"}]}
    found = job(
        **failed("items_failed", **error),
        submitter="ci",
        key_id="payroll",
        labels={"dag": "a", "run": "b"},
        metadata={"owner": "ops"},
        group="nightly",
        started_at="2027-01-31T12:00:01.000Z",
        ended_at="2027-01-31T12:00:02.000Z",
    )
    with click.Context(jobs.show_command):
        jobs.show_job(found)

    lines = capsys.readouterr().out.replace("first failed", "first").splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    expected = {
        "error": "items_failed: it is why",
        "first": "3: decrypt_failed",
        "hint": "do that",
        "submitter": "ci",
        "key": "payroll",
        "labels": "dag=a, run=b",
        "metadata": "owner=ops",
        "group": "nightly",
        "started": "2027-01-31T12:00:01.000Z",
        "ended": "2027-01-31T12:00:02.000Z",
    }
    assert shown.items() >= expected.items()


@pytest.mark.parametrize(("attempt", "is_shown"), [(0, False), (1, True)])
def test_the_start_of_an_attempt_that_never_began_is_not_shown(
    capsys: pytest.CaptureFixture[str], attempt: int, *, is_shown: bool
) -> None:
    """A worker that claims a job and gives it back leaves the time of the claim."""
    found = job(state="queued", attempt=attempt, started_at="2027-01-31T12:00:01.000Z")
    with click.Context(jobs.show_command):
        jobs.show_job(found)

    assert ("2027-01-31T12:00:01.000Z" in capsys.readouterr().out) == is_shown


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("items_failed", 1), ("attempts_exhausted", 1), ("not_started", 1), ("target_exists", 73)],
)
def test_a_failed_job_ends_the_command_with_its_code_and_words(
    capsys: pytest.CaptureFixture[str], code: str, exit_code: int
) -> None:
    with pytest.raises(KmsError) as raised:
        require_success(job(**failed(code, detail="It is why", hint="do that")))

    assert terminal.failed(raised.value, as_json=True) == exit_code
    assert msgspec.json.decode(capsys.readouterr().err) == {
        "error": {"code": code, "detail": "It is why", "hint": "do that", "notes": []}
    }
