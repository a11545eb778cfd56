"""Servers that speak the protocol of AWS KMS, one of each kind for the session, and stand-ins for faults.

moto encrypts and authenticates in earnest, and lets disabled keys work; ministack minds the states of keys,
and authenticates nothing but the context. Neither checks signatures: ``Script`` does.
"""

import atexit
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import boto3
from botocore.session import Session

from kms_core.backends.aws.backend import AwsCipher
from kms_core.backends.aws.client import AwsKmsClient
from kms_core.backends.aws.settings import AwsKmsSection
from kms_core.programs.tether import spawn
from support.ports import free_port, listens
from support.waiting import until_up

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient  # of boto3-stubs, which has no run-time part

REGION: Final = "us-east-1"
ACCESS_KEY: Final = "AKIDEXAMPLE"
SECRET_KEY: Final = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@dataclass(frozen=True)
class AwsServer:
    """One server, and the two ways to it: ours, and boto3 as an operator uses it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @functools.cached_property
    def admin(self) -> "KMSClient":
        return boto3.client(
            "kms",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )

    def new_key(self) -> str:
        """A key id."""
        return self.admin.create_key()["KeyMetadata"]["KeyId"]

    def new_alias(self) -> str:
        """``alias/…`` of a new key."""
        alias = f"alias/{uuid4()}"
        self.admin.create_alias(AliasName=alias, TargetKeyId=self.new_key())
        return alias

    def cipher(self, key: str) -> AwsCipher:
        return AwsCipher(calls_to(self.url), key)


@functools.cache
def _session() -> Session:
    """One for all, since it reads AWS's service descriptions."""
    session = Session()
    session.set_credentials(ACCESS_KEY, SECRET_KEY)
    return session


def calls_to(url: str, *, timeout_s: float = 10.0) -> AwsKmsClient:
    return AwsKmsClient(AwsKmsSection(region=REGION, endpoint_url=url, timeout_s=timeout_s), _session())


@functools.cache
def moto() -> AwsServer:
    port = free_port()
    return started([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)


@functools.cache
def ministack() -> AwsServer:
    port = free_port()
    hypercorn = str(Path(sys.executable).with_name("hypercorn"))
    argv = [hypercorn, "ministack.app:app", "--workers", "0", "-b", f"127.0.0.1:{port}"]  # in one process
    return started(argv, port)


def started(argv: list[str], port: int) -> AwsServer:
    """A server of this command, once its port answers; it ends with the session."""
    server = spawn(argv, env=dict(os.environ), output=subprocess.DEVNULL)
    atexit.register(_stop, server)
    until_up(server, lambda: listens(port))
    return AwsServer(port)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()
