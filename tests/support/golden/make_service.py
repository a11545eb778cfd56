"""Makes what else rests on disk, from the audit log to tokens; run by ``support.golden.make``."""

import json
import shutil
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from kms_cli.commands.migrate import MovedRecord, continued
from kms_cli.plugin.names import PluginTarget
from kms_core import audit
from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import AuditLog
from kms_core.audit.maintenance import FolderSink
from kms_core.audit.verification import receipt
from kms_core.auth import tokens
from kms_core.auth.tokens import TokenRequest
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import audit_section, room_for
from support.golden import expected_service as expected
from support.golden import install, manifest

BEGIN_NS: Final = 1_790_000_000 * 10**9
FAR: Final = datetime(2100, 1, 1, tzinfo=UTC)


def make(folder: Path) -> None:
    with TemporaryDirectory(prefix="kms-golden-") as scratch:
        install.put_keys(Path(scratch))
        audit_log(folder / "audit", Path(scratch))
        shutil.copyfile(Path(scratch) / "audit-signing.pub", folder / "audit/signing.pub")
    _tokens(folder)
    _plugin(folder / "plugin.json")
    _migrated(folder / "migrated.jsonl")
    with TemporaryDirectory(prefix="kms-golden-") as scratch:
        _codec(folder / "codec.json", Path(scratch))


# -- audit -------------------------------------------------------------------------------------------


def audit_log(folder: Path, state: Path) -> None:
    """A log with every kind of line, its anchors and a receipt; ``state`` holds the two keys."""
    folder.mkdir()
    ticks = count(BEGIN_NS, 1_234_567_000)
    section = audit_section(folder / "log", checkpoint_lines=4)
    concealer, signer = Concealer.at(state / "audit.key"), Signer.at(state / "audit-signing.key")

    def trail(role: str) -> AuditLog:
        made = AuditLog(section, role, concealer, signer, clock=lambda: next(ticks))
        made.rotate_bytes = 2500
        return made

    anchors: list[bytes] = []
    api = trail("api")
    ids = [_append(api, number, anchors) for number in range(expected.API_RECORDS)]
    api.close()
    _retiring(trail("worker"), anchors)
    for line in anchors:
        FolderSink(folder / "anchors").put(line)
    made = receipt.make(folder / "log", ids[-3])
    (folder / "receipt.json").write_bytes(msgspec.json.encode(made) + b"\n")


def _retiring(worker: AuditLog, anchors: list[bytes]) -> None:
    """A second chain: a record is refused by a full disk, and the oldest segment of the folder retired."""
    first = min(worker.folder.iterdir())
    for number in range(2):
        _append(worker, number, anchors)
    file = max(worker.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with suppress(AuditUnavailable), room_for(file.stat().st_size):
        _append(worker, 2, anchors)
    _append(worker, 3, anchors)
    worker.record_removal(json.loads(first.read_bytes().split(b"\n")[0])["time"], 1)
    first.unlink()
    worker.close()
    anchors.append(worker.last_signed)


def _append(trail: AuditLog, number: int, anchors: list[bytes]) -> str:
    fields = dict(expected.RECORD)
    hidden = trail.conceal("acme", Context.parse(expected.CONTEXT))
    record = audit.AuditRecord(**fields, principal=f"ada-{number}", context=hidden)
    made = trail.append(record)
    if trail.last_signed and trail.last_signed not in anchors:
        anchors.append(trail.last_signed)
    return made


# -- credentials -------------------------------------------------------------------------------------


def _tokens(folder: Path) -> None:
    path = folder / "tokens.json"
    texts: dict[str, str] = {}
    far = FAR - datetime.now(UTC)
    for name, (tenant, scopes, ttl) in expected.TOKENS.items():
        span = {"far": far, "none": None, "over": timedelta(seconds=-60)}[ttl]
        _, texts[name] = tokens.create(path, TokenRequest(name, tenant, scopes, span))
    _, texts["rotated-new"] = tokens.rotate(path, "rotated", far, None)
    path.with_name("tokens.json.lock").unlink(missing_ok=True)
    document = {"about": "TEST TOKENS of tests/golden: they are published, and open nothing", "texts": texts}
    (folder / "keys/tokens.json").write_text(json.dumps(document, indent=1) + "\n")


# -- the command -------------------------------------------------------------------------------------


def _plugin(path: Path) -> None:
    made = [
        PluginTarget("payroll", Context.parse({"env": "prod", "größe": "drei"}), "https://kms.example:8443"),
        PluginTarget(None, Context(), None, in_process=True),
    ]
    path.write_text(
        json.dumps([{"recipient": one.recipient(), "identity": one.identity()} for one in made], indent=1)
        + "\n"
    )


def _migrated(path: Path) -> None:
    file = manifest.entry("age-x25519/small-bound").file
    with continued(path) as out:
        for number, name in enumerate(expected.MOVED, start=1):
            source = f"{number:064x}"
            out.put(
                [
                    MovedRecord(
                        line=number, reference=name, source=source, ciphertext=file, **expected.MOVED_TO
                    )
                ]
            )


def _codec(path: Path, scratch: Path) -> None:
    """A payload of Temporal as ``/codec/encode`` answers it."""
    made = install.service(scratch, "unix:///nonexistent/valkey.sock")
    with made:
        made.start("api")
        answer = made.post("/codec/encode", {"payloads": [expected.PAYLOAD]}, headers=expected.NAMESPACE)
        path.write_text(json.dumps(answer.json(), indent=1) + "\n")
