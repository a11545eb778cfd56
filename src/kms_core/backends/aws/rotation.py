"""From one AWS KMS key to the next: a new key under the alias, the old one left enabled and in its history.

Needs ``kms:DescribeKey``, ``GetKeyPolicy``, ``ListResourceTags``, ``CreateKey``, ``TagResource``,
``CreateAlias`` and ``UpdateAlias``. Where nobody is to have all of that, an operator makes the key and moves
the alias by hand; the service notices within half a minute.
"""

from datetime import UTC, datetime
from typing import Final

import msgspec

from kms_core.backends import KeyVersion
from kms_core.backends.aws.client import AwsKmsClient
from kms_protocol.errors import BackendUnavailable

ALGORITHM: Final = "SYMMETRIC_DEFAULT"  # others do not authenticate a context


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


def describe(calls: AwsKmsClient, key: str) -> Described:
    """What a key id, an alias or an ARN stands for now."""
    return calls.ask("DescribeKey", {"KeyId": key}, _Answer).key_metadata


def to_new_key(calls: AwsKmsClient, alias: str, old: Described) -> KeyVersion:
    """Policy, description and tags are the old key's; grants are not, since each was given to one key.

    Both keys enter the history before the new one encrypts, so that of two rotations at once neither's key
    is lost. An error that comes after the new key was made names it.
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
            calls.tell("CreateAlias", named, done="AlreadyExistsException")
        calls.tell("UpdateAlias", {"AliasName": alias, "TargetKeyId": new.key_id})
    except BackendUnavailable as exc:
        raise BackendUnavailable(
            f"{exc.detail}. The new key is {new.key_id}: move {alias} to it, or schedule its deletion"
        ) from exc
    return KeyVersion(new.key_id, datetime.fromtimestamp(new.creation_date, UTC))
