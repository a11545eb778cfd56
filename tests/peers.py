"""Programs of others that tests compare with: a missing one skips at home and fails in CI."""

import os
import shutil

import pytest


def program(name: str) -> str:
    """The path of a program on the PATH."""
    found = shutil.which(name)
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail(f"{name} is not on the PATH, and CI must not skip what compares with it")
    pytest.skip(f"{name} is not on the PATH")
