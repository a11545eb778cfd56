"""The commands of docs/hosts.md, in their order: five hosts on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support import network_hosts, pages, programs

ALONE: Final = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.timeout(600)
def test_the_page_works_as_written(tmp_path: Path) -> None:
    """Names of namespaces are files in /run/netns, which is a directory of its own here.

    It is a process tree of its own too, and nothing of it outlives the first process.
    """
    network_hosts.require()
    for name in ("redis-server", "curl"):
        programs.program(name)
    walk = pages.blocks_to_run("docs/hosts.md", "sh")
    script = "\n".join(["mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns", *walk])
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run(
        programs.tethered("/usr/bin/unshare", *ALONE, "bash", "-euo", "pipefail", "-c", script),
        cwd=here,
        env={
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]),
            "HOME": str(tmp_path),
            "LANG": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = done.stdout.splitlines()
    shared = [
        line
        for line in told
        if re.match("ok +hosts +.* shares spool, Redis, keys, tokens and settings", line)
    ]
    assert len(shared) == 5 * 4, "each host sees the four others"
    assert len([line for line in told if re.match("ok +install ", line)]) == 5
    assert "20000" in told
    assert "job.taken_up" in done.stdout
    assert told[-2:] == ["401", "401"]
    assert list(here.iterdir()) == []
