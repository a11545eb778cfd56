"""``scripts/release`` and docs/releases.md: what is refused, what is built, what users verify."""

import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest

from support.pages import blocks_to_run
from support.programs import program
from support.wheels import build, copy_sources

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = "docs/releases.md"
VERIFY, VERIFY_TAG = blocks_to_run(PAGE, "sh")
VERSION: Final = "7.8.0"
CHECKED: Final = ("pyproject.toml", "CHANGELOG.md", "client", "docs", "scripts")
SMALL: Final = (*CHECKED, "src/kms_protocol/__init__.py", "src/kms_api/openapi/openapi.json")
WHOLE: Final = (*CHECKED, ".gitignore", "README.md", "NOTICE", "requirements", "src")
CHANGELOG: Final = """# Changelog

## [Unreleased]

## [7.8.0] - 2026-01-02

### Added

- Something.

## [7.7.9] - 2026-01-01

### Fixed

- Another thing.
"""
SIGNER: Final = 'kms-service-release namespaces="kms-service-release,git" '
Ran = subprocess.CompletedProcess[str]
pytestmark = pytest.mark.timeout(600)  # a busy machine takes long to build


def run(*words: object, cwd: Path | None = None, check: bool = True, **variables: str) -> Ran:
    """Run a program without what the environment says of Git and keys, except for ``variables``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "KMS_"))}
    argv, env = list(map(str, words)), kept | variables
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=check)


def git(tree: Path, *words: object) -> str:
    argv = ("git", "-c", "user.name=A", "-c", "user.email=a@example.com", *words)
    return run(*argv, cwd=tree, GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1").stdout.strip()


def shell(folder: Path, words: str) -> Ran:
    """As a shell of a user is, without pipefail."""
    return run("bash", "-c", words, cwd=folder, check=False)


def repository(folder: Path, *names: str) -> Path:
    """A repository with these files, of which everything says that this is the version."""
    tree = copy_sources(folder, *(name for name in names if "/" not in name))
    for name in (name for name in names if "/" in name):
        (tree / name).parent.mkdir(parents=True)
        shutil.copyfile(ROOT / name, tree / name)
    for path in tree.glob("scripts/*"):
        shutil.copymode(ROOT / "scripts" / path.name, path)
    for name in ("pyproject.toml", "client/pyproject.toml", "src/kms_protocol/__init__.py"):
        path = tree / name
        path.write_text(
            re.sub(
                r'(version.*"|kms-service-client==)\d+\.\d+\.\d+[.\w]*"',
                rf'\g<1>{VERSION}"',
                path.read_text(),
            )
        )
    document = json.loads((tree / "src/kms_api/openapi/openapi.json").read_text())
    document["info"]["version"] = VERSION
    (tree / "src/kms_api/openapi/openapi.json").write_text(json.dumps(document))
    (tree / "CHANGELOG.md").write_text(CHANGELOG)
    git(tree, "init", "--quiet", "--initial-branch=main")
    commit(tree, "Begin")
    return tree


def commit(tree: Path, subject: str) -> str:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", subject)
    return git(tree, "rev-parse", "HEAD")


def replace(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))


def make_key(folder: Path, name: str) -> Path:
    run(program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name)
    return folder / name


def allow(tree: Path, key: Path) -> None:
    with (tree / "scripts/allowed_signers").open("a") as signers:
        signers.write(SIGNER + key.with_suffix(".pub").read_text())


def released(tree: Path, *words: object) -> Ran:
    return run(sys.executable, tree / "scripts/release.py", *words, check=False)


# -- what is refused --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("small") / "tree", *SMALL)


@pytest.fixture
def small(template: Path, tmp_path: Path) -> Path:
    """A repository with all that is checked, and nothing to build."""
    return shutil.copytree(template, tmp_path / "tree", symlinks=True)


def refusals(tree: Path, *words: object) -> list[str]:
    """What is wrong, if it is refused and nothing was built."""
    done = released(tree, VERSION, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (tree / "dist").exists()
    lines = done.stderr.splitlines()
    assert len(lines) % 2 == 0
    assert all(line.startswith("kms: hint: ") for line in lines[1::2])
    return [line.removeprefix("kms: error: ") for line in lines[::2]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("git switch --create other", "this is branch other, and releases are made on main"),
        (">new; echo >>scripts/allowed_signers", "the tree is not clean: M scripts/allowed_signers; ?? new"),
        ("git tag v7.8.0", "the tag v7.8.0 is there already"),
    ],
)
def test_a_release_is_made_once_on_main_of_what_is_committed(small: Path, words: str, told: str) -> None:
    assert shell(small, words).returncode == 0

    assert refusals(small) == [told]


@pytest.mark.parametrize(
    ("name", "before", "after", "told"),
    [
        ("pyproject.toml", 'version = "7.8.0"', 'version = "7.7.9"', "version in pyproject.toml is 7.7.9"),
        ("pyproject.toml", "==7.8.0", "==7.7.9", "kms-service-client in pyproject.toml is 7.7.9"),
        ("client/pyproject.toml", '= "7.8.0"', '= "7.7.9"', "version in client/pyproject.toml is 7.7.9"),
        ("src/kms_protocol/__init__.py", '"7.8.0"', '"7.7.9"', "__version__ of kms_protocol is 7.7.9"),
        ("src/kms_api/openapi/openapi.json", '"7.8.0"', '"7.7.9"', "version in openapi.json is 7.7.9"),
        ("CHANGELOG.md", "[Unreleased]", "[Unreleased]\n### Fixed\n- More.", "[Unreleased] of CHANGELOG.md"),
        ("CHANGELOG.md", "## [Unreleased]\n\n", "", "CHANGELOG.md does not begin with ## [Unreleased]"),
        ("CHANGELOG.md", " - 2026-01-02", "", "7.8.0 is not the newest dated section"),
        ("CHANGELOG.md", "[7.8.0]", "[7.9.0]", "7.8.0 is not the newest dated section"),
        ("CHANGELOG.md", "2026-01-02", "2999-01-02", "the date of 7.8.0 in CHANGELOG.md, 2999-01-02, is"),
        ("CHANGELOG.md", "2026-01-02", "yesterday", "the date of 7.8.0 in CHANGELOG.md, yesterday, is"),
        ("CHANGELOG.md", "- Something.\n", "", "7.8.0 has no entry in CHANGELOG.md"),
        ("CHANGELOG.md", "[7.7.9]", "[7.10.0]", "7.8.0 is not after 7.10.0"),
    ],
)
def test_each_place_has_the_version_and_the_changelog_tells_of_it(
    small: Path, name: str, before: str, after: str, told: str
) -> None:
    replace(small / name, before, after)
    replace(small / "CHANGELOG.md", "Another thing.", "Other things.")  # as each change of the contract
    commit(small, "Change one")

    (refusal,) = refusals(small)
    assert refusal.startswith(told)


@pytest.mark.parametrize(
    ("group", "refused"), [("Added", True), ("Removed", True), ("Fixed", False), ("Security", False)]
)
def test_a_patch_version_only_mends(small: Path, group: str, refused: bool) -> None:
    replace(small / "CHANGELOG.md", "[7.8.0]", "[7.7.10]")
    replace(small / "CHANGELOG.md", "### Added", f"### {group}")
    commit(small, "Make it a patch")

    told = f"a patch version only mends, and 7.7.10 has {group}"
    assert (told in released(small, "7.7.10").stderr) == refused


@pytest.mark.parametrize("version", ["7.8", "v7.8.0", "7.8.0-rc1", "07.8.0", "../7.8.0"])
def test_a_version_is_three_numbers(small: Path, version: str) -> None:
    done = released(small, version)

    assert (done.returncode, f"{version} is no version" in done.stderr) == (1, True)


def test_a_change_of_the_contract_is_documented_in_its_commit(small: Path) -> None:
    git(small, "tag", "v7.7.9")
    with (small / "docs/contract.md").open("a") as page:
        page.write("More.\n")
    changed = commit(small, "Change the contract")
    replace(small / "CHANGELOG.md", "- Something.", "- Something else.")
    commit(small, "Write of something else")

    assert refusals(small) == [
        f"a commit changes the contract and not CHANGELOG.md: {changed[:7]} Change the contract"
    ]
    (refusal,) = refusals(small, "--documented", changed[:12], "--key", "/no/such/key")[:1]
    assert refusal == "there is no key /no/such/key"


def test_without_a_tag_the_contract_is_compared_since_the_last_heading(small: Path) -> None:
    (small / "docs/contract.md").write_text("None.\n")
    commit(small, "Change the contract")

    (refusal,) = refusals(small)
    assert refusal.endswith(" Change the contract")


def test_the_first_version_changes_no_contract(small: Path) -> None:
    replace(small / "CHANGELOG.md", " - 2026-01-01", "")
    commit(small, "Take the date from the version before")
    (small / "docs/contract.md").write_text("None.\n")
    commit(small, "Change the contract")

    refused = refusals(small, "--key", "/no/such/key")
    assert "there is no key /no/such/key" in refused
    assert [each for each in refused if "contract" in each] == []


def test_a_cut_history_shows_no_changes_of_the_contract(small: Path, tmp_path: Path) -> None:
    git(small, "commit", "--quiet", "--allow-empty", "--message", "Change nothing")
    git(tmp_path, "clone", "--quiet", "--depth=1", small.as_uri(), "cut")

    assert refusals(tmp_path / "cut") == ["the history is cut, so changes of the contract are not seen"]


def test_a_key_that_users_cannot_know_is_refused_before_the_build(small: Path, tmp_path: Path) -> None:
    refused = refusals(small, "--key", make_key(tmp_path, "unknown"))

    assert refused == ["scripts/allowed_signers names no key, so that nobody could verify the signature"]


# -- CHANGELOG.md -----------------------------------------------------------------------------------------


def test_prepare_dates_the_entries_and_leaves_the_rest(small: Path) -> None:
    replace(small / "CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n### Added\n\n- More.\n")
    commit(small, "Add more")
    today = datetime.now(UTC).date()
    head = git(small, "rev-parse", "HEAD")

    done = released(small, "7.9.0", "--prepare")

    assert done.returncode == 0, done.stderr
    assert "version in pyproject.toml is 7.8.0: make it 7.9.0" in done.stderr
    assert (small / "CHANGELOG.md").read_text() == CHANGELOG.replace(
        "## [Unreleased]\n", f"## [Unreleased]\n\n## [7.9.0] - {today}\n\n### Added\n\n- More.\n"
    )
    assert git(small, "status", "--porcelain") == "M CHANGELOG.md"
    assert (git(small, "rev-parse", "HEAD"), git(small, "tag")) == (head, "")


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("7.9.0", "7.9.0 has no entry in CHANGELOG.md"),
        ("7.8.0", "7.8.0 has a section or a tag already"),
        ("7.7.0", "7.7.0 is not after 7.8.0"),
    ],
)
def test_prepare_refuses_what_a_release_would(small: Path, version: str, told: str) -> None:
    done = released(small, version, "--prepare")

    assert (done.returncode, told in done.stderr) == (1, True)
    assert (small / "CHANGELOG.md").read_text() == CHANGELOG


# -- what is built, signed and verified -------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with throw-away keys: of the owner, and of another."""
    folder = tmp_path_factory.mktemp("keys")
    make_key(folder, "owner")
    make_key(folder, "foreign")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """A whole repository, whose .venv is this one as ``scripts/venv.sh`` would leave it."""
    made = repository(tmp_path_factory.mktemp("whole") / "tree", *WHOLE)
    allow(made, keys / "owner")
    commit(made, "Name the key")
    (made / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".kms-"):
            (made / ".venv" / path.name).symlink_to(path)
    stamp = "source scripts/venv.sh; locked >.venv/.kms-dev; declared >.venv/.kms-project"
    run("bash", "-euc", stamp, cwd=made)
    return made


@pytest.fixture(scope="module")
def made(tree: Path, keys: Path) -> Ran:
    """The one run that builds: by the script, from another folder, with a relative key."""
    done = run(tree / "scripts/release", VERSION, cwd=keys, check=False, KMS_RELEASE_KEY="owner")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def download(tree: Path, made: Ran, keys: Path, tmp_path: Path) -> Path:
    """What a user has: the files, and the key from elsewhere."""
    del made
    folder = shutil.copytree(tree / "dist" / VERSION, tmp_path / "download")
    (tmp_path / "allowed_signers").write_text(SIGNER + (keys / "owner.pub").read_text())
    return folder


def fingerprint(key: Path) -> str:
    return run(program("ssh-keygen"), "-l", "-f", key.with_suffix(".pub")).stdout.split()[1]


def verified(folder: Path, key: Path) -> Ran:
    """The commands of docs/releases.md, as a user runs them where the files are, who was told of the key."""
    words = VERIFY.replace("SHA256:…", fingerprint(key))
    assert words != VERIFY
    return shell(folder, words)


def sign(download: Path, key: Path, namespace: str = "kms-service-release") -> None:
    """Sign the list anew."""
    (download / "SHA256SUMS.sig").unlink()
    run("ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", namespace, download / "SHA256SUMS")


def add_to_the_list(folder: Path, name: str = "more.whl") -> None:
    (folder / name).write_bytes(b"more")
    with (folder / "SHA256SUMS").open("a") as listed:
        listed.write(f"{hashlib.sha256(b'more').hexdigest()}  {name}\n")


def test_a_release_has_these_files(tree: Path, made: Ran) -> None:
    folder = tree / "dist" / VERSION
    names = {
        f"kms_service-{VERSION}-py3-none-any.whl",
        f"kms_service-{VERSION}.tar.gz",
        f"kms_service_client-{VERSION}-py3-none-any.whl",
        f"kms_service_client-{VERSION}.tar.gz",
        f"kms-service-{VERSION}-image-sbom.cdx.json",
        f"kms-service-{VERSION}-openapi.json",
        f"kms-service-{VERSION}-requirements-image.lock",
        f"kms-service-{VERSION}-requirements.lock",
        f"kms-service-{VERSION}-sbom.cdx.json",
    }
    expected = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names)
    )

    assert {path.name for path in folder.iterdir()} == names | {"SHA256SUMS", "SHA256SUMS.sig"}
    assert (folder / "SHA256SUMS").read_text() == expected
    assert made.stdout.startswith(expected)
    sbom = json.loads((folder / f"kms-service-{VERSION}-sbom.cdx.json").read_text())
    assert sbom["metadata"]["component"]["version"] == VERSION
    assert (folder / f"kms-service-{VERSION}-openapi.json").read_bytes() == (
        tree / "src/kms_api/openapi/openapi.json"
    ).read_bytes()


def test_a_release_tags_nothing_and_prints_what_remains(tree: Path, made: Ran) -> None:
    head = git(tree, "rev-parse", "HEAD")
    steps = [line for line in made.stdout.splitlines() if line.startswith("- ")]

    remains = ["- licence", "- tag", "- publish", "- image", "- tell users"]
    assert [step.partition(":")[0] for step in steps] == remains
    assert f"tag -s v{VERSION} -m 'kms-service {VERSION}' {head}" in steps[1]
    assert "Nothing has left this machine." in made.stdout
    assert git(tree, "tag") == ""
    assert git(tree, "status", "--porcelain") == ""
    assert [path.name for path in (tree / "dist").iterdir()] == [VERSION]


@pytest.mark.parametrize("name", ["podman", "buildah"])
def test_the_command_for_the_image_keeps_its_health_check(name: str, tmp_path: Path) -> None:
    """Both make images in the format of OCI by themselves, which has none."""
    for word, target in {"git": shutil.which("git"), name: "/bin/true"}.items():
        (tmp_path / word).symlink_to(str(target))
    code = "import release; print(*release.image_steps('0.3.0', 'HEAD'))"

    told = run(sys.executable, "-c", code, cwd=ROOT, PATH=str(tmp_path), PYTHONPATH=str(ROOT / "scripts"))

    assert f"{name} build --format docker --timestamp" in told.stdout


def test_the_files_are_those_that_anyone_builds_of_the_commit(
    tree: Path, download: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "--quiet", tree, "clone")
    built_at = git(tree, "log", "-1", "--format=%ct")
    (wheel,) = build(tmp_path / "clone/client", tmp_path / "again", built_at=built_at)

    assert wheel.read_bytes() == (download / wheel.name).read_bytes()


def test_what_was_signed_is_not_built_over(tree: Path, made: Ran) -> None:
    del made
    before = (tree / "dist" / VERSION / "SHA256SUMS.sig").read_bytes()

    assert f"dist/{VERSION} is signed already" in released(tree, VERSION).stderr
    assert (tree / "dist" / VERSION / "SHA256SUMS.sig").read_bytes() == before


def test_a_user_verifies_what_was_downloaded(download: Path, keys: Path) -> None:
    done = verified(download, keys / "owner")

    assert done.returncode == 0, done.stderr
    assert 'Good "kms-service-release" signature for kms-service-release' in done.stdout
    assert done.stdout.count(": OK") == 9


def flip(folder: Path) -> None:
    path = folder / f"kms_service-{VERSION}-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(folder: Path) -> None:
    one, other = (folder / f"kms_service{kind}-{VERSION}.tar.gz" for kind in ("", "_client"))
    kept = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(kept)


def lose(folder: Path) -> None:
    (folder / f"kms-service-{VERSION}-requirements.lock").unlink()


def flip_and_list(folder: Path) -> None:
    """As one who can write all files but has no key."""
    flip(folder)
    path, name = folder / "SHA256SUMS", f"kms_service-{VERSION}-py3-none-any.whl"
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.endswith(f"  {name}")]
    path.write_text("".join(f"{line}\n" for line in [f"{digest}  {name}", *kept]))


def unsign(folder: Path) -> None:
    (folder / "SHA256SUMS.sig").unlink()


@pytest.mark.parametrize("damage", [flip, swap, lose, flip_and_list, add_to_the_list, unsign])
def test_a_user_notices(download: Path, keys: Path, damage: Callable[[Path], None]) -> None:
    damage(download)

    assert verified(download, keys / "owner").returncode != 0


@pytest.mark.parametrize(
    ("key", "namespace"), [("foreign", "kms-service-release"), ("owner", "git"), ("owner", "file")]
)
def test_a_user_refuses_a_signature_of_another_key_or_purpose(
    download: Path, keys: Path, key: str, namespace: str
) -> None:
    sign(download, keys / key, namespace)

    done = verified(download, keys / "owner")

    assert done.returncode != 0
    assert ": OK" not in done.stdout


def test_a_user_compares_the_key_that_signed(download: Path, keys: Path) -> None:
    """A line of another key may be in the file, written so that a list of its keys leaves it out.

    A name in the list that it signed may paint over the line with its fingerprint.
    """
    add_to_the_list(download, "\x1b[1A\x1b[2Kmore")
    key = (keys / "foreign.pub").read_text().split()[:2]
    with (download.parent / "allowed_signers").open("a") as signers_file:
        signers_file.write(f"kms-service-release\t{' '.join(key)}\n")
    sign(download, keys / "foreign")

    done = verified(download, keys / "owner")

    assert (done.returncode, done.stdout) == (1, "")
    assert verified(download, keys / "foreign").returncode == 0


@pytest.mark.parametrize("key", ["", "SHA256:…", "SHA256:"])
def test_a_user_who_names_no_key_verifies_nothing(download: Path, key: str) -> None:
    done = shell(download, VERIFY.replace("SHA256:…", key))

    assert (done.returncode, done.stdout) == (1, "")


def install(folder: Path, options: str = "") -> str:
    """What the commands of the page say in a folder without a release, where they fail."""
    (block,) = re.findall(r"^```sh\n(mkdir .*?)^```", (ROOT / PAGE).read_text(), re.MULTILINE | re.DOTALL)
    made = f"{shlex.quote(sys.executable)} -I -m venv {options}"
    words: str = block.replace("python3 -I -m venv ", made, 1)
    assert made in words
    done = shell(folder, words)
    assert done.returncode != 0
    return done.stderr


def test_an_install_runs_nothing_of_the_folder_but_what_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    for name in ("venv", "runpy", "ensurepip", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open('{tmp_path}/ran', 'w')")

    assert "../kms/bin/pip: No such file" in install(folder, "--without-pip ")

    assert {path.name for path in tmp_path.iterdir()} == {"download", "kms"}


def test_an_install_runs_nothing_of_an_environment_that_is_there(tmp_path: Path) -> None:
    """An archive may bring one beside the folder of the release."""
    (tmp_path / "download").mkdir()
    (tmp_path / "kms/bin").mkdir(parents=True)
    for name in ("python", "python3", f"python3.{sys.version_info.minor}", "pip", "kms"):
        (tmp_path / "kms/bin" / name).symlink_to(tmp_path / "program")
    (tmp_path / "program").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    (tmp_path / "program").chmod(0o755)

    said = install(tmp_path / "download")

    assert {path.name for path in tmp_path.iterdir()} == {"download", "kms", "program"}
    assert "File exists" in said


def test_a_key_that_is_not_named_signs_nothing(tree: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    script = runpy.run_path(str(tree / "scripts/release.py"))

    with pytest.raises(script["ReleaseError"]) as caught:
        script["sign"](tmp_path, keys / "foreign")
    (problem,) = caught.value.problems
    assert problem.error.startswith("scripts/allowed_signers does not allow this key to sign")


def test_builds_that_differ_are_refused(tree: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(tree / "scripts/release.py"))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.whl").write_text("same")
        (tmp_path / name / "one.whl").write_text(name)

    with pytest.raises(script["ReleaseError"]) as caught:
        script["require_same"](tmp_path / "one", tmp_path / "other")
    (problem,) = caught.value.problems
    assert problem.error == "two builds of one commit differ: one.whl"


ANY_KEY = r"""#!/bin/sh
case "$*" in
*--verify*) printf '\n[GNUPG:] GOODSIG 0 somebody\n' ;;
*) cat >/dev/null && printf -- '-----BEGIN PGP SIGNATURE-----\n' && printf '\n[GNUPG:] SIG_CREATED \n' >&2 ;;
esac
"""


@pytest.fixture
def tagged(tree: Path, keys: Path, tmp_path: Path) -> Path:
    """A clone with the tag as the script says to make it, by either key."""
    git(tmp_path, "clone", "--quiet", tree, "kms-service")
    clone = tmp_path / "kms-service"
    for name, tag in (("owner", f"v{VERSION}"), ("foreign", "v9.9.9")):
        by_key = ("-c", "gpg.format=ssh", "-c", f"user.signingkey={keys / name}")
        git(clone, *by_key, "tag", "-s", tag, "-m", tag)
    git(clone, "update-ref", "refs/tags/v9.9.8", f"refs/tags/v{VERSION}")  # an old one under a new name
    gpg = tmp_path / "gpg"  # whose keyring has a key of somebody else
    gpg.write_text(ANY_KEY)
    gpg.chmod(0o755)
    git(clone, "config", "gpg.program", gpg)
    git(clone, "-c", "gpg.format=openpgp", "tag", "-s", "v9.9.7", "-m", "v9.9.7")
    (tmp_path / "allowed_signers").write_text(SIGNER + (keys / "owner.pub").read_text())
    return clone


@pytest.mark.parametrize(
    ("tag", "has_foreign_key", "is_good"),
    [
        (f"v{VERSION}", False, True),
        (f"v{VERSION}", True, True),
        ("v9.9.9", False, False),
        ("v9.9.9", True, False),
        ("v9.9.8", False, False),
        ("v9.9.7", False, False),
    ],
)
def test_a_user_verifies_the_tag_of_a_clone(
    tagged: Path, keys: Path, tag: str, has_foreign_key: bool, is_good: bool
) -> None:
    if has_foreign_key:
        with (tagged.parent / "allowed_signers").open("a") as signers_file:
            signers_file.write(SIGNER + (keys / "foreign.pub").read_text())
    words = VERIFY_TAG.replace("v0.3.0", tag).replace("SHA256:…", fingerprint(keys / "owner"))
    assert tag in words

    done = shell(tagged, words)

    assert (done.returncode == 0) == is_good, done.stderr


# -- what the repository says -----------------------------------------------------------------------------


def test_keys_that_sign_are_for_releases_only() -> None:
    lines = (ROOT / "scripts/allowed_signers").read_text("utf-8").splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]

    allowed = re.compile(re.escape(SIGNER) + r"(?:sk-)?ssh-ed25519\S* AAAA\S+( .+)?")
    assert [line for line in keys if not allowed.fullmatch(line)] == []


def test_the_page_names_the_options_of_the_script() -> None:
    told = released(ROOT, "--help").stdout
    options = set(re.findall(r"--[a-z]+", told)) - {"--help"}

    assert options == {"--key", "--prepare", "--documented"}
    page = (ROOT / PAGE).read_text()
    assert [option for option in options if not re.search(rf"`[^`\n]*{option}\b", page)] == []
