"""The job store does what the model of its protocol says, and all that the model can do happens.

The sequences are the same in each run.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from kms_core.jobs.store.scripts import SCRIPTS
from support.clocked_store import python_clock
from support.embedded_valkey import unrestricted
from support.job_stores import connect
from support.job_walks import WALKS
from support.store_machine import StoreMachine

TRANSITIONS: Final[dict[str, tuple[str, ...]]] = {
    "submit": ("nothing > queued",),
    "withdraw": ("queued > nothing",),
    "cancel": (
        "queued > cancelled",
        "queued to cancel > cancelled",
        "running > running to cancel",
        "in parts > in parts to cancel",
    ),
    "retry": ("dead > queued",),
    "release": (
        "succeeded > succeeded",
        "failed > failed",
        "dead > failed",
        "cancelled > cancelled",
    ),
    "claim": (
        "queued > running",
        "queued > failed",
        "queued > dead",
        "queued > cancelled",
        "queued to cancel > cancelled",
        "running > running",
        "running > failed",
        "running > dead",
        "running > cancelled",
        "running to cancel > cancelled",
        "committing > committing",
        "in parts > failed",
        "in parts to cancel > cancelled",
    ),
    "renew": ("running > running", "running to cancel > running to cancel", "committing > committing"),
    "commit": ("running > committing",),
    "take back": ("committing > running",),
    "finish": tuple(
        f"{before} > {after}"
        for before in ("running", "running to cancel", "committing")
        for after in ("succeeded", "failed", "dead", "cancelled")
    ),
    "defer": ("running > queued", "running to cancel > queued to cancel", "committing > committing"),
    "stall": (
        "running > queued",
        "running > cancelled",
        "running to cancel > cancelled",
        "committing > committing",
    ),
    "step": ("running > running",),
    "split": ("running > in parts",),
    "end parent": ("in parts > succeeded", "in parts > failed", "in parts to cancel > cancelled"),
    "reap": (
        "queued > queued",
        "queued > failed",
        "queued to cancel > queued to cancel",
        "queued to cancel > failed",
        "running > queued",
        "running > failed",
        "running > cancelled",
        "running to cancel > cancelled",
        "committing > committing",
        "in parts > in parts",
        "in parts > failed",
        "in parts to cancel > in parts to cancel",
        "in parts to cancel > cancelled",
    ),
    "remove input": ("failed > failed",),
    "purge": ("succeeded > succeeded", "failed > failed", "dead > dead", "cancelled > cancelled"),
    "pass time": ("succeeded > nothing", "failed > nothing", "dead > nothing", "cancelled > nothing"),
}
"""Of each call, what a job was before and is after it, where the call changes anything of it.

A dead job failed and may be retried; parts that fail so are not dead. A job in parts runs without a lease.
"""
ANSWERS: Final[dict[str, tuple[str, ...]]] = {
    "submit": ("an earlier job", "idempotency_conflict", "rate_limited", "group_complete", "spool_quota"),
    "withdraw": ("started",),
    "cancel": ("unknown_job", "job_committing"),
    "retry": ("unknown_job", "job_not_dead"),
    "release": ("unknown_job", "job_not_finished"),
    "claim": ("none", "closed", "a chore"),
    "renew": ("lease_lost", "cancelled", "expired"),
    "commit": ("lease_lost", "cancelled", "expired"),
    "take back": ("lease_lost",),
    "finish": ("lease_lost",),
    "defer": ("lease_lost",),
    "stall": ("lease_lost",),
    "step": ("lease_lost", "cancelled", "expired"),
    "split": ("lease_lost", "cancelled"),
}
"""What a call answers but ``ok``."""
OUTSIDE: Final = {
    "add_counts": "counts of operations",
    "begin_session": "sessions of the pages",
    "lock": "one reaper at a time",
    "move_delivery": "webhooks",
    "probe": "memory",
    "put_aside": "records of newer versions",
    "stuck": "processes that hang",
    "wake": "wake-ups",
    "worker_seen": "workers that live",
}
"""Scripts that are no part of the protocol."""
SETTINGS: Final = settings(
    max_examples=10,
    stateful_step_count=40,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.generate,),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
ROUNDS: Final = 22
"""Of ten sequences each, drawn afresh: from the eleventh on Hypothesis repeats parts of earlier ones."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """A server that may be emptied."""
    with unrestricted(tmp_path) as url, connect(url) as client:
        yield client


def test_store_does_what_its_model_says(server: redis.Redis) -> None:
    reached, called = Counter[str](), Counter[str]()
    with python_clock() as clock:
        for terms, words in WALKS:
            StoreMachine(server, clock, reached, called).follow(terms, words.split())
        for number in range(ROUNDS):
            machine: Any = seed(number)(lambda: StoreMachine(server, clock, reached, called))
            run_state_machine_as_test(machine, settings=SETTINGS)

    known = {f"{call}: {what}" for table in (TRANSITIONS, ANSWERS) for call in table for what in table[call]}
    assert reached.keys() - known == set(), "happens, and stands in no table"
    assert known - reached.keys() == set(), "is not reached"
    assert SCRIPTS.keys() - OUTSIDE.keys() - called.keys() == set(), "scripts that are not run"
