"""The shape of ``kms.toml``: every key with its type, unit and default. Knows no file and no environment.

A field without a default is filled in by ``settings.load`` from the environment's name or the state
directory; ``docs/kms.example.toml`` shows what with. No shape shows its values in ``repr``.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct, field

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

KeyId = Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,80}(?!\\s)$")]
BackendName = Literal["age", "cosmian"]
Queue = Literal["kms.bulk", "kms.files", "kms.maintenance"]
JobState = Literal["queued", "running", "committing", "succeeded", "failed", "cancelled"]
Positive = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65534)]  # the worker's metrics are on port + 1


class Section(Struct, frozen=True, kw_only=True):
    """A table of the file: immutable, and silent in ``repr``, since URLs and API keys are secrets."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:  # msgspec would otherwise list every field to rich
        return []


class Environment(Section, frozen=True, kw_only=True):
    """``[kms.environments.<name>]``: an environment besides dev and prod. The guards of prod are prod's."""

    backend: BackendName


class Age(Section, frozen=True, kw_only=True):
    """``[kms.age]``: local X25519 files.

    Default paths: ``age/`` in the state directory where one is named, else ``~/.config/provisioning/age/``.
    Foreign files are accepted by default in dev only.
    """

    public_key_path: Path
    private_key_path: Path
    data_keys: bool = False
    accept_foreign: bool


class Cosmian(Section, frozen=True, kw_only=True):
    """``[kms.cosmian]``: needed where Cosmian is the active backend or a key's URI names it."""

    server_url: str | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    default_key_id: KeyId = "provisioning-master-key"
    tls_verify: bool = True
    ca_file: Path | None = None


class Redis(Section, frozen=True, kw_only=True):
    """``[kms.redis]``: job state; ``broker_url`` is Celery's and defaults to the same server."""

    url: str
    broker_url: str


class Auth(Section, frozen=True, kw_only=True):
    """``[kms.auth]``: None means that nobody has decided, which is enough on loopback in dev only."""

    mode: Literal["none"] | None = None


class Server(Section, frozen=True, kw_only=True):
    """``[kms.server]``: names, besides loopback ones, that a request's Host header may carry."""

    allowed_hosts: tuple[str, ...] = ()


class Limits(Section, frozen=True, kw_only=True):
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


class Endpoint(Section, frozen=True, kw_only=True):
    """``[kms.jobs.endpoints.<name>]``: a receiver of webhooks, which a job names in its ``callback``."""

    url: str
    secret_file: Path
    allow_private: bool = False
    events: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
    ca_file: Path | None = None


class Jobs(Section, frozen=True, kw_only=True):
    """``[kms.jobs]``: ``roots`` are the directories that ``file://`` may name; none means no such jobs.

    Their default is ``files`` in the state directory in dev, and none elsewhere.
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
    queues: tuple[Queue, ...] = ("kms.bulk", "kms.files", "kms.maintenance")
    watchdog_s: Positive = 120
    endpoints: dict[KeyId, Endpoint] = field(default_factory=dict)


class Audit(Section, frozen=True, kw_only=True):
    """``[kms.audit]``: ``write`` hands each record to the kernel, ``fsync`` waits for the disk."""

    path: Path
    durability: Literal["write", "fsync"] = "write"


class Log(Section, frozen=True, kw_only=True):
    """``[kms.log]``: ``level`` in the grammar of ``logs.parse_levels``."""

    level: str = "info"
    format: Literal["auto", "json", "text"] = "auto"

    def as_json(self, *, terminal: bool) -> bool:
        """Whether to write JSON lines, given whether stderr is a terminal."""
        return self.format == "json" or (self.format == "auto" and not terminal)


class Kms(Section, frozen=True, kw_only=True):
    """``[kms]``, the only table of the file."""

    environment: str
    dev_backend: BackendName = "age"
    prod_backend: BackendName = "cosmian"
    default_key_id: KeyId | None = None
    require_context: bool
    bind: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 8082
    state_dir: Path
    allow_age_in_prod: bool = False
    environments: dict[str, Environment] = field(default_factory=dict)
    keys: dict[KeyId, str | tuple[str, ...]] = field(default_factory=dict)
    age: Age
    cosmian: Cosmian = field(default_factory=Cosmian)
    redis: Redis
    auth: Auth = field(default_factory=Auth)
    server: Server = field(default_factory=Server)
    limits: Limits = field(default_factory=Limits)
    jobs: Jobs
    audit: Audit
    log: Log = field(default_factory=Log)

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

    kms: Kms

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
        return frozenset({self.active_backend, *(uri.partition(":")[0] for _, uri in self.kms.key_uris)})

    @property
    def state_dir(self) -> Path:
        return self.kms.state_dir

    @property
    def accept_foreign(self) -> bool:
        """Whether decrypt takes files without our context stanza (made by stock ``age``)."""
        return self.kms.age.accept_foreign
