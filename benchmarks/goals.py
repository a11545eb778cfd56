"""Holds the figures of the last run against the goals, at the top of RESULTS.md; measures nothing.

    python -m benchmarks.goals [--results FILE]

Each script leaves its medians beside the results (``report.kept_in``); no figure is typed here. What bounds a
goal that is missed, and what would lift it, is in ``bounds.toml``.
"""

import argparse
import json
import math
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.figures import Figures, Find, Goal, Row, at_most, ratio, reached, table, value

from support.script_bounds import BOUNDS

_MIB: Final = 1024 * 1024
_LARGEST_MIB: Final = 16 * 1024
_OURS: Final = "envelope, driver"
_AUDIT, _NO_AUDIT = "OpenBao transit, file audit", "OpenBao transit, no audit"
_CALLS: Final = [f"POST /{call}, {size} B" for call in ("encrypt", "decrypt") for size in ("16", "1,024")]
_BULK: Final = ("8 jobs of 1,000 items", "1 job of 100,000 items")
_ITEM, _HTTP_ITEM = "job of one item, sent in process", "the same over HTTP"
_CRYPTO: Final = "the crypto alone, two processes"
_HOSTILE: Final = "refuse an endless header of 65,536 bytes"
_MANY: Final = "open a file of 1,000 recipients by the last"
_LIMITS: Final = ("call", "file")
_NOTHING: Final = "bare Celery, a task that does nothing"
_MANY_JOBS, _FEW_JOBS = "100,000 jobs", "100 jobs"
_DIRECTORY: Final = "spool in a directory"
_TOKEN, _OPEN = "API token", "no credential"
_METRICS: Final = (
    ("a process alone", "alone, without metrics"),
    ("one of several", "one of several, without metrics"),
)
_WAYS: Final = ("kms: token, audit write", "kms: no credential, no audit log")
_CROWD: Final = ("all of them", "alone")
_RECORD: Final = ("one record of two context pairs", "AuditLog.append, with record and hashes")
_SEALED: Final = ("encrypt and decrypt, 16 B, in process", ("sealed", "plain"))
_CLIENTS: Final = ("encrypt and decrypt, 16 B, one thread", ("kms_client, the API", "hvac, the Vault API"))
_STARTS: Final = ("both start together", "one joins another")


def _file(table: str, peer: str, factor: float = 1.0) -> Find:
    """How many times as fast as the peer."""
    return _whole("file", ratio("file", table, (peer, _OURS), "seconds", factor))


def _whole(script: str, find: Find) -> Find:
    return reached(find, value(script, "size", "file", "mib"), 1024)


def _beside(peer: str, operation: str, place: str, *, must: float, aim: float) -> Goal:
    return Goal(operation, must, aim, [_file(f"{operation}, {place}", peer)])


def _everywhere(peer: str, factor: float = 1.0) -> list[Find]:
    return [
        _file(f"{what}, {place}", peer, factor) for what in ("seal", "open") for place in ("memory", "disk")
    ]


def _uploaded(key: str) -> list[Find]:
    names = [("bare uvicorn, files", f"kms, {kind} job") for kind in ("encrypt", "decrypt")]
    kinds = ("encrypt a file", "decrypt a file")
    found = [ratio("http", kind, pair, key, 100) for kind, pair in zip(kinds, names, strict=True)]
    return [_whole("http", find) for find in found]


def _calls(peer: str, key: str, *connections: int) -> list[Find]:
    return [
        ratio("transit", f"{call}, {many}", ("kms", peer), key) for call in _CALLS for many in connections
    ]


def _doors(table: str, ours: str) -> list[Find]:
    return [ratio("doors", f"{table}, {many}", (ours, _AUDIT), "rate") for many in (1, 16)]


def _cli(peer: str) -> list[Find]:
    return [ratio("cli", "invocation", (ours, peer), "seconds") for ours in ("`kms encrypt`", "`kms status`")]


def _small(table: str, name: str, factor: float = 1e3) -> Find:
    return value("small", table, name, "seconds", factor)


def _job(ours: str) -> Find:
    return ratio("jobs", "one at a time", (ours, _NOTHING), "p50_s")


def _failover(name: str, what: str) -> Find:
    """A count, if it was taken of as many jobs as the goal speaks of."""
    figure = value("failover", "failover", name, what)
    return reached(figure, value("failover", "failover", name, "acknowledged"), 4_000)


def _two_hosts(name: str) -> Find:
    figure = value("sharing", "two hosts", name, "apart_s")
    return reached(figure, value("sharing", "two hosts", name, "waiting"), 1_000)


def _core(operation: str) -> Find:
    size = value("growth", "core", operation, "to")
    return reached(value("growth", "core", operation, "peak_bytes", 1 / _MIB), size, _LARGEST_MIB)


def _spool(find: Find) -> Find:
    return reached(find, value("spool", "size", "file", "mib"), 1024)


def _in_bucket(store: str) -> str:
    return f"spool in a bucket of {store}"


def _off(to: float, *what: str) -> list[Find]:
    def figure(name: str, key: str, factor: float = 1.0) -> Find:
        return value("growth", "deviation", name, key, factor)

    return [reached(figure(name, "share", 100), figure(name, "to"), to) for name in what]


_SHARE, _AGE_KEY = "kms: OpenBao, share=5m", "kms: Age key"
_SMALL_CALLS: Final = ("POST /encrypt, 16 B", "POST /decrypt, 16 B, files of 16 processes")


def _shared() -> list[Find]:
    return [
        ratio("wrapkeys", f"{call}, {many}", (_SHARE, _AGE_KEY), "rate")
        for call in _SMALL_CALLS
        for many in (16, 64)
    ]


def _crowded() -> Find:
    """How many times as much 64 callers get as 16 do."""
    many, few = (
        value("wrapkeys", f"waiting, {count}", "Backend.wrap, transit", "rate") for count in (64, 16)
    )

    def found(figures: Figures) -> float | None:
        most, least = many(figures), few(figures)
        return most / least if most and least else None

    return found


def _verified() -> Find:
    """Seconds, of a log that is as long as the goal says."""
    return reached(
        value("audit", "verify", "one process", "seconds"), value("audit", "verify", "lines", "count"), 1e6
    )


ROWS: Final = (
    Row(
        "seal / open 1 GiB, page cache → tmpfs, 2 cores",
        "`age`",
        [
            _beside("age", "seal", "memory", must=2.0, aim=2.3),
            _beside("age", "open", "memory", must=2.4, aim=2.9),
        ],
    ),
    Row(
        "the same → ext4",
        "`age`",
        [
            _beside("age", "seal", "disk", must=2.3, aim=2.9),
            _beside("age", "open", "disk", must=3.2, aim=3.8),
        ],
    ),
    Row("the same, both", "`cp`", [Goal("", 0.9, 1.0, _everywhere("cp"))]),
    Row(
        "the same, both",
        "the bare AEAD over the same slabs and I/O",
        [Goal("", 85, 92, _everywhere("bare cipher, same slabs", 100), "%")],
    ),
    Row(
        "the same, pipe to pipe",
        "`age`",
        [
            _beside("age", "seal", "pipe", must=1.15, aim=1.3),
            _beside("age", "open", "pipe", must=1.5, aim=1.7),
        ],
    ),
    Row(
        "the same, over HTTP through a job, up (the job included) / down",
        "bare uvicorn app storing and serving the bytes",
        [Goal("up", 55, 75, _uploaded("stored_s"), "%"), Goal("down", 70, 85, _uploaded("down_s"), "%")],
    ),
    Row("RSS of the core, any size", "-", [at_most("", 40, 32, [*map(_core, ("seal", "open"))], "MiB")]),
    Row(
        "seal / open 1 KiB in memory",
        "pyrage",
        [
            at_most("seal", 95, 70, [_small("seal 1,024 bytes in memory", "sealing.seal", 1e6)], "µs"),
            at_most(
                "open", 60, 52, [_small("open 1,024 bytes in memory", "envelope, bound file", 1e6)], "µs"
            ),
        ],
    ),
    Row(
        "hostile 64 KiB header refused; 1,000 recipients opened",
        "pyrage",
        [
            at_most(
                "refused", 5, 1.5, [_small(_HOSTILE, f"envelope, limits of a {of}") for of in _LIMITS], "ms"
            ),
            at_most("opened", 60, 45, [_small(_MANY, "envelope, in process")], "ms"),
        ],
    ),
    Row(
        "POST /encrypt, /decrypt, 16 B and 1 KiB, 16, 64 connections, 2 API processes, auth, audit, metrics",
        "OpenBao transit with file audit",
        [
            Goal("requests a second", 1.2, 1.6, _calls(_AUDIT, "rate", 16, 64)),
            at_most("p99", 0.5, 1 / 3, _calls(_AUDIT, "p99_s", 16, 64)),
        ],
    ),
    Row(
        "the same",
        "OpenBao transit, no audit",
        [Goal("requests a second", 0.8, 1.1, _calls(_NO_AUDIT, "rate", 16, 64))],
    ),
    Row(
        "the same, 1 connection",
        "OpenBao, no audit",
        [at_most("p50", 2.0, 1.3, _calls(_NO_AUDIT, "p50_s", 1))],
    ),
    Row(
        "POST /batch, 100 items, 1 and 16 connections",
        "OpenBao batch_input with file audit",
        [Goal("", 2.0, 5.0, _doors("Batches of 100 x 16 B, each a request", "kms: POST /batch"))],
    ),
    Row(
        "POST /encrypt and /decrypt, 16 B, 16 and 64 connections, OpenBao with share=5m",
        "an Age key",
        [Goal("requests a second", 0.95, 1.2, _shared())],
    ),
    Row(
        "remote calls for 1,000 of these",
        "-",
        [
            at_most(
                "", 2, 0.1, [value("wrapkeys", "shared, remote calls", "1,000 operations", "calls")], "calls"
            )
        ],
    ),
    Row(
        "Backend.wrap in process, transit, without share: 64 callers",
        "16 callers",
        [Goal("", 1.0, 1.2, [_crowded()])],
    ),
    Row(
        "the same",
        "OpenBao alone",
        [
            Goal(
                "",
                0.7,
                0.9,
                [ratio("wrapkeys", "waiting, 64", ("Backend.wrap, transit", "OpenBao alone"), "rate")],
            )
        ],
    ),
    Row(
        "POST /batch, 100 items of 16 B, native=false, 16 and 64 connections",
        "OpenBao batch_input with file audit",
        [
            Goal(
                "",
                0.35,
                0.45,
                [
                    ratio(
                        "wrapkeys",
                        f"Batches of 100 x 16 B, each a request, {many}",
                        ("kms: Age key, native=false", _AUDIT),
                        "rate",
                    )
                    for many in (16, 64)
                ],
            )
        ],
    ),
    Row(
        "bulk job, items of 1 KiB, native=false",
        "with native stanzas",
        [
            Goal(
                "", 1.4, 2.0, [ratio("wrapkeys", "bulk job", ("native=false", "with native stanzas"), "rate")]
            )
        ],
    ),
    Row(
        "POST /encrypt, 1 KiB, in process, an API token",
        "no credential",
        [
            at_most(
                "",
                1.3,
                1.15,
                [ratio("auth", "POST /encrypt, 1,024 B, in process", (_TOKEN, _OPEN), "seconds")],
            )
        ],
    ),
    Row(
        "the same, all metrics, one process and one of several",
        "no metrics",
        [
            at_most(
                "",
                1.05,
                1.02,
                [ratio("metrics", "calls", (name, bare), "seconds") for name, bare in _METRICS],
            )
        ],
    ),
    Row(
        "POST /encrypt, 1 KiB, 1 and 16 connections, 2 API processes, a token, each record written",
        "no credential, no audit log",
        [
            Goal(
                "requests a second",
                0.7,
                0.85,
                [ratio("overhead", f"POST /encrypt, 1,024 B, {many}", _WAYS, "rate") for many in (1, 16)],
            )
        ],
    ),
    Row(
        "the same, 4 connections, beside 670 connections of another tenant's token that misbehaves",
        "alone",
        [
            at_most(
                "p99", 3.0, 1.5, [ratio("crowd", "POST /encrypt, 1,024 B, 4 connections", _CROWD, "p99_s")]
            )
        ],
    ),
    Row(
        "an audit record with its hashes; 1,000,000 records verified",
        "-",
        [
            at_most("record", 50, 30, [value("audit", *_RECORD, "seconds", 1e6)], "µs"),
            at_most("verified", 15, 6, [_verified()], "s"),
        ],
    ),
    Row(
        "encrypt and decrypt, 16 B, in process, a sealed Age key; calls to its root after the start",
        "a plain Age key",
        [
            at_most("time", 1.1, 1.02, [ratio("sealed", *_SEALED, "seconds")]),
            at_most("calls", 0, 0, [value("sealed", "calls", "after the start", "calls")], ""),
        ],
    ),
    Row(
        "wraps by a Cosmian KMS server, 64 callers, together",
        "a message each",
        [Goal("", 4.0, 10.0, [ratio("cosmian", "64 callers", ("together", "a message each"), "rate")])],
    ),
    Row(
        "calls of the Python client, one after the other",
        "`hvac` on the Vault API of the same service",
        [Goal("", 1.0, 1.3, [ratio("client", *_CLIENTS, "rate")])],
    ),
    Row(
        "one object of 1 GiB to another, encrypted",
        "`obstore`, get and put",
        [Goal("", 1.0, 1.2, [ratio("s3", "object", ("obstore, get and put", "kms, encrypt"), "seconds")])],
    ),
    Row(
        "PUT /v1/transit/encrypt, the Vault API, 1 and 16 connections",
        "OpenBao with file audit",
        [Goal("", 1.0, 1.5, _doors("PUT by the Vault API, 1,024 B", "kms: Vault API"))],
    ),
    Row(
        "job: submit to done, idle worker, AOF always",
        "bare Celery no-op with result",
        [
            at_most("p50 in process", 1.2, 1.0, [_job(_ITEM)]),
            at_most("over HTTP", 1.5, 1.3, [_job(_HTTP_ITEM)]),
        ],
    ),
    Row(
        "1,000 jobs of one item at once, 2 processes",
        "bare Celery no-op with result",
        [Goal("", 1.2, 2.0, [ratio("jobs", "all at once", (_ITEM, _NOTHING), "rate")])],
    ),
    Row(
        "bulk job, items of 1 KiB per second, 2-core worker",
        "the crypto alone in 2 processes",
        [Goal("", 60, 75, [ratio("jobs", "bulk", (name, _CRYPTO), "rate", 100) for name in _BULK], "%")],
    ),
    Row(
        "bulk job, items of 1 KiB per second, 2 processes, Redis and sender included",
        "one process",
        [Goal("", 1.6, 1.9, [ratio("jobs", "processes", ("two processes", "one process"), "rate")])],
    ),
    Row(
        "list by state, page of 50; status; metrics: 100,000 jobs",
        "100 jobs",
        [
            at_most(
                name,
                3.0,
                1.5,
                [ratio("waiting", table, (_MANY_JOBS, _FEW_JOBS), "p50_s") for table in tables],
            )
            for name, *tables in (
                ("list", "list by state, page of 50"),
                ("status", "status of a job", "status of the service"),
                ("metrics", "metrics"),
            )
        ],
    ),
    Row(
        "second attempt after a killed worker, 100,000 jobs queued for another queue, less the lease",
        "-",
        [at_most("", 5, 2, [value("waiting", "second attempt", _MANY_JOBS, "over_s")], "s")],
    ),
    Row(
        "idle Redis commands a second of one API and one worker: 100,000 queued for a queue without workers; "
        "100,000 behind a cap",
        "-",
        [
            at_most(name, 50, 10, [value("waiting", "idle", f"{_MANY_JOBS}, of a {of}", "rate")], "")
            for name, of in (
                ("not served", "queue without workers"),
                ("behind a cap", "tenant at its cap"),
            )
        ],
    ),
    Row(
        "a small tenant's job behind 10,000 of a big one, 2 processes: jobs of the big one before it",
        "-",
        [
            at_most(
                "",
                2,
                1,
                [value("sharing", "small tenant", "behind 10,000 of another tenant", "worst")],
                "jobs",
            )
        ],
    ),
    Row(
        "the same beside two large files of the big one: begun within",
        "-",
        [
            at_most(
                "",
                2,
                0.3,
                [value("sharing", "beside files", "beside two large files of another tenant", "worst_s")],
                "s",
            )
        ],
    ),
    Row(
        "one host whose processes are all in long files, one idle host, one job, ten times: begun within",
        "-",
        [
            at_most(name, 2, 0.1, [value("sharing", "idle host", name, "worst_s")], "s")
            for name in ("Redis", "RabbitMQ")
        ],
    ),
    Row(
        "two hosts, 1,000 jobs waiting: until both are busy",
        "-",
        [
            at_most("", 1, 0.5, [_two_hosts(name) for name in _STARTS], "s"),
        ],
    ),
    Row(
        "fail-over, replica 1.5 s behind, 4,000 acknowledged jobs",
        "-",
        [
            *(
                at_most(what, 0, 0, [_failover("wait_replicas = 1", what)], "")
                for what in ("lost", "turned", "left")
            ),
            at_most("turned without wait", math.inf, 0, [_failover("no wait", "turned")], ""),
        ],
    ),
    Row(
        "`kms encrypt`, `kms status` wall time",
        "`bao write`, `sops -e` (near: at most a quarter more)",
        [
            at_most("of `bao write`", 1.0, 1.0, _cli("`bao write transit/encrypt`")),
            at_most("of `sops -e`", math.inf, 1.25, _cli("`sops -e`")),
        ],
    ),
    Row(
        "1 GiB over HTTP through an encrypt job, up and down, the spool in a bucket on the same machine",
        "the spool in a directory",
        [
            Goal(
                store, 0.4, 0.6, [_spool(ratio("spool", "file", (_DIRECTORY, _in_bucket(store)), "seconds"))]
            )
            for store in ("SeaweedFS", "MinIO")
        ],
    ),
    Row(
        "1,000 jobs of one item at once, the spool in a bucket that they do not need",
        "the spool in a directory",
        [Goal("", 1.0, 1.3, [ratio("spool", "small jobs", (_in_bucket("SeaweedFS"), _DIRECTORY), "rate")])],
    ),
    Row(
        "requests to the bucket of the spool: small job; file of 1 GiB, up, job, down and removal",
        "-",
        [
            at_most("small job", 0, 0, [value("spool", "requests", "small job", "calls")], ""),
            at_most("file", 180, 130, [_spool(value("spool", "requests", "file", "calls"))], ""),
        ],
    ),
    Row(
        "RSS of an API process with 16 uploads to the bucket under way, less `buffer_bytes`",
        "-",
        [at_most("", 90, 90, [value("spool", "memory", "API", "beyond", 1 / _MIB)], "MiB")],
    ),
    Row(
        "a script of Redis where its work is largest, least of five runs",
        "-",
        [at_most("", 50, 10, [value("scripts", "scripts", bound.name, "ms") for bound in BOUNDS], "ms")],
    ),
    Row(
        "RSS: API idle, worker idle; Redis per queued job",
        "-",
        [
            *(
                at_most(of, 90, 70, [value("jobs", "room", "idle", of, 1 / _MIB)], "MiB")
                for of in ("API", "worker")
            ),
            at_most("job", 2, 1, [value("jobs", "room", "queued job", "memory", 1 / 1024)], "KiB"),
        ],
    ),
    Row(
        "growth: file size 1 MiB to 16 GiB, items 10 to 100,000, workers 1 to 2, queue depth 10 to 100,000",
        "a line",
        [
            at_most(name, 15, 5, _off(to, *what), "%")
            for name, to, what in (
                ("file size", _LARGEST_MIB, ("seal a file", "open a file")),
                ("items", 100_000, ("items of a job",)),
                ("workers", 2, ("workers",)),
                ("depth", 100_000, ("submit at depth", "claim at depth")),
            )
        ],
    ),
)


def _bounded() -> list[Row]:
    """The rows with what bounds them."""
    bounds = tomllib.loads(Path(__file__).with_name("bounds.toml").read_text())["bound"]
    notes = {(bound["row"], bound["peer"]): bound["text"] for bound in bounds}
    rows = [replace(row, note=notes.pop((row.question, row.peer), "")) for row in ROWS]
    if notes:
        raise ValueError(f"no goal has these names: {list(notes)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench goals", description="Figures against the goals.")
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="file to write into [%(default)s]"
    )
    parser.add_argument("--forget", action="store_true", help="drop the figures of former runs, and end")
    given, _ = parser.parse_known_args()  # a whole run passes on what it was given
    files = sorted(report.kept_in(given.results).glob("*.json"))
    if given.forget:
        for file in files:
            file.unlink()
        return
    kept = {file.stem: json.loads(file.read_text()) for file in files}
    figures = {name: each["figures"] for name, each in kept.items()}
    text = table(_bounded(), figures, {name: each["run"] for name, each in kept.items()})
    sys.stdout.write(f"{text}\n")
    report.put(given.results, "goals", text)


if __name__ == "__main__":
    main()
