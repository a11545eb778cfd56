"""What settings may not say together, and where the service may not listen. Reads no file but symlinks."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from kms_core.settings.buckets import bucket_files
from kms_core.settings.model import Settings
from kms_core.settings.toml_reader import Unset, nearest, unset_error
from kms_core.settings.validate_auth import auth_files
from kms_core.settings.validate_backends import check_aws_endpoint, is_loopback, secret_files
from kms_protocol.errors import ConfigurationError

BUILT_IN_ENVIRONMENTS: Final = ("dev", "prod")
JOB_BODY_FACTOR: Final = 2
"""Bytes of a JSON job's body for each of ``json_job_bytes``: items are base64, with names around them."""


def check_exposure(settings: Settings) -> None:
    """Refuse to serve prod, or any address off loopback, while nobody has decided about authentication.

    Raises ConfigurationError. ``localhost`` and loopback addresses count as loopback, other names do not.
    """
    if settings.kms.auth.mode is not None:
        return
    if settings.is_prod:
        reason = "The environment is prod"
    elif not is_loopback(settings.kms.bind):
        reason = "kms.bind is not a loopback address"
    else:
        return
    raise ConfigurationError(
        f'{reason}, and callers are not authenticated: write mode = "required" under [kms.auth] and make '
        "tokens with kms token create; if something in front of the service authenticates callers, write "
        'mode = "none" under [kms.auth]; if neither, bind to 127.0.0.1 and leave prod'
    )


def check_environment(settings: Settings) -> None:
    """A misspelt environment must not run with the guards of dev: other names need a section."""
    known = (*BUILT_IN_ENVIRONMENTS, *settings.kms.environments)
    for name in BUILT_IN_ENVIRONMENTS:
        if name in settings.kms.environments:
            raise ConfigurationError(f"kms.environments.{name}: set kms.{name}_backend instead")
    if settings.environment not in known:
        raise ConfigurationError(
            f"kms.environment: expected one of {', '.join(known)}{nearest(settings.environment, known)}"
            "; another environment needs a section [kms.environments.<name>] with its backend"
        )


def check_variables(settings: Settings, unset: Mapping[str, Mapping[str, Unset]]) -> None:
    """``unset``: backend to key to the value that is missing. Only backends in use matter."""
    for backend in unset.keys() & settings.used_backends:
        for key, value in unset[backend].items():
            section = backend.replace("-", "_")
            raise unset_error(f"kms.{section}.{key}", value)


def check_backends(settings: Settings, literals: Collection[str]) -> None:
    """Age in prod and a Cosmian server without TLS are refused; so is Cosmian without an address.

    ``literals`` are the sections whose credential stands in the file itself, which prod refuses.
    """
    if settings.is_prod and "age" in settings.used_backends and not settings.kms.allow_age_in_prod:
        raise ConfigurationError(
            "The age backend is in use and the environment is prod: set kms.prod_backend to another one, "
            "or allow_age_in_prod = true under [kms] if key files on this host are what you want"
        )
    if "cosmian" in settings.used_backends:
        _check_cosmian(settings)
        if settings.is_prod and "cosmian" in literals:
            raise ConfigurationError(
                "kms.cosmian.api_key: a key in the settings themselves is refused in prod; use api_key_file, "
                'or api_key = "${COSMIAN_API_KEY}"'
            )


def _check_cosmian(settings: Settings) -> None:
    cosmian = settings.kms.cosmian
    if not cosmian.server_url:
        raise ConfigurationError("kms.cosmian.server_url is missing: set it, or export COSMIAN_KMS_URL")
    url = urlsplit(cosmian.server_url)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ConfigurationError("kms.cosmian.server_url: expected https://host[:port][/prefix]")
    if url.username or url.password or url.query or url.fragment:
        raise ConfigurationError("kms.cosmian.server_url: no user, password, query or fragment belongs there")
    if settings.is_prod and url.scheme != "https":
        raise ConfigurationError("kms.cosmian.server_url: http:// is refused in prod; use https://")
    if settings.is_prod and not cosmian.tls_verify:
        raise ConfigurationError("kms.cosmian.tls_verify = false is refused in prod; name a CA in ca_file")
    if cosmian.api_key and cosmian.api_key_file:
        raise ConfigurationError("kms.cosmian.api_key_file: set it, or api_key, and not both")
    if (cosmian.client_cert_file is None) != (cosmian.client_key_file is None):
        raise ConfigurationError(
            "kms.cosmian.client_cert_file and kms.cosmian.client_key_file belong together: set both"
        )


def check_awskms(settings: Settings) -> None:
    """Another endpoint than AWS's needs TLS, except on loopback outside prod."""
    awskms = settings.kms.awskms
    if "awskms" in settings.used_backends and awskms.endpoint_url is not None:
        check_aws_endpoint("kms.awskms.endpoint_url", awskms.endpoint_url, in_prod=settings.is_prod)


def check_keys(settings: Settings) -> None:
    """Every key is a URI with a scheme; which schemes there are, the keyring knows."""
    for key_id, uri in settings.kms.key_uris:
        try:
            scheme = urlsplit(uri).scheme
        except ValueError:  # its text quotes the URI
            scheme = ""
        if not scheme:
            raise ConfigurationError(
                f"kms.keys.{key_id}: expected a URI such as age:///path/to/private_key.txt"
            )


def check_endpoints(settings: Settings) -> None:
    """Webhooks go over TLS; http:// only to this machine, and only in dev."""
    for name, endpoint in settings.kms.jobs.endpoints.items():
        where = f"kms.jobs.endpoints.{name}.url"
        url = _http_url(endpoint.url)
        if url is None:
            raise ConfigurationError(f"{where}: expected https://host[:port][/path] in ASCII")
        if url.username is not None or url.password is not None or url.fragment:
            raise ConfigurationError(f"{where}: no user, password or fragment belongs there")
        if url.scheme == "http" and not (settings.environment == "dev" and is_loopback(url.hostname or "")):
            raise ConfigurationError(f"{where}: expected https://; http:// is for loopback in dev alone")


def _http_url(text: str) -> SplitResult | None:
    """The parts of an absolute URL whose name and port can be looked up and called."""
    try:
        url = urlsplit(text)
        names_host = bool(url.hostname and url.hostname.encode("idna")) and url.port != 0
    except ValueError:  # UnicodeError is one; their texts quote the URL
        return None
    visible = text.isascii() and text.isprintable() and " " not in text
    return url if names_host and visible and url.scheme in {"http", "https"} else None


def check_facade(settings: Settings) -> None:
    """A port of its own must be one that nobody else of ours takes."""
    facade, port = settings.kms.facade, settings.kms.port
    if facade.port is not None and not facade.enabled:
        raise ConfigurationError("kms.facade.port: nobody would answer there; write enabled = true")
    if facade.port in {port, port + 1}:
        raise ConfigurationError(
            "kms.facade.port: kms.port and the next one, where the worker's metrics are, are taken; "
            "name another"
        )


def check_server(settings: Settings) -> None:
    """The largest JSON body must fit into each bound on such bodies: it could never be accepted else."""
    server, limits = settings.kms.server, settings.kms.limits
    largest = max(limits.json_body_bytes, limits.json_job_bytes * JOB_BODY_FACTOR)
    for name in ("json_bytes", "json_bytes_per_tenant", "json_bytes_per_credential"):
        if getattr(server, name) < largest:
            raise ConfigurationError(
                f"kms.server.{name}: expected at least {largest}, the largest JSON body that [kms.limits] "
                "allows (json_body_bytes, or twice json_job_bytes): raise the one, or lower the other"
            )


def check_audit(settings: Settings) -> None:
    """The file is the trail; everything else is a copy of it."""
    if "file" not in settings.kms.audit.sinks:
        raise ConfigurationError('kms.audit.sinks: "file" must be among them: the trail itself is there')


def check_roots(settings: Settings) -> None:
    """No root of file jobs may hold, or lie in, what the service keeps to itself (symlinks followed)."""
    for index, root in enumerate(settings.kms.jobs.roots):
        where = f"kms.jobs.roots[{index}]"
        if not root.is_absolute():
            raise ConfigurationError(f"{where}: expected an absolute path")
        for name, private, is_tree in _private(settings):
            inside = private.resolve().is_relative_to(root.resolve())
            around = is_tree and root.resolve().is_relative_to(private.resolve())
            if inside or around:
                raise ConfigurationError(
                    f"{where} overlaps {name}: jobs could reach keys or records; move one"
                )


def _private(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """Name, path, and whether everything below the path is private too."""
    kms = settings.kms
    yield "kms.state_dir", kms.state_dir, False  # a root of its own within is what `kms up` makes
    yield "kms.state_dir's run/", kms.state_dir / "run", True
    yield "kms.jobs.spool_dir", kms.jobs.spool_dir, True
    yield "kms.jobs.spool_identity_path", kms.jobs.spool_identity_path, True
    yield "kms.jobs.intake_identity_path", kms.jobs.intake_identity_path, True
    yield "kms.audit.path", kms.audit.path, True
    yield "kms.audit.key_path", kms.audit.key_path, True
    yield "kms.audit.signing_key_path", kms.audit.signing_key_path, True
    yield from auth_files(settings)
    yield "kms.age.private_key_path", kms.age.private_key_path, True
    yield "kms.age.public_key_path", kms.age.public_key_path, True
    for name, endpoint in kms.jobs.endpoints.items():
        yield f"kms.jobs.endpoints.{name}.secret_file", endpoint.secret_file, True
    optional = {
        "kms.audit.anchor_dir": kms.audit.anchor_dir,
        "kms.cosmian.api_key_file": kms.cosmian.api_key_file,
        "kms.cosmian.client_key_file": kms.cosmian.client_key_file,
        "kms.redis.password_file": kms.redis.password_file,
    }
    yield from ((name, path, True) for name, path in optional.items() if path)
    yield from bucket_files(settings)
    yield from secret_files(settings)
    for key_id, uri in kms.key_uris:
        parts = urlsplit(uri)
        if parts.scheme == "age":
            for path in (unquote(parts.path), *parse_qs(parts.query).get("public", ())):
                yield f"the files of kms.keys.{key_id}", Path(path), True
