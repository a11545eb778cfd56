"""Makes ``v2/records.json``: ``PYTHONPATH=src:tests .venv/bin/python -m support.golden.make_records``.

Sealed records that say their kind. Refuses where the file exists: it is made once, by the code whose formats
it holds, and never again.
"""

import json
import sys
from typing import Any

import msgspec

from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.spec import AnyJob
from support.golden import expected_records as expected
from support.golden.jobs import SECRET
from support.golden.manifest import b64


def main() -> int:
    if expected.PATH.exists():
        print(f"{expected.PATH} exists, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    made = {name: b64(_sealed(record)) for name, record in expected.RECORDS.items()}
    expected.PATH.write_text(json.dumps(made, indent=1) + "\n")
    return 0


def _sealed(record: dict[str, Any]) -> bytes:
    return RecordKey((SECRET,)).seal(msgspec.convert(record, AnyJob))


if __name__ == "__main__":
    sys.exit(main())
