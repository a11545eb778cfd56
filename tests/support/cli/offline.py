"""The command with keys at hand, run as users run it: files, pipes and what became of them."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from kms_core.age import mlkem768x25519, x25519
from support.cli import fixtures

Done = subprocess.CompletedProcess[bytes]


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder to work in, with an age identity in ``key.txt``."""

    folder: Path
    identity: x25519.X25519Identity

    @property
    def recipient(self) -> str:
        return self.identity.recipient.text

    @property
    def key(self) -> Path:
        return self.folder / "key.txt"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def write(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return self.path(name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def names(self) -> set[str]:
        return {entry.name for entry in self.folder.iterdir()}

    def kms(self, *args: str, given: bytes = b"", **variables: str) -> Done:
        return fixtures.kms(self.folder, *args, given=given, **variables)

    def stdout_of(self, *args: str, given: bytes = b"", **variables: str) -> bytes:
        """What a command that succeeds writes to stdout."""
        done = self.kms(*args, given=given, **variables)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


def workspace(folder: Path) -> Workspace:
    made = Workspace(folder, x25519.X25519Identity.generate())
    write_key(made.key, made.identity)
    return made


def write_key(path: Path, *identities: x25519.X25519Identity | mlkem768x25519.HybridIdentity) -> None:
    path.touch(mode=0o600)
    path.write_text("".join(f"{identity.export()}\n" for identity in identities))
