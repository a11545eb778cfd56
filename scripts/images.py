"""Finds container images that are named without a digest, in the files named or in all of the project.

A tag can be moved to another image; a digest cannot. An operator who reaches the registry resolves one by
``docker buildx imagetools inspect IMAGE:TAG --format '{{.Manifest.Digest}}'``: that of the index, which is
for all architectures.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

UNPINNED: Final[Mapping[str, str]] = {
    "provisioning/kms-service": "built here: who deploys it pins what he has built",
    "provisioning/kms-service:${KMS_IMAGE_TAG:-0.3.0.dev0}": "as above",
    "ghcr.io/cosmian/kms:5.26.0": "no digest of it is known here; a key server to try, in a profile",
}
"""Images without a digest, and why."""
_PINNED: Final = re.compile(r"[a-z0-9./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
_FILES: Final = ("*Dockerfile*", "*.yml", "*.yaml", "*.md")
_NAMED: Final = re.compile(
    r"""^\s*(?:-\s+)?["']?image["']?:[ \t]*["']?(?P<yaml>[^\s"'#]+)"""
    r"""|^FROM\s+(?:--\S+\s+)*(?P<base>\S+)"""
    r"""|^\#\s*syntax=(?P<frontend>\S+)"""
    r"""|\b\w*IMAGE=(?P<argument>[a-z]\S+)"""
    r"""|\bdocker\s+(?:run|pull|create)\b.*?\s(?P<run>[a-z0-9./-]+[:@][\w.:-]+)""",
    re.MULTILINE | re.VERBOSE,
)


def unpinned(text: str) -> Iterator[tuple[int, str]]:
    """Line number and name of each image without tag and digest; stages and arguments are none."""
    stages = set(re.findall(r"^FROM\s.*\sAS\s+(\S+)", text, re.MULTILINE))
    for found in _NAMED.finditer(text):
        name = next(value for value in found.groups() if value)
        if not (
            name.startswith(("$", "{{")) or name in stages or name in UNPINNED or _PINNED.fullmatch(name)
        ):
            yield text.count("\n", 0, found.end()) + 1, name


def main(names: list[str]) -> int:
    """Print what is found; 1 if there is any."""
    listed = ["git", "ls-files", "-z", "--", *_FILES]
    paths = (
        names or subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    )
    found = [(path, *each) for path in paths for each in unpinned(Path(path).read_text("utf-8"))]
    for path, line, name in found:
        sys.stderr.write(f"{path}:{line}: {name} has no digest: see scripts/images.py\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
