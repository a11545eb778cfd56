"""Signed calls to AWS KMS: one POST for each, with typed answers and our errors.

botocore provides credentials and their renewal, the address of a region and proxies. ``Peer`` sends the
requests, which bounds answers in time and size. Protocol: AWS JSON 1.1 (Smithy), signature version 4.
Errors contain no text of an answer, since AWS quotes requests in some.
"""

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from kms_core.backends import KeyMissing
from kms_core.backends.aws.settings import AwsKmsSection
from kms_core.http_client import Busy, Peer, PeerAnswer, PeerServer, Tls, Unreachable
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed, KmsError

try:
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.config import Config
    from botocore.credentials import ReadOnlyCredentials
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.session import Session
    from botocore.utils import get_environ_proxies
except ImportError as exc:
    raise ConfigurationError("Keys in AWS KMS need another package: run `pip install botocore`") from exc

Shape = TypeVar("Shape")
Parameters = Mapping[str, object]
_CREDENTIALS: Final = "AWS does not accept these credentials: {} (kms.awskms.profile, or the AWS_* variables)"
_IAM_REFUSAL: Final = "not authorized to perform"  # IAM User Guide, "access denied error messages"
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,80}")


class ErrorCodes(msgspec.Struct, frozen=True):
    """The content of ``errors.toml``."""

    busy: frozenset[str]
    ciphertext: frozenset[str]
    advice: dict[str, str]
    credentials: dict[str, str]


ERRORS: Final = msgspec.toml.decode(Path(__file__).with_name("errors.toml").read_bytes(), type=ErrorCodes)
ADVICE: Final[Mapping[str, str]] = ERRORS.advice | {
    code: _CREDENTIALS.format(reason) for code, reason in ERRORS.credentials.items()
}
"""Advice for permanent errors, which are not retried."""


class _Problem(msgspec.Struct):
    """Smithy, AWS JSON 1.1, "operation error serialization": ``__type`` may carry a namespace and a URI."""

    kind: str = msgspec.field(name="__type")
    message: str | None = None

    @property
    def code(self) -> str:
        return self.kind.rpartition("#")[2].partition(":")[0]


class AwsKmsClient:
    """AWS KMS in one region with one set of credentials; safe for several threads."""

    def __init__(self, endpoint: AwsKmsSection, session: Session | None = None) -> None:
        """Read AWS's configuration files, without a call. Raises ConfigurationError.

        ``endpoint`` has the address and the credentials.
        """
        try:
            self._session = session or _session(endpoint)
            url, self._region = _address(self._session, endpoint)
            ca_file = endpoint.ca_file or self._session.get_config_variable("ca_bundle")
        except (BotoCoreError, ValueError) as exc:
            raise ConfigurationError(f"kms.awskms: {exc}") from exc
        self.peer = Peer(
            PeerServer(
                url,
                "AWS KMS",
                "kms.awskms.endpoint_url",
                endpoint.timeout_s,
                Tls(ca_file=Path(ca_file) if ca_file else None),
                proxy=get_environ_proxies(url).get(urlsplit(url).scheme),
            )
        )
        self._lock = threading.Lock()

    def ask(self, operation: str, parameters: Parameters, shape: type[Shape]) -> Shape:
        """Make a call within the timeout; a renewal of credentials may take one more timeout.

        Raises DecryptFailed (only Decrypt), Unreachable, Busy, BackendUnavailable.
        """
        return self.send(operation, parameters).read(shape)

    def send(self, operation: str, parameters: Parameters, *, done: str = "") -> PeerAnswer:
        """Make a call; the error code ``done`` means success too. Raises as ``ask``."""
        body = msgspec.json.encode(parameters)  # bytes as base64, which AWS JSON 1.1 wants too
        answer = self.peer.call("POST", "/", body, headers=self._signed(operation, body))
        if not answer.ok:
            problem = answer.read(_Problem)
            if problem.code != done:
                raise _call_error(operation, parameters.get("KeyId"), problem)
        return answer

    def _signed(self, operation: str, body: bytes) -> dict[str, str]:
        headers = {
            "Content-Type": "application/x-amz-json-1.1",
            "X-Amz-Target": f"TrentService.{operation}",
        }
        url = self.peer.server.url.rstrip("/") + "/"
        request = AWSRequest("POST", url, headers=headers, data=body)
        SigV4Auth(self._identity(), "kms", self._region).add_auth(request)
        return dict(request.headers.items())

    def _identity(self) -> ReadOnlyCredentials:
        """Credentials for a signature; botocore renews them."""
        try:
            with self._lock:
                credentials = self._session.get_credentials()
            if credentials:
                return credentials.get_frozen_credentials()
        except (HTTPClientError, NoConnection) as exc:
            raise Unreachable("No answer from the service that gives out AWS credentials") from exc
        except (BotoCoreError, ClientError, OSError, ValueError) as exc:
            raise BackendUnavailable(
                f"There are no AWS credentials ({type(exc).__name__}): `aws sts get-caller-identity` helps"
            ) from None
        raise BackendUnavailable(
            "There are no AWS credentials: name a profile in kms.awskms.profile, or give the service a role"
        )


def _session(endpoint: AwsKmsSection) -> Session:
    session = Session(profile=endpoint.profile)
    limits = Config(
        connect_timeout=endpoint.timeout_s, read_timeout=endpoint.timeout_s, retries={"total_max_attempts": 1}
    )
    session.set_default_client_config(limits)  # for the services that issue credentials
    session.get_scoped_config()  # ProfileNotFound
    return session


def _address(session: Session, endpoint: AwsKmsSection) -> tuple[str, str]:
    """URL and region, from botocore's list of partitions. ``AWS_ENDPOINT_URL`` is ignored."""
    client = session.create_client(
        "kms",
        region_name=endpoint.region,
        endpoint_url=endpoint.endpoint_url,
        aws_access_key_id="none",  # prevents a search for some
        aws_secret_access_key="none",  # noqa: S106 -- as above
        config=Config(ignore_configured_endpoint_urls=True),  # type: ignore[call-arg]  # not in its stubs
    )
    return client.meta.endpoint_url, client.meta.region_name


def _call_error(operation: str, key: object, problem: _Problem) -> KmsError:
    """The error for an answer of AWS; ``key`` is its name in the settings or its ARN."""
    code = problem.code
    denied = code.startswith("AccessDenied") and _IAM_REFUSAL not in (problem.message or "")
    if operation == "Decrypt" and (code in ERRORS.ciphertext or denied):  # AWS calls an unknown key denied
        return DecryptFailed()
    shown = code if _CODE.fullmatch(code) else "an error without a name"
    text = f"AWS KMS answers {shown} to {operation}{f' with {key}' if key else ''}"
    if code in ERRORS.busy:
        return Busy(text)
    kind = KeyMissing if (operation, code) == ("DescribeKey", "NotFoundException") else BackendUnavailable
    advice = ADVICE.get(code, "see the AWS KMS API reference")
    return kind(f"{text}: {advice.format(call=f'kms:{operation}')}")
