"""AWS KMS for the contract: moto, reached through a relay that can be cut."""

import functools

from kms_core.backends import Backend
from kms_core.backends.aws.backend import AwsCipher
from kms_core.backends.aws.client import AwsKmsClient
from kms_core.backends.remote import RemoteBackend
from support.aws_servers import calls_to, moto
from support.tcp_proxy import TcpProxy


@functools.cache
def relay() -> TcpProxy:
    """One for all tests: each new rig finds it whole."""
    return TcpProxy(moto().port)


@functools.cache
def calls() -> AwsKmsClient:
    return calls_to(relay().url)


class AwsRig:
    """Two aliases of an account; rotation as the service does it."""

    def __init__(self) -> None:
        relay().mend()
        self.backend: Backend = RemoteBackend(AwsCipher(calls(), moto().new_alias()))
        self.other: Backend = RemoteBackend(AwsCipher(calls(), moto().new_alias()))

    def rotate(self) -> None:
        self.backend.rotate()

    def break_it(self) -> None:
        relay().cut()

    def mend(self) -> None:
        relay().mend()
