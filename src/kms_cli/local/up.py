"""``kms up``: everything on this machine in one command. It prepares and wires; ``supervisor`` runs.

It makes the state directories, keys for development, an embedded Valkey server where no Redis is named,
the API and a worker. What they do is theirs: it tells them where things are by the environment.
"""

import http.client
import os
import socket
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final

from pyrage import x25519

from kms_cli import audited
from kms_cli.local import machine_settings, private_files, prometheus, valkey
from kms_core.programs.supervisor import Child, RestartPolicy, say, supervise
from kms_core.settings.load import check_exposure
from kms_core.settings.load import find as find_settings
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_core.settings.toml_reader import read_toml
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Unavailable
from kms_protocol.wire import PREFIX

API_GRACE_S: Final = 25.0  # it finishes the requests it has within 20
WORKER_GRACE_S: Final = 40.0  # Celery's pool may take 30 to end a warm shutdown
PROBE_TIMEOUT_S: Final = 0.5
ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # answered here, not bound
EXAMPLE: Final = '{"plaintext": "c2VjcmV0", "context": "env=dev"}'


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The flags of ``kms up``; None leaves it to the environment, the settings file and the default."""

    config: Path | None = None
    state_dir: Path | None = None
    bind: str | None = None
    port: int | None = None
    monitoring: bool = False


Programs = Callable[[Settings, Mapping[str, str]], Sequence[Child]]


def service_programs(settings: Settings, env: Mapping[str, str]) -> Sequence[Child]:
    """The API, and a worker, which answers probes on the next port."""
    host, port = reachable(settings.kms.bind), settings.kms.port
    tls = settings.kms.server.tls_cert is not None
    api, worker = ([sys.executable, "-P", "-m", f"{name}.main"] for name in ("kms_api", "kms_worker"))
    return (
        Child("api", api, ready=lambda: is_alive(host, port, tls=tls), env=env, grace_s=API_GRACE_S),
        Child("worker", worker, ready=lambda: is_alive(host, port + 1), env=env, grace_s=WORKER_GRACE_S),
    )


def run(
    options: UpOptions,
    environ: Mapping[str, str] | None = None,
    *,
    programs: Programs = service_programs,
    pace: RestartPolicy | None = None,
) -> int:
    """Run the service until Ctrl-C or SIGTERM; return the exit code (see ``supervise``).

    ``environ`` defaults to that of the process. Raises, before anything is started: ConfigurationError
    on wrong settings, Unavailable if a port is taken, Conflict if the state directory is in use.
    """
    env = _environment(options, os.environ if environ is None else environ)
    machine_settings.tell_found(options.config, env)
    settings = load_settings(options.config, env)
    check_exposure(settings)
    with ExitStack() as stack:
        run_dir = _make_directories(settings.state_dir)
        stack.enter_context(valkey.locked(run_dir / "lock", f"kms up already runs with {settings.state_dir}"))
        _check_ports(settings, options.monitoring)
        if settings.environment == "dev" and _lacks_keys(settings):
            with audited.effect(settings, "key.create", "development"):
                make_dev_keys(settings)
        servers = _embedded_redis(options, settings, env, stack)
        children = [*servers, *programs(settings, env)]
        if options.monitoring:
            children.append(prometheus.child(settings, reachable(settings.kms.bind), env))

        def announce() -> None:
            _announce(settings)
            if options.monitoring:
                say(
                    f"Prometheus: http://{reachable(settings.kms.bind)}:{prometheus.port_of(settings)}/alerts"
                )

        return supervise(children, pid_dir=run_dir, on_ready=announce, pace=pace)


def _embedded_redis(
    options: UpOptions, settings: Settings, env: dict[str, str], stack: ExitStack
) -> list[Child]:
    """The Valkey server, unless the user named one; ``env`` gets its addresses, ``stack`` its place."""
    named = _named_servers(options, env)
    if "url" in named:
        return []
    place = stack.enter_context(valkey.claim(settings.state_dir, env))
    env["KMS_REDIS_URL"] = place.url_of(0)
    if "broker_url" not in named:
        env["KMS_BROKER_URL"] = place.broker_url_of(0)
    return [valkey.child(place, valkey.ValkeyLimits(), env)]


def _environment(options: UpOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """The children's environment: ours, and over it the flags."""
    flags = {
        "KMS_CONFIG": options.config and str(options.config.absolute()),
        "KMS_STATE_DIR": options.state_dir and str(options.state_dir.absolute()),
        "KMS_BIND": options.bind,
        "KMS_PORT": options.port and str(options.port),
    }
    return {**environ, **{name: value for name, value in flags.items() if value}}


def _named_servers(options: UpOptions, env: Mapping[str, str]) -> set[str]:
    """Which of ``[kms.redis] url`` and ``broker_url`` the user gave, by variable or in the file."""
    named = {
        key for key, name in (("url", "KMS_REDIS_URL"), ("broker_url", "KMS_BROKER_URL")) if env.get(name)
    }
    file = find_settings(options.config, env)
    match read_toml(file) if file else {}:
        case {"kms": {"redis": {**keys}}}:
            named |= {str(key) for key in keys}
    return named


def _make_directories(state_dir: Path) -> Path:
    """Make the state directory and what is below it; return the one for pid files."""
    try:
        state_dir.mkdir(mode=private_files.DIR_MODE, parents=True, exist_ok=True)
        (state_dir / "files").mkdir(
            mode=private_files.DIR_MODE, exist_ok=True
        )  # the user may open it to others
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot make the state directory {state_dir}: {exc.strerror}. Name another with --state-dir"
        ) from exc
    private_files.directory(state_dir / "log")
    return private_files.directory(state_dir / "run")


def _check_ports(settings: Settings, monitoring: bool) -> None:
    bind, port = settings.kms.bind, settings.kms.port
    uses = [(port, "the API"), (port + 1, "the worker's metrics")]
    if settings.kms.facade.port is not None:
        uses.append((settings.kms.facade.port, "[kms.facade] port"))
    if monitoring:
        uses.append((prometheus.port_of(settings), "Prometheus"))
    for number, use in uses:
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((bind, number))
            except OSError as exc:
                raise Unavailable(
                    f"{bind} port {number}, for {use}, cannot be used: {exc.strerror}. Stop the program that "
                    "has it, or choose another with --port"
                ) from exc


# -- keys for development ----------------------------------------------------------------------------


def _lacks_keys(settings: Settings) -> bool:
    kms = settings.kms
    paths = [kms.jobs.spool_identity_path, kms.jobs.intake_identity_path]
    if "age" in settings.used_backends:
        paths.append(kms.age.public_key_path)
    return not all(path.exists() for path in paths)


def make_dev_keys(settings: Settings) -> None:
    """Make an Age key pair, a spool and an intake identity where there are none; touch none that is there."""
    age = settings.kms.age
    if "age" in settings.used_backends and not age.public_key_path.exists():
        if make_identity(age.private_key_path):
            say(f"made a key for development: {age.private_key_path}")
        identity = _first_identity(age.private_key_path)
        private_files.create_file(age.public_key_path, f"{identity.to_public()}\n")
    make_identity(settings.kms.jobs.spool_identity_path)
    make_identity(settings.kms.jobs.intake_identity_path)


def make_identity(path: Path) -> bool:
    """Write a new X25519 identity to ``path`` (0600) as ``age-keygen`` would; False if it is there."""
    if path.exists():
        return False
    identity = x25519.Identity.generate()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = f"# created: {created}\n# public key: {identity.to_public()}\n{identity}\n"
    try:
        path.parent.mkdir(mode=private_files.DIR_MODE, parents=True, exist_ok=True)
        return private_files.create_file(path, text)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot write the key {path}: {exc.strerror}. With --state-dir, keys are made in that directory"
        ) from exc


def _first_identity(path: Path) -> x25519.Identity:
    lines = small_files.text(path).splitlines()
    text = next((line for line in lines if line.startswith("AGE-SECRET-KEY-1")), None)
    if text is None:
        raise ConfigurationError(f"No X25519 identity in {path}: put its recipient beside it by hand")
    return x25519.Identity.from_str(text.strip())


# -- being ready -------------------------------------------------------------------------------------


def reachable(bind: str) -> str:
    """The address at which a server bound to ``bind`` answers on this machine."""
    return ANY_ADDRESS.get(bind, bind)


def is_alive(host: str, port: int, *, tls: bool = False) -> bool:
    """Whether GET /livez answers 200, whoever that is; one that asks for a certificate is alive."""
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    if tls:
        anybody = ssl._create_unverified_context()  # noqa: S323, SLF001 -- nothing is told to whoever answers
        connection = http.client.HTTPSConnection(host, port, timeout=PROBE_TIMEOUT_S, context=anybody)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == HTTPStatus.OK
    except http.client.RemoteDisconnected:  # behind a handshake: without a certificate it says no more
        return tls
    except ssl.SSLError as exc:
        return "CERTIFICATE_REQUIRED" in str(exc)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _announce(settings: Settings) -> None:
    host = reachable(settings.kms.bind)
    scheme = "http" if settings.kms.server.tls_cert is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.kms.port}"
    sys.stdout.write(f"kms: ready {url} (state {settings.state_dir.absolute()})\n")
    sys.stdout.flush()
    credential = ""
    if settings.kms.auth.mode == "required":
        file = settings.kms.auth.tokens_path
        say(f"make a token: kms token create --file {file} --name me --scope '*' -o me")
        credential = ' -H "Authorization: Bearer $(cat me)"'
    say(f"try: curl -s {url}{PREFIX}/encrypt{credential} -H 'Content-Type: application/json' -d '{EXAMPLE}'")
    say("stop with Ctrl-C")
