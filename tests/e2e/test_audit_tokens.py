"""What ``kms token`` changes goes on record: before and after it, never with the token, or not at all."""

import json
import os
import pwd
from pathlib import Path

import pytest

from support.audit_logs import AuditFolder, Line, room_for, unresolved
from support.canary.secrets import forms
from support.credentials import REQUIRED, SecuredService, bearer

NO_REDIS = "unix:///nonexistent.sock"
ROOM_FOR_AN_INTENT = 800


@pytest.fixture
def install(tmp_path: Path) -> SecuredService:
    return SecuredService(tmp_path, REQUIRED, NO_REDIS)


def tokens(install: SecuredService) -> list[Line]:
    found: list[Line] = (
        json.loads(install.token_file.read_bytes())["tokens"] if install.token_file.exists() else []
    )
    return found


def test_each_change_of_a_token_is_on_record_and_no_token_is(install: SecuredService) -> None:
    words = ("create", "--name", "ci", "--tenant", "acme", "--scope", "audit:read")
    made = install.run_kms("token", *words).stdout.strip()
    renewed = install.run_kms("token", "rotate", "ci").stdout.strip()
    assert install.run_kms("token", "revoke", "ci").returncode == 0
    lines = AuditFolder(install.state).operations()

    assert [(line["operation"], line["stage"]) for line in lines] == [
        (f"token.{change}", stage)
        for change in ("create", "rotate", "revoke")
        for stage in ("intent", "outcome")
    ]
    token_id = made.split("_")[1]
    assert {line["effect"].partition("-")[0] for line in lines} == {token_id}
    assert len({line["effect"] for line in lines}) == 3
    user = pwd.getpwuid(os.getuid()).pw_name
    assert {(line["principal"], line["credential"]) for line in lines} == {(user, f"uid:{os.getuid()}")}
    assert {line["tenant"] for line in lines} == {"acme"}
    trail = b"".join(path.read_bytes() for path in AuditFolder(install.state).files())
    secrets = [text.split("_", 2)[2] for text in (made, renewed)]
    assert not any(form in trail for secret in secrets for form in forms(secret))
    assert unresolved(install.state) == []


def test_a_tenant_reads_what_was_done_to_its_tokens_and_to_no_others(install: SecuredService) -> None:
    texts = {}
    with install:
        for tenant in ("acme", "web"):
            words = ("create", "--name", "eve", "--tenant", tenant, "--scope", "audit:read")
            texts[tenant] = install.run_kms("token", *words)
        install.start("api")
        answer = install.get("/audit", headers=bearer(texts["web"].stdout.strip())).json()

    shown = [event for event in answer["events"] if event["operation"] == "token.create"]
    assert [event["stage"] for event in shown] == ["intent", "outcome"]
    assert {event["effect"].partition("-")[0] for event in shown} == {texts["web"].stdout.split("_")[1]}


def test_no_token_is_changed_without_its_intent_on_record(install: SecuredService) -> None:
    install.new_token("status")
    before = install.token_file.read_bytes()
    (install.state / "audit").write_text("a file in the place of the directory")
    name = tokens(install)[0]["name"]

    for change in (["create", "--name", "x", "--scope", "status"], ["rotate", name], ["revoke", name]):
        done = install.run_kms("token", *change)
        assert (done.returncode, done.stdout) == (69, "")
        assert "the audit log cannot be written" in done.stderr
    assert install.token_file.read_bytes() == before


def test_a_change_whose_outcome_could_not_be_recorded_is_seen(install: SecuredService) -> None:
    """The disk is full after the intent: the token was made, nobody is told it, and the trail says so."""
    with room_for(ROOM_FOR_AN_INTENT):
        done = install.run_kms("token", "create", "--name", "ci", "--scope", "status")

    assert (done.returncode, done.stdout) == (69, "")
    (token,) = tokens(install)
    (note,) = unresolved(install.state)
    assert note.startswith(f"token.create {token['id']}-")
    assert note.endswith("has no outcome")


def test_the_password_of_redis_may_be_for_the_service_alone(tmp_path: Path) -> None:
    """As systemd hands it on; only the anchor is missing then, and the service's chains bear witness."""
    text = f'[kms.redis]\nurl = "redis://kms@127.0.0.1:1/0"\npassword_file = "{tmp_path}/none"\n{REQUIRED}'
    install = SecuredService(tmp_path, text)
    assert install.run_kms("token", "create", "--name", "ci", "--scope", "status").returncode == 0

    assert [line["stage"] for line in AuditFolder(install.state).operations()] == ["intent", "outcome"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_records_belongs_to_whoever_has_the_trail(install: SecuredService) -> None:
    folder = install.state / "audit"
    folder.mkdir(mode=0o700)
    os.chown(folder, 4711, 4711)
    assert install.run_kms("token", "create", "--name", "ci", "--scope", "status").returncode == 0

    assert [path.stat().st_uid for path in folder.iterdir()] == [4711]
