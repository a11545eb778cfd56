"""``v2/tokens-document.json``: a signed document with tokens, opened with the keys of the golden set."""

from pathlib import Path
from typing import Final

from kms_core.auth.tokens import DOCUMENT_INFO, DOCUMENT_NAME
from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.storage import FileStorage
from kms_core.jobs.model import RecordKey
from support.golden import golden_set
from support.golden.jobs import SECRET

PATH: Final = golden_set.V1.parent / "v2/tokens-document.json"


def document_at(path: Path) -> SignedDocument:
    """The document in a file, with the keys of the golden set; without Redis."""
    key = RecordKey((SECRET,)).derived(DOCUMENT_INFO)
    anchors = Anchors(DOCUMENT_NAME, path.parent, None, key)
    return SignedDocument(DOCUMENT_NAME, FileStorage(path), key, anchors)
