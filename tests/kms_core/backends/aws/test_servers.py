"""AWS KMS against real servers: whose keys open what, rotation, and the states of keys.

Both servers are programs of others (``awsservers``); the administrator is boto3, as outside.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from kms_core.backends import KeyMissing
from kms_core.backends.aws.backend import AwsCipher
from kms_protocol.errors import BackendUnavailable, DecryptFailed, InvalidRequest
from support.aws_servers import AwsServer, ministack, moto

SECRET = bytes(range(16))
AAD = b"names and a context"


@pytest.fixture(scope="module")
def aws() -> AwsServer:
    return moto()


@pytest.fixture(scope="module")
def stateful() -> AwsServer:
    return ministack()


def current(cipher: AwsCipher) -> str:
    return cipher.versions()[-1].version


def ids(cipher: AwsCipher) -> list[str]:
    return [version.version for version in cipher.versions()]


# -- names -------------------------------------------------------------------------------------------


def test_a_key_is_named_by_its_alias_its_id_or_the_arn_of_either(aws: AwsServer) -> None:
    alias = aws.new_alias()
    described = aws.admin.describe_key(KeyId=alias)["KeyMetadata"]
    alias_arn = described["Arn"].replace(f"key/{described['KeyId']}", alias)
    wrapped = aws.cipher(alias).encrypt(SECRET, described["KeyId"], AAD)

    for name in (alias, alias_arn, described["KeyId"], described["Arn"]):
        assert ids(aws.cipher(name)) == [described["KeyId"]]
        assert aws.cipher(name).decrypt(wrapped, described["KeyId"], AAD) == SECRET


@pytest.mark.parametrize("name", [f"alias/{uuid4()}", str(uuid4())], ids=["alias", "key id"])
def test_a_key_that_is_not_there_is_told_to_the_operator(aws: AwsServer, name: str) -> None:
    with pytest.raises(KeyMissing, match=f"with {name}: the key is not there"):
        aws.cipher(name).versions()


# -- history -----------------------------------------------------------------------------------------


def test_after_an_alias_has_moved_a_fresh_process_opens_what_its_earlier_keys_sealed(aws: AwsServer) -> None:
    alias = aws.new_alias()
    cipher = aws.cipher(alias)
    old = current(cipher)
    wrapped = cipher.encrypt(SECRET, old, AAD)
    aws.admin.create_alias(AliasName=f"{alias}/{old}", TargetKeyId=old)
    new = aws.new_key()
    aws.admin.update_alias(AliasName=alias, TargetKeyId=new)

    assert ids(aws.cipher(alias)) == [old, new]
    assert aws.cipher(alias).decrypt(wrapped, old, AAD) == SECRET


@pytest.mark.parametrize("naming", ["none", "of another alias", "with another key's name"])
def test_what_another_key_of_the_account_sealed_is_refused(aws: AwsServer, naming: str) -> None:
    """A file names its version: whoever may use any key of the account must not forge under ours."""
    alias = aws.new_alias()
    foreign = aws.new_key()
    forged = aws.cipher(foreign).encrypt(SECRET, foreign, AAD)
    if naming == "of another alias":
        aws.admin.create_alias(AliasName=f"{alias}s/{foreign}", TargetKeyId=foreign)
    if naming == "with another key's name":
        aws.admin.create_alias(AliasName=f"{alias}/{current(aws.cipher(alias))}", TargetKeyId=foreign)

    with pytest.raises(DecryptFailed):
        aws.cipher(alias).decrypt(forged, foreign, AAD)


def test_a_process_that_runs_notices_a_key_that_an_operator_made(aws: AwsServer) -> None:
    alias = aws.new_alias()
    cipher = aws.cipher(alias)
    old = current(cipher)
    aws.admin.create_alias(AliasName=f"{alias}/{old}", TargetKeyId=old)
    aws.admin.update_alias(AliasName=alias, TargetKeyId=aws.new_key())

    assert old in ids(cipher)
    assert current(cipher) != old


# -- rotation ----------------------------------------------------------------------------------------


def test_rotation_makes_a_key_with_the_policy_words_and_tags_of_the_old_one(aws: AwsServer) -> None:
    alias = aws.new_alias()
    cipher = aws.cipher(alias)
    old = current(cipher)
    policy = aws.admin.get_key_policy(KeyId=old, PolicyName="default")["Policy"].replace("Enable", "Allow")
    aws.admin.put_key_policy(KeyId=old, PolicyName="default", Policy=policy)
    aws.admin.update_key_description(KeyId=old, Description="payroll")
    aws.admin.tag_resource(KeyId=old, Tags=[{"TagKey": "team", "TagValue": "hr"}])

    made = cipher.rotate()

    assert ids(cipher) == [old, made.version]
    assert aws.admin.get_key_policy(KeyId=made.version, PolicyName="default")["Policy"] == policy
    assert aws.admin.describe_key(KeyId=made.version)["KeyMetadata"]["Description"] == "payroll"
    assert aws.admin.list_resource_tags(KeyId=made.version)["Tags"] == [{"TagKey": "team", "TagValue": "hr"}]


def test_two_rotations_at_once_lose_no_key(aws: AwsServer) -> None:
    """Both make a key; whichever the alias is moved to last, what was sealed under the other opens."""
    alias = aws.new_alias()
    cipher = aws.cipher(alias)
    old = current(cipher)
    gate = threading.Barrier(2)

    def rotate(own: AwsCipher) -> str:
        gate.wait()
        return own.rotate().version

    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(rotate, [aws.cipher(alias), aws.cipher(alias)]))

    assert set(ids(aws.cipher(alias))) == {old, *made}


def test_a_key_named_by_its_id_is_rotated_by_aws_alone(aws: AwsServer) -> None:
    key = aws.new_key()

    with pytest.raises(InvalidRequest, match="name the key by an alias"):
        aws.cipher(key).rotate()


def test_aws_rotating_the_material_inside_a_key_changes_nothing_here(aws: AwsServer) -> None:
    alias = aws.new_alias()
    cipher = aws.cipher(alias)
    version = current(cipher)
    wrapped = cipher.encrypt(SECRET, version, AAD)
    aws.admin.rotate_key_on_demand(KeyId=version)

    assert ids(cipher) == [version]
    assert cipher.decrypt(wrapped, version, AAD) == SECRET


# -- states of keys ----------------------------------------------------------------------------------


def test_a_disabled_key_is_unavailable_until_it_is_enabled(stateful: AwsServer) -> None:
    cipher = stateful.cipher(stateful.new_alias())
    key = current(cipher)
    wrapped = cipher.encrypt(SECRET, key, AAD)
    stateful.admin.disable_key(KeyId=key)

    with pytest.raises(BackendUnavailable, match="the key is disabled") as refused:
        cipher.decrypt(wrapped, key, AAD)
    assert type(refused.value) is BackendUnavailable  # neither tried again nor passed on
    with pytest.raises(BackendUnavailable, match="the key is disabled"):
        cipher.encrypt(SECRET, key, AAD)
    stateful.admin.enable_key(KeyId=key)
    assert cipher.decrypt(wrapped, key, AAD) == SECRET


def test_a_key_that_waits_for_its_deletion_is_unavailable(stateful: AwsServer) -> None:
    cipher = stateful.cipher(stateful.new_alias())
    key = current(cipher)
    wrapped = cipher.encrypt(SECRET, key, AAD)
    stateful.admin.schedule_key_deletion(KeyId=key)

    with pytest.raises(BackendUnavailable, match="cancel-key-deletion"):
        cipher.decrypt(wrapped, key, AAD)


def test_a_disabled_old_key_does_not_stop_the_new_one(stateful: AwsServer) -> None:
    cipher = stateful.cipher(stateful.new_alias())
    old = current(cipher)
    new = cipher.rotate().version
    stateful.admin.disable_key(KeyId=old)

    assert cipher.decrypt(cipher.encrypt(SECRET, new, AAD), new, AAD) == SECRET
