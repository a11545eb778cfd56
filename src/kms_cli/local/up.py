"""``kms up``: runs the whole service on this machine under ``kms_core.programs.supervisor``.

It creates the state directories and keys for development, and starts the API, a worker, an embedded Valkey
server if no Redis is named, and Prometheus from the PATH with ``--monitoring``. The processes are configured
by their environment.
"""

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

from kms_cli import audited, terminal
from kms_cli.local import directories, valkey
from kms_cli.local.instances import keep_note
from kms_cli.session import global_options
from kms_client.requests import START_HINT
from kms_core import secure_files
from kms_core.age.recipients import Recipient, parse_identity
from kms_core.backends.age_settings import AgeSection
from kms_core.backends.key_files import make_identity
from kms_core.programs.liveness import is_alive, reachable
from kms_core.programs.supervisor import Child, say, supervise
from kms_core.secure_files import in_shell
from kms_core.settings.files import for_server
from kms_core.settings.files import named as named_file
from kms_core.settings.load import load as load_settings
from kms_core.settings.load import origins
from kms_core.settings.model import Settings
from kms_core.settings.redis_urls import for_celery
from kms_core.settings.validation import check_exposure
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, KmsError, Unavailable
from kms_protocol.wire import PREFIX

RULES: Final = Path(__file__).parents[3] / "monitoring" / "rules"  # in a checkout, from which scripts/up runs
PROMETHEUS_OFFSET: Final = 2  # from the port of the API; the next port is that of the worker
API_GRACE_S: Final = 25.0  # its open requests end within 20 s
WORKER_GRACE_S: Final = 40.0  # a warm shutdown of Celery's pool may take 30 s
_ADDRESSES: Final[Sequence[str]] = ("KMS_REDIS_URL", "KMS_BROKER_URL")
EXAMPLE: Final = '{"plaintext": "c2VjcmV0", "context": "env=dev"}'


def prometheus_port(settings: Settings) -> int:
    """Return the port of the Prometheus that ``--monitoring`` starts."""
    return settings.kms.port + PROMETHEUS_OFFSET


def prometheus(settings: Settings, host: str, env: Mapping[str, str]) -> Child:
    """Return Prometheus as a child process. Raises ConfigurationError without the program or the rules."""
    binary = shutil.which("prometheus", path=env.get("PATH"))
    if binary is None:
        raise ConfigurationError("--monitoring needs the program prometheus on the PATH: install it first")
    if not RULES.is_dir():
        raise ConfigurationError(
            "--monitoring needs the folder monitoring/ of a checkout: use scripts/up there"
        )
    folder = directories.private_directory(settings.state_dir / "prometheus")
    secure_files.write(folder / "prometheus.yml", json.dumps(_configuration(settings, host)).encode())
    argv = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={settings.kms.bind}:{prometheus_port(settings)}",
        "--log.level=warn",
    ]
    port = prometheus_port(settings)
    return Child("prometheus", argv, ready=lambda: is_alive(host, port, path="/-/ready"), env=env)


def _configuration(settings: Settings, host: str) -> dict[str, object]:
    """Return the configuration, as ``monitoring/prometheus.yml`` but for this service. JSON is valid YAML."""
    targets = {"kms-api": settings.kms.port, "kms-worker": settings.kms.port + 1}
    return {
        "global": {
            "scrape_interval": "5s",
            "evaluation_interval": "5s",
            "external_labels": {"kms_url": f"http://{host}:{settings.kms.port}"},
        },
        "rule_files": [str(RULES / "*.yml")],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [f"{host}:{port}"]}]}
            for name, port in targets.items()
        ],
    }


def url_of(settings: Settings) -> str:
    """Return the address of the service for this machine."""
    host = reachable(settings.kms.bind)
    scheme = "http" if settings.kms.server.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.kms.port}"


def service_programs(settings: Settings, env: Mapping[str, str]) -> Sequence[Child]:
    """Return the API and a worker, which answers probes on the next port."""
    host, port = reachable(settings.kms.bind), settings.kms.port
    tls = settings.kms.server.tls_cert is not None
    api, worker = ([sys.executable, "-P", "-m", f"{name}.main"] for name in ("kms_api", "kms_worker"))
    return (
        Child("api", api, ready=lambda: is_alive(host, port, tls=tls), env=env, grace_s=API_GRACE_S),
        Child("worker", worker, ready=lambda: is_alive(host, port + 1), env=env, grace_s=WORKER_GRACE_S),
    )


@click.command("up")
@click.option("--bind", help="Address to listen on.", envvar="KMS_BIND")
@click.option("--port", type=click.IntRange(1, 65534), help="Port to listen on.", envvar="KMS_PORT")
@click.option("--monitoring", is_flag=True, help="Also run Prometheus from the PATH, two ports above.")
def up_command(bind: str | None, port: int | None, *, monitoring: bool) -> int:
    """Run API, worker and an embedded Valkey until Ctrl-C. Missing keys are created for development."""
    env = _environment(bind, port)
    settings = load_settings(None, env)
    check_exposure(settings)
    host = reachable(settings.kms.bind)
    with ExitStack() as stack:
        directories.make_directory(settings.state_dir)
        directories.make_directory(settings.state_dir / "files")  # the user may change its mode
        run_dir = directories.private_directory(settings.state_dir / "run")
        stack.enter_context(
            directories.locked(run_dir / "lock", f"kms up already runs with {settings.state_dir}")
        )
        _check_ports(settings, monitoring)
        if settings.environment == "dev" and _lacks_keys(settings):
            with audited.effect(settings, "key.create", "development"):
                make_dev_keys(settings)
        stack.enter_context(keep_note(settings, url_of(settings), env))
        servers = _embedded_redis(env, settings.state_dir, stack)
        children = [*servers, *service_programs(settings, env)]
        if monitoring:
            children.append(prometheus(settings, host, env))
        embedded = {name: env[name] for name in _ADDRESSES if servers and name in env}
        announce = partial(_announce, settings, embedded, monitoring=monitoring)
        return supervise(children, pid_dir=run_dir, on_ready=announce)


def _embedded_redis(env: dict[str, str], state_dir: Path, stack: ExitStack) -> list[Child]:
    """Return the Valkey server, unless the user names another, and set its addresses in ``env``."""
    origin = origins(None, env)
    if origin(("redis", "url")) != "default":
        return []
    files = stack.enter_context(valkey.claim(state_dir, env))
    env["KMS_REDIS_URL"] = files.url_of(0)
    if origin(("redis", "broker_url")) == "default":
        env["KMS_BROKER_URL"] = for_celery(files.url_of(0))
    return [valkey.child(files, env)]


def _environment(bind: str | None, port: int | None) -> dict[str, str]:
    """Return the environment of the processes: that of this process, with the options and the file set."""
    given = global_options()
    file = for_server(given.config, os.environ)
    if file and file != named_file(given.config, os.environ):
        terminal.say(f"settings: {file}")
    flags = {
        "KMS_CONFIG": file and str(file.absolute()),
        "KMS_STATE_DIR": given.state_dir and str(given.state_dir.absolute()),
        "KMS_BIND": bind,
        "KMS_PORT": port and str(port),
    }
    return {**os.environ, **{name: value for name, value in flags.items() if value}}


class PortTaken(Unavailable):
    """A port of the service is in use by another program, or cannot be bound."""

    hint = "use `kms up --port 8090`, or find the holder: `ss -ltnp`"


def _check_ports(settings: Settings, monitoring: bool) -> None:
    bind, port = settings.kms.bind, settings.kms.port
    uses = [(port, "the API"), (port + 1, "the worker's metrics")]
    if monitoring:
        uses.append((prometheus_port(settings), "Prometheus"))
    for number, use in uses:
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((bind, number))
            except OSError as exc:
                raise PortTaken(f"{bind} port {number}, for {use}, cannot be used: {exc.strerror}") from exc


# -- keys for development ----------------------------------------------------------------------------


def _lacks_keys(settings: Settings) -> bool:
    kms = settings.kms
    paths = [kms.jobs.spool_identity_path, kms.jobs.intake_identity_path]
    if "age" in settings.used_backends:
        paths.append(settings.backend(AgeSection).public_key_path)
    return not all(path.exists() for path in paths)


def make_dev_keys(settings: Settings) -> None:
    """Create an Age key pair, a spool identity and an intake identity, unless they exist."""
    age = settings.backend(AgeSection)
    if "age" in settings.used_backends and not age.public_key_path.exists():
        if make_identity(age.private_key_path):
            say(f"created a key for development: {age.private_key_path}")
        secure_files.create(age.public_key_path, f"{_recipient(age.private_key_path)}\n".encode())
    make_identity(settings.kms.jobs.spool_identity_path)
    make_identity(settings.kms.jobs.intake_identity_path)


def _recipient(path: Path) -> Recipient:
    """Return the recipient of the first identity in a file. Raises ConfigurationError without one."""
    for line in small_files.read(path).decode("utf-8", "replace").splitlines():  # a sealed one is no text
        with suppress(ValueError):
            return parse_identity(line.strip()).recipient
    raise ConfigurationError(
        f"There is no identity in {path}: write its recipient to the public key file yourself"
    )


# -- readiness ---------------------------------------------------------------------------------------


def without_status(url: str, error: KmsError) -> tuple[str, str]:
    """Return what it means that a service gives no status, and what to do: it may be alive."""
    parts, hint = urlsplit(url), terminal.hint_of(error)
    if hint != START_HINT or not is_alive(parts.hostname or "", parts.port or 0, tls=parts.scheme == "https"):
        return error.detail, hint
    text = f"{url} runs, but gives no status: {terminal.plain(error.detail)}"
    return text, "a peer that it asks may hang, as Redis: see the lines above and its log"


def _announce(settings: Settings, embedded: Mapping[str, str], *, monitoring: bool) -> None:
    """Print the address, what is there, and what to try. ``embedded``: the variables of the own Redis."""
    url = url_of(settings)
    sys.stdout.write(f"kms: ready {url} (state {settings.state_dir.absolute()})\n")
    sys.stdout.flush()
    credential = ""
    if settings.kms.auth.mode == "required":
        file = "" if settings.kms.auth.tokens else f"--file {in_shell(settings.kms.auth.tokens_path)} "
        say(f"create a token: kms token create {file}--name me --scope '*' -o me")
        credential = ' -H "Authorization: Bearer $(cat me)"'
    say(f"try: curl -s {url}{PREFIX}/encrypt{credential} -H 'Content-Type: application/json' -d '{EXAMPLE}'")
    say(f"in a browser: {url}/ui" + (f", {url}/docs" if settings.kms.server.docs else ""))
    if embedded:
        say("for Celery: export " + " ".join(f"{name}='{value}'" for name, value in embedded.items()))
    if monitoring:
        host = reachable(settings.kms.bind)
        say(f"Prometheus: http://{host}:{prometheus_port(settings)}/alerts")
    say("stop with Ctrl-C")
