"""Installs whose key files are sealed by a key of OpenBao."""

from pathlib import Path
from typing import Final

from support.openbao import Bao, bao
from support.service import CONTEXT, Service, b64

ROOT: Final = """
{transit}
timeout_s = {timeout_s}
[kms.keys]
root = {{ uri = "transit:{key}", use = "seal" }}
"""


def root_settings(
    server: Bao | None = None, key: str = "", *, address: str = "", timeout_s: float = 5.0
) -> str:
    """Settings below ``[kms]`` with the key ``root``, which seals; ``[kms.keys]`` is the last table."""
    server = server or bao()
    transit = server.settings(url=address).rstrip()
    return ROOT.format(transit=transit, key=key or server.new_key(), timeout_s=timeout_s)


def ok(service: Service, *words: str) -> str:
    """The output of a ``kms`` command that succeeds."""
    done = service.run_kms(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seal(service: Service, name: str, path: Path, *more: str, root: str = "root") -> None:
    """Seal a key file in its place, as an operator does before the first start."""
    made = path.with_name(f"{path.name}.sealed")
    ok(service, "keygen", "--sealed-by", root, "--for", name, "--from", str(path), "-o", str(made), *more)
    made.replace(path)


def current_version(service: Service) -> str:
    """The version of the default key that seals now."""
    answer = service.post("/encrypt", {"plaintext": b64(b"x"), "context": CONTEXT})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["key_version"])


def age_file(service: Service) -> Path:
    """The private file of the default key."""
    return service.state / "age" / "private_key.txt"
