"""The feed of events: how often records are read for it."""

import json
from pathlib import Path

from kms_core.jobs.events import transitions
from kms_core.jobs.store.store import JobStore
from support.job_stores import TENANT, accepted, alone, commands, round_trips


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
