"""Connections to the object stores that settings name, and the signed documents in them."""

from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec
import redis

from kms_core.age.header import hkdf
from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.key_document import INFO
from kms_core.documents.storage import FileStorage, ObjectStorage, Storage
from kms_core.redis_client import connect_once
from kms_core.s3 import connection
from kms_core.s3.bucket import Bucket
from kms_core.s3.connection import S3Connection, S3Endpoint
from kms_core.settings.model import Settings, StoreSection
from kms_protocol.tls_client import client_context

_TIMEOUT_S: Final = 2.0
_REDIS_S: Final = 1.0


def s3_connection(where: str, section: StoreSection, *, strict: bool) -> S3Connection:
    """The connection to the store of a section, ``where`` in the settings. Raises ConfigurationError."""
    endpoint = section.endpoint or f"https://s3.{section.region}.amazonaws.com"
    if section.access_key_id and section.secret_key_file:
        credentials = connection.credentials_from_file(
            section.access_key_id, section.secret_key_file, f"{where}.secret_key_file", strict=strict
        )
    else:
        credentials = connection.credentials_from_environment(where)
    trust = client_context(section.ca_file, f"{where}.ca_file") if endpoint.startswith("https:") else None
    return S3Connection(S3Endpoint(endpoint, section.region, credentials, trust, section.timeout_s))


def documents_folder(settings: Settings) -> Path:
    """The folder of this host's copies and anchors."""
    return settings.state_dir.absolute() / "documents"


def document_storage(settings: Settings, url: str) -> Storage:
    """The storage at ``file:///path`` or ``s3://bucket/key``, which settings have checked.

    Each answer of a store may take two seconds at most. Raises ConfigurationError.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3":
        return FileStorage(Path(unquote(parts.path)))
    section = settings.kms.jobs.buckets[parts.netloc]
    section = msgspec.structs.replace(section, timeout_s=min(_TIMEOUT_S, section.timeout_s))
    store = s3_connection(f"kms.jobs.buckets.{parts.netloc}", section, strict=settings.is_prod)
    return ObjectStorage(Bucket(parts.netloc, store, path_style=section.path_style), parts.path.lstrip("/"))


def anchor_client(settings: Settings) -> redis.Redis:
    """A client of Redis that gives up after a second: a poll must not wait for it."""
    return connect_once(settings.kms.redis, timeout_s=_REDIS_S)


def key_document(settings: Settings, secret: bytes, name: str, url: str) -> SignedDocument:
    """The document of a key, authenticated by a key of this ``secret``. Raises ConfigurationError."""
    key, document = hkdf(secret, salt=b"", info=INFO), f"key-{name}"
    anchor_key = hkdf(secret, salt=b"", info=INFO + b"/anchor/" + name.encode())  # of this document only
    client = anchor_client(settings)
    anchors = Anchors(document, documents_folder(settings), client, anchor_key, f"kms keys adopt {name}")
    return SignedDocument(document, document_storage(settings, url), key, anchors)
