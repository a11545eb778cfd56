"""Libraries that a process must not load: they cost memory and start-up time."""

import subprocess
import sys

import pytest

from support.contract_server import running

BACKENDS = {"httpcore2", "kms_core.keyring", "kms_core.key_opening", "kms_core.jobs"}
HELP = {"asyncio", "cryptography", "httpx2", "kms_client", "msgspec", "pyrage"}


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        ("import kms_api.app", {"celery", "kombu"}),  # they take 8 MiB of each process
        ("import kms_cli.commands.audit", BACKENDS),  # which only open sealed keys and find other hosts
        ("from kms_cli.main import run; run(['--help'])", HELP),
    ],
    ids=["API", "audit log", "help"],
)
def test_a_program_loads_what_it_needs(code: str, unused: set[str]) -> None:
    argv = [sys.executable, "-c", f"{code}; import sys; print(); print(*sys.modules)"]

    done = subprocess.run(argv, capture_output=True, text=True, check=True)

    assert unused & set(done.stdout.splitlines()[-1].split()) == set()


_CALL = """
import atexit, gc, sys, kms_cli
before = sum(each["collections"] for each in gc.get_stats())
atexit.register(lambda: print(*sys.modules))
atexit.register(lambda: print("collections", sum(each["collections"] for each in gc.get_stats()) - before))
sys.argv = ["kms", "encrypt", "--context", "a=b", "--url", sys.argv[1]]
kms_cli.start()
"""


def test_a_small_call_loads_what_it_needs() -> None:
    """Each of these takes a part of every call, the second HTTP library a quarter, collections a tenth."""
    unused = {"anyio", "asyncio", "cryptography", "difflib", "dotenv", "encodings.idna", "h11", "hashlib"}
    unused |= {"httpcore2", "httpx2", "importlib.metadata", "json", "logging", "pyrage", "rich", "shutil"}
    unused |= {"tempfile", "truststore", "urllib.request"}

    with running() as service:
        argv = [sys.executable, "-c", _CALL, service.url]
        done = subprocess.run(argv, capture_output=True, check=True, input="secret", text=True)

    _, collections, modules = done.stdout.splitlines()
    assert unused & set(modules.split()) == set()
    assert collections == "collections 0"
