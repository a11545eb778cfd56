"""Compose, Kubernetes and the units for hosts that share no volume: the files, and two hosts of each."""

import os
import re
import shutil
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import pytest
import yaml

from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_core.settings.validation import check_exposure
from support import artefacts, object_stores, redis_servers
from support.artefacts import DEPLOY, ROOT, SYSTEMD, make_secrets, rendered
from support.credentials import bearer
from support.object_stores import ACCESS_KEY, SECRET
from support.openbao import bao
from support.programs import BUILD_LIMIT_S
from support.service import CONTEXT, Service
from support.waiting import WAIT_S, until
from support.webhooks import LocalhostTls, make_localhost_tls

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)  # the first run builds Helm
MIB: Final = 1024 * 1024
FILES: Final = {
    "compose": DEPLOY / "compose/several-hosts.toml",
    "systemd": SYSTEMD / "several-hosts.toml",
}
VARIANTS: Final = (*FILES, "kubernetes")


def settings_of(variant: str) -> Settings:
    return load_settings(FILES[variant], {"COSMIAN_KMS_URL": "https://kms.example.com"})


def text_of(variant: str) -> str:
    """The file of settings; in Kubernetes that of the chart, with a key that OpenBao seals."""
    if variant != "kubernetes":
        return FILES[variant].read_text()
    (text,) = [
        each["data"]["kms.toml"]
        for each in rendered("openbao")
        if each["kind"] == "ConfigMap" and "kms.toml" in each["data"]
    ]
    return str(text)


def first_key(bucket: str) -> list[str]:
    """The command of the chart's Job, for another bucket."""
    (job,) = [each for each in rendered("openbao") if each["kind"] == "Job"]
    program, *words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert program == "kms"
    return [word.replace("s3://kms-state/", f"s3://{bucket}/") for word in words]


# -- what the files say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FILES)
def test_its_settings_share_no_directory(variant: str) -> None:
    loaded = settings_of(variant)

    check_exposure(loaded)
    kms = loaded.kms
    assert loaded.environment == "prod"
    assert kms.jobs.spool_bucket is not None
    assert kms.auth.mode == "required"
    assert (kms.auth.tokens or "").startswith("s3://kms-state/")
    assert not kms.jobs.roots
    buckets = {**kms.jobs.buckets, "the spool's": kms.jobs.spool_bucket}
    assert {str(each.endpoint) for each in buckets.values()} == {"https://s3.example.com"}
    assert [name for name, each in kms.jobs.buckets.items() if each.read or each.write] == []


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """Both files as Compose reads them."""
    files = ("docker-compose.yml", "deploy/compose/several-hosts.yml")
    return artefacts.composed(files=files, env={"PATH": os.environ["PATH"], "KMS_ADDRESS": "192.0.2.11"})


def test_compose_runs_api_and_worker_and_no_server_of_its_own(composed: dict[str, Any]) -> None:
    assert composed["services"].keys() == {"api", "worker"}
    for service in composed["services"].values():
        assert not service.get("depends_on")
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["mem_limit"] == service["memswap_limit"]
        (settings,) = [
            each["source"] for each in service["volumes"] if each["target"] == "/etc/kms-service/kms.toml"
        ]
        assert Path(settings) == FILES["compose"]
    addresses = {each["host_ip"] for each in composed["services"]["api"]["ports"]}
    assert addresses == {"127.0.0.1", "192.0.2.11"}


def test_volumes_of_compose_are_of_one_host_and_its_memory_has_room_for_buffers(
    composed: dict[str, Any],
) -> None:
    one_host = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-service"]["mem_limit"]
    bucket = settings_of("compose").kms.jobs.spool_bucket
    assert (one_host, bucket is not None) == ("1g", True)
    buffers = bucket.buffer_bytes if bucket else 0

    for service in composed["services"].values():
        named = {each["source"] for each in service["volumes"] if each["type"] == "volume"}
        assert not any({"driver", "driver_opts"} & composed["volumes"][name].keys() for name in named)
        assert int(service["mem_limit"]) >= 1024 * MIB + buffers


def test_compose_mounts_each_secret_that_its_settings_name(composed: dict[str, Any]) -> None:
    named = set(re.findall(r"/run/secrets/([a-z_]+)", FILES["compose"].read_text()))

    for service in composed["services"].values():
        assert {each["source"] for each in service["secrets"]} == named


# -- two hosts -----------------------------------------------------------------------------------------------


def secrets_of(variant: str, folder: Path, authority: LocalhostTls) -> Path:
    """The secrets of a deployment, where its settings look for them below the directory that is answered."""
    made = make_secrets(folder / "made")
    shutil.copy(authority.cert_and_key, made / "tls.crt")
    shutil.copy(authority.cert_and_key, made / "tls.key")
    for name, text in {
        "bucket": SECRET,
        "redis_password": redis_servers.PASSWORD,
        "cosmian-api-key": "-",
    }.items():
        (made / name).unlink(missing_ok=True)
        (made / name).write_text(text)
    names = [path.name for path in made.iterdir()]
    places = {
        "compose": {
            "age_private_key.txt": "age_private_key",
            "age_public_key.txt": "age_public_key",
            "spool.key": "spool_key",
            "intake.key": "intake_key",
            "bucket": "bucket_secret_key",
            "tls.crt": "tls_cert",
            "tls.key": "tls_key",
        },
        "kubernetes": {
            "spool.key": "keys/spool.key",
            "intake.key": "keys/intake.key",
            "redis_password": "redis/password",
            "bucket": "bucket/secret-key",
            "tls.crt": "tls/tls.crt",
            "tls.key": "tls/tls.key",
        },
        "systemd": {name: f"kms_{name}" for name in names} | {"bucket": "kms_bucket-secret-key"},
    }[variant]
    mounted = folder / "mounted"
    if variant == "kubernetes":
        (made / "token").write_text(bao().token())
        places["token"] = "key-server/token"
    for name, place in ({"redis_password": "redis_password"} | places).items():
        (mounted / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / name, mounted / place)
        (mounted / place).chmod(0o600)
    return mounted


class Host(Service):
    """One host with a state directory of its own, and a copy of the deployment's settings and secrets."""

    def __init__(self, folder: Path, text: str, secrets: Path, authority: LocalhostTls) -> None:
        self.secrets = secrets
        super().__init__(folder)
        self.config.write_text(text)
        if self.settings.kms.server.tls_cert:
            self.url = self.url.replace("http:", "https:").replace("127.0.0.1", "localhost")
            context = ssl.create_default_context(cafile=authority.ca_file)
            self.http.close()
            self.http = httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False, verify=context)

    @property
    def environ(self) -> dict[str, str]:
        """Cosmian has no server here, so what would use it uses Age keys, as in dev."""
        environ = super().environ | {"CREDENTIALS_DIRECTORY": str(self.secrets), "PROVISIONING_ENV": "dev"}
        return {name: value for name, value in environ.items() if name != "KMS_REDIS_URL"}

    def said(self, *words: str, **environ: str) -> str:
        """What a ``kms`` command that succeeds prints."""
        done = self.run_kms(*words, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass(frozen=True)
class Hosts:
    one: Host
    two: Host
    spool: object_stores.TestBucket
    state: object_stores.TestBucket


@pytest.fixture(params=VARIANTS)
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts that have Redis, two buckets and copies of the same files in common, and no directory."""
    variant, weed = str(request.param), object_stores.weed()
    authority, spool, state = make_localhost_tls(tmp_path), weed.new(), weed.new()
    with ExitStack() as stack:
        server = stack.enter_context(redis_servers.server(tmp_path / "redis", None))
        made: list[Host] = []
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            if made:
                shutil.copytree(made[0].secrets, folder / "mounted")
                secrets = folder / "mounted"
            else:
                secrets = secrets_of(variant, folder, authority)
            text = text_of(variant)
            for old, new in {
                r'"rediss?://kms@[^"]+"': f'"redis://kms@localhost:{server.port}/0"',
                r'endpoint = "[^"]+"': f'endpoint = "{weed.url}"\nallow_http = true',
                r'access_key_id = "kms"': f'access_key_id = "{ACCESS_KEY}"',
                r"\bkms-spool\b": spool.name,
                r"\bkms-state\b": state.name,
                r"/run/secrets": str(secrets),
                r'bind = "0.0.0.0"': 'bind = "127.0.0.1"',
                r"state_dir = .*": f'state_dir = "{folder / "state"}"',
            }.items():
                text, count = re.subn(old, new, text)
                assert count or old == "/run/secrets", old
            if variant == "kubernetes":
                text, count = re.subn(r'address = "[^"]+"', f'address = "{bao().url}"', text)
                assert count == 1
            made.append(stack.enter_context(Host(folder, text, secrets, authority)))
            if len(made) > 1 and variant != "kubernetes":
                shutil.copytree(made[0].state / "age", made[1].state / "age", dirs_exist_ok=True)
        if variant == "kubernetes":
            bao().admin("POST", "transit/keys/kms-root")
            made[0].said(*first_key(state.name), KMS_STATE_DIR=str(tmp_path / "job"))
        for host in made:
            host.start()
        yield Hosts(made[0], made[1], spool, state)


def test_a_job_of_one_host_is_fetched_from_the_other(hosts: Hosts) -> None:
    """With a token that one made; the spool is the bucket, and nothing rests in either state directory."""
    token = re.search(r"kms_\S+", hosts.one.said("token", "create", "--name", "me", "--scope", "*"))
    assert token
    for host in (hosts.one, hosts.two):
        host.http.headers.update(bearer(token[0]))
    data = os.urandom(MIB)

    job_id = hosts.one.upload("encrypt", data, CONTEXT)
    kept = hosts.spool.keys()
    hosts.two.wait(job_id, "succeeded")
    sealed = hosts.two.result(job_id)

    assert hosts.one.decrypt(sealed) == data
    assert any(job_id in key for key in kept)
    assert {each.split(".")[0] for each in hosts.state.keys()} >= {"tokens"}  # noqa: SIM118 -- no dict
    assert not [path for host in (hosts.one, hosts.two) for path in host.state.rglob(f"*{job_id}*")]
    until(
        lambda: hosts.one.http.get("/readyz").json()["spool"] == "available", "the spool is known as shared"
    )
