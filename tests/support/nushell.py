"""Nushell for tests: any version, as npm has it, and scripts that it runs with the module of this tree."""

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from support.programs import from_npm

ROOT: Final = Path(__file__).parents[2]
MODULE: Final = ROOT / "nu" / "kms"
TIMEOUT_S: Final = 60
USE: Final = "use nu/kms"


@dataclass(frozen=True)
class Nu:
    """A nu in a folder of its own, with what its environment says of the service."""

    program: Path
    folder: Path
    environ: dict[str, str] = field(repr=False)

    def run(self, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
        file = self.folder / "script.nu"
        file.write_text(script)
        return subprocess.run(
            [self.program, "--no-config-file", "-I", ROOT, file],
            cwd=self.folder,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "NO_COLOR": "1",
                **self.environ,
                **environ,
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def gives(self, script: str, **environ: str) -> Any:  # noqa: ANN401 -- whatever JSON can say
        """The value of a script; bytes are a list of numbers."""
        *before, last = script.strip().splitlines()
        ran = self.run("\n".join([USE, *before, f"({last.strip()}) | to json --raw | print"]), **environ)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    def fails(self, script: str, **environ: str) -> str:
        """What a script that ends in an error prints, out of its frame."""
        ran = self.run(f"{USE}\n{script}", **environ)
        assert ran.returncode == 1, ran.stdout
        return unframed(ran.stderr)

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def unframed(text: str) -> str:
    """An error as one line."""
    return re.sub(r"\s*\n[ |]*", " ", text)


def fetched(version: str) -> Path:
    """A nu of this version; fetched once."""
    pattern = "node_modules/@nushell/*/bin/nu"
    return from_npm(f"nushell-{version}", pattern, f"nushell@{version}")
