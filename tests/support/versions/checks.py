"""The verdict on an install that ran two versions: each job ended once, and each target was made once."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Final, cast

from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import ENDED
from support.job_stores import events
from support.service import Json, Service, core_of
from support.versions.install import TODAY, VERSIONS, YESTERDAY, Install

ID_LENGTH: Final = 36
"""Of the id of a job, with which the name of an effect begins; its attempt follows."""
_NEWER: Final = "newer_worker"
"""In the history of a job that was left to one, and in the log event of a worker that counts such jobs."""
_REFUSED: Final = "record_refused"


def listed(service: Service) -> list[Json]:
    """All jobs, as an API lists them."""
    found: list[Json] = []
    after: dict[str, str] | None = {}
    while after is not None:
        page = service.get("/jobs", params={"limit": "1000", **after}).json()
        found += page["jobs"]
        after = {"cursor": page["next"]} if page.get("next") else None
    return found


def history_of(store: JobStore, job_id: str) -> str:
    """The attempts at a job that did not end it, as its record has them."""
    found = cast("bytes | None", store.redis.hget(f"kms:job:{job_id}", "history"))
    return (found or b"").decode()


def check_jobs(install: Install, expected: Collection[str]) -> None:
    """The install has these jobs and no others. All succeeded, once, and none waited for a newer worker."""
    for host in install.hosts.values():
        states = {job["job_id"]: job["state"] for job in listed(host)}
        assert Counter(states.values()) == {"succeeded": len(expected)}
        assert states.keys() == set(expected)
    store = core_of(install.any_host).worker_context.store
    assert not store.redis.zcard("kms:newer")
    ends = Counter(
        event["subject"]
        for event in events(store)
        if event["type"].removeprefix("kms.job.") in ENDED and event["subject"] in set(expected)
    )
    assert ends == Counter(expected), "a job ended more or less than once"
    for job_id in expected:
        history = history_of(store, job_id)
        assert _NEWER not in history, f"{job_id} waited for a newer worker: {history}"


def check_log(install: Install, files: Mapping[str, int]) -> None:
    """The audit log is sound to both versions, has lines of both, and has each target once.

    ``files`` are the numbers of targets of jobs, by job id. The processes of the install have ended.
    """
    made: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    writers: Counter[tuple[str, str]] = Counter()
    for line in install.audit_lines():
        if "operation" not in line:
            continue
        writers[line["chain"].partition("-")[0], line["version"]] += 1
        if (line["operation"], line.get("stage"), line.get("result")) == ("commit", "outcome", "ok"):
            name = line["effect"]
            made[line["job_id"]][name[:ID_LENGTH]].add(name)
    for job_id, count in files.items():
        assert [len(names) for names in made[job_id].values()] == [1] * count, (job_id, made[job_id])
    assert {(role, version) for role in ("api", "worker") for version in VERSIONS} <= writers.keys(), writers
    for version in (TODAY, YESTERDAY):
        report = install.any_host.verified(version)
        assert report["verdict"] == "intact", report


def check_output(install: Install) -> None:
    """No process refused a record, or left a job to a newer version."""
    lines = [line for line in install.output().splitlines() if _REFUSED in line or _NEWER in line]
    assert not lines, "\n".join(lines[:10])
