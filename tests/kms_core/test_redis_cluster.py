"""Which arguments of a command get the hash tag of a Redis Cluster."""

from typing import Any

import pytest
from redis.crc import key_slot

from kms_core.redis_client import tagged


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        (("GET", "kms:a"), ("GET", "{kms}:a")),
        (("set", "kms:a", "kms:b", "EX", 3), ("set", "{kms}:a", "kms:b", "EX", 3)),
        (("HSET", "kms:a", "kms:field", b"kms:value"), ("HSET", "{kms}:a", "kms:field", b"kms:value")),
        (("DEL", "kms:a", "kms:b"), ("DEL", "{kms}:a", "{kms}:b")),
        (
            ("EVALSHA", "sha", 2, "kms:a", "kms:b", "kms:value", b"kms:"),
            ("EVALSHA", "sha", 2, "{kms}:a", "{kms}:b", "kms:value", b"kms:"),
        ),
        (("EVALSHA", "sha", "0", "kms:value"), ("EVALSHA", "sha", "0", "kms:value")),
        (("TIME",), ("TIME",)),
        (("WAIT", 1, 100), ("WAIT", 1, 100)),
        (("AUTH", "kms", "kms:secret"), ("AUTH", "kms", "kms:secret")),
    ],
)
def test_keys_get_the_hash_tag_and_values_do_not(command: tuple[Any, ...], sent: tuple[Any, ...]) -> None:
    assert tagged(command) == sent


def test_all_keys_are_in_one_slot() -> None:
    found = {
        key_slot(str(tagged(("GET", f"kms:{name}"))[1]).encode()) for name in ("a", "job:{b}", "tenant:c")
    }

    assert found == {key_slot(b"kms")}
