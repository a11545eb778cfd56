"""Libraries that a process must not load: they cost memory and start-up time."""

import subprocess
import sys


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
