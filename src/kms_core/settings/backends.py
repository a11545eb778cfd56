"""The tables of ``kms.toml`` for backends: ``[kms.age]`` and those of servers that hold keys."""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kms_core.settings.base import KeyId, Section, Timeout


class AgeSection(Section, frozen=True, kw_only=True):
    """``[kms.age]``: local X25519 files.

    Default paths: ``age/`` in the state directory where one is named, else ``~/.config/provisioning/age/``.
    Foreign files are accepted by default in dev only.
    """

    public_key_path: Path
    private_key_path: Path
    data_keys: bool = False
    accept_foreign: bool


class CosmianSection(Section, frozen=True, kw_only=True):
    """``[kms.cosmian]``: needed where Cosmian is the active backend or a key's URI names it."""

    server_url: str | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    default_key_id: KeyId = "provisioning-master-key"
    protocol: Literal["auto", "kmip", "jose"] = "auto"
    tls_verify: bool = True
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    timeout_s: Timeout = 5.0


class VaultSection(Section, frozen=True, kw_only=True):
    """What ``[kms.transit]`` and ``[kms.vault_kv]`` have in common: a server, and our token there."""

    address: str | None = None
    token: str | None = None
    token_file: Path | None = None
    namespace: str | None = None
    tls_verify: bool = True
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    timeout_s: Timeout = 5.0
    data_keys: bool = True


class TransitSection(VaultSection, frozen=True, kw_only=True):
    """``[kms.transit]``: needed where transit is the active backend or a key's URI names it."""

    mount: str = "transit"
    key_name: str | None = None


class VaultKvSection(VaultSection, frozen=True, kw_only=True):
    """``[kms.vault_kv]``: as ``[kms.transit]``, for vault-kv; ``cache_s`` is how long keys stay in memory."""

    mount: str = "secret"
    path: str | None = None
    kv_version: Literal[1, 2] = 2
    cache_s: Annotated[float, Meta(ge=0, le=3600)] = 60.0


class AwsKmsSection(Section, frozen=True, kw_only=True):
    """``[kms.awskms]``: needed where AWS KMS is the active backend; else what keys named by URI start from.

    What is None is left to AWS's own configuration: ``AWS_*`` variables, ``~/.aws``, a role of the machine.
    """

    key_id: str | None = None
    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    ca_file: Path | None = None
    timeout_s: Timeout = 5.0
    data_keys: bool = True
