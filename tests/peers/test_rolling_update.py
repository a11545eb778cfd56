"""An update of an install to today's version under load, one process after another, and the way back.

Then once more in the other order, since docs/contract.md promises any.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.tcp_proxy import BalancingProxy
from support.versions.checks import check_jobs, check_log, check_output
from support.versions.install import TODAY, YESTERDAY, Install, install
from support.versions.load import clients
from support.versions.yesterday import INSTALL_LIMIT_S

pytestmark = pytest.mark.timeout(INSTALL_LIMIT_S + 300)
HOSTS: Final = ("one", "two")
SETTINGS: Final = "[kms.audit]\ncheckpoint_s = 1\n[kms.jobs]\nlease_s = 5\n"
FORWARD: Final = (("worker", TODAY), ("api", TODAY))
"""In the order of docs/operations.md: workers know what APIs of their version write."""
BACK: Final = (("api", YESTERDAY), ("worker", YESTERDAY))
STEPS: Final = (*FORWARD, *BACK, *reversed(FORWARD))


@pytest.fixture
def two_hosts(tmp_path: Path, redis_url: str) -> Iterator[Install]:
    """An API and a worker on each of two hosts, of yesterday's version."""
    with install(tmp_path, SETTINGS, redis_url, *HOSTS) as made:
        for host in made.hosts.values():
            host.start()
        yield made


def test_an_update_and_its_way_back_lose_no_job_and_double_none(two_hosts: Install, tmp_path: Path) -> None:
    hosts = two_hosts.hosts.values()
    proxy = BalancingProxy(*(host.port for host in hosts))
    with clients(two_hosts, proxy.url, tmp_path) as load:
        load.more()
        for name, version in STEPS:
            for host in hosts:
                host.replace(name, version)
                load.more()
        reports = load.end()

    ids = [job_id for report in reports for job_id in report["ids"].values()]
    assert [report["errors"] for report in reports] == [[], []]
    assert [report["unexplained"] for report in reports] == [[], []]
    assert len(ids) == len(set(ids)), "two requests have one job"
    check_jobs(two_hosts, ids)
    two_hosts.stop()
    check_log(two_hosts, {job_id: 1 for report in reports for job_id in report["targets"]})
    check_output(two_hosts)
