"""Audit logs of three hosts with one Redis: copies on the first are verified and read, by host."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from support.audit_logs import rewrite
from support.service import Service, b64, check_problem
from support.waiting import until

HERE: Final = socket.gethostname()
ITEMS: Final = [{"plaintext": b64(b"a")}, {"plaintext": b64(b"b")}]
Line = dict[str, Any]


class Hosts:
    """An API that reads copies, another API (kms-2) and a worker (kms-3)."""

    def __init__(self, folder: Path, url: str, stack: ExitStack) -> None:
        self.copies, self.url = folder / "copies", url
        self.copies.mkdir(mode=0o700)
        audit = f'[kms.audit]\ncheckpoint_s = 1\ncopies = "{self.copies}"\n'
        self.first = stack.enter_context(Service(folder / "1", audit, url))
        self.first.start("api")
        self.others: dict[str, Service] = {}
        for name, program in (("kms-2", "api"), ("kms-3", "worker")):
            settings = f'[kms.jobs]\nspool_dir = "{self.first.spool}"\n[kms.audit]\ncheckpoint_s = 1\n'
            other = stack.enter_context(Service(folder / name, settings, url))
            other.take_keys(self.first)
            self.others[name] = other.start(program)

    def copy(self) -> None:
        """Copy the logs, as rsync would, and the public keys, as an operator does once."""
        for name, other in self.others.items():
            shutil.rmtree(self.copies / name, ignore_errors=True)
            subprocess.run(["cp", "-a", other.state / "audit", self.copies / name], check=True)
            shutil.copy2(other.state / "audit-signing.pub", self.copies / f"{name}.pub")

    def stop(self) -> None:
        """End the others, so that their chains are closed, and copy these."""
        self.others["kms-2"].stop("api")
        self.others["kms-3"].stop("worker")
        self.copy()

    def kms(self, *args: str) -> tuple[int, list[Line]]:
        done = self.first.run_kms("audit", *args, "--json")
        assert done.returncode in {0, 1, 65, 69}, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    def verified(self, *args: str) -> tuple[int, dict[str, Line]]:
        """The exit code, and what was found of each host."""
        code, (report,) = self.kms("verify", *args)
        return code, {each["host"]: each for each in report["hosts"]}

    def file(self, name: str) -> Path:
        """The largest file of a copy."""
        return max((self.copies / name).iterdir(), key=lambda path: path.stat().st_size)


@pytest.fixture
def hosts(tmp_path: Path, redis_url: str) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(tmp_path, redis_url, stack)


def verdicts(found: dict[str, Line]) -> dict[str, str]:
    return {name: each["verdict"] for name, each in found.items()}


INTACT: Final = dict.fromkeys((HERE, "kms-2", "kms-3"), "intact")


def test_a_job_is_followed_across_hosts(hosts: Hosts) -> None:
    job_id = hosts.first.submit({"kind": "encrypt", "items": ITEMS})
    second = hosts.others["kms-2"]
    second.wait(job_id, "succeeded")
    assert second.result(job_id)
    assert [each["host"] for each in hosts.first.audited(job_id=job_id)] == [HERE], "there are no copies yet"

    def is_intact() -> bool:
        hosts.copy()
        return verdicts(hosts.verified()[1]) == INTACT

    until(is_intact, "copies of hosts that run are intact")
    assert hosts.verified()[0] == 0

    events = hosts.first.audited(job_id=job_id)
    assert [(each["host"], each["operation"]) for each in events] == [
        (HERE, "job.submit"),
        ("kms-3", "encrypt"),
        ("kms-3", "encrypt"),
        ("kms-2", "job.result"),
    ]
    assert hosts.first.audited(job_id=job_id, limit="1") == events
    assert hosts.first.audited(job_id=job_id, host="kms-3") == events[1:3]
    refused = hosts.first.get("/audit", params={"host": "kms-9"})
    check_problem(refused, 422, "invalid_request")
    assert "kms-2" in refused.json()["detail"]
    code, shown = hosts.kms("tail", "--job-id", job_id)
    assert (code, [each["id"] for each in shown]) == (0, [each["id"] for each in events])
    assert [each["host"] for each in hosts.kms("tail", "--host", "kms-2")[1]][-1:] == ["kms-2"]

    page = hosts.first.http.get("/ui/audit", params={"job_id": job_id, "period": "all"}).text
    assert re.findall(r"<td>(kms-\d)</td>", page) == ["kms-2", "kms-3", "kms-3"]
    link = re.search(r"/ui/audit/[^\"]+receipt\?host=kms-2", page)
    assert link

    def is_signed() -> bool:
        hosts.copy()
        return hosts.first.http.get(link[0]).status_code == 200

    until(is_signed, "the copy has a checkpoint after the record")
    assert hosts.first.http.get(link[0]).json()["id"] == events[-1]["id"]
    one = hosts.first.http.get("/ui/audit", params={"host": "kms-3", "period": "all"}).text
    assert set(re.findall(r"<td>(kms-\d)</td>", one)) == {"kms-3"}


def drop(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def change(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b'"result":"ok"', b'"result":"OK"') for line in lines]


def cut(lines: list[bytes]) -> list[bytes]:
    return lines[:2]


def test_damage_is_told_of_the_host_that_has_it(hosts: Hosts) -> None:
    for api in (hosts.first, hosts.others["kms-2"]):
        api.wait(api.submit({"kind": "encrypt", "items": ITEMS}), "succeeded")
    hosts.stop()
    until(lambda: verdicts(hosts.verified()[1]) == INTACT, "the logs are intact")

    def damaged(name: str, hurt: Callable[[list[bytes]], list[bytes]], *args: str) -> tuple[int, Line]:
        """The exit code and what is found of the host; the others are intact."""
        hosts.copy()
        rewrite(hosts.file(name), hurt)
        code, found = hosts.verified(*args)
        assert verdicts(found) | {name: "intact"} == INTACT
        return code, found[name]

    code, found = damaged("kms-2", drop)
    assert (code, found["verdict"], found["problems"][0]["code"]) == (65, "damaged", "gap")
    code, found = damaged("kms-3", change)
    assert (code, found["verdict"], found["problems"][0]["code"]) == (65, "damaged", "edited")
    code, found = damaged("kms-2", cut, "--max-late", "1s")
    assert (code, found["verdict"], found["problems"]) == (1, "late", [])
    assert "late" in [note["code"] for note in found["notes"]]
    code, found = damaged("kms-2", cut)
    assert (code, found["verdict"], bool(found["late_since"])) == (0, "intact", True)


def test_copies_that_cannot_be_read_or_are_missing_are_told(hosts: Hosts) -> None:
    api = hosts.others["kms-2"]
    api.wait(api.submit({"kind": "encrypt", "items": ITEMS}), "succeeded")
    hosts.stop()
    (hosts.copies / "kms-2" / hosts.file("kms-2").name.replace("api", "bad")).symlink_to("/etc/hostname")
    until(lambda: verdicts(hosts.verified()[1]) == INTACT | {"kms-2": "not read"}, "a link is told")
    code, found = hosts.verified()
    assert (code, verdicts(found)) == (69, INTACT | {"kms-2": "not read"})
    answer = hosts.first.get("/audit").json()
    assert (set(answer["unread"]), "a link" in answer["unread"]["kms-2"]) == ({"kms-2"}, True)
    assert "Not read:</strong> the audit log of kms-2" in hosts.first.http.get("/ui/audit").text

    hosts.copy()
    (hosts.copies / "kms-2.pub").unlink()
    shutil.rmtree(hosts.copies / "kms-3")
    (hosts.copies / "kms-3").mkdir()
    note = json.dumps({"id": "0" * 16, "name": "kms-4", "seen": 0})
    redis.Redis.from_url(hosts.url).hset("kms:hosts", "0" * 16, note)
    code, found = hosts.verified()
    assert (code, verdicts(found)) == (
        69,
        {HERE: "intact", "kms-2": "not read", "kms-3": "intact", "kms-4": "missing"},
    )
    shutil.copy2(hosts.copies / "kms-3.pub", hosts.copies / "kms-2.pub")  # the key of another host
    assert "unknown_key" in [each["code"] for each in hosts.verified()[1]["kms-2"]["problems"]]
    (hosts.copies / "kms-3.pub").unlink()
    folders = [str(hosts.copies / name) for name in ("kms-2", "kms-3")]
    assert list(hosts.verified("--anchors", "redis", *folders)[1]) == ["kms-2", "kms-3"]
