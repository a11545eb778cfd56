"""Python client of the service, sync and async; knows the wire only, never a server's inside.

>>> from kms_client import Client
>>> with Client("http://localhost:8082") as kms:                      # doctest: +SKIP
...     sealed = kms.encrypt(b"secret-data", context="env=prod,service=api")
...     kms.decrypt(sealed.ciphertext, context="env=prod,service=api").plaintext
b'secret-data'
"""

from kms_client.aio import AsyncClient
from kms_client.requests import ServiceUnreachable, UnexpectedAnswer, job_error
from kms_client.settings import DEFAULT_URL, Options
from kms_client.sync import Client
from kms_protocol import admin, errors, wire
from kms_protocol.errors import KmsError

__all__ = [
    "DEFAULT_URL",
    "AsyncClient",
    "Client",
    "KmsError",
    "Options",
    "ServiceUnreachable",
    "UnexpectedAnswer",
    "admin",
    "errors",
    "job_error",
    "wire",
]
