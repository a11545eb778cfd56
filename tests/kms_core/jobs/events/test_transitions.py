"""The feed of events: how often records are read for it, and what of a record an earlier event has."""

import json
from pathlib import Path

from kms_core.jobs.events import transitions
from kms_core.jobs.spec import WorkResult
from kms_core.jobs.store.store import JobStore
from support.job_stores import TENANT, accepted, alone, claimed, commands, round_trips


def test_the_record_of_a_job_is_read_once_for_all_its_events(store: JobStore, tmp_path: Path) -> None:
    with alone(store, tmp_path / "own") as own:
        jobs = [own.submit(accepted()).job_id for _ in range(100)]
        for job_id in jobs:
            own.cancel(job_id, TENANT)
        own.submit(accepted(tenant="other"))
        before, trips = commands(own), round_trips(own)
        found = transitions.read_feed(own, TENANT, transitions.FEED_START)
        taken, made = commands(own) - before, round_trips(own) - trips

    told = [json.loads(event.body)["data"] for event in found.events]
    assert [(each["job_id"], each["state"]) for each in told] == [
        *((job_id, "queued") for job_id in jobs),
        *((job_id, "cancelled") for job_id in jobs),
    ]
    assert taken == 2 + len(jobs), "the oldest event, the next ones, and each record"
    assert made < 10


def test_events_from_before_the_end_of_a_job_have_no_progress_of_its_end(
    store: JobStore, tmp_path: Path
) -> None:
    with alone(store, tmp_path / "own") as own:
        work = WorkResult(items_done=2, items_failed=1, bytes_done=5)
        own.finish(claimed(own, "w1", items=2, size_bytes=7), "failed", "items_failed", work)
        found = transitions.read_feed(own, TENANT, transitions.FEED_START)

    told = [json.loads(event.body)["data"] for event in found.events]
    nothing = {"items": 2, "items_done": 0, "items_failed": 0, "bytes": 7, "bytes_done": 0}
    done = {"items": 2, "items_done": 2, "items_failed": 1, "bytes": 7, "bytes_done": 5}
    assert [(each["state"], each["progress"]) for each in told] == [
        ("queued", nothing),
        ("running", nothing),
        ("failed", done),
    ]
