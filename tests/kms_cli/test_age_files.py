"""All C2SP CCTV vectors through ``kms open``: its exit code, and a file that appears only with the truth."""

import hashlib
from pathlib import Path

import pytest

from kms_cli.main import run
from kms_core.age.x25519 import X25519Identity
from support import cctv
from support.cctv import Vector

VECTORS = cctv.load()


@pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])
def test_open_ends_as_expected(vector: Vector, tmp_path: Path) -> None:
    """Files with a passphrase are refused: they are left to stock age."""
    source, key, target = tmp_path / "in", tmp_path / "key", tmp_path / "out"
    source.write_bytes(vector.file)
    key.touch(mode=0o600)
    identities = vector.all("identity") or [X25519Identity.generate().export()]
    key.write_text("".join(f"{text}\n" for text in identities))
    is_good = vector.expect == "success" and not vector.all("passphrase")

    code = run(["open", "-i", str(key), "-o", str(target), str(source)])

    assert code == (0 if is_good else 65)
    assert target.exists() == is_good
    if is_good:
        assert hashlib.sha256(target.read_bytes()).hexdigest() == vector.payload_sha256
