"""Makes ``v2/tokens-document.json``: ``PYTHONPATH=src:tests python -m support.golden.make_document``.

A signed document with tokens, and their texts. Refuses where the file exists: it is made once, by the code
whose formats it holds, and never again.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kms_core.auth import tokens
from kms_core.auth.tokens import DOCUMENT_INFO, DOCUMENT_NAME, TokenRequest
from kms_core.jobs.model import RecordKey
from kms_core.signed_documents import Anchors, FilePlace, SignedDocument
from support.golden import manifest
from support.golden.jobs import SECRET

PATH: Final = manifest.V1.parent / "v2/tokens-document.json"
FAR: Final = datetime(2100, 1, 1, tzinfo=UTC)


def document_at(path: Path) -> SignedDocument:
    """The document in a file, with the keys of the golden set; without Redis."""
    key = RecordKey((SECRET,)).derived(DOCUMENT_INFO)
    anchors = Anchors(DOCUMENT_NAME, path.parent, None, key)
    return SignedDocument(DOCUMENT_NAME, FilePlace(path), key, anchors)


def main() -> int:
    if PATH.exists():
        print(f"{PATH} exists, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    with TemporaryDirectory(prefix="kms-golden-") as scratch:
        path, far = Path(scratch) / "document", FAR - datetime.now(UTC)
        document = document_at(path)
        tokens.adopt(document)
        texts = {
            name: tokens.create(document, TokenRequest(name, "acme", ("encrypt key=a-*", "status"), ttl))
            for name, ttl in (("far", far), ("forever", None), ("revoked", far))
        }
        tokens.revoke(document, "revoked")
        made = {"stored": path.read_text(), "texts": {name: text for name, (_, text) in texts.items()}}
    PATH.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
