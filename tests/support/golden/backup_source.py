"""What ``v2/backup.age`` was made of: an install with the keys of ``v1/`` and one upload."""

from pathlib import Path
from typing import Final

from support.golden import golden_set, install

PATH: Final = golden_set.V1.parent / "v2/backup.age"
IDENTITIES: Final = golden_set.V1 / "keys/age-x25519.txt"
SETTINGS: Final = b'[kms]\nenvironment = "dev"\n'
INSTALL_ID: Final = b"0f8e6a2c-5a4b-4a57-9e55-2b1c4d5e6f70\n"
JOB: Final = "spool/0adf3e46-f198-4650-bc9a-6fdf38249781"
INPUT: Final = bytes(range(256)) * 400  # two chunks of an age payload


def put_install(state: Path) -> None:
    """Lay out an install with one upload, in a state directory."""
    install.put_keys(state)
    for name, content in (
        (f"{JOB}/input", INPUT),
        ("spool/hosts/install", INSTALL_ID),
        ("kms.toml", SETTINGS),
    ):
        path = state / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(content)
