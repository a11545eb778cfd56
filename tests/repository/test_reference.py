"""docs/cli.md and man pages: what ``scripts/docs`` makes of the commands, complete and alike everywhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kms_cli.command_line import topics
from kms_cli.commands.completion import EXIT_CODES
from support.programs import program

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/cli.md").read_text("utf-8")
KMS: Final = Path(sys.executable).with_name("kms")


def ran(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=os.environ | environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The man pages, in a folder as below share/man."""
    folder = tmp_path_factory.mktemp("man")
    argv = (sys.executable, ROOT / "scripts/reference.py", folder / "cli.md", folder)
    assert ran(*argv, COLUMNS="40", FORCE_COLOR="1").returncode == 0
    return sorted(folder.glob("man1/*.1"))


def test_the_page_is_what_the_commands_say_at_any_terminal(pages: list[Path]) -> None:
    written = pages[0].parents[1] / "cli.md"

    assert written.read_text("utf-8") == PAGE, "scripts/docs --reference writes it"


def test_the_page_has_every_command_that_help_lists() -> None:
    def listed(*command: str) -> list[str]:
        section = ran(KMS, *command, "--help").stdout.partition("Commands:\n")[2].partition("\n\n")[0]
        return re.findall(r"^  ([a-z-]+)  ", section, re.MULTILINE)

    commands = listed()
    expected = {f"kms {name}" for name in commands}
    for name in ("job", "audit"):
        expected |= {f"kms {name} {inner}" for inner in listed(name)}

    assert len(expected) > 40
    assert expected - set(re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)) == set()
    assert {"kms-service", "kms-worker", "age-plugin-kms"} <= set(
        re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    )


def test_exit_codes_are_those_of_the_contract() -> None:
    contract = (ROOT / "docs/contract.md").read_text("utf-8")
    table = contract.partition("| exit code of `kms` |")[2].partition("\n\n")[0]

    assert re.findall(r"^\| (\d+) \| (.+) \|$", table, re.MULTILINE) == [
        (str(code), text) for code, text in EXIT_CODES.items()
    ]


def test_the_page_has_every_topic() -> None:
    text = PAGE.partition("\n### kms help pipes\n")[2].partition("\n### ")[0]

    assert "\n```text\npg_dump app | kms encrypt-file - > app.age\n" in text
    assert {f"kms help {name}" for name in topics()} <= set(re.findall(r"^### (.*)$", PAGE, re.MULTILINE))


def test_the_page_shows_options_variables_defaults_codes_and_examples() -> None:
    upload = PAGE.partition("\n### kms encrypt-file\n")[2].partition("\n### ")[0]
    top = PAGE.partition("\n## kms\n")[2].partition("\n## ")[0]

    assert "kms encrypt-file [OPTIONS] SOURCE" in upload
    assert "- `--priority [high|normal|low]`: Run before (high) or after (low) other queued jobs." in upload
    assert "- `KMS_SERVICE_URL`: The default of --url." in top
    assert "- `78`: wrong configuration." in top
    assert "--listener" not in PAGE
    assert "\nExample: `kms backup -r age1… -o kms-backup.age`\n" in PAGE


def test_the_reference_needs_what_the_service_needs_and_no_tools_of_the_tests(tmp_path: Path) -> None:
    """As a user has it who installed by ``scripts/up``: ``ready`` says what would be installed."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts/docs", scripts)
    (scripts / "venv.sh").write_text(
        f"root={shlex.quote(str(tmp_path))} venv=$root; say() {{ :; }}; ready() {{ echo $1; }}\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("/bin/true")

    assert ran(scripts / "docs", "--reference").stdout == "runtime\n"
    assert ran(scripts / "docs").stdout == "dev\n"
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); print(*{m.partition('.')[0] for m in sys.modules})"
    )
    loaded = set(ran(sys.executable, "-c", code, ROOT / "scripts/reference.py").stdout.split())
    assert not loaded & {"pytest", "yaml", "zensical", "pyrage", "boto3", "httpx2"}


def test_each_heading_is_a_man_page(pages: list[Path]) -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)

    assert sorted(path.stem for path in pages) == sorted(name.replace(" ", "-") for name in headings)


def test_no_man_page_has_a_mistake(pages: list[Path]) -> None:
    found = ran(program("mandoc"), "-T", "lint", "-W", "warning", *pages)
    assert (found.returncode, found.stdout) == (0, "")
    shown = ran(program("groff"), "-ww", "-man", "-z", *pages)
    assert (shown.returncode, shown.stderr) == (0, "")


def test_man_shows_what_was_written(pages: list[Path], tmp_path: Path) -> None:
    """man finds share/man beside the bin of the PATH that a command is in."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "share").mkdir()
    (tmp_path / "share/man").symlink_to(pages[0].parents[1])
    environ = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"}
    done = ran(program("man"), "--pager=cat", "kms-job-submit", **environ)
    shown = re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert "kms job submit [OPTIONS] {encrypt|decrypt|rewrap|reseal} SOURCE" in shown
    assert "  --priority [high|normal|low]\n" in shown
    assert "kms-job(1)" in shown
