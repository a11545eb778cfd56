"""The AWS KMS backend: symmetric keys that only AWS holds, named by alias, key id or ARN.

**Versions.** AWS can rotate the material inside a key, but a ciphertext does not name its material, so the
service could not tell which files still need a rewrap. A version is therefore a KMS key, named by its key id
(the same in each region for a multi-Region key), and rotation makes a new key under the alias. Rotation
inside AWS remains possible and is invisible here. AWS bills each version, and it must be kept while files
need it. So the schedule makes none: versions have no age here.

**History.** The alias ``alias/payroll`` points to the key that encrypts. Earlier keys are those with an alias
of the form ``alias/payroll/<their own key id>``: rotation makes it, an operator who moves the alias by hand
makes it too, and deleting it removes the key from the service. A file names its version, and this list
decides which keys may decrypt it: any other key that the credentials could use is refused.

**AAD.** AWS gets one pair of encryption context, whose value is the SHA-256 of the AAD, so that names and
context values do not reach CloudTrail.

**Rotation** needs ``kms:DescribeKey``, ``GetKeyPolicy``, ``ListResourceTags``, ``CreateKey``,
``TagResource``, ``CreateAlias`` and ``UpdateAlias``. Without these rights an operator makes the key and moves
the alias by hand; the service notices within half a minute.
"""

import hashlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit
from weakref import WeakValueDictionary

import msgspec

from kms_core.backends import Backend, KeyMissing, KeyVersion
from kms_core.backends.aws.settings import AwsKmsSection
from kms_core.backends.remote import RemoteBackend
from kms_core.http_client import Busy, Peer, PeerAnswer, PeerServer, Tls, Unreachable
from kms_protocol.errors import (
    BackendUnavailable,
    ConfigurationError,
    DecryptFailed,
    InvalidRequest,
    KmsError,
)

try:
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.config import Config
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.session import Session
    from botocore.utils import get_environ_proxies
except ImportError as exc:
    raise ConfigurationError("Keys in AWS KMS need another package: run `pip install botocore`") from exc

# Signed calls to AWS KMS: one POST for each, with typed answers and our errors.
#
# botocore provides credentials and their renewal, the address of a region and proxies. ``Peer`` sends the
# requests, which bounds answers in time and size. Protocol: AWS JSON 1.1 (Smithy), signature version 4.
# Errors contain no text of an answer, since AWS quotes requests in some.

Shape = TypeVar("Shape")
Parameters = Mapping[str, object]


CIPHERTEXT: Final = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
"""Codes of Decrypt for a wrong ciphertext, context or key."""

BUSY: Final = frozenset(
    {
        "DependencyTimeoutException",
        "InternalFailure",
        "KMSInternalException",
        "KeyUnavailableException",
        "LimitExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
"""Temporary errors. Status 503 counts as no answer, before the code is read."""

_CREDENTIALS: Final = "AWS does not accept these credentials: {} (kms.awskms.profile, or the AWS_* variables)"
_CREATE: Final = "the new key cannot be made: {}"
ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "AccessDenied": "these credentials may not: allow {call} in the key's policy or in IAM",
        "AccessDeniedException": "these credentials may not: allow {call} in the key's policy or in IAM",
        "AlreadyExistsException": "an alias of that name is there already",
        "CloudHsmClusterInvalidConfigurationException": _CREATE.format("its CloudHSM cluster is not ready"),
        "CustomKeyStoreInvalidStateException": _CREATE.format("its key store is not connected"),
        "CustomKeyStoreNotFoundException": _CREATE.format("its key store is not there"),
        "DisabledException": "the key is disabled: enable it with `aws kms enable-key`",
        "DryRunOperationException": "the call was a rehearsal",
        "ExpiredToken": _CREDENTIALS.format("they have expired"),
        "ExpiredTokenException": _CREDENTIALS.format("they have expired"),
        "IncompleteSignature": _CREDENTIALS.format("the signature is not complete"),
        "IncompleteSignatureException": _CREDENTIALS.format("the signature is not complete"),
        "InvalidAliasNameException": "the alias has a name that AWS does not allow",
        "InvalidArnException": "the key's name is not an ARN: check kms.awskms.key_id or the key's URI",
        "InvalidClientTokenId": _CREDENTIALS.format("the access key is not known"),
        "InvalidGrantTokenException": "a grant token is not valid",
        "InvalidKeyUsageException": "the key is not for symmetric encryption: name one that is",
        "InvalidMarkerException": "the list of aliases changed: the service lists them again soon",
        "InvalidSignatureException": _CREDENTIALS.format("check the secret key, the region and the clock"),
        "KMSInvalidStateException": "the key's state does not allow it: `aws kms describe-key` tells which, "
        "and `aws kms cancel-key-deletion` keeps one that waits for its deletion",
        "MalformedPolicyDocumentException": _CREATE.format("AWS refuses the old key's policy"),
        "MissingAuthenticationToken": _CREDENTIALS.format("there are none"),
        "MissingAuthenticationTokenException": _CREDENTIALS.format("there are none"),
        "NotFoundException": "the key is not there: check its name, region and account",
        "OptInRequired": _CREDENTIALS.format("the account has not opted in to this region"),
        "RequestExpired": _CREDENTIALS.format("the clock of this machine is wrong"),
        "SignatureDoesNotMatch": _CREDENTIALS.format("check the secret key, the region and the clock"),
        "TagException": _CREATE.format("AWS refuses the old key's tags"),
        "UnrecognizedClientException": _CREDENTIALS.format("the access key is not known"),
        "UnsupportedOperationException": "AWS KMS does not do that with this key",
        "ValidationException": "AWS KMS does not take the request: check the key's name",
        "XksKeyAlreadyInUseException": _CREATE.format("it is in an external key store"),
        "XksKeyInvalidConfigurationException": _CREATE.format("it is in an external key store"),
        "XksKeyNotFoundException": _CREATE.format("it is in an external key store"),
    }
)
"""Advice for permanent errors, which are not retried."""

_IAM_REFUSAL: Final = "not authorized to perform"  # IAM User Guide, "access denied error messages"
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,80}")
ALGORITHM: Final = "SYMMETRIC_DEFAULT"  # others do not authenticate a context
CONTEXT_KEY: Final = "kms-service"
CIPHERTEXT_BYTES: Final = 6144  # what Decrypt takes
KEYS_FRESH_S: Final = 60.0
MOST_PAGES: Final = 200
_PAGE: Final = 100  # the most that AWS gives
_KEY_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,80}")  # as KeyRef.version
_NAME: Final = re.compile(
    r"(?:arn:[a-z0-9-]+:kms:(?P<region>[a-z0-9-]+):[0-9]{12}:)?"
    r"(?:(?P<alias>alias/[A-Za-z0-9/_-]{1,250})|(?(region)key/)[A-Za-z0-9-]{1,80})"
)
_USAGE: Final = (
    "A key in AWS KMS is awskms:alias/name, awskms:<key id> or awskms:<ARN>, with ?region= and &profile="
)


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
        self._credentials: Credentials | None = None

    def ask(self, operation: str, parameters: Parameters, shape: type[Shape]) -> Shape:
        """Make a call within the timeout; a renewal of credentials may take one more timeout.

        Raises DecryptFailed (only Decrypt), Unreachable, Busy, BackendUnavailable.
        """
        return self._send(operation, parameters).read(shape)

    def send(self, operation: str, parameters: Parameters, *, done: str = "") -> None:
        """Make a call without an answer; the error code ``done`` means success too. Raises as ``ask``."""
        self._send(operation, parameters, done)

    def _send(self, operation: str, parameters: Parameters, done: str = "") -> PeerAnswer:
        body = msgspec.json.encode(parameters)  # bytes as base64, which AWS JSON 1.1 wants too
        with self.peer.one_timeout():
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
                self._credentials = self._credentials or self._session.get_credentials()
            if self._credentials:
                return self._credentials.get_frozen_credentials()
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
    if operation == "Decrypt" and (code in CIPHERTEXT or denied):  # AWS calls an unknown key in it denied
        return DecryptFailed()
    shown = code if _CODE.fullmatch(code) else "an error without a name"
    text = f"AWS KMS answers {shown} to {operation}{f' with {key}' if key else ''}"
    if code in BUSY:
        return Busy(text)
    kind = KeyMissing if (operation, code) == ("DescribeKey", "NotFoundException") else BackendUnavailable
    advice = ADVICE.get(code, "see the AWS KMS API reference")
    return kind(f"{text}: {advice.format(call=f'kms:{operation}')}")


class Described(msgspec.Struct, rename="pascal"):
    """``KeyMetadata`` of DescribeKey and CreateKey; ``creation_date`` in seconds since the epoch."""

    arn: str
    key_id: str
    creation_date: float = 0.0
    description: str = ""
    key_spec: str = ALGORITHM
    origin: str = "AWS_KMS"
    multi_region: bool | None = None


class _Answer(msgspec.Struct, rename="pascal"):
    key_metadata: Described


class _Policy(msgspec.Struct, rename="pascal"):
    policy: str


class _Tag(msgspec.Struct, rename="pascal"):
    tag_key: str
    tag_value: str


class _Tags(msgspec.Struct, rename="pascal"):
    tags: list[_Tag]


def to_new_key(calls: AwsKmsClient, alias: str, old: Described) -> KeyVersion:
    """Make a key with policy, description and tags of the old one, and move the alias to it.

    Grants are not copied, since each was given to one key. Both keys enter the history before the new one
    encrypts, so that two concurrent rotations lose no key. An error after the new key was made names it.
    """
    policy = calls.ask("GetKeyPolicy", {"KeyId": old.arn, "PolicyName": "default"}, _Policy).policy
    tags = calls.ask("ListResourceTags", {"KeyId": old.arn}, _Tags).tags  # at most 50: one page
    wanted = {
        "Policy": policy,
        "Description": old.description,
        "Tags": [tag for tag in tags if not tag.tag_key.startswith("aws:")],  # AWS sets those itself
    }
    new = calls.ask("CreateKey", wanted, _Answer).key_metadata
    try:
        for key_id in (old.key_id, new.key_id):
            named = {"AliasName": f"{alias}/{key_id}", "TargetKeyId": key_id}
            calls.send("CreateAlias", named, done="AlreadyExistsException")
        calls.send("UpdateAlias", {"AliasName": alias, "TargetKeyId": new.key_id})
    except BackendUnavailable as exc:
        raise BackendUnavailable(
            f"{exc.detail}. The new key is {new.key_id}: move {alias} to it, or schedule its deletion"
        ) from exc
    return KeyVersion(new.key_id, datetime.fromtimestamp(new.creation_date, UTC))


class _Alias(msgspec.Struct, rename="pascal"):
    alias_name: str
    alias_arn: str
    target_key_id: str = ""
    creation_date: float = 0.0


class _Aliases(msgspec.Struct, rename="pascal"):
    aliases: list[_Alias]
    truncated: bool = False
    next_marker: str | None = None


class _Encrypted(msgspec.Struct, rename="pascal"):
    ciphertext_blob: bytes
    key_id: str


class _Decrypted(msgspec.Struct, rename="pascal"):
    plaintext: bytes
    key_id: str


@dataclass(frozen=True, slots=True)
class _AliasKeys:
    """The keys of a name, as AWS answered at ``asked_at``; ``home`` is their common ARN without the key id.

    ``tried_at`` is the time of the last call, with or without an answer.
    """

    home: str = ""
    ids: frozenset[str] = frozenset()
    asked_at: float = -math.inf
    tried_at: float = -math.inf

    def settle(self, version: str, now: float) -> bool:
        """Return whether this answers if a key is ours.

        A yes is valid for a minute, a no only if it was just asked.
        """
        return self.tried_at >= now - KEYS_FRESH_S if version in self.ids else self.asked_at >= now


class AwsCipher:
    """One key of AWS KMS, or one alias and the keys that it has pointed to. See ``remote.Cipher``."""

    name = "awskms"
    token = None
    """Credentials of AWS change all the time, for the same role."""

    def __init__(self, calls: AwsKmsClient, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``key`` is an alias (``alias/…``), a key id, or the ARN of either. Makes no call."""
        self._calls, self.server = calls, calls.peer.server
        self._key = key
        self._alias = parsed(key)["alias"]
        self._clock = clock
        self._lock = threading.Lock()
        self._keys = _AliasKeys()

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        with self._calls.peer.one_timeout():
            arn = self._arn(version)
            if arn is None:
                raise BackendUnavailable(f"{version} is no key of {self._key}: check its aliases in AWS KMS")
            asked = {"KeyId": arn, "Plaintext": secret, **_bound(aad)}
            answer = self._calls.ask("Encrypt", asked, _Encrypted)
        if answer.key_id != arn:
            raise BackendUnavailable("AWS KMS encrypted with another key than the one it was asked for")
        return answer.ciphertext_blob

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        with self._calls.peer.one_timeout():
            arn = self._arn(version)
            if arn is None or not 0 < len(wrapped) <= CIPHERTEXT_BYTES:
                raise DecryptFailed
            asked = {"KeyId": arn, "CiphertextBlob": wrapped, **_bound(aad)}
            answer = self._calls.ask("Decrypt", asked, _Decrypted)
        if answer.key_id != arn:
            raise DecryptFailed
        return answer.plaintext

    def versions(self) -> Sequence[KeyVersion]:
        """The keys of the alias: a call for the current one, and one for each 100 aliases of the account."""
        now = self._clock()
        with self._calls.peer.one_timeout():
            current = self._current()
            home = current.arn.removesuffix(current.key_id)
            if not home.endswith(":key/") or not _KEY_ID.fullmatch(current.key_id):
                raise BackendUnavailable(f"AWS KMS describes {self._key} without an ARN: check its name")
            earlier = [key_id for key_id in self._history(home) if key_id != current.key_id]
        ids = (*earlier, current.key_id)
        self._keys = _AliasKeys(home, frozenset(ids), now, now)
        return [KeyVersion(key_id) for key_id in ids]

    def rotate(self) -> KeyVersion:
        """Make a new key under the alias: eight calls, each with its own timeout. Errors name the new key."""
        if self._alias is None:
            raise InvalidRequest(
                f"{self._key} is one key, within which AWS rotates: to rotate here, name the key by an alias"
            )
        old = self._current()
        if (old.key_spec, old.origin, bool(old.multi_region)) != (ALGORITHM, "AWS_KMS", False):
            raise InvalidRequest(
                f"The key under {self._alias} is multi-Region, or its material is not from AWS KMS: make "
                f"a new one yourself, give the old one the alias {self._alias}/{old.key_id}, move the alias"
            )
        return to_new_key(self._calls, self._alias, old)

    def _current(self) -> Described:
        return self._calls.ask("DescribeKey", {"KeyId": self._key}, _Answer).key_metadata

    def _history(self, home: str) -> Iterator[str]:
        """Ids of the earlier keys of the alias, in the order of their use."""
        if self._alias is None:
            return
        account = home.removesuffix("key/")
        found = [
            alias
            for alias in self._aliases()
            if alias.alias_name == f"{self._alias}/{alias.target_key_id}"
            and alias.alias_arn == account + alias.alias_name
        ]
        for alias in sorted(found, key=lambda alias: alias.creation_date):
            yield alias.target_key_id

    def _aliases(self) -> Iterator[_Alias]:
        page: Mapping[str, object] = {"Limit": _PAGE}
        for _ in range(MOST_PAGES):
            answer = self._calls.ask("ListAliases", page, _Aliases)
            yield from answer.aliases
            if not answer.truncated:
                return
            page = {"Limit": _PAGE, "Marker": answer.next_marker}
        raise BackendUnavailable(f"There are over {MOST_PAGES * _PAGE} aliases: name the key by its id")

    def _arn(self, version: str) -> str | None:
        """The ARN of a key of ours, or None. Asks AWS for a new key, or if the last answer is a minute old.

        Concurrent callers share an answer, since files choose the version.
        """
        came = self._clock()
        if not self._keys.settle(version, came):
            with self._calls.peer.holding(self._lock):
                if not self._keys.settle(version, came):
                    self._ask_again(version)
        keys = self._keys
        return keys.home + version if version in keys.ids else None

    def _ask_again(self, version: str) -> None:
        try:
            self.versions()
        except (Unreachable, Busy):
            if version not in self._keys.ids:
                raise
            self._keys = replace(self._keys, tried_at=self._clock())  # the last answer remains valid


def _bound(aad: bytes) -> dict[str, object]:
    return {
        "EncryptionContext": {CONTEXT_KEY: hashlib.sha256(aad).hexdigest()},
        "EncryptionAlgorithm": ALGORITHM,
    }


def parsed(key: str) -> re.Match[str]:
    """Groups ``alias`` and ``region``, each or None. Raises ConfigurationError."""
    found = _NAME.fullmatch(key)
    if found is None:
        raise ConfigurationError(_USAGE)
    return found


# -- opening -----------------------------------------------------------------------------------------

_open: Final[WeakValueDictionary[AwsKmsSection, AwsKmsClient]] = WeakValueDictionary()


def open_key(uri: SplitResult | None, section: AwsKmsSection, *, strict: bool) -> Backend:
    """``awskms:alias/name``, ``awskms:<key id or ARN>``; None means ``[kms.awskms]``.

    Options: ``region`` (an ARN names its own) and ``profile``. Raises ConfigurationError.
    """
    del strict
    options = _options(uri) if uri else {}
    key = uri.path if uri else section.key_id
    if key is None:
        raise ConfigurationError("kms.awskms.key_id is missing: name an alias, a key id or an ARN")
    region = parsed(key)["region"] or options.get("region") or section.region
    profile = options.get("profile") or section.profile
    endpoint = msgspec.structs.replace(section, key_id=None, region=region, profile=profile)
    calls = _open.get(endpoint) or AwsKmsClient(endpoint)  # keys of one endpoint share its connections
    _open[endpoint] = calls
    return RemoteBackend(AwsCipher(calls, key))


def _options(uri: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(uri.query, keep_blank_values=True)
    options = dict(pairs)
    stray = uri.netloc or uri.fragment or options.keys() - {"region", "profile"}
    if stray or len(options) != len(pairs) or "" in options.values():
        raise ConfigurationError(_USAGE)
    return options
