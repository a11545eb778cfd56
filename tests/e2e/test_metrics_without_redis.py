"""Figures that Redis has, while it does not answer: not known, and never those of before."""

from math import isnan
from pathlib import Path

import pytest

from support.service import Service

GAUGES = (
    "kms_jobs_oldest_queued_seconds",
    "kms_workers",
    "kms_worker_stuck_processes",
    'kms_storage_used_ratio{what="redis"}',
    'kms_jobs_in_state{state="queued"}',
    'kms_jobs_in_state{state="running"}',
    'kms_jobs_in_state{state="committing"}',
    'kms_jobs_in_state{state="dead"}',
    'kms_redis_ok{what="writes"}',
)


@pytest.mark.parametrize("name", GAUGES)
def test_a_figure_that_cannot_be_read_is_not_a_number(no_redis: Service, name: str) -> None:
    """A zero would end an alert; an old figure would look like one of now."""
    assert isnan(no_redis.metric(name))
    assert no_redis.metric('kms_redis_ok{what="answers"}') == 0


def test_figures_are_known_while_redis_answers(service: Service) -> None:
    assert all(service.metric(name) >= 0 for name in GAUGES)


def test_depths_of_queues_are_not_those_of_before(tmp_path: Path) -> None:
    name = 'kms_queue_depth{priority="normal",queue="kms.files"}'
    with Service(tmp_path) as service:
        service.start("api")
        assert service.metric(name) == 0
        service.valkey.stop()

        assert isnan(service.metric(name))
