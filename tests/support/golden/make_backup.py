"""Makes ``v2/backup.age``: ``PYTHONPATH=src:tests python -m support.golden.make_backup``.

A backup of an install with the keys of ``v1/``, sealed to the first recipient of ``keys/age-x25519.txt``.
Refuses where the file exists: it is made once, by the code whose format it holds, and never again.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kms_cli import age_files
from kms_cli.backup.files import ArchiveWriter, InstalledFiles, Manifest
from support.golden import install, manifest

PATH: Final = manifest.V1.parent / "v2/backup.age"
IDENTITIES: Final = manifest.V1 / "keys/age-x25519.txt"
MADE_AT: Final = datetime(2026, 11, 28, 12, 30, tzinfo=UTC)
SETTINGS: Final = b'[kms]\nenvironment = "dev"\n'
INSTALL_ID: Final = b"0f8e6a2c-5a4b-4a57-9e55-2b1c4d5e6f70\n"
JOB: Final = "spool/0adf3e46-f198-4650-bc9a-6fdf38249781"
INPUT: Final = bytes(range(256)) * 400  # two chunks of an age payload


def recipient() -> str:
    """The first recipient of the Age key of the golden set."""
    lines = IDENTITIES.read_text().splitlines()
    return next(line for line in lines if line.startswith("# public key: ")).removeprefix("# public key: ")


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


def main() -> int:
    if PATH.exists():
        print(f"{PATH} exists, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    with TemporaryDirectory(prefix="kms-golden-") as scratch, PATH.open("wb") as target:
        state = Path(scratch) / "state"
        put_install(state)
        files = InstalledFiles(install.settings(state), {}, state / "kms.toml", with_spool=True)
        writer = ArchiveWriter(age_files.for_recipients(age_files.recipients((recipient(),), ())), target)
        for source in files.all():
            writer.add(source, "/etc/kms/kms.toml" if source.name == "kms.toml" else "")
        writer.finish(
            Manifest(
                service="0.2.0",
                made_at=MADE_AT,
                host="alpha.example",
                install_id=INSTALL_ID.decode().strip(),
                state_dir="/var/lib/kms-service",
                files=tuple(writer.files),
                left_out=("Redis, which is not the embedded Valkey",),
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
