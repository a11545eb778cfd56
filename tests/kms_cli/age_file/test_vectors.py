"""All C2SP CCTV vectors through ``kms open``: its exit code, and a file that appears only with the truth."""

import hashlib
from pathlib import Path

import pytest

from kms_cli.main import run
from support import cctv
from support.cctv import Vector

VECTORS = [vector for vector in cctv.load() if len(vector.all("passphrase")) < 2]  # the command takes one


@pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])
def test_open_ends_as_expected(vector: Vector, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(vector.file)
    code = run(["open", *keys(vector, tmp_path), "-o", str(target), str(source)])

    assert (code == 0) == (vector.expect == "success")
    assert target.exists() == (vector.expect == "success")
    assert code in {0, 2, 65}
    if vector.expect == "success":
        assert hashlib.sha256(target.read_bytes()).hexdigest() == vector.payload_sha256


def keys(vector: Vector, folder: Path) -> list[str]:
    args = []
    for option, key in (("-i", "identity"), ("--passphrase-file", "passphrase")):
        if vector.all(key):
            path = folder / key
            path.touch(mode=0o600)
            path.write_text("".join(f"{text}\n" for text in vector.all(key)))
            args += [option, str(path)]
    return args
