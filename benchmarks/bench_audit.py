"""What the audit log costs: one record, chained and not; records that wait for the disk; verification.

A run of records is a batch of some 100 ms. Verification reads a log that it makes first.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, Literal

import msgspec
from benchmarks import report
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Scale

from kms_core.age.x25519 import X25519Identity
from kms_core.audit import AuditRecord, query
from kms_core.audit.hosts import HostLog
from kms_core.audit.keys import Concealer, PublicKeys, Signer, public_path
from kms_core.audit.log import AuditLog
from kms_core.audit.verification import receipt
from kms_core.audit.verification.verify import verify
from kms_core.auth.policy import AllowAll, Principal
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.key_selection import SelectionRules as CallRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_core.settings.model import AuditSection
from kms_protocol.context import Context

CONTEXT: Final = Context.parse("env=prod,service=api")
THREADS: Final = 16  # as many as the API has for calls that wait
TOGETHER: Final = 500  # the items of one part of a bulk job
_BATCH_S: Final = 0.1
_WHO: Final = Principal("bench")
_MICRO: Final = Scale(unit="µs a record", factor=1e6, digits=1)
_CALL: Final = Scale(unit="µs a call", factor=1e6, digits=1)
_SECONDS: Final = Scale(unit="s", digits=2)
_MILLI: Final = Scale(unit="ms", factor=1e3, digits=2)


class NoLog:
    """An audit log that keeps nothing: the cost of a call without one."""

    def conceal(self, tenant: str, context: Context) -> dict[str, str]:
        del tenant, context
        return {}

    def append(self, record: AuditRecord) -> str:
        del record
        return ""

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        """Nothing to check."""


def main() -> None:
    options = report.options("audit", "What the audit log costs.", runs=9, budget_s=35.0, lines=1_000_000)
    budget = options.budget(4)
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as name:
        folder = Path(name)
        groups = (
            ("one record of two context pairs", _records(folder), _MICRO),
            ("one record on disk (fsync)", _synced(folder), _MICRO),
            ("seal 1 KiB in memory", _calls(folder), _CALL),
        )
        parts = [
            report.table(title, options.keep(title, in_turn(contenders, options.plan, budget.share())), scale)
            for title, contenders, scale in groups
        ]
        count = int(options.given.lines)
        middle = _written(folder / "long", count)
        found = in_turn(_verifications(folder / "long"), options.plan, budget.share())
        title = f"verify {count:,} lines ({_size(folder / 'long'):.0f} MB)"
        parts.append(report.table(title, options.keep("verify", found), _SECONDS))
        options.note("verify", "lines", {"count": count})
        found = in_turn(_looks(folder / "long", middle), options.plan, 10.0)
        parts.append(report.table(f"read in {count:,} lines", found, _MILLI))
    options.write(parts)


def log_in(folder: Path, durability: Literal["write", "fsync"] = "write") -> AuditLog:
    folder.mkdir(exist_ok=True)
    section = AuditSection(
        path=folder / "audit",
        key_path=folder / "audit.key",
        signing_key_path=folder / "signing.key",
        durability=durability,
    )
    concealer, signer = Concealer.at(section.key_path), Signer.at(section.signing_key_path)
    return AuditLog(section, "bench", concealer, signer)


def record(log: AuditLog) -> AuditRecord:
    """As a call of 1 KiB leaves it."""
    return AuditRecord(
        operation="encrypt",
        principal="local",
        tenant="default",
        credential="none",
        request_id="4f1f7bd1a1a14e0f8e3f0d6a6c0b9f4e",
        key_id="default",
        key_version="cfa7154b",
        backend="age",
        context=log.conceal("default", CONTEXT),
        bytes_in=1024,
        bytes_out=1410,
        result="ok",
        duration_us=151,
    )


def many(name: str, function: Callable[[], object], each: int = 1) -> Contender:
    """A batch of calls; seconds are of one record, of which a call makes ``each``."""
    function()
    started = time.perf_counter()
    function()
    count = max(1, int(_BATCH_S / (time.perf_counter() - started)))

    def batch() -> Reading:
        started = time.perf_counter()
        for _ in range(count):
            function()
        return {"seconds": (time.perf_counter() - started) / count / each}

    return Contender(name, batch)


def _records(folder: Path) -> list[Contender]:
    log = log_in(folder / "one")
    plain = os.open(folder / "plain", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    return [
        many("AuditLog.append, with record and hashes", lambda: log.append(record(log))),
        many("the same as a plain line, one write", lambda: os.write(plain, _plain(log))),
        many("its context hashes alone", lambda: log.conceal("default", CONTEXT)),
    ]


def _plain(log: AuditLog) -> bytes:
    return msgspec.json.encode(record(log)) + b"\n"


def _synced(folder: Path) -> list[Contender]:
    log = log_in(folder / "synced", "fsync")
    pool = ThreadPoolExecutor(THREADS)

    def together() -> None:
        with log.together():
            for _ in range(TOGETHER):
                log.append(record(log))

    def at_once() -> None:
        list(pool.map(lambda _: log.append(record(log)), range(THREADS * 4)))

    return [
        many(f"{THREADS} threads share syncs", at_once, THREADS * 4),
        many("one thread", lambda: log.append(record(log))),
        many(f"{TOGETHER} of a batch share one sync", together, TOGETHER),
    ]


def _calls(folder: Path) -> list[Contender]:
    file = folder / "identity"
    file.touch(0o600)
    file.write_text(f"{X25519Identity.generate().export()}\n")
    key = Key("default", AgeBackend(KeyFiles(file)), accept_foreign=True)
    ring, plaintext = Keyring({"default": key}, key), os.urandom(1024)
    audited = Kms(ring, AllowAll(), log_in(folder / "calls"), CallRules())
    bare = Kms(ring, AllowAll(), NoLog(), CallRules())
    return [
        many("Kms.encrypt, audited", lambda: audited.encrypt(_WHO, plaintext, CONTEXT)),
        many("Kms.encrypt, no audit log", lambda: bare.encrypt(_WHO, plaintext, CONTEXT)),
    ]


# -- long logs ---------------------------------------------------------------------------------------


def _written(folder: Path, count: int) -> str:
    """A log of so many records; the id of one in the middle."""
    log = log_in(folder)
    made = record(log)
    middle = ""
    for number in range(count):
        name = log.append(made)
        if number == count // 2:
            middle = name
    log.close()
    return middle


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in (folder / "audit").iterdir()) / 1e6


def _verifications(folder: Path) -> list[Contender]:
    keys = PublicKeys.read(public_path(folder / "signing.key"))

    def checked() -> Reading:
        found = verify(folder / "audit", keys)
        if found.verdict != "intact":
            raise RuntimeError(found.verdict)
        return {"seconds": found.seconds}

    return [Contender("one process", checked)]


def _looks(folder: Path, name: str) -> list[Contender]:
    audit, wanted = folder / "audit", query.EventFilter()
    logs = [HostLog("", audit)]
    after = query.page(logs, wanted, None, 100).following
    return [
        many("a page of 100 behind a cursor", lambda: query.page(logs, wanted, after, 100)),
        many("the newest 20", lambda: query.newest(logs, wanted, 20)),
        many("a receipt from the middle", lambda: receipt.make(audit, name)),
    ]


if __name__ == "__main__":
    main()
