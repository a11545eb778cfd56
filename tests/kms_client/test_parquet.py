"""Without pyarrow; with it tests/peers/test_integration_pages.py writes and reads a file."""

import subprocess
import sys


def test_without_pyarrow_the_import_says_what_to_install() -> None:
    source = "import sys; sys.modules['pyarrow'] = None; import kms_client.parquet"

    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: kms_client.parquet needs pyarrow with encryption: run `pip install pyarrow`"
    )
