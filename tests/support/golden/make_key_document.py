"""Makes ``v2/key-document.json``: ``PYTHONPATH=src:tests python -m support.golden.make_key_document``.

A signed document with the sealed identities of an Age key, and these in clear. Refuses where the file
exists: it is made once, by the code whose formats it holds, and never again.
"""

import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kms_core.age.x25519 import X25519Identity
from kms_core.envelope.sealed_files import FileSealer
from kms_core.jobs.model import RecordKey
from kms_core.key_documents import INFO, KeyDocument
from kms_core.keyring import Key
from kms_core.signed_documents import Anchors, FilePlace, LocalCopy, SignedDocument
from support.golden import backends, manifest
from support.golden.jobs import SECRET

PATH: Final = manifest.V1.parent / "v2/key-document.json"
NAME: Final = "orders"


def document_at(path: Path) -> KeyDocument:
    """The key in a file, with the keys of the golden set; its root is an Age key. Without Redis."""
    secret = RecordKey((SECRET,)).derived(INFO)
    document = SignedDocument(
        f"key-{NAME}", FilePlace(path), secret, Anchors(f"key-{NAME}", path.parent, None, secret)
    )
    sealer = FileSealer(lambda: {"root": Key("root", backends.age("age-x25519"))}, list)
    return KeyDocument(NAME, document, LocalCopy(document, path.parent, math.inf), sealer)


def _block() -> bytes:
    """The lines of a new identity."""
    made = X25519Identity.generate()
    lines = f"# created: 2026-11-27T00:00:00Z\n# public key: {made.recipient}\n{made.export()}\n"
    return lines.encode()


def main() -> int:
    if PATH.exists():
        print(f"{PATH} exists, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    with TemporaryDirectory(prefix="kms-golden-") as scratch:
        path = Path(scratch) / "document"
        (path.parent / f"key-{NAME}.anchor").write_text(json.dumps({"generation": 0, "write_id": ""}))
        key = document_at(path)
        first, second = _block(), _block()
        key.make(first, "root")
        key.add(second)
        made = {"stored": path.read_text(), "first": first.decode(), "second": second.decode()}
    PATH.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
