"""The commands of docs/KMS_SIMPLIFICATION.md, as they stand there, one after another in one folder."""

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from kms_client import Client
from kms_core.age import x25519
from support import pages
from support.age_plugin import sops
from support.aws_servers import ACCESS_KEY, REGION, SECRET_KEY, moto
from support.cli.fixtures import RunningService, environment
from support.cli.migrate import Workspace
from support.openbao import ROOT_TOKEN, bao
from support.programs import program
from support.service import b64


@pytest.fixture
def workspace(tmp_path: Path, real_service: RunningService) -> Workspace:
    workspace = Workspace(tmp_path, real_service)
    for name in ("public_key.txt", "private_key.txt"):
        shutil.copy(real_service.state_dir / "age" / name, tmp_path)
    workspace.write("vault-token", [ROOT_TOKEN])
    (tmp_path / "vault-token").chmod(0o600)
    with Client(real_service.url) as client:
        sealed = client.encrypt(b"archive", context="env=prod")
    (tmp_path / "archive.age").write_bytes(sealed.ciphertext)
    return workspace


def in_vault(workspace: Workspace) -> None:
    """Ciphertexts of a key that the document names."""
    bao().admin("POST", "transit/keys/payroll")
    made = [
        bao().admin("POST", "transit/encrypt/payroll", {"plaintext": b64(secret)})["data"]["ciphertext"]
        for secret in (b"first", b"second")
    ]
    workspace.write("vault.ndjson", made)
    workspace.write("export.json", [json.dumps([{"name": "db", "secret": made[0]}])])


def in_aws(workspace: Workspace) -> None:
    """As ``in_vault``."""
    admin = moto().admin
    with suppress(admin.exceptions.AlreadyExistsException):
        admin.create_alias(AliasName="alias/payroll", TargetKeyId=moto().new_key())
    bound = {"tenant": "acme"}
    blob = admin.encrypt(KeyId="alias/payroll", Plaintext=b"third", EncryptionContext=bound)["CiphertextBlob"]
    workspace.write("aws.ndjson", [{"CiphertextBlob": b64(blob), "EncryptionContext": bound}])


def in_sops(workspace: Workspace) -> None:
    """Files of an owner whose identity is in ``old.txt``."""
    old = x25519.X25519Identity.generate()
    workspace.write("old.txt", [old.export()])
    workspace.write("old-public-key.txt", [str(old.recipient)])
    for name, text in (("secrets.yaml", "password: hunter2\n"), ("config.json", '{"password": "hunter2"}')):
        (workspace.folder / name).write_text(text)
        command = [sops(), "encrypt", "--in-place", "--age", str(old.recipient), name]
        subprocess.run(command, cwd=workspace.folder, env=environment(workspace.folder), check=True)


def test_the_commands_of_the_document_work_as_written(workspace: Workspace) -> None:
    program("jq")
    in_vault(workspace)
    in_aws(workspace)
    in_sops(workspace)
    environ = environment(
        workspace.folder,
        KMS_SERVICE_URL=workspace.place.url,
        SOPS_AGE_KEY_FILE=str(workspace.folder / "old.txt"),
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
    )
    commands = pages.blocks_to_run("docs/KMS_SIMPLIFICATION.md", "sh")
    assert len(commands) > 5
    for command in commands:
        script = command.replace("https://vault.example.com:8200", bao().url)
        script = script.replace("--region eu-central-1", f"--region {REGION} --endpoint-url {moto().url}")
        pages.said(script, workspace.folder, environ)

    moved = [workspace.opened(record, "env=prod") for record in workspace.records("moved.ndjson")]
    assert moved == [b"first", b"second"]
    (named,) = workspace.records("moved-by-name.ndjson")
    assert (named["reference"], workspace.opened(named, "env=prod,name=db")) == ("db", b"first")
    (from_aws,) = workspace.records("moved-aws.ndjson")
    assert workspace.opened(from_aws, {"tenant": "acme"}) == b"third"
    assert (workspace.folder / "old-public-key.txt").read_text().strip() not in (
        workspace.folder / "secrets.yaml"
    ).read_text()
