"""``kms keygen``: the key file it writes, and one that is there. Sealed keys: e2e/test_sealed_keys.py."""

import stat

import pyrage

from support.cli.offline import Workspace


def test_a_key_file_is_private_and_its_recipient_is_told(workspace: Workspace) -> None:
    done = workspace.kms("keygen", "-o", "new.txt")

    assert done.returncode == 0
    (secret,) = (line for line in workspace.read("new.txt").decode().splitlines() if line[0] != "#")
    recipient = str(pyrage.x25519.Identity.from_str(secret).to_public())
    assert done.stderr.decode() == f"Public key: {recipient}\n"
    assert stat.S_IMODE((workspace.folder / "new.txt").stat().st_mode) == 0o600
    assert workspace.stdout_of("keygen", "-y", "new.txt").decode() == f"{recipient}\n"


def test_a_key_file_that_exists_is_left_alone(workspace: Workspace) -> None:
    before = workspace.read("key.txt")

    assert workspace.kms("keygen", "-o", "key.txt").returncode == 73
    assert workspace.read("key.txt") == before
