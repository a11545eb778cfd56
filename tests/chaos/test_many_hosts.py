"""Hosts without a shared disk, while the lines between them are cut.

One seed, three in the long form; ``KMS_STORM_SEED`` repeats one.
"""

import os
import random
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import pytest

from kms_core.jobs.recovery import spool_cleanup
from kms_core.jobs.storage import spool_bucket
from kms_protocol.errors import EXIT_CONFIGURATION
from support import redis_servers
from support.chaos.fleet import ANY_ADDRESS, CLIENTS, Fleet, Machine, fleet
from support.chaos.fleet_faults import FleetFaults
from support.chaos.job_checks import JobChecks
from support.chaos.job_mix import ObjectJobMix
from support.chaos.load import Load
from support.job_stores import reap
from support.long_form import RUNS
from support.network_hosts import isolated_network
from support.service import PROGRAMS, Service, core_of
from support.waiting import until

JOBS: Final = 300
SENDERS: Final = 4
SCALE: Final = 0.3
PATIENCE_S: Final = 90.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found: no ``violations``, or one line each."""

    violations: Sequence[str]
    facts: Mapping[str, object]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", RUNS)
def test_every_job_ends_once_whichever_line_is_cut(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("KMS_STORM_SEED") or secrets.randbelow(1_000_000)) + number
    monkeypatch.setattr(spool_cleanup, "_ORPHAN_AGE_S", 0.0)  # the time that passes until orphans are swept
    monkeypatch.setattr(spool_bucket, "UNFINISHED_S", 0.0)
    with capsys.disabled():
        print(f"\nmany hosts: seed {seed}")  # noqa: T201 -- a failure must be repeatable

    verdict = _run(tmp_path, seed)

    with capsys.disabled():
        print(f"many hosts: {verdict.facts}")  # noqa: T201
    assert not verdict.violations, "\n".join([*verdict.violations[:40], *_refusals(tmp_path)])


def _refusals(folder: Path) -> list[str]:
    """What the store refused, which a job that fails with ``path_refused`` does not say."""
    lines = (line for log in folder.rglob("worker.log") for line in log.read_text("utf-8").splitlines())
    return [line for line in lines if "s3.refused" in line]


def _run(folder: Path, seed: int) -> Verdict:
    begun = time.monotonic()
    with fleet(folder, seed) as hosts:
        core = core_of(hosts)
        mix = ObjectJobMix(hosts.launch(), core, seed, scale=SCALE, bucket=hosts.shared.files)
        load = Load(hosts, mix, JOBS, SENDERS, seed, request_limit=0, token=hosts.token)
        cuts = FleetFaults(hosts, mix, load, seed)
        _cut(hosts, load, cuts, seed)
        checks = JobChecks(hosts, load, lambda: hosts.shared.files.creations("out/"))
        checks.wait(PATIENCE_S)
        checks.check_results()
        checks.expire()
        reap(core.worker_context.store, core.worker_context.spool)
        checks.spool_is_empty()
        facts = {
            "seconds": round(time.monotonic() - begun),
            "jobs": len(load.accepted_jobs),
            "states": dict(checks.states),
            "claims": Counter(_claims(hosts, accepted.job_id) for accepted in load.accepted_jobs),
            "claims of cut jobs": [_claims(hosts, job_id) for job_id in cuts.cut_jobs],
            "crossed": hosts.spread.crossed,
            "glimpses": len(load.glimpses),
            "revoked_s": [round(each, 1) for each in cuts.revoked_s],
            "took": cuts.took,
        }
        faults = [
            *cuts.violations,
            *checks.violations,
            *(f"ended by itself: {end}" for end in hosts.unexpected_exits),
            *(f"left in Redis: {key!r}" for key in hosts.admin.keys("kms:blobs:*")),
            *(f"no worker was cut from {job_id}" for job_id in cuts.cut_jobs if _claims(hosts, job_id) < 2),
        ]
        cast("spool_bucket.SpoolBucket", core.worker_context.spool.store).bucket.line.close()
        for machine in hosts.machines.values():
            machine.stop(machine.program)
    return Verdict([*faults, *hosts.search()], facts)


def _cut(hosts: Fleet, load: Load, cuts: FleetFaults, seed: int) -> None:
    """All faults, in the order of the seed; jobs arrive before, during and after each."""
    rng = random.Random(seed + 1)  # noqa: S311 -- repeatable, no secret
    names = list(cuts.faults_by_name)
    rng.shuffle(names)
    load.start()
    for number, name in enumerate(names, start=1):
        share = JOBS * number // len(names)
        after = len(load.accepted_jobs) + rng.randrange(JOBS // len(names) // 2)
        load.request_limit = share
        while len(load.accepted_jobs) < after and load.busy:
            hosts.restart_dead()
            time.sleep(0.05)
        cuts.inject(name)
        hosts.restart_dead()
    load.request_limit = JOBS
    while load.busy:
        hosts.restart_dead()
        time.sleep(0.1)
    load.close()


def _claims(hosts: Fleet, job_id: str) -> int:
    """How many attempts a job had."""
    return int(cast("bytes | None", hosts.admin.hget(f"kms:job:{job_id}", "fence")) or 0)


OWN_DISK: Final = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"')


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_disks_at_one_path_are_no_spool_of_two_hosts(tmp_path: Path, program: str) -> None:
    """Each has the same path and the same keys, and a disk of its own there."""
    (spool := tmp_path / "spool").mkdir(mode=0o700)
    settings = f'bind = "{ANY_ADDRESS}"\n[kms.auth]\nmode = "none"\n[kms.jobs]\nspool_dir = "{spool}"\n'
    with (
        isolated_network(2, [CLIENTS]) as hosts,
        redis_servers.server(tmp_path / "redis", None, bind=ANY_ADDRESS) as redis,
        Service(tmp_path / "keys", settings, redis.url()) as keys,
    ):
        first, second = (
            Machine(
                tmp_path / name,
                replace(host, enter=(*host.enter, *OWN_DISK, str(spool))),
                settings,
                redis.url(host=host.lines[CLIENTS].test_address),
                keys,
            )
            for name, host in zip(("api1", f"{program}2"), hosts, strict=True)
        )
        with first, second:
            first.spawn("api")
            until(lambda: first.is_up, "the first host is up")
            done = subprocess.run(
                second.argv(program),
                env=second.environ,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == EXIT_CONFIGURATION, done.stderr
            assert "spool_not_shared" in done.stderr
            assert "host1" in done.stderr
            assert first.is_up
