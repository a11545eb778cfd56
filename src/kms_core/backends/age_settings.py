"""The table of the Age backend."""

from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import SplitResult

from kms_core.sections import BackendSection

DEFAULT_DIR: Final = "~/.config/provisioning/age"


class AgeSection(BackendSection, frozen=True, kw_only=True):
    """``[kms.age]``: local identity files.

    Default paths: ``age/`` in the state directory where one is configured, else
    ``~/.config/provisioning/age/``. Foreign files are accepted, and data keys given, by default in dev only.

    A private key file may be sealed: an age file that a root key opens, or the identities in
    ``seal_identity_path``. ``sealed_only`` refuses plain ones, and allows Age keys in prod.
    """

    MODULE: ClassVar = "kms_core.backends.age"
    SECRET_FILES: ClassVar = ("private_key_path", "seal_identity_path")

    public_key_path: Path
    private_key_path: Path
    seal_identity_path: Path | None = None
    sealed_only: bool = False
    data_keys: bool
    accept_foreign: bool

    @classmethod
    def fill_in(cls, table: dict[str, object], state_dir: Path | None, environment: str) -> None:
        directory = f"{state_dir}/age" if state_dir else DEFAULT_DIR
        table.setdefault("public_key_path", f"{directory}/public_key.txt")
        table.setdefault("private_key_path", f"{directory}/private_key.txt")
        table.setdefault("data_keys", environment == "dev")
        table.setdefault("accept_foreign", environment == "dev")


def document_of(uri: SplitResult) -> str:
    """The URL of the signed document in ``age:s3://bucket/key`` or ``age:file:///path``; empty for a file."""
    return uri.path if uri.scheme == "age" and uri.path.startswith(("s3://", "file://")) else ""
