"""Which keys an AWS KMS alias stands for, with scripted answers: history, refreshing, rotation that fails."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from kms_core.backends.aws.backend import AwsCipher
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError
from support.aws_scripted import (
    AAD,
    ARN,
    ARN_PREFIX,
    KEY,
    SECRET,
    Reply,
    cipher_with,
    refused,
    scripted,
    working,
)
from support.aws_servers import calls_to
from support.clock import Clock
from support.waiting import WAIT_S

THREADS: Final = 8


def earlier(home: str) -> dict[str, object]:
    """The alias of one more key."""
    name = "alias/payroll/earlier"
    return {"AliasName": name, "AliasArn": home + name, "TargetKeyId": "earlier"}


def paged(operation: str, asked: Mapping[str, object]) -> Reply:
    """Five aliases on five pages, the younger first."""
    if operation != "ListAliases":
        return working(operation, asked)
    page = int(str(asked.get("Marker", 0)))
    name = f"alias/payroll/key-{page}"
    alias = {
        "AliasName": name,
        "AliasArn": ARN_PREFIX + name,
        "TargetKeyId": f"key-{page}",
        "CreationDate": 1.7e9 - page,
    }
    more = {"Truncated": True, "NextMarker": str(page + 1)} if page < 4 else {"Truncated": False}
    return 200, {"Aliases": [alias], **more}


def test_the_history_is_read_to_its_last_page_and_in_its_order() -> None:
    with scripted(paged) as (url, _):
        versions = AwsCipher(calls_to(url), "alias/payroll").versions()

    assert [version.version for version in versions] == ["key-4", "key-3", "key-2", "key-1", "key-0", KEY]


def test_a_list_without_end_ends() -> None:
    endless: Reply = (200, {"Aliases": [], "Truncated": True, "NextMarker": "again"})
    with (
        cipher_with({"ListAliases": endless}, "alias/payroll") as (cipher, _),
        pytest.raises(BackendUnavailable, match="name the key by its id"),
    ):
        cipher.versions()


def test_a_key_that_another_process_made_a_moment_ago_is_known() -> None:
    replies: dict[str, Reply] = {}
    with cipher_with(replies, "alias/payroll") as (cipher, _):
        cipher.versions()
        replies["ListAliases"] = (200, {"Aliases": [earlier(ARN_PREFIX)]})

        assert cipher.decrypt(SECRET[::-1], "earlier", AAD) == SECRET


def test_a_known_key_asks_aws_for_nothing_but_its_work() -> None:
    with cipher_with({}, "alias/payroll") as (cipher, script):
        for _ in range(3):
            cipher.decrypt(SECRET, KEY, AAD)

    assert [operation for operation, _ in script.asked] == [
        "DescribeKey",
        "ListAliases",
        "Decrypt",
        "Decrypt",
        "Decrypt",
    ]


@pytest.mark.parametrize("failure", ["ThrottlingException", "no connection"])
def test_a_known_key_is_used_while_the_list_cannot_be_had(clock: Clock, failure: str) -> None:
    """After a minute AWS is asked for it again. Of a key that is not on the last one nobody can tell."""
    replies: dict[str, Reply] = {}
    with cipher_with(replies, "alias/payroll", clock) as (cipher, script):
        assert cipher.decrypt(SECRET[::-1], KEY, AAD) == SECRET
        replies["ListAliases"] = refused(failure) if "Exception" in failure else refused(failure, status=502)
        clock.now += 61.0
        assert cipher.decrypt(SECRET[::-1], KEY, AAD) == SECRET
        assert cipher.decrypt(SECRET[::-1], KEY, AAD) == SECRET
        with pytest.raises((Busy, Unreachable)):
            cipher.decrypt(SECRET[::-1], "unknown", AAD)

    assert [operation for operation, _ in script.asked].count("ListAliases") == 3


def test_those_who_ask_about_an_unknown_key_at_once_share_an_answer() -> None:
    """Files choose the version, so many of a wrong one must not become as many calls."""
    came = threading.Semaphore(0)
    first = iter([True])

    def clock() -> float:
        came.release()
        return 0.0

    def answer(operation: str, asked: Mapping[str, object]) -> Reply:
        if operation == "DescribeKey" and next(first, False):
            for _ in range(THREADS + 1):  # each who came, and the one who asks once more
                assert came.acquire(timeout=WAIT_S)
        return working(operation, asked)

    with scripted(answer) as (url, script), ThreadPoolExecutor(THREADS) as threads:
        cipher = AwsCipher(calls_to(url, timeout_s=WAIT_S), "alias/payroll", clock=clock)
        calls = [threads.submit(cipher.decrypt, SECRET, "unknown", AAD) for _ in range(THREADS)]

        assert {type(call.exception(WAIT_S)) for call in calls} == {DecryptFailed}
    assert [operation for operation, _ in script.asked] == ["DescribeKey", "ListAliases"]


def test_a_key_that_left_the_history_is_let_go_within_a_minute(clock: Clock) -> None:
    replies: dict[str, Reply] = {"ListAliases": (200, {"Aliases": [earlier(ARN_PREFIX)]})}
    with cipher_with(replies, "alias/payroll", clock) as (cipher, _):
        assert cipher.decrypt(SECRET[::-1], "earlier", AAD) == SECRET
        replies.clear()
        clock.now += 61.0
        with pytest.raises(DecryptFailed):
            cipher.decrypt(SECRET[::-1], "earlier", AAD)


def test_an_alias_of_another_account_makes_no_history() -> None:
    elsewhere = ARN_PREFIX.replace("111122223333", "999999999999")
    with cipher_with({"ListAliases": (200, {"Aliases": [earlier(elsewhere)]})}, "alias/payroll") as (
        cipher,
        _,
    ):
        assert [version.version for version in cipher.versions()] == [KEY]


@pytest.mark.parametrize("failing", ["CreateAlias", "UpdateAlias"])
def test_a_rotation_that_breaks_off_names_the_key_that_it_made(failing: str) -> None:
    replies = {**rotating(), failing: refused("LimitExceededException")}
    with (
        cipher_with(replies, "alias/payroll") as (cipher, _),
        pytest.raises(BackendUnavailable, match="The new key is 4321abcd-"),
    ):
        cipher.rotate()


def rotating(*tags: Mapping[str, str]) -> dict[str, Reply]:
    """What AWS answers to a rotation that works; the old key has these tags."""
    new = ARN.replace("1234abcd", "4321abcd")
    return {
        "GetKeyPolicy": (200, {"Policy": "{}"}),
        "ListResourceTags": (200, {"Tags": tags}),
        "CreateKey": (200, {"KeyMetadata": {"Arn": new, "KeyId": new.rpartition("/")[2]}}),
        "CreateAlias": (200, b""),
        "UpdateAlias": (200, b""),
    }


def test_a_rotation_leaves_the_tags_of_aws_to_aws() -> None:
    """AWS refuses those that begin with ``aws:`` (AWS KMS API reference, Tag)."""
    ours = {"TagKey": "team", "TagValue": "payroll"}
    theirs = {"TagKey": "aws:cloudformation:stack-name", "TagValue": "keys"}
    with cipher_with(rotating(theirs, ours), "alias/payroll") as (cipher, script):
        cipher.rotate()

    assert dict(script.asked)["CreateKey"]["Tags"] == [ours]


@pytest.mark.parametrize(
    "trait",
    [{"MultiRegion": True}, {"Origin": "EXTERNAL"}, {"Origin": "AWS_CLOUDHSM"}, {"KeySpec": "RSA_2048"}],
    ids=str,
)
def test_a_key_of_another_kind_is_not_replaced_by_a_plain_one(trait: dict[str, object]) -> None:
    described: Reply = (200, {"KeyMetadata": {"Arn": ARN, "KeyId": KEY, **trait}})
    with (
        cipher_with({"DescribeKey": described}, "alias/payroll") as (cipher, script),
        pytest.raises(KmsError, match="alias/payroll/1234abcd-"),
    ):
        cipher.rotate()

    assert [operation for operation, _ in script.asked] == ["DescribeKey"]
