"""Key files sealed by a key in OpenBao: opened once at start, used without calls, rotated, and away."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_core import backend_watch, key_opening
from kms_core.age.recipients import parse_recipient
from kms_core.envelope.binding import version_of
from support import programs
from support.openbao import Bao, bao
from support.ports import free_port
from support.sealed_keys import age_file, current_version, ok, root_settings, seal
from support.service import PROGRAMS, Service, b64, check_problem, unb64, without_checks
from support.waiting import until


def decryptions(trail: Path) -> int:
    """The calls to transit's decrypt in OpenBao's own audit log."""
    return trail.read_text().count('"path":"transit/decrypt/') // 2  # a request and its response


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Bao]:
    """One whose audit log is counted."""
    (tmp_path / "bao").mkdir()
    made = Bao(tmp_path / "bao", audit=tmp_path / "bao" / "trail")
    yield made
    made.close()


def test_a_sealed_key_is_opened_once_and_then_used_without_calls(
    tmp_path: Path, redis_url: str, server: Bao
) -> None:
    trail = tmp_path / "bao" / "trail"
    settings = root_settings(server) + "[kms.server]\nprocesses = 2\n"
    with Service(tmp_path, settings, redis_url) as service, without_checks(service):
        jobs = service.settings.kms.jobs
        seal(service, "default", age_file(service))
        seal(service, "kms:spool", jobs.spool_identity_path)
        before = decryptions(trail)
        service.start()

        assert b"AGE-SECRET-KEY" not in age_file(service).read_bytes()
        opened = decryptions(trail) - before
        for _ in range(50):
            assert service.decrypt(service.encrypt(b"local")) == b"local"
        job_id = service.upload("encrypt", b"by a job", "env=prod,service=api")
        service.wait(job_id, "succeeded")
        assert service.decrypt(service.result(job_id)) == b"by a job"
        os.kill(service.pool_pids()[0], signal.SIGKILL)  # another is forked, and inherits
        job_id = service.upload("encrypt", b"again", "env=prod,service=api")
        service.wait(job_id, "succeeded")

        assert opened == 4, "two files, by the leader of the API and by the worker"
        assert decryptions(trail) - before == opened


def test_rotation_seals_first_and_every_process_follows(tmp_path: Path, redis_url: str) -> None:
    settings = root_settings() + "[kms.server]\nprocesses = 2\n"
    with Service(tmp_path, settings, redis_url) as service:
        seal(service, "default", age_file(service))
        assert "sealed by root" in service.run_kms("doctor").stdout
        service.start()
        old = service.encrypt(b"old")
        answer = service.post("/keys/default/rotate")
        assert answer.status_code == 200, answer.text
        rotated = answer.json()["key_version"]
        public = (service.state / "age" / "public_key.txt").read_text().strip()

        assert version_of(parse_recipient(public)) == rotated
        assert b"AGE-SECRET-KEY" not in age_file(service).read_bytes()
        sealed = b""
        for _ in range(40):  # of both processes, at once
            sealed = service.encrypt(b"new")
            assert service.decrypt(sealed) == b"new"
            assert service.decrypt(old) == b"old"
        until(lambda: current_version(service) == rotated, "the new version seals in both processes")
        service.kill("api")
        service.start("api")  # what is on the disk opens again
        assert service.decrypt(sealed) == b"new"


def test_a_rotation_without_its_root_changes_nothing(tmp_path: Path, redis_url: str, server: Bao) -> None:
    with Service(tmp_path, root_settings(server, timeout_s=1.0), redis_url) as service:
        seal(service, "default", age_file(service))
        service.start("api")
        before = age_file(service).read_bytes()
        public = (service.state / "age" / "public_key.txt").read_bytes()
        server.close()

        refused = service.post("/keys/default/rotate")

        check_problem(refused, 503, "backend_unavailable")
        assert "nothing has changed" in refused.json()["detail"]
        assert age_file(service).read_bytes() == before
        assert (service.state / "age" / "public_key.txt").read_bytes() == public
        assert service.decrypt(service.encrypt(b"still")) == b"still"
        told = service.run_kms("doctor").stdout
        assert "default (age, sealed by root) does not wrap and unwrap" in told
        assert str(server.port) in told


def test_a_root_that_is_away_degrades_and_comes_back(tmp_path: Path, redis_url: str, server: Bao) -> None:
    with Service(tmp_path, root_settings(server, timeout_s=1.0), redis_url) as service:
        seal(service, "default", age_file(service))
        server.admin("PUT", "sys/seal")
        service.start("api")

        encrypt = {"plaintext": b64(b"x"), "context": "a=b"}
        check_problem(service.post("/encrypt", encrypt), 503, "backend_unavailable")
        ready = service.http.get("/readyz")
        assert (ready.status_code, ready.json()["keys"]) == (503, "unavailable")
        assert "keys" in service.degraded
        assert "a sealed key file is not open" in service.http.get("/ui").text

        server.unseal()
        until(lambda: service.http.get("/readyz").status_code == 200, "the key is open")
        assert service.http.get("/readyz").json()["keys"] == "available"
        assert service.decrypt(service.encrypt(b"open")) == b"open"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_of_another_key_stops_the_start(tmp_path: Path, program: str) -> None:
    with Service(tmp_path, root_settings(), "unix:///nonexistent/valkey.sock") as service:
        spool = service.settings.kms.jobs.spool_identity_path
        seal(service, "kms:spool", spool)
        seal(service, "default", age_file(service))
        age_file(service).write_bytes(spool.read_bytes())

        assert "was not sealed as default" in service.refusal(program)


def test_an_identity_of_another_recipient_stops_the_start(tmp_path: Path) -> None:
    with Service(tmp_path, root_settings(), "unix:///nonexistent/valkey.sock") as service:
        other = tmp_path / "other.txt"
        other.write_text(ok(service, "keygen"))
        other.chmod(0o600)
        seal(service, "default", other)
        other.replace(age_file(service))

        assert "has no identity in" in service.refusal("api")


def test_a_key_that_is_sealed_seals_no_other(tmp_path: Path) -> None:
    """Neither by itself nor by another one."""
    private = tmp_path / "state" / "age" / "private_key.txt"
    settings = root_settings() + f'circle = {{ uri = "age://{private}", use = "seal" }}\n'
    with Service(tmp_path, settings, "unix:///nonexistent/valkey.sock") as service:
        spool = service.settings.kms.jobs.spool_identity_path
        seal(service, "kms:spool", spool, root="circle")
        seal(service, "default", age_file(service))

        assert "a key that seals others may not be" in service.refusal("api")


def test_the_root_takes_no_calls(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, root_settings(), redis_url) as service:
        service.start("api")
        named = {"context": "a=b", "key_id": "root"}

        for path, body in {
            "/encrypt": {"plaintext": b64(b"x"), **named},
            "/generate-key": named,
            "/wrap": {"file_key": b64(bytes(16)), **named},
            "/jobs": {"kind": "encrypt", "items": [{"plaintext": b64(b"x")}], **named},
            "/keys/root/rotate": None,
        }.items():
            check_problem(service.post(path, body), 404, "unknown_key")
        assert [key["id"] for key in service.get("/keys").json()["keys"]] == ["default"]
        vault = service.http.post("/v1/transit/encrypt/root", json={"plaintext": b64(b"x")})
        assert vault.status_code in {400, 404}, vault.text


def test_what_the_root_sealed_is_opened_by_no_call(tmp_path: Path, redis_url: str) -> None:
    """The file itself, given to decrypt, rewrap and unwrap."""
    with Service(tmp_path, root_settings(), redis_url) as service:
        seal(service, "default", age_file(service))
        service.start("api")
        file = b64(age_file(service).read_bytes())

        for path in ("/decrypt", "/rewrap"):
            for context in ("", "sealed=default"):
                check_problem(
                    service.post(path, {"ciphertext": file, "context": context}), 404, "unknown_key"
                )
            answer = service.post(path, {"ciphertext": file, "context": {"kms:sealed": "default"}})
            assert answer.status_code == 422, answer.text


def test_break_glass_needs_stock_age_only(tmp_path: Path, redis_url: str, server: Bao) -> None:
    """OpenBao and the service are gone; the offline identity opens the key file, and that the data."""
    age = programs.program("age")
    with Service(tmp_path, root_settings(server), redis_url) as service:
        offline = tmp_path / "offline.txt"
        offline.write_text(ok(service, "keygen"))
        offline.chmod(0o600)
        recipient = ok(service, "keygen", "-y", str(offline)).strip()
        seal(service, "default", age_file(service), "--recovery", recipient)
        service.start("api")
        service.post("/keys/default/rotate")
        data = tmp_path / "data.age"
        data.write_bytes(service.encrypt(b"after the rotation"))
        service.kill("api")
        server.close()

    opened = subprocess.run([age, "-d", "-i", offline, age_file(service)], capture_output=True, check=True)
    (tmp_path / "opened.txt").write_bytes(opened.stdout)
    plain = subprocess.run([age, "-d", "-i", tmp_path / "opened.txt", data], capture_output=True, check=True)
    assert plain.stdout == b"after the rotation"


def test_audit_and_intake_keys_may_be_sealed(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, root_settings(), redis_url) as service:
        service.start("api")
        service.encrypt(b"before")
        service.stop("api")
        kms_section = service.settings.kms
        plain = kms_section.audit.key_path.read_bytes()
        for name, path in {
            "kms:audit": kms_section.audit.key_path,
            "kms:audit-signing": kms_section.audit.signing_key_path,
            "kms:intake": kms_section.jobs.intake_identity_path,
        }.items():
            seal(service, name, path)
        assert plain not in kms_section.audit.key_path.read_bytes()
        service.start("api")
        service.encrypt(b"after")
        service.stop("api")

        ok(service, "audit", "verify")
        shown = ok(service, "audit", "tail", "--context", "env=prod")
        assert shown.count("encrypt") == 2


def test_identities_of_a_credential_open_it(tmp_path: Path, redis_url: str) -> None:
    """As ``LoadCredentialEncrypted=`` of systemd hands it: a file with an age identity."""
    credential = tmp_path / "credential"
    settings = f'[kms.age]\nseal_identity_path = "{credential}"\nsealed_only = true\n'
    with Service(tmp_path, settings, redis_url) as service:
        credential.write_text(ok(service, "keygen"))
        credential.chmod(0o600)
        assert "is a plain key file" in service.refusal("api")
        seal(service, "default", age_file(service), root="kms:identity")
        service.start()
        assert service.post("/keys/default/rotate").status_code == 200
        assert unb64(b64(service.decrypt(service.encrypt(b"x")))) == b"x"


def test_a_root_that_never_answered_seals_nothing(tmp_path: Path, redis_url: str) -> None:
    settings = root_settings(address=f"http://127.0.0.1:{free_port()}", key="k", timeout_s=1.0)
    with Service(tmp_path, settings, redis_url) as service:
        made = tmp_path / "made"
        done = service.run_kms("keygen", "--sealed-by", "root", "-o", str(made))

        assert done.returncode == 69
        assert not made.exists()
        assert "Public key" not in done.stderr


# -- keys that a backend does not have -------------------------------------------------------------------


def with_remote(folder: Path, key: str, address: str) -> Service:
    """An install whose second key is in OpenBao."""
    settings = f'{bao().settings(url=address)}[kms.keys]\nremote = "transit:{key}"\n'
    return Service(folder, settings, "unix:///nonexistent/valkey.sock")


def test_keys_that_are_there_pass_and_so_does_a_backend_that_is_away(tmp_path: Path) -> None:
    key, nobody = bao().new_key(), f"http://127.0.0.1:{free_port()}"

    for folder, address in (("there", bao().url), ("away", nobody)):
        settings = with_remote(tmp_path / folder, key, address).settings
        backend_watch.check_keys(settings, key_opening.direct(settings))


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_starts_with_a_missing_key(tmp_path: Path, program: str) -> None:
    assert "no-such-key" in with_remote(tmp_path, "no-such-key", bao().url).refusal(program)
