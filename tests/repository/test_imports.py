"""Libraries that a process must not load: they cost memory and start-up time."""

import subprocess
import sys

from support.contract_server import running


def test_the_api_does_not_load_celery() -> None:
    """Celery is loaded only where the broker is not the Redis of the jobs: it takes 8 MiB of each process."""
    script = "import sys, kms_api.app; print(sorted({'celery', 'kombu'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_commands_that_read_the_audit_log_load_no_backend() -> None:
    """They open sealed audit keys, and look for other hosts, only where there are any."""
    heavy = {"httpcore2", "kms_core.keyring", "kms_core.key_opening", "kms_core.jobs"}
    script = f"import sys, kms_cli.commands.audit; print(sorted({heavy} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


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
    unused = {
        "anyio",
        "asyncio",
        "difflib",
        "dotenv",
        "encodings.idna",
        "h11",
        "hashlib",
        "httpcore2",
        "json",
    }
    unused |= {
        "httpx2",
        "importlib.metadata",
        "logging",
        "shutil",
        "tempfile",
        "truststore",
        "urllib.request",
    }

    with running() as service:
        argv = [sys.executable, "-c", _CALL, service.url]
        done = subprocess.run(argv, capture_output=True, check=True, input="secret", text=True)

    _, collections, modules = done.stdout.splitlines()
    assert unused & set(modules.split()) == set()
    assert collections == "collections 0"
