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
from typing import Final
from urllib.parse import SplitResult, parse_qsl
from weakref import WeakValueDictionary

import msgspec

from kms_core.backends import Backend, KeyVersion
from kms_core.backends.aws.client import AwsKmsClient
from kms_core.backends.aws.settings import AwsKmsSection
from kms_core.backends.remote import RemoteBackend
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed, InvalidRequest

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
        arn = self._arn(version)
        if arn is None:
            raise BackendUnavailable(f"{version} is no key of {self._key}: check its aliases in AWS KMS")
        asked = {"KeyId": arn, "Plaintext": secret, **_bound(aad)}
        answer = self._calls.ask("Encrypt", asked, _Encrypted)
        if answer.key_id != arn:
            raise BackendUnavailable("AWS KMS encrypted with another key than the one it was asked for")
        return answer.ciphertext_blob

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
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
    """Match the alias, id or ARN of a key. Its groups ``alias`` and ``region`` are None where it has none.

    Raises ConfigurationError for other text.
    """
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
