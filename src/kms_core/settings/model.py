"""The tables of ``kms.toml``: every key with its type, unit and default.

``settings.load`` fills in fields without a default from the environment's name or the state directory;
``docs/kms.example.toml`` shows the values.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from msgspec import Meta, field

from kms_core.backends import SCHEMES
from kms_core.sections import BackendSection, Positive, Section, Timeout
from kms_protocol.units import GiB, KiB, MiB
from kms_protocol.wire import JobState, KeyId

if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal[tuple(SCHEMES)]

Algorithm = Literal[  # of JWTs: signatures by a private key, nothing else
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
BucketName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{2,62}(?!\\s)$")]
_Table = TypeVar("_Table", bound=BackendSection)
Queue = Literal["kms.bulk", "kms.files", "kms.maintenance"]
Port = Annotated[int, Meta(ge=1, le=65534)]  # the worker's metrics are on port + 1


class ClaimGrant(Section, frozen=True, kw_only=True):
    """``[kms.auth.issuers.<name>.grants.<name>]``: scopes of tokens whose claims match ``when``."""

    when: dict[str, str]
    scopes: tuple[str, ...]


class IssuerSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.issuers.<name>]``: an issuer of accepted JWTs, and the meaning of their claims.

    Without ``jwks_url`` and ``jwks_file`` its keys are found by discovery. An API server of Kubernetes at
    ``review_url`` verifies tokens in place of keys (TokenReview), for logins only; it is sent the token in
    ``review_token_file``. ``tenants`` are the values that
    ``tenant_claim`` may have. A token's jobs may run for ``job_grace_s`` seconds after its expiry.
    """

    issuer: Annotated[str, Meta(min_length=1)]
    audience: Annotated[str, Meta(min_length=1)]
    jwks_url: str | None = None
    jwks_file: Path | None = None
    review_url: str | None = None
    review_token_file: Path | None = None
    ca_file: Path | None = None
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)] = ("RS256", "ES256", "EdDSA")
    leeway_s: Annotated[int, Meta(ge=0, le=300)] = 30
    principal_claim: str = "sub"
    tenant: KeyId = "default"
    tenant_claim: str | None = None
    tenants: tuple[KeyId, ...] = ()
    scopes: tuple[str, ...] = ()
    scopes_claim: str | None = None
    grants: dict[KeyId, ClaimGrant] = field(default_factory=dict)
    job_grace_s: Annotated[int, Meta(ge=0, le=30 * 24 * 3600)] = 0


class CertificateSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.certificates.<name>]``: a client certificate, by one of its names."""

    subject: Annotated[str, Meta(min_length=1)]
    tenant: KeyId = "default"
    scopes: tuple[str, ...]


class LoginSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.logins.<mount>]``: ``POST /v1/auth/<mount>/login`` of the Vault API.

    ``jwt`` takes a JWT of ``issuer``, a name of ``[kms.auth.issuers]``, and the name of one of its grants as
    role; ``approle`` takes a token of this service and its name. Either hands out a token of the same rights
    that is valid for ``ttl_s`` seconds, and not longer than the credential.
    """

    method: Literal["jwt", "approle"]
    issuer: KeyId | None = None
    ttl_s: Annotated[int, Meta(ge=1, le=24 * 3600)] = 3600


class AuthSection(Section, frozen=True, kw_only=True):
    """``[kms.auth]``: mode None is undecided, enough on loopback in dev. ``tokens`` replaces the file."""

    mode: Literal["none", "required"] | None = None
    tokens_path: Path
    tokens: Annotated[str, Meta(pattern="^(s3|file)://")] | None = None
    max_stale_s: Timeout = 60.0
    failures_per_minute: Positive = 30
    issuers: dict[KeyId, IssuerSection] = field(default_factory=dict)
    certificates: dict[KeyId, CertificateSection] = field(default_factory=dict)
    logins: dict[KeyId, LoginSection] = field(default_factory=dict)


class StoreSection(Section, frozen=True, kw_only=True):
    """The address of an object store, and the credentials for a bucket.

    Without an ``access_key_id`` the credentials are those that AWS tools would find.
    """

    endpoint: str | None = None
    region: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}(?!\\s)$")] = "us-east-1"  # part of a host name
    access_key_id: str | None = None
    secret_key_file: Path | None = None
    path_style: bool = True
    allow_http: bool = False
    ca_file: Path | None = None
    timeout_s: Timeout = 60.0


class BucketSection(StoreSection, frozen=True, kw_only=True):
    """``[kms.jobs.buckets.<bucket>]``: a bucket and the rights of jobs.

    ``read`` and ``write`` are prefixes of keys that end in a slash; ``""`` is the whole bucket, no prefix
    means no right.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


class SpoolBucketSection(StoreSection, frozen=True, kw_only=True):
    """``[kms.jobs.spool_bucket]``: the spool in a bucket, in place of ``spool_dir``.

    ``url`` is ``s3://bucket`` or ``s3://bucket/prefix``. The buffers of uploads, results and reads of one
    process have at most ``buffer_bytes``.
    """

    url: Annotated[str, Meta(pattern="^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_.=-]+)*/?(?!\\s)$")]
    timeout_s: Timeout = 20.0
    buffer_bytes: Annotated[int, Meta(ge=16 * MiB)] = 256 * MiB

    @property
    def bucket(self) -> str:
        return self.url.split("/")[2]

    @property
    def prefix(self) -> str:
        """The beginning of all keys: empty, or with a slash at its end."""
        path = self.url.split("/", 3)[3:]
        return f"{path[0].rstrip('/')}/" if path and path[0] else ""


class EnvironmentSection(Section, frozen=True, kw_only=True):
    """``[kms.environments.<name>]``: another environment than dev and prod, without the checks of prod."""

    backend: BackendName


class RedisSection(Section, frozen=True, kw_only=True):
    """``[kms.redis]``: job state; ``broker_url`` is Celery's and defaults to the same server.

    ``password_file`` holds the password of the user that a URL of Redis or Sentinel names. ``ca_file`` is the
    authority to trust instead of the system's, for URLs with TLS. ``broker_queue_type`` is the type of
    RabbitMQ queues, the same for senders to ``kms.submit``. ``wait_replicas`` must have a job, a commit and
    an end on disk before it is acknowledged, within ``wait_ms``.
    """

    url: str
    broker_url: str
    broker_queue_type: Literal["quorum", "classic"] = "quorum"
    password_file: Path | None = None
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    wait_replicas: Annotated[int, Meta(ge=0, le=16)] = 0
    wait_ms: Annotated[int, Meta(ge=1, le=60_000)] = 2000


class TenantSection(Section, frozen=True, kw_only=True):
    """``[kms.tenants.<name>]``: the keys that a tenant may use, and its quotas; None means no bound."""

    keys: tuple[str, ...] = ("*",)
    requests_per_s: Annotated[float, Meta(gt=0)] | None = None
    burst: Positive | None = None
    open_jobs: Positive | None = None
    spool_bytes: Positive | None = None


class ServerSection(Section, frozen=True, kw_only=True):
    """``[kms.server]``: processes, TLS, names that a Host header may carry besides loopback ones, pages.

    Pages of ``codec_origins`` may call the codec server, and nothing else. ``uploads`` bounds the concurrent
    uploads of each process, and its downloads: half of them for a tenant, a quarter for a credential.
    ``trusted_proxies`` are addresses and networks whose X-Forwarded-For names the client. ``client_crl``
    holds a revocation list (PEM) for each authority in ``client_ca``.
    """

    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    allowed_hosts: tuple[str, ...] = ()
    codec_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    client_crl: Path | None = None
    client_cert: Literal["optional", "required"] = "optional"
    metrics: Literal["loopback", "open", "token"] = "loopback"
    docs: bool
    uploads: Positive = 64


class FacadeSection(Section, frozen=True, kw_only=True):
    """``[kms.facade]``: Vault's transit API below ``/v1/``, by default in dev only."""

    enabled: bool


class EndpointSection(Section, frozen=True, kw_only=True):
    """``[kms.jobs.endpoints.<name>]``: a receiver of webhooks, which a job names in its ``callback``.

    ``tenants`` are those whose jobs may name it; None means all. While a secret is replaced, requests have a
    second signature, by ``previous_secret_file``. ``kms_headers``: they have the headers X-KMS-… as well.
    """

    url: str
    secret_file: Path
    previous_secret_file: Path | None = None
    kms_headers: bool = True
    tenants: Annotated[tuple[KeyId, ...], Meta(min_length=1)] | None = None
    allow_private: bool = False
    events: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
    ca_file: Path | None = None

    def is_for(self, tenant: str) -> bool:
        """Return whether jobs of a tenant may name it."""
        return self.tenants is None or tenant in self.tenants


class JobsSection(Section, frozen=True, kw_only=True):
    """``[kms.jobs]``: ``roots`` are the directories that ``file://`` may name; none disables such jobs.

    Inputs stay in the spool for ``input_grace_s`` after the end of their job: Redis may lose that end. The
    default is ``files`` in the state directory in dev, and none elsewhere. Large jobs leave
    ``reserved_processes`` of a worker's ``concurrency`` to other jobs. ``durability``: ``fsync`` waits until
    files of the spool are on disk, ``write`` leaves them to the kernel. Inputs and results of at most
    ``inline_bytes``, sealed, are stored in Redis instead. ``tenant_spool_bytes`` is the quota of tenants
    without one of their own; None means no bound. Results are kept for ``result_ttl_s`` from the end unless
    their job says otherwise. An attempt that advances nothing for ``stall_s`` is ended. A worker that is told
    to stop hands jobs back after ``stop_s``. ``resource_leases`` bounds the running jobs that use
    ``root:/path``, ``bucket:name`` or ``backend:name``.
    """

    roots: tuple[Path, ...]
    spool_dir: Path
    spool_identity_path: Path
    intake_identity_path: Path
    spool_max_bytes: Positive = 10 * GiB
    inline_bytes: Annotated[int, Meta(ge=0, le=64 * KiB)] = 16 * KiB
    durability: Literal["fsync", "write"] = "fsync"
    tenant_spool_bytes: Positive | None = None
    result_ttl_s: Annotated[int, Meta(ge=1, le=30 * 86_400)] = 86_400
    attempts: Positive = 5
    lease_s: Annotated[int, Meta(ge=2)] = 30
    stall_s: Positive = 300
    stop_s: Positive = 30
    input_grace_s: Annotated[int, Meta(ge=0)] = 60
    concurrency: Positive = 2
    open_jobs: Positive = 100_000
    tenant_leases: Positive = 1_000
    resource_leases: dict[str, Positive] = field(default_factory=dict)
    reserved_processes: Annotated[int, Meta(ge=0)] = 1
    source_max_bytes: Positive = 1024 * GiB
    fanout_files: Positive = 100_000
    queues: tuple[Queue, ...] = ("kms.bulk", "kms.files", "kms.maintenance")
    endpoints: dict[KeyId, EndpointSection] = field(default_factory=dict)
    buckets: dict[BucketName, BucketSection] = field(default_factory=dict)
    spool_bucket: SpoolBucketSection | None = None


class KeySection(Section, frozen=True, kw_only=True):
    """``[kms.keys.<id>]``: a key with more than a URI.

    ``use = "seal"``: it seals the key files of the service, and takes no calls.
    """

    uri: str | tuple[str, ...]
    use: Literal["data", "seal"] = "data"

    @property
    def uris(self) -> tuple[str, ...]:
        return (self.uri,) if isinstance(self.uri, str) else self.uri


class AuditSection(Section, frozen=True, kw_only=True):
    """``[kms.audit]``: durability ``write`` hands each record to the kernel, ``fsync`` waits for the disk.

    ``anchor_*`` keep copies of signed checkpoints, which are written every ``checkpoint_lines`` and
    ``checkpoint_s``. ``keep_days`` 0 keeps all. ``copies`` has copies of the logs of other hosts
    (``audit.hosts``).
    """

    path: Path
    key_path: Path
    signing_key_path: Path
    durability: Literal["write", "fsync"] = "write"
    keep_days: Annotated[int, Meta(ge=0)] = 365
    checkpoint_lines: Positive = 1_000
    checkpoint_s: Positive = 10
    anchor_redis: bool = True
    anchor_dir: Path | None = None
    copies: Path | None = None


class RotationSection(Section, frozen=True, kw_only=True):
    """``[kms.rotation]``: new key versions made by the workers; ``every_days`` 0 disables the schedule.

    A schedule also replaces a version that has sealed as many messages as it may.
    """

    every_days: Annotated[int, Meta(ge=0)] = 90


class LogSection(Section, frozen=True, kw_only=True):
    """``[kms.log]``: ``level`` in the grammar of ``logs.parse_levels``."""

    level: str = "info"
    format: Literal["auto", "json", "text"] = "auto"

    def as_json(self, *, terminal: bool) -> bool:
        """Return whether to write JSON lines, given whether stderr is a terminal."""
        return self.format == "json" or (self.format == "auto" and not terminal)


class TracesSection(Section, frozen=True, kw_only=True):
    """``[kms.traces]``: spans to an OTLP receiver; needs the extra ``otel``.

    ``endpoint`` is the URL of the receiver (OTLP over HTTP). Other options are OpenTelemetry's ``OTEL_*``.
    """

    enabled: bool = False
    endpoint: str | None = None


class KmsSection(Section, frozen=True, kw_only=True):
    """``[kms]``, the only table of the file, without the tables of backends (see ``Settings.backends``).

    ``accept_weak`` names settings that ``kms config lint`` reports and that are intended.
    """

    environment: str
    dev_backend: BackendName = "age"
    prod_backend: BackendName = "cosmian"
    default_key_id: KeyId | None = None
    require_context: bool
    bind: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 8082
    state_dir: Path
    allow_age_in_prod: bool = False
    accept_weak: tuple[str, ...] = ()
    environments: dict[str, EnvironmentSection] = field(default_factory=dict)
    keys: dict[KeyId, str | tuple[str, ...] | KeySection] = field(default_factory=dict)
    redis: RedisSection
    auth: AuthSection
    tenants: dict[KeyId, TenantSection] = field(default_factory=dict)
    server: ServerSection
    facade: FacadeSection
    jobs: JobsSection
    audit: AuditSection
    rotation: RotationSection = field(default_factory=RotationSection)
    log: LogSection = field(default_factory=LogSection)
    traces: TracesSection = field(default_factory=TracesSection)

    @property
    def key_uris(self) -> tuple[tuple[str, str], ...]:
        """Key id and URI, once for each URI: a key may name several backends."""
        return tuple((key_id, uri) for key_id, key in self.all_keys.items() for uri in key.uris)

    @property
    def all_keys(self) -> dict[str, KeySection]:
        """The keys by id, with those that are written as URIs only."""
        return {
            key_id: key if isinstance(key, KeySection) else KeySection(uri=key)
            for key_id, key in self.keys.items()
        }


class Settings(Section, frozen=True, kw_only=True):
    """All settings. ``backends`` are the tables of all backends, by scheme."""

    kms: KmsSection
    backends: dict[str, BackendSection]

    def backend(self, kind: type[_Table]) -> _Table:
        """The table of one backend."""
        return next(table for table in self.backends.values() if isinstance(table, kind))

    @property
    def environment(self) -> str:
        """``dev``, ``prod``, or a name of ``[kms.environments]``."""
        return self.kms.environment

    @property
    def is_prod(self) -> bool:
        return self.kms.environment == "prod"

    @property
    def active_backend(self) -> BackendName:
        """The backend that the environment chooses."""
        standard = {"dev": self.kms.dev_backend, "prod": self.kms.prod_backend}
        name = self.kms.environment
        return standard[name] if name in standard else self.kms.environments[name].backend

    @property
    def used_backends(self) -> frozenset[str]:
        """The active backend and the schemes that the URIs of ``[kms.keys]`` name."""
        schemes = (uri.partition(":")[0].lower() for _, uri in self.kms.key_uris)  # as urlsplit reads them
        return frozenset({self.active_backend, *schemes})

    @property
    def state_dir(self) -> Path:
        return self.kms.state_dir
