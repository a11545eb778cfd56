"""Which modes keep a secret to its owner, and which owner may share with a group."""

import os

import pytest

from kms_core.secure_files import is_open

ROOT, SERVICE, STRANGER = 0, 10001, 1000


def found(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 0, 0, 1, owner, 10001, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "owner", "reader"),
    [(0o600, SERVICE, SERVICE), (0o400, ROOT, SERVICE), (0o440, ROOT, SERVICE), (0o400, ROOT, ROOT)],
    ids=["own", "root's", "root's, with the group of a Kubernetes Secret or a credential", "root itself"],
)
def test_a_file_is_private(mode: int, owner: int, reader: int) -> None:
    assert not is_open(found(mode, owner), reader)


@pytest.mark.parametrize(
    ("mode", "owner", "reader"),
    [
        (0o640, SERVICE, SERVICE),
        (0o440, STRANGER, SERVICE),
        (0o440, ROOT, ROOT),
        (0o460, ROOT, SERVICE),
        (0o450, ROOT, SERVICE),
        (0o444, ROOT, SERVICE),
        (0o604, SERVICE, SERVICE),
    ],
)
def test_a_file_is_open_to_others(mode: int, owner: int, reader: int) -> None:
    assert is_open(found(mode, owner), reader)
