"""An install whose keys are those of the golden set; the caller gives its spool and Redis."""

from pathlib import Path
from typing import Final

from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from support.golden import golden_set
from support.service import Service

FILES: Final = {
    "keys/age-x25519.txt": "age/private_key.txt",
    "keys/spool.txt": "spool.key",
    "keys/intake.txt": "intake.key",
    "keys/audit.key": "audit.key",
    "keys/audit_signing.pem": "audit-signing.key",
}
"""A file of the set, and where an install with default settings has it."""


def put_keys(state: Path) -> None:
    """Lay the keys out below a state directory; the second recipient of the Age key is in use."""
    for name, place in FILES.items():
        path = state / place
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes((golden_set.V1 / name).read_bytes())
    (state / "age/public_key.txt").write_text(golden_set.recipients("age-x25519")[-1] + "\n")


def service(folder: Path, redis_url: str, more: str = "") -> Service:
    """An install in ``folder``, not started; ``more`` is TOML of its settings below ``[kms]``."""
    put_keys(folder / "state")
    return Service(folder, more, redis_url)


def settings(folder: Path) -> Settings:
    """Default settings over such a state directory."""
    return load_settings(None, {"KMS_STATE_DIR": str(folder), "HOME": "/nonexistent"})
