import math
import uuid

import pytest

from kms_client import Client, ServiceUnreachable, attempts
from kms_protocol import errors, wire
from support.contract_server import ContractServer
from support.waiting import RealTime


def bulk_job() -> wire.JobIn:
    return wire.JobIn(kind="encrypt", items=[wire.JobItem(plaintext=b"a"), wire.JobItem(plaintext=b"b")])


def test_submit_repeats_one_idempotency_key(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 1

    accepted = kms.submit(bulk_job())

    keys = {headers["idempotency-key"] for headers in server.headers_to("/jobs")}
    assert (len(server.seen), len(keys)) == (2, 1)
    assert uuid.UUID(keys.pop()).version == 4
    assert accepted.links.self_.endswith(accepted.job_id)


def test_two_submits_have_two_idempotency_keys(kms: Client) -> None:
    assert kms.submit(bulk_job()).job_id != kms.submit(bulk_job()).job_id


@pytest.mark.parametrize("is_new", [True, False], ids=["waits", "polling"])
def test_wait_sees_the_end(kms: Client, server: ContractServer, *, is_new: bool) -> None:
    server.faults.honours_wait = is_new
    server.faults.steps_s = math.inf  # the job stays queued until it is seen, however late that is
    seen: list[str] = []

    def progress(job: wire.JobOut) -> None:
        seen.append(job.state)
        server.faults.steps_s = 0.05

    job = kms.wait(kms.submit(bulk_job()).job_id, progress=progress)

    assert job.state == "succeeded"
    assert (seen[0], seen[-1]) == ("queued", "succeeded")


@pytest.mark.parametrize(("is_new", "most"), [(True, 1), (False, 8)], ids=["waits", "polling"])
def test_wait_asks_seldom(kms: Client, server: ContractServer, *, is_new: bool, most: int) -> None:
    """Once where the service waits; where it answers at once, less often the longer it takes."""
    server.faults.honours_wait, server.faults.steps_s = is_new, 0.3

    kms.wait(kms.submit(bulk_job()).job_id)

    assert len(server.headers_to("/jobs/", "GET")) <= most


def test_progress_tells_each_state_once(kms: Client, server: ContractServer) -> None:
    server.faults.honours_wait, server.faults.steps_s = False, 0.3
    seen: list[str] = []

    kms.wait(kms.submit(bulk_job()).job_id, progress=lambda job: seen.append(job.state))

    assert len(seen) == len(set(seen)) < len(server.headers_to("/jobs/", "GET"))


def test_wait_outlives_a_proxy_that_cuts_waits(
    kms: Client, server: ContractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "OUTAGE_S", 0.3)
    monkeypatch.setattr(attempts, "_SLOWEST_WAIT_S", 0.1)
    server.faults.wait_times_out, server.faults.steps_s = True, 0.3

    assert kms.wait(kms.submit(bulk_job()).job_id).state == "succeeded"


def test_wait_ends_with_an_outage(
    kms: Client, server: ContractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "OUTAGE_S", 0.3)
    job_id = kms.submit(bulk_job()).job_id
    server.faults.dropped = 1000

    with pytest.raises(ServiceUnreachable):
        kms.wait(job_id)


def test_wait_outlives_a_restart(kms: Client, server: ContractServer) -> None:
    job_id = kms.submit(bulk_job()).job_id
    server.faults.busy, server.faults.dropped = 2, 2

    assert kms.wait(job_id).state == "succeeded"


@pytest.mark.parametrize("timeout_s", [0, 1.2])
def test_no_poll_outlasts_the_time_given(kms: Client, server: ContractServer, timeout_s: float) -> None:
    server.faults.steps_s = 100
    job_id, begun = kms.submit(bulk_job()).job_id, RealTime.now_s()

    with pytest.raises(errors.JobNotFinished):
        kms.wait(job_id, timeout_s=timeout_s)

    assert timeout_s <= RealTime.now_s() - begun < timeout_s + 0.5


def test_job_that_has_ended_needs_no_time(kms: Client, server: ContractServer) -> None:
    server.faults.steps_s = 0

    assert kms.wait(kms.submit(bulk_job()).job_id, timeout_s=0).state == "succeeded"


def test_wait_for_an_unknown_job(kms: Client) -> None:
    with pytest.raises(errors.UnknownJob):
        kms.wait("no-such-job")


def test_jobs_are_listed_by_page(kms: Client) -> None:
    for _ in range(3):
        kms.submit(bulk_job())

    first = kms.jobs(limit=2)

    assert len(first.jobs) == 2
    assert len(kms.jobs(limit=2, cursor=first.next).jobs) == 1
    assert kms.jobs(state="cancelled").jobs == []


def test_cancel(kms: Client, server: ContractServer) -> None:
    server.faults.steps_s = 100

    assert kms.cancel(kms.submit(bulk_job()).job_id).state == "cancelled"


def test_bulk_results_come_item_by_item(kms: Client) -> None:
    job_id = kms.submit(bulk_job()).job_id
    kms.wait(job_id)

    items = list(kms.items(job_id))

    assert [item.index for item in items] == [0, 1]
    assert kms.decrypt(bytes(items[1].ciphertext or b"")).plaintext == b"b"


def test_result_before_the_end(kms: Client, server: ContractServer) -> None:
    server.faults.steps_s = 100

    with pytest.raises(errors.JobNotFinished):
        list(kms.result(kms.submit(bulk_job()).job_id))


def test_odd_job_ids_stay_in_their_place(kms: Client, server: ContractServer) -> None:
    with pytest.raises(errors.UnknownJob):
        kms.job("../status?x")

    assert server.seen[-1].path.endswith("/jobs/..%2Fstatus%3Fx")
