"""Several hosts of one install: state directories of their own, one Redis, and one spool or several."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from kms_core.age import x25519
from kms_core.auth.policy import Principal
from kms_core.jobs.hosts.notes import HostNotes
from kms_core.jobs.spec import BULK
from kms_core.jobs.store import wake_ups
from kms_protocol.context import Context
from kms_protocol.wire import JobItem
from support.age_kms import write_recipient
from support.chaos.cluster import Clock
from support.embedded_valkey import EmbeddedValkey
from support.job_options import job_options
from support.service import CONTEXT, PROGRAMS, Service, b64, check_problem, core_of
from support.waiting import until

ITEMS = [{"plaintext": b64(b"a")}, {"plaintext": b64(b"b")}]


class Host(Service):
    """A host, whose clock a test may move."""

    clock: Clock | None = None

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | (self.clock.environ if self.clock else {})

    def doctor(self, **environ: str) -> dict[tuple[str, str], str]:
        """The last line of ``kms doctor`` for each subject and level."""
        ran = self.run_kms("doctor", "--json", KMS_SERVICE_URL=self.url, **environ)
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        return {(line["subject"], line["level"]): f"{line['text']}: {line['next']}" for line in lines}


def host(folder: Path, url: str, of: Host | None = None, *, shared: bool = True) -> Host:
    """A host with copies of the keys of another one, and with its spool if ``shared``."""
    settings = f'[kms.jobs]\nspool_dir = "{of.spool}"\n' if of and shared else ""
    made = Host(folder, settings, url)
    if of:
        made.take_keys(of)
        made.spool = of.spool if shared else made.spool
    return made


@pytest.fixture
def pair(tmp_path: Path, redis_url: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts with one spool: an API on the first, API and worker on the second."""
    with ExitStack() as stack:
        first = stack.enter_context(host(tmp_path / "1", redis_url))
        first.start("api")
        second = stack.enter_context(host(tmp_path / "2", redis_url, first))
        second.start()
        until_hosts_know_each_other(first, 2)
        yield first, second


def until_hosts_know_each_other(of: Host, number: int) -> None:
    """Wait until so many hosts are live. A host renews its note after it has read those of the others."""
    notes = HostNotes(redis.Redis.from_url(of.environ["KMS_REDIS_URL"]))

    def renewed(since: float) -> int:
        live = notes.live(notes.now()[0]).values()
        return sum(note.serving and note.seen > since for note in live)

    until(lambda: renewed(0) == number, f"{number} hosts are live")
    since, _ = notes.now()
    until(lambda: renewed(since) == number, "each host has read the notes of the others")


def metrics(of: Host) -> str:
    return of.http.get("/metrics").text


def test_hosts_with_one_spool_work_on_each_others_jobs(pair: tuple[Host, Host], tmp_path: Path) -> None:
    first, second = pair
    job_id = first.submit({"kind": "encrypt", "items": ITEMS})
    second.wait(job_id, "succeeded")
    assert first.result(job_id) == second.result(job_id) != b""
    told = [each.get("/status").json() for each in pair]
    assert told[0]["install"] == told[1]["install"] == (first.spool / "hosts/install").read_text()
    assert [each["degraded"] for each in told] == [[], []]
    assert len(list(first.spool.glob("hosts/host-*"))) == 2, "each is one host from its first start"
    assert first.http.get("/readyz").json()["spool"] == "available"

    third = host(tmp_path / "3", first.environ["KMS_REDIS_URL"], first)  # one that comes later
    with third.start("api"):
        until_hosts_know_each_other(first, 3)


@pytest.mark.parametrize("program", PROGRAMS)
def test_host_with_a_spool_of_its_own_does_not_start(tmp_path: Path, redis_url: str, program: str) -> None:
    with host(tmp_path / "1", redis_url) as first:
        first.start("api")
        other = host(tmp_path / "2", redis_url, first, shared=False)
        refusal = other.refusal(program)
        assert "spool_not_shared" in refusal
        assert "Mount the same directory" in refusal
        assert first.degraded == ["workers"]


def test_redis_of_another_install_refuses_jobs_and_nothing_else(pair: tuple[Host, Host]) -> None:
    first, second = pair
    client = redis.Redis.from_url(first.environ["KMS_REDIS_URL"])
    client.set("kms:install", "0" * 32)
    until(lambda: "install" in first.degraded, "the first host notices")
    check_problem(first.post("/jobs", {"kind": "encrypt", "items": ITEMS}), 503, "install_mismatch")
    assert 'kms_install_ok{what="id"} 0.0' in metrics(first)
    assert "/ui/runbooks#kmsinstallsplit" in first.http.get("/ui").text
    assert first.decrypt(first.encrypt(b"a call")) == b"a call"
    second.kill("api")
    assert "install_mismatch" in second.refusal("api")
    assert first.doctor()["install", "FAIL"].startswith("install_mismatch")

    client.delete("kms:install")  # as the error says, though with processes that run
    until(lambda: "install" not in first.degraded, "the id is back")
    first.wait(first.submit({"kind": "encrypt", "items": ITEMS}), "succeeded")


def test_worker_takes_no_job_of_another_install(tmp_path: Path, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    with host(tmp_path, redis_url) as only:
        only.start()
        client.set("kms:install", "0" * 32)
        until(lambda: "install.mismatch" in only.output("worker"), "the worker notices")
        submitter = core_of(only).submitter
        submitter._require_install = lambda: None  # noqa: SLF001 -- as before it noticed
        options = job_options(Principal("local"), "encrypt", Context())
        job_id = submitter.items(options, [JobItem(plaintext=b"a")]).job_id
        client.lpush(wake_ups.list_key(BULK), wake_ups.encode_message(BULK))
        until(lambda: "job.left_to_lease" in only.output("worker"), "the worker refuses it")
        assert only.job(job_id)["state"] == "queued"
        client.delete("kms:install")
        until(lambda: "install" not in only.degraded, "the id is back")
        only.wait(job_id, "succeeded")


def test_spool_that_is_swapped_under_a_host_is_told(pair: tuple[Host, Host]) -> None:
    first, _ = pair
    for mark in first.spool.glob("hosts/host-*"):
        mark.unlink()
    until(lambda: "spool_not_shared" in first.degraded, "it is degraded")
    assert first.http.get("/readyz").json()["spool"] == "not_shared"
    assert 'kms_install_ok{what="spool"} 0.0' in metrics(first)
    assert "install.spool_not_shared" in first.output("api")


# -- key files -------------------------------------------------------------------------------------------


def test_key_files_of_several_hosts_are_rotated_by_hand(pair: tuple[Host, Host]) -> None:
    first, second = pair
    check_problem(first.post("/keys/default/rotate"), 409, "rotation_refused")
    before = version(first)

    fresh = x25519.X25519Identity.generate()
    append(second, fresh)
    write_recipient(second.state / "age/public_key.txt", fresh)
    until(lambda: version(second) != before, "the second host uses it")
    sealed = second.encrypt(b"salary")
    body = {"ciphertext": b64(sealed), "context": CONTEXT}
    check_problem(first.post("/decrypt", body), 503, "backend_unavailable")

    append(first, fresh)
    until(lambda: first.post("/decrypt", body).status_code == 200, "the first host opens it")
    assert first.decrypt(sealed) == b"salary"
    assert version(first) == before


def append(to: Host, identity: x25519.X25519Identity) -> None:
    with (to.state / "age/private_key.txt").open("a") as file:
        file.write(f"{identity.export()}\n")


def version(of: Host) -> str:
    return str(of.get("/keys").json()["keys"][0]["current_version"])


# -- clocks and doctor -----------------------------------------------------------------------------------


def test_clock_that_is_off_is_told_by_all_hosts(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "clock").mkdir()
    clock = Clock(tmp_path / "clock")
    with host(tmp_path / "1", redis_url) as first, host(tmp_path / "2", redis_url, first) as second:
        second.clock = clock
        first.start("api")
        second.start("api")
        clock.shift(3600)
        until(lambda: "clock" in first.degraded, "the first host tells of it")
        until(lambda: "clock" in second.degraded, "the second host tells of it")
        ahead = re.findall(r"^kms_clock_ahead_seconds (\S+)$", metrics(second), re.MULTILINE)
        assert abs(float(ahead[0]) - 3600) < 1
        assert "is +3600 s off" in first.doctor()["hosts", "warn"]
        clock.shift(0)
        until(lambda: "clock" not in first.degraded, "it is right again")


def test_doctor_says_what_is_shared_and_what_is_not(pair: tuple[Host, Host]) -> None:
    first, second = pair
    told = first.doctor()
    assert first.get("/status").json()["install"] in told["install", "ok"]
    assert "shares spool, Redis, keys, tokens and settings; key files" in told["hosts", "ok"]
    assert "key files of its own: default" in told["hosts", "ok"]

    second.kill("api")
    second.kill("worker")
    more = '[kms.jobs.buckets.reports]\n[kms.tenants.a]\nkeys = ["*"]\n'
    second.config.write_text(f"{second.config.read_text()}lease_s = 10\n{more}")
    (second.state / "tokens.json").write_text("{}")
    append(second, x25519.X25519Identity.generate())
    second.start("api")
    until(lambda: "[kms.jobs] lease_s is 10" in first.doctor().get(("hosts", "warn"), ""), "the difference")
    other = first.doctor()["hosts", "warn"]
    assert "[kms.jobs.buckets] is reports there and none here" in other
    assert "[kms.tenants] is a there and none here" in other
    assert re.search("tokens is a file [0-9a-f]{16} there and no file here", other)
    assert re.search("version of key default is ([0-9a-f]{8}) of 2 there and \\1 of 1 here", other)


def test_doctor_tells_hosts_of_another_install_with_the_same_spool(
    pair: tuple[Host, Host], tmp_path: Path
) -> None:
    first, _ = pair
    with EmbeddedValkey(tmp_path / "other") as other:
        told = first.doctor(KMS_REDIS_URL=other.url)
    assert "hosts that this Redis does not know use this spool" in told["install", "FAIL"]
    assert ("install", "FAIL") not in first.doctor()
