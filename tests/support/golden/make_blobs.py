"""Makes ``v2/blobs.json``: ``PYTHONPATH=src:tests .venv/bin/python -m support.golden.make_blobs``.

Blobs of the spool with their MACs, and a job record that names one of them. Refuses where the file exists: it
is made once, by the code whose formats it holds, and never again.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.spec import of_flat
from kms_core.jobs.storage.disk_sync import DiskSync
from kms_core.jobs.storage.spool import Label, Spool
from kms_core.jobs.storage.spool_folder import SpoolFolder
from support.golden import expected_blobs as expected
from support.golden import manifest
from support.golden.jobs import SECRET
from support.golden.manifest import b64

_MAX_BYTES = 1024 * 1024 * 1024


def main() -> int:
    if expected.PATH.exists():
        print(f"{expected.PATH} exists, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    expected.PATH.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="kms-golden-") as scratch:
        expected.PATH.write_text(json.dumps(_made(Path(scratch)), indent=1) + "\n")
    return 0


def _made(folder: Path) -> dict[str, dict[str, str]]:
    key = AgeBackend(KeyFiles(manifest.copied("keys/spool.txt", folder)))
    records = RecordKey((SECRET,))
    spool = Spool(SpoolFolder(folder, DiskSync(folder)), key, records, _MAX_BYTES)
    found = {name: _blob(spool, folder, name) for name in (*expected.AS_THEY_ARE, *expected.SEALED)}
    record = expected.RECORD | {"input_ref": manifest.unb64(found["upload"]["ref"])}
    found["record"] = {"sealed": b64(records.seal(of_flat(record)))}
    return found


def _blob(spool: Spool, folder: Path, name: str) -> dict[str, str]:
    tenant, job_id, role, attempt = expected.names(name)
    content = expected.AS_THEY_ARE.get(name)
    with spool.writing(Label(tenant, job_id, role, attempt), sealed=content is None) as out:
        out.write(content or expected.PLAIN)
    stored = (folder / job_id / name).read_bytes()
    return {"ref": b64(out.ref), "stored": b64(stored[len(content or b"") :])}


if __name__ == "__main__":
    sys.exit(main())
