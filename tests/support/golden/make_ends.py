"""Makes ``v2/ends.json``: ``PYTHONPATH=src:tests .venv/bin/python -m support.golden.make_ends``.

Job records whose ends are signed, as their fields lie in Redis. Refuses where the file exists: it is made
once, by the code whose formats it holds, and never again.
"""

import json
import sys

import msgspec

from kms_core.jobs.ends import SignedEnd, SignedSplit, spec_digest
from kms_core.jobs.model import Checkpoint, Commit
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.spec import JobSpec, of_flat
from support.golden import expected_ends as expected
from support.golden.jobs import SECRET
from support.golden.manifest import b64


def main() -> int:
    if expected.PATH.exists():
        print(f"{expected.PATH} exists, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    expected.PATH.parent.mkdir(exist_ok=True)
    expected.PATH.write_text(json.dumps(_records(RecordKey((SECRET,))), indent=1) + "\n")
    return 0


def _records(key: RecordKey) -> dict[str, dict[str, str]]:
    sealed = {name: key.seal(_accepted(name)) for name in expected.RECORDS}
    found: dict[str, dict[str, str]] = {}
    for name in sealed:
        plain = {field: value.encode() for field, value in expected.PLAIN[name].items()}
        found[name] = {field: b64(value) for field, value in (plain | _signed(key, name, sealed)).items()}
    return found


def _accepted(name: str) -> JobSpec:
    return of_flat(expected.RECORDS[name])


def _signed(key: RecordKey, name: str, sealed: dict[str, bytes]) -> dict[str, bytes]:
    job_id, spec = str(expected.RECORDS[name]["job_id"]), spec_digest(sealed[name])
    found = {"sealed": sealed[name]}
    if name in expected.ENDS:
        end = msgspec.convert(expected.ENDS[name] | {"result_digest": expected.DIGEST}, SignedEnd)
        found["end"] = key.sign_end(job_id, end, spec)
    if name in expected.COMMITS:
        found["commit"] = key.sign_commit(job_id, msgspec.convert(expected.COMMITS[name], Commit), spec)
    if name in expected.LOGS:
        found["log"] = key.sign_log(job_id, msgspec.convert(expected.LOGS[name], Checkpoint), spec)
    if name == "whole":
        parts = SignedSplit(parts=2, digest=spec_digest(sealed["part-0"], sealed["part-1"]))
        found["split"] = key.sign_split(job_id, parts, spec)
    return found


if __name__ == "__main__":
    sys.exit(main())
