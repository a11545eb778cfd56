"""The whole service over AWS KMS: calls, a bulk job, rotation, a start without the key."""

import subprocess
import sys
from pathlib import Path

from kms_protocol.errors import EXIT_CONFIGURATION
from kms_protocol.wire import ENDED
from support.aws_servers import ACCESS_KEY, REGION, SECRET_KEY, moto
from support.service import PROGRAMS, Service, b64
from support.waiting import until


class AwsService(Service):
    """Its default key is an alias in AWS KMS; the credentials are in the environment."""

    def __init__(self, folder: Path, alias: str) -> None:
        place = (
            f'awskms.key_id = "{alias}"\nawskms.region = "{REGION}"\nawskms.endpoint_url = "{moto().url}"\n'
        )
        super().__init__(folder, f'dev_backend = "awskms"\n{place}')

    @property
    def environ(self) -> dict[str, str]:
        return {
            **super().environ,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }


def test_files_of_both_keys_open_after_a_rotation(tmp_path: Path) -> None:
    with AwsService(tmp_path, moto().new_alias()) as service:
        service.start()
        before = service.encrypt(b"before")
        job = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"%d" % n)} for n in range(50)]})
        until(lambda: service.job(job)["state"] in ENDED, "the job has ended")
        rotated = service.post("/keys/default/rotate")
        after = service.encrypt(b"after")

        assert service.job(job)["state"] == "succeeded"
        assert rotated.status_code == 200
        assert rotated.json()["key_version"].encode() in after
        assert rotated.json()["key_version"].encode() not in before
        assert (service.decrypt(before), service.decrypt(after)) == (b"before", b"after")
        assert service.get("/health").json()["status"] == "healthy"


def test_a_key_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    service = AwsService(tmp_path, "alias/nobody")
    service.http.close()
    argv = [sys.executable, "-P", "-m", PROGRAMS["api"]]
    start = subprocess.run(argv, env=service.environ, capture_output=True, text=True, timeout=60, check=False)

    assert start.returncode == EXIT_CONFIGURATION
    assert "alias/nobody: the key is not there" in start.stderr
