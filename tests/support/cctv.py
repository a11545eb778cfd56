"""The C2SP CCTV test vectors for age, from the archive beside this file; knows the vector format, not age.

tests/kms_core/age/README.md says where they come from, and their licence.
"""

import base64
import re
import tarfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Self

ARCHIVE: Final = Path(__file__).with_name("cctv-age-0.2.0.tgz")
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
    """All vectors."""
    with tarfile.open(ARCHIVE) as archive:
        index = archive.extractfile("package/index.js")
        if index is None:
            raise ValueError("the archive has no package/index.js")
        entries = _ENTRY.findall(index.read().decode("ascii"))
    return [Vector.parse(name, base64.b64decode(text)) for name, text in entries]


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name, value
