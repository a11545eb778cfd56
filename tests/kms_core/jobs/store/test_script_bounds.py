"""The commands that each script of Redis runs where its work is largest; over a real Valkey."""

from collections.abc import Iterator

import pytest
import redis

from kms_core.jobs.store.scripts import SCRIPTS
from support import script_bounds
from support.script_bounds import BOUNDS, Bound


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with script_bounds.server(tmp_path_factory.mktemp("valkey")) as client:
        yield client


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.name)
def test_a_script_runs_few_commands_where_its_work_is_largest(client: redis.Redis, bound: Bound) -> None:
    assert bound.most / 2 < script_bounds.measured(client, bound).commands <= bound.most


def test_each_script_has_a_bound() -> None:
    assert {bound.script for bound in BOUNDS} == SCRIPTS.keys()
