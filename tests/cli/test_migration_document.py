"""The commands of docs/KMS_SIMPLIFICATION.md, as they stand there, one after another in one folder."""

import json
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from awsservers import ACCESS_KEY, REGION, SECRET_KEY, moto
from bao import ROOT_TOKEN, bao
from cli.conftest import BIN, Place, environment
from cli.migrating import Desk, b64
from kms_client import Client
from kms_core.age import x25519
from peers import program

DOCUMENT: Final = Path(__file__).parents[2] / "docs/KMS_SIMPLIFICATION.md"
COMMANDS: Final = re.findall(r"<!-- run -->\n```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path, real_service: Place) -> Desk:
    desk = Desk(tmp_path, real_service)
    for name in ("public_key.txt", "private_key.txt"):
        shutil.copy(real_service.state_dir / "age" / name, tmp_path)
    desk.write("vault-token", [ROOT_TOKEN])
    (tmp_path / "vault-token").chmod(0o600)
    with Client(real_service.url) as client:
        sealed = client.encrypt(b"archive", context="env=prod")
    (tmp_path / "archive.enc").write_bytes(sealed.ciphertext)
    return desk


def in_vault(desk: Desk) -> None:
    """Ciphertexts of a key that the document names."""
    bao().admin("POST", "transit/keys/payroll")
    made = [
        bao().admin("POST", "transit/encrypt/payroll", {"plaintext": b64(secret)})["data"]["ciphertext"]
        for secret in (b"first", b"second")
    ]
    desk.write("vault.ndjson", made)
    desk.write("export.json", [json.dumps([{"name": "db", "secret": made[0]}])])


def in_aws(desk: Desk) -> None:
    """As ``in_vault``."""
    admin = moto().admin
    with suppress(admin.exceptions.AlreadyExistsException):
        admin.create_alias(AliasName="alias/payroll", TargetKeyId=moto().new_key())
    bound = {"tenant": "acme"}
    blob = admin.encrypt(KeyId="alias/payroll", Plaintext=b"third", EncryptionContext=bound)["CiphertextBlob"]
    desk.write("aws.ndjson", [{"CiphertextBlob": b64(blob), "EncryptionContext": bound}])


def in_sops(desk: Desk) -> None:
    """Files of an owner whose identity is in ``old.txt``."""
    old = x25519.X25519Identity.generate()
    desk.write("old.txt", [old.export()])
    desk.write("old-public-key.txt", [str(old.recipient)])
    sops = str(BIN / "sops") if (BIN / "sops").is_file() else program("sops")
    for name, text in (("secrets.yaml", "password: hunter2\n"), ("config.json", '{"password": "hunter2"}')):
        (desk.folder / name).write_text(text)
        command = [sops, "encrypt", "--in-place", "--age", str(old.recipient), name]
        subprocess.run(command, cwd=desk.folder, env=environment(desk.folder), check=True)


def test_the_commands_of_the_document_work_as_written(desk: Desk) -> None:
    program("jq")
    in_vault(desk)
    in_aws(desk)
    in_sops(desk)
    environ = environment(
        desk.folder,
        KMS_SERVICE_URL=desk.place.url,
        SOPS_AGE_KEY_FILE=str(desk.folder / "old.txt"),
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
    )
    assert len(COMMANDS) > 5
    for command in COMMANDS:
        script = command.replace("https://vault.example.com:8200", bao().url)
        script = script.replace("--region eu-central-1", f"--region {REGION} --endpoint-url {moto().url}")
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=desk.folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, command + ran.stderr

    moved = [desk.opened(record, "env=prod") for record in desk.records("moved.ndjson")]
    assert moved == [b"first", b"second"]
    (named,) = desk.records("moved-by-name.ndjson")
    assert (named["reference"], desk.opened(named, "env=prod,name=db")) == ("db", b"first")
    (from_aws,) = desk.records("moved-aws.ndjson")
    assert desk.opened(from_aws, {"tenant": "acme"}) == b"third"
    assert (desk.folder / "old-public-key.txt").read_text().strip() not in (
        desk.folder / "secrets.yaml"
    ).read_text()
