"""``v2/key-document.json``: a signed document with a sealed Age key, opened with the keys of the set."""

import math
from pathlib import Path
from typing import Final

from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.key_document import INFO, KeyDocument
from kms_core.documents.local_copy import LocalCopy
from kms_core.documents.storage import FileStorage
from kms_core.envelope.sealed_files import FileSealer
from kms_core.jobs.model import RecordKey
from kms_core.keyring import Key
from support.documents import no_documents
from support.golden import backends, golden_set
from support.golden.jobs import SECRET

PATH: Final = golden_set.V1.parent / "v2/key-document.json"
NAME: Final = "orders"


def document_at(path: Path) -> KeyDocument:
    """The key in a file, with the keys of the golden set; its root is an Age key. Without Redis."""
    secret = RecordKey((SECRET,)).derived(INFO)
    document = SignedDocument(
        f"key-{NAME}", FileStorage(path), secret, Anchors(f"key-{NAME}", path.parent, None, secret)
    )
    sealer = FileSealer(lambda: {"root": Key("root", backends.age("age-x25519"))}, list, no_documents)
    return KeyDocument(NAME, document, LocalCopy(document, path.parent, math.inf), sealer)
