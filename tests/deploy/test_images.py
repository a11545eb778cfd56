"""Images are named by tag and digest, and the check that says so finds those that are not."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.artefacts import ROOT

PROGRAM: Final = ROOT / "scripts/images.py"
DIGEST: Final = "sha256:" + "0123456789abcdef" * 4


def check(*paths: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(PROGRAM), *map(str, paths)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_image_of_the_project_has_a_digest() -> None:
    done = check()

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        "    image: valkey/valkey:9.1.2",
        "  - image: valkey/valkey@{digest}",
        '    "image": "valkey/valkey:latest"',
        "    image: valkey/valkey:9.1.2@sha256:0123",
        "FROM python:3.13-slim-bookworm AS builder",
        "FROM --platform=linux/amd64 python:3.13",
        "ARG PYTHON_IMAGE=python:3.13-slim-bookworm",
        "# syntax=docker/dockerfile:1",
        "    --build-arg PYTHON_IMAGE=python:3.13 .",
        "$ docker run --rm -p 127.0.0.1:6379:6379 valkey/valkey:9.1.2",
    ],
)
def test_an_image_without_tag_and_digest_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "file").write_text(f"first\n{line.format(digest=DIGEST)}\n")

    done = check(tmp_path / "file")

    assert done.returncode == 1
    assert f"{tmp_path / 'file'}:2: " in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "    image: valkey/valkey:9.1.2@{digest}",
        "    image: provisioning/kms-service",
        '    image: {{{{ include "kms.image" . }}}}',
        "ARG PYTHON_IMAGE=python:3.13.16-slim-bookworm@{digest}",
        "FROM ${{PYTHON_IMAGE}}",
        "FROM python:3.13@{digest} AS builder\nFROM builder",
        "an image: of what it was",
    ],
)
def test_what_is_pinned_or_no_image_is_not_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "file").write_text(f"first\n{line.format(digest=DIGEST)}\n")

    assert check(tmp_path / "file").returncode == 0
