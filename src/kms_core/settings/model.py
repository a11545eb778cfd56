"""The shape of ``kms.toml``: every key with its type, unit and default. Knows no file and no environment.

A field without a default is filled in by ``settings.load`` from the environment's name or the state
directory; ``docs/kms.example.toml`` shows what with. No shape shows its values in ``repr``.
"""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, field

from kms_core.settings.backends import (
    AgeSection,
    AwsKmsSection,
    CosmianSection,
    TransitSection,
    VaultKvSection,
)
from kms_core.settings.base import BackendName, GiB, KeyId, KiB, MiB, Positive, Seconds, Section, Timeout

BucketName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{2,62}(?!\\s)$")]
Queue = Literal["kms.bulk", "kms.files", "kms.maintenance"]
JobState = Literal["queued", "running", "committing", "succeeded", "failed", "cancelled"]
Algorithm = Literal[  # of JWTs: signatures by a private key, nothing else
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
Port = Annotated[int, Meta(ge=1, le=65534)]  # the worker's metrics are on port + 1


class EnvironmentSection(Section, frozen=True, kw_only=True):
    """``[kms.environments.<name>]``: an environment besides dev and prod. The guards of prod are prod's."""

    backend: BackendName


class RedisSection(Section, frozen=True, kw_only=True):
    """``[kms.redis]``: job state; ``broker_url`` is Celery's and defaults to the same server.

    ``password_file`` holds the password of the user that a URL of Redis or Sentinel names.
    ``ca_file`` is the authority to trust instead of the system's, where a URL asks for TLS.
    ``broker_queue_type`` is for RabbitMQ: how queues are declared, by us and by senders of ``kms.submit``.
    """

    url: str
    broker_url: str
    broker_queue_type: Literal["quorum", "classic"] = "quorum"
    password_file: Path | None = None
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None


class ClaimGrant(Section, frozen=True, kw_only=True):
    """``[kms.auth.issuers.<name>.grants.<name>]``: scopes of those whose claims are as ``when`` says."""

    when: dict[str, str]
    scopes: tuple[str, ...]


class IssuerSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.issuers.<name>]``: whose JWTs are let in, and what their claims mean.

    Without ``jwks_url`` and ``jwks_file`` its keys are found by discovery. ``tenants`` bound what
    ``tenant_claim`` may say. ``job_grace_s`` is how long after its expiry a token's jobs may still run.
    """

    issuer: Annotated[str, Meta(min_length=1)]
    audience: Annotated[str, Meta(min_length=1)]
    jwks_url: str | None = None
    jwks_file: Path | None = None
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
    """``[kms.auth.certificates.<name>]``: a client certificate, by one of the names that it bears."""

    subject: Annotated[str, Meta(min_length=1)]
    tenant: KeyId = "default"
    scopes: tuple[str, ...]


class AuthSection(Section, frozen=True, kw_only=True):
    """``[kms.auth]``: None means that nobody has decided, which is enough on loopback in dev only."""

    mode: Literal["none", "required"] | None = None
    tokens_path: Path
    failures_per_minute: Positive = 30
    issuers: dict[KeyId, IssuerSection] = field(default_factory=dict)
    certificates: dict[KeyId, CertificateSection] = field(default_factory=dict)


class TenantSection(Section, frozen=True, kw_only=True):
    """``[kms.tenants.<name>]``: the keys that a tenant may use, and its quotas; None means no bound."""

    keys: tuple[str, ...] = ("*",)
    requests_per_s: Annotated[float, Meta(gt=0)] | None = None
    burst: Positive | None = None
    open_jobs: Positive | None = None
    spool_bytes: Positive | None = None


class ServerSection(Section, frozen=True, kw_only=True):
    """``[kms.server]``: processes, TLS, names that a Host header may carry besides loopback ones, pages.

    The rest bounds what requests hold, in each process: ``json_bytes`` of JSON bodies in work, ``uploads``,
    ``downloads`` and event ``streams`` under way, and unfinished ``logins``; and how long bodies may take.
    ``trusted_proxies`` are addresses and networks whose ``proxy_header`` names the client. ``client_crl``
    holds a revocation list (PEM) of every authority in ``client_ca``.
    """

    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    allowed_hosts: tuple[str, ...] = ()
    connections: Annotated[int, Meta(ge=16, le=100_000)] = 2048  # of each process and port
    trusted_proxies: tuple[str, ...] = ()
    proxy_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    client_crl: Path | None = None
    client_cert: Literal["optional", "required"] = "optional"
    metrics: Literal["loopback", "open", "token"] = "loopback"
    docs: bool
    json_bytes: Positive = 192 * MiB
    json_bytes_per_tenant: Positive = 96 * MiB
    json_bytes_per_credential: Positive = 64 * MiB
    json_body_s: Seconds = 60.0
    uploads: Positive = 64
    uploads_per_tenant: Positive = 32
    uploads_per_credential: Positive = 16
    downloads: Positive = 64
    downloads_per_tenant: Positive = 32
    downloads_per_credential: Positive = 16
    streams: Positive = 256
    streams_per_tenant: Positive = 128
    streams_per_credential: Positive = 64
    logins: Positive = 64
    logins_per_address: Positive = 8
    admission_wait_s: Annotated[float, Meta(ge=0, le=120)] = 10.0
    transfer_grace_s: Seconds = 30.0
    transfer_bytes_per_s: Positive = 4 * KiB
    transfer_stall_s: Seconds = 60.0


class FacadeSection(Section, frozen=True, kw_only=True):
    """``[kms.facade]``: Vault's transit API below ``/v1/``, by default in dev alone.

    ``port`` is a second listener for these paths only.
    """

    enabled: bool
    port: Port | None = None


class LimitsSection(Section, frozen=True, kw_only=True):
    """``[kms.limits]``: what a request may cost. ``sync_*`` hold for calls answered at once."""

    sync_plaintext_bytes: Positive = 1 * MiB
    sync_ciphertext_bytes: Positive = 1 * MiB + 64 * KiB
    json_body_bytes: Positive = 3 * MiB
    file_header_bytes: Positive = 256 * KiB
    file_stanzas: Positive = 4096
    sync_header_bytes: Positive = 32 * KiB
    sync_stanzas: Positive = 64
    pyrage_header_bytes: Annotated[int, Meta(ge=1, le=64 * KiB)] = 8 * KiB  # it parses in quadratic time
    scrypt_work_factor: Annotated[int, Meta(ge=1, le=24)] = 18  # log2; 24 takes 16 GiB
    json_job_items: Positive = 10_000
    json_job_bytes: Positive = 16 * MiB


class EndpointSection(Section, frozen=True, kw_only=True):
    """``[kms.jobs.endpoints.<name>]``: a receiver of webhooks, which a job names in its ``callback``.

    ``tenants`` are those whose jobs may name it; None is all.
    """

    url: str
    secret_file: Path
    tenants: Annotated[tuple[KeyId, ...], Meta(min_length=1)] | None = None
    allow_private: bool = False
    events: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
    ca_file: Path | None = None


class BucketSection(Section, frozen=True, kw_only=True):
    """``[kms.jobs.buckets.<bucket>]``: where a bucket is, as whom to use it, and what jobs may do there.

    ``read`` and ``write`` are prefixes of keys that end in a slash; ``""`` is the whole bucket, and none is
    nothing. Without an ``access_key_id`` the credentials are those that AWS tools would find.
    """

    endpoint: str | None = None
    region: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}(?!\\s)$")] = "us-east-1"  # part of a host name
    access_key_id: str | None = None
    secret_key_file: Path | None = None
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    path_style: bool = True
    allow_http: bool = False
    ca_file: Path | None = None
    timeout_s: Timeout = 60.0


class JobsSection(Section, frozen=True, kw_only=True):
    """``[kms.jobs]``: ``roots`` are the directories that ``file://`` may name; none means no such jobs.

    Their default is ``files`` in the state directory in dev, and none elsewhere. Jobs that read
    ``large_job_bytes`` or more leave ``reserved_processes`` of a worker's ``concurrency`` to other jobs.
    """

    roots: tuple[Path, ...]
    spool_dir: Path
    spool_identity_path: Path
    intake_identity_path: Path
    spool_max_bytes: Positive = 10 * GiB
    result_ttl_s: Positive = 86_400
    attempts: Positive = 5
    lease_s: Annotated[int, Meta(ge=2)] = 30
    concurrency: Positive = 2
    open_jobs: Positive = 100_000
    tenant_leases: Positive = 1_000
    large_job_bytes: Positive = 64 * MiB
    reserved_processes: Annotated[int, Meta(ge=0)] = 1
    source_max_bytes: Positive = 1024 * GiB
    source_max_hole_bytes: Annotated[int, Meta(ge=0)] = 4 * GiB
    fanout_files: Positive = 100_000
    queues: tuple[Queue, ...] = ("kms.bulk", "kms.files", "kms.maintenance")
    watchdog_s: Positive = 120
    endpoints: dict[KeyId, EndpointSection] = field(default_factory=dict)
    buckets: dict[BucketName, BucketSection] = field(default_factory=dict)


class AuditSection(Section, frozen=True, kw_only=True):
    """``[kms.audit]``: ``write`` hands each record to the kernel, ``fsync`` waits for the disk.

    ``sinks`` besides the file are copies; ``anchor_*`` are second places for signed checkpoints, one of which
    is due after so many lines and so many seconds. ``keep_days`` 0 keeps all.
    """

    path: Path
    key_path: Path
    signing_key_path: Path
    durability: Literal["write", "fsync"] = "write"
    sinks: tuple[Literal["file", "stdout", "redis"], ...] = ("file",)
    rotate_bytes: Annotated[int, Meta(ge=4 * KiB)] = 64 * MiB
    keep_days: Annotated[int, Meta(ge=0)] = 365
    checkpoint_lines: Positive = 1_000
    checkpoint_s: Positive = 10
    anchor_redis: bool = True
    anchor_dir: Path | None = None


class RotationSection(Section, frozen=True, kw_only=True):
    """``[kms.rotation]``: new versions of keys, made by the workers; ``every_days`` 0 means by hand alone.

    ``max_per_hour`` bounds the new versions of each key that callers make.
    """

    every_days: Annotated[int, Meta(ge=0)] = 90
    budget_messages: Positive = 2**32
    budget_rotates: bool = False
    max_per_hour: Positive = 10


class LogSection(Section, frozen=True, kw_only=True):
    """``[kms.log]``: ``level`` in the grammar of ``logs.parse_levels``."""

    level: str = "info"
    format: Literal["auto", "json", "text"] = "auto"

    def as_json(self, *, terminal: bool) -> bool:
        """Whether to write JSON lines, given whether stderr is a terminal."""
        return self.format == "json" or (self.format == "auto" and not terminal)


class TracesSection(Section, frozen=True, kw_only=True):
    """``[kms.traces]``: spans to an OTLP receiver; needs the extra ``otel``.

    ``endpoint`` is the whole URL that takes traces by HTTP. All else is OpenTelemetry's own ``OTEL_*``.
    """

    enabled: bool = False
    endpoint: str | None = None


class KmsSection(Section, frozen=True, kw_only=True):
    """``[kms]``, the only table of the file.

    ``accept_weak`` names settings that ``kms config lint`` tells, and that shall stay as they are.
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
    keys: dict[KeyId, str | tuple[str, ...]] = field(default_factory=dict)
    age: AgeSection
    cosmian: CosmianSection = field(default_factory=CosmianSection)
    transit: TransitSection = field(default_factory=TransitSection)
    vault_kv: VaultKvSection = field(default_factory=VaultKvSection)
    awskms: AwsKmsSection = field(default_factory=AwsKmsSection)
    redis: RedisSection
    auth: AuthSection
    tenants: dict[KeyId, TenantSection] = field(default_factory=dict)
    server: ServerSection
    facade: FacadeSection
    limits: LimitsSection = field(default_factory=LimitsSection)
    jobs: JobsSection
    audit: AuditSection
    rotation: RotationSection = field(default_factory=RotationSection)
    log: LogSection = field(default_factory=LogSection)
    traces: TracesSection = field(default_factory=TracesSection)

    @property
    def key_uris(self) -> tuple[tuple[str, str], ...]:
        """Key id and URI, once for each URI: a key may name several backends."""
        return tuple(
            (key_id, uri)
            for key_id, uris in self.keys.items()
            for uri in ((uris,) if isinstance(uris, str) else uris)
        )


class Settings(Section, frozen=True, kw_only=True):
    """All settings, and what follows from them."""

    kms: KmsSection

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
        match self.kms.environment:
            case "dev":
                return self.kms.dev_backend
            case "prod":
                return self.kms.prod_backend
            case name:
                return self.kms.environments[name].backend

    @property
    def used_backends(self) -> frozenset[str]:
        """The active backend and the schemes that the URIs of ``[kms.keys]`` name."""
        schemes = (uri.partition(":")[0].lower() for _, uri in self.kms.key_uris)  # as urlsplit reads them
        return frozenset({self.active_backend, *schemes})

    @property
    def state_dir(self) -> Path:
        return self.kms.state_dir

    @property
    def accept_foreign(self) -> bool:
        """Whether decrypt takes files without our context stanza (made by stock ``age``)."""
        return self.kms.age.accept_foreign
