"""The C2SP CCTV test vectors for age, fetched once into ``.cache``; knows the vector format, not age.

See README.md beside this file for their origin and licence.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Self

from support.programs import kept

VERSION: Final = "0.2.0"
SHA256: Final = "94a2a220a95b158a69997e84405bb5d4ef84adf05d15bf341b83ec3ba9dd846e"
COUNT: Final = 143
_ENTRY: Final = re.compile(
    r'^// \.\./testdata/(\w+)\nvar \w+ = __toBinary\("([A-Za-z0-9+/=]*)"\);$', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Vector:
    """One file, and what its reader should find."""

    name: str
    fields: tuple[tuple[str, str], ...]
    file: bytes

    @classmethod
    def parse(cls, name: str, data: bytes) -> Self:
        head, _, file = data.partition(b"\n\n")
        fields = tuple(_field(line) for line in head.decode("ascii").split("\n"))
        compressed = ("compressed", "zlib") in fields
        return cls(name, fields, zlib.decompress(file) if compressed else file)

    def all(self, key: str) -> list[str]:
        return [value for name, value in self.fields if name == key]

    @property
    def expect(self) -> str:
        return self.all("expect")[0]

    @property
    def armored(self) -> bool:
        return self.all("armored") == ["yes"]

    @property
    def file_key(self) -> bytes:
        return bytes.fromhex(self.all("file key")[0])

    @property
    def payload_sha256(self) -> str | None:
        """The hash of all plaintext that may be released, also before a failure."""
        return next(iter(self.all("payload")), None)


@cache
def load() -> list[Vector]:
    """All vectors, fetched where the cache has none. None of them if that fails at home; an error in CI."""
    with kept("cctv") as folder:
        archived = folder / f"cctv-age-{VERSION}.tgz"
        if not archived.exists() and not _fetched(folder):
            if os.environ.get("CI") == "true":
                raise FileNotFoundError("the CCTV vectors could not be fetched: npm is missing or failed")
            return []
        data = archived.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{archived} is not the archive that was pinned; delete it to fetch it again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        index = archive.extractfile("package/index.js")
        if index is None:
            raise ValueError("the archive has no package/index.js")
        entries = _ENTRY.findall(index.read().decode("ascii"))
    return [Vector.parse(name, base64.b64decode(text)) for name, text in entries]


def _fetched(folder: Path) -> bool:
    npm = shutil.which("npm")
    if npm is None:
        return False
    command = [npm, "pack", "--silent", f"cctv-age@{VERSION}", "--pack-destination", str(folder)]
    return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name, value
