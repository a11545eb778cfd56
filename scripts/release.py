"""Makes the files of a release: checks the tree, builds, lists them in SHA256SUMS, signs that list.

``scripts/release`` runs it, and docs/releases.md describes it. It neither tags nor sends anything: it prints
what remains to be done. Exit codes: 0, 1 if a check fails, 2 for wrong arguments.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
CHANGELOG: Final = ROOT / "CHANGELOG.md"
SIGNERS: Final = ROOT / "scripts/allowed_signers"
SUMS: Final = "SHA256SUMS"
NAMESPACE: Final = "kms-service-release"
"""The namespace of signatures, and the name of the signer in ``scripts/allowed_signers``."""
CONTRACT: Final = ("docs/contract.md", "src/kms_api/openapi/openapi.json")
DISTRIBUTIONS: Final = ("client", ".")
COPIED: Final = {
    "src/kms_api/openapi/openapi.json": "openapi.json",
    "requirements/runtime.lock": "requirements.lock",
    "requirements/image.lock": "requirements-image.lock",
}
SBOMS: Final = {
    "requirements/runtime.lock": "sbom.cdx.json",
    "requirements/image.lock": "image-sbom.cdx.json",
}
IN_PATCHES: Final = {"Changed", "Fixed", "Security"}
_VERSION: Final = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
_HEADING: Final = re.compile(r"^## \[([^\]]+)\](?: - (\S+))?[ \t]*\n", re.MULTILINE)


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    error: str
    hint: str


class ReleaseError(Exception):
    """The release cannot be made: ``problems`` has at least one."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems


class Section(NamedTuple):
    """A section of CHANGELOG.md; ``date`` is empty where the heading has none."""

    name: str
    date: str
    text: str

    @property
    def has_entries(self) -> bool:
        return re.search(r"^- ", self.text, re.MULTILINE) is not None

    @property
    def groups(self) -> set[str]:
        """The kinds of its entries: Added, Changed, …."""
        return set(re.findall(r"^### (.+?)[ \t]*$", self.text, re.MULTILINE))


# -- what a release needs ---------------------------------------------------------------------------------


def problems(version: str, documented: Sequence[str]) -> Iterator[Problem]:
    """Everything that keeps the commit that is checked out from being this version."""
    yield from tree_problems(version)
    yield from version_problems(version)
    sections = changelog()
    yield from changelog_problems(version, sections)
    yield from contract_problems(version, sections, documented)


def tree_problems(version: str) -> Iterator[Problem]:
    branch = git("rev-parse", "--abbrev-ref", "HEAD")
    if branch != "main":
        yield Problem(f"this is branch {branch}, and releases are made on main", "git switch main")
    if changed := git("status", "--porcelain"):
        yield Problem(f"the tree is not clean: {'; '.join(changed.splitlines())}", "commit or remove these")
    if has_tag(version):
        yield Problem(
            f"the tag v{version} is there already", "take the next version: what was released stays as it is"
        )
    if (ROOT / "dist" / version / f"{SUMS}.sig").exists():
        yield Problem(f"dist/{version} is signed already", "upload it, or remove it to build it again")


def version_problems(version: str) -> Iterator[Problem]:
    for place, found in versions().items():
        if found != version:
            yield Problem(f"{place} is {found}", f"make it {version}, or release {found}")


def versions() -> dict[str, str]:
    """The version of the project, from every file that packages or clients read it from."""
    service, client = (pyproject(name) for name in ("pyproject.toml", "client/pyproject.toml"))
    module = (ROOT / "src/kms_protocol/__init__.py").read_text("utf-8")
    pins = [need for need in service["dependencies"] if need.startswith("kms-service-client==")]
    return {
        "version in pyproject.toml": service["version"],
        "kms-service-client in pyproject.toml": "".join(pins).partition("==")[2],
        "version in client/pyproject.toml": client["version"],
        "__version__ of kms_protocol": "".join(re.findall(r'^__version__\b.*"(.+)"', module, re.MULTILINE)),
        "version in openapi.json": json.loads((ROOT / CONTRACT[1]).read_bytes())["info"]["version"],
    }


def pyproject(name: str) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / name).read_text("utf-8"))["project"]
    return project


def changelog() -> list[Section]:
    """The sections, newest first."""
    parts = _HEADING.split(CHANGELOG.read_text("utf-8"))[1:]
    return [
        Section(name, day or "", text)
        for name, day, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def changelog_problems(version: str, sections: Sequence[Section]) -> Iterator[Problem]:
    if unreleased(sections).has_entries:
        yield Problem(
            f"[Unreleased] of CHANGELOG.md has entries, and this commit would be {version} with them",
            f"move them below the heading of {version}, or release the next: scripts/release NEXT --prepare",
        )
    dated = [section for section in sections if section.date]
    if not dated or dated[0].name != version:
        yield Problem(
            f"{version} is not the newest dated section of CHANGELOG.md",
            f"scripts/release {version} --prepare",
        )
        return
    if not is_past(dated[0].date):
        yield Problem(
            f"the date of {version} in CHANGELOG.md, {dated[0].date}, is none or is to come",
            "write it as YYYY-MM-DD, of today or earlier",
        )
    yield from number_problems(version, dated[0], dated[1:])


def unreleased(sections: Sequence[Section]) -> Section:
    if sections and sections[0].name == "Unreleased":
        return sections[0]
    raise ReleaseError(Problem("CHANGELOG.md does not begin with ## [Unreleased]", "add that heading"))


def is_past(day: str) -> bool:
    try:
        return date.fromisoformat(day) <= datetime.now(UTC).date()
    except ValueError:
        return False


def number_problems(version: str, section: Section, earlier: Sequence[Section]) -> Iterator[Problem]:
    """The rules of Semantic Versioning for the number."""
    if not section.has_entries:
        yield Problem(f"{version} has no entry in CHANGELOG.md", "write what a user notices")
    if earlier and numbers(version) <= numbers(earlier[0].name):
        yield Problem(f"{version} is not after {earlier[0].name}", "take a later version")
    if numbers(version)[2] and (more := section.groups - IN_PATCHES):
        yield Problem(
            f"a patch version only mends, and {version} has {', '.join(sorted(more))}",
            "raise the second number: docs/releases.md#what-a-version-number-promises",
        )


def numbers(version: str) -> tuple[int, int, int]:
    found = _VERSION.fullmatch(version)
    if not found:
        raise ReleaseError(Problem(f"{version} is no version", "write three numbers, such as 0.3.0"))
    return int(found[1]), int(found[2]), int(found[3])


def contract_problems(
    version: str, sections: Sequence[Section], documented: Sequence[str]
) -> Iterator[Problem]:
    """Commits since the last version that change the contract and not CHANGELOG.md."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        yield Problem("the history is cut, so changes of the contract are not seen", "git fetch --unshallow")
        return
    earlier = [section.name for section in sections if section.date and section.name != version]
    if not earlier:  # the first version: no user has a contract that it could change
        return
    span = since(earlier[0])
    known = {git("rev-parse", "--verify", f"{commit}^{{commit}}") for commit in documented}
    known.update(commits(span, CHANGELOG.name))
    for commit in commits(span, *CONTRACT):
        if commit not in known:
            subject = git("log", "-1", "--format=%h %s", commit)
            yield Problem(
                f"a commit changes the contract and not CHANGELOG.md: {subject}",
                f"write the entry that is missing; if there is none: --documented {commit[:12]}",
            )


def since(version: str) -> str:
    """The commits after the tag of a version, else after the one that wrote its heading."""
    if has_tag(version):
        return f"v{version}..HEAD"
    found = git("log", "--format=%H", f"-S## [{version}] - ", "--", CHANGELOG.name).split()
    return f"{found[-1]}..HEAD" if found else "HEAD"


def has_tag(version: str) -> bool:
    return bool(git("tag", "--list", f"v{version}"))


def commits(span: str, *paths: str) -> list[str]:
    return git("log", "--full-history", "--no-merges", "--format=%H", span, "--", *paths).split()


def key_problems(key: Path) -> Iterator[Problem]:
    """What keeps this key from signing."""
    if not shutil.which("ssh-keygen"):
        yield Problem("ssh-keygen is not on the PATH", "Debian and Ubuntu: apt install openssh-client")
    if not key.is_file():
        yield Problem(
            f"there is no key {key}", "name the file of a private key, or of a public key in ssh-agent"
        )
    if not signers():
        yield Problem(
            f"{SIGNERS.relative_to(ROOT)} names no key, so that nobody could verify the signature",
            f'add the line: {NAMESPACE} namespaces="{NAMESPACE},git" and the public key; commit it',
        )


def signers() -> list[str]:
    lines = map(str.strip, SIGNERS.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


# -- building ---------------------------------------------------------------------------------------------


def build(version: str, commit: str, folder: Path) -> None:
    """Write all files of the version and their list into an empty ``folder``."""
    say("building wheels and sdists, twice")
    distributions(commit, folder)
    with tempfile.TemporaryDirectory() as second:
        distributions(commit, Path(second))
        require_same(folder, Path(second))
    for source, name in COPIED.items():
        shutil.copyfile(ROOT / source, folder / f"kms-service-{version}-{name}")
    say("writing the SBOMs")
    for lock, name in SBOMS.items():
        (folder / f"kms-service-{version}-{name}").write_bytes(run(str(ROOT / "scripts/sbom"), lock))
    (folder / SUMS).write_text(sums(folder), "utf-8")


def distributions(commit: str, folder: Path) -> None:
    """Build both distributions from an export of ``commit``, in a folder of its own."""
    environ = os.environ | {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct", commit)}
    with tempfile.TemporaryDirectory() as top:
        tree = Path(top, "tree")
        tree.mkdir()
        git("archive", "--format=tar", f"--output={top}/tree.tar", commit)
        run("tar", "--extract", f"--file={top}/tree.tar", f"--directory={tree}")
        for name in DISTRIBUTIONS:
            argv = (sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--target", "wheel")
            run(*argv, "--directory", str(folder), cwd=tree / name, env=environ)


def require_same(first: Path, second: Path) -> None:
    names = {path.name for folder in (first, second) for path in folder.iterdir()}
    other = sorted(name for name in names if digest(first / name) != digest(second / name))
    if other:
        raise ReleaseError(
            Problem(
                f"two builds of one commit differ: {', '.join(other)}",
                "find what enters the files besides the sources: tests/deploy/test_distributions.py",
            )
        )


def digest(path: Path) -> str:
    """SHA-256 in hexadecimal; empty if there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def sums(folder: Path) -> str:
    """The list that ``sha256sum --check`` reads."""
    return "".join(f"{digest(path)}  {path.name}\n" for path in sorted(folder.iterdir()))


def sign(folder: Path, key: Path) -> None:
    """Sign the list, and verify the signature as a user does. ssh-keygen may ask for a passphrase."""
    listed = folder / SUMS
    if not succeeds("sign", "-f", str(key), "-n", NAMESPACE, str(listed)):
        raise ReleaseError(Problem(f"ssh-keygen could not sign with {key}", "see its output above"))
    words = ("-f", str(SIGNERS), "-I", NAMESPACE, "-n", NAMESPACE, "-s", f"{listed}.sig")
    if not succeeds("verify", *words, stdin=listed.read_bytes()):
        raise ReleaseError(
            Problem(
                f"{SIGNERS.relative_to(ROOT)} does not allow this key to sign: users would refuse the files",
                "add its line, commit that, and run this again; or use a key that is there",
            )
        )


def succeeds(action: str, *words: str, stdin: bytes | None = None) -> bool:
    """Whether ``ssh-keygen`` does this; it prints why not."""
    argv = ["ssh-keygen", "-Y", action, *words]
    return subprocess.run(argv, input=stdin, stdout=sys.stderr, check=False).returncode == 0


# -- commands ---------------------------------------------------------------------------------------------


def release(version: str, key: Path | None, documented: Sequence[str]) -> None:
    """Check, build, sign if there is a key, and print what remains."""
    found = [*problems(version, documented), *(key_problems(key) if key else ())]
    if found:
        raise ReleaseError(*found)
    commit, target = git("rev-parse", "HEAD"), ROOT / "dist" / version
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".release-") as top:
        folder = Path(top, version)
        folder.mkdir()
        build(version, commit, folder)
        if key:
            sign(folder, key)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    sys.stdout.write((target / SUMS).read_text("utf-8"))
    sys.stdout.writelines(f"{line}\n" for line in remaining(version, commit, key))


def remaining(version: str, commit: str, key: Path | None) -> Iterator[str]:
    """The steps that are the owner's."""
    yield f"\nThe files are in dist/{version}. Nothing has left this machine. What remains:\n"
    if not key:
        yield "- sign: --key FILE, or KMS_RELEASE_KEY=FILE. The key is the owner's: docs/releases.md#the-key"
    if not {"license", "license-files"} & pyproject("pyproject.toml").keys():
        yield "- licence: pyproject.toml names none; the owner chooses. Without one nobody may copy the files"
    own = f"-c gpg.format=ssh -c user.signingkey={shlex.quote(str(key)) if key else 'FILE'}"
    yield f"- tag: git {own} tag -s v{version} -m 'kms-service {version}' {commit}"
    yield f"- publish: push main and the tag, upload dist/{version}. This script knows no place for it"
    yield from image_steps(version, commit)
    yield f"- tell users: the section {version} of CHANGELOG.md, the image's digest, docs/releases.md"


def image_steps(version: str, commit: str) -> Iterator[str]:
    """How to build and push the image with the program that is here, and which digest to note."""
    name, epoch = f"REGISTRY/kms-service:{version}", git("log", "-1", "--format=%ct", commit)
    words = f"-f deploy/Dockerfile --build-arg VERSION={version} --build-arg REVISION={commit}"
    program = next((name for name in ("docker", "podman", "buildah") if shutil.which(name)), None)
    if program is None:
        yield "- image: docker, podman or buildah is needed: deploy/README.md#image"
    elif program == "docker":
        output = f"--output type=image,name={name},rewrite-timestamp=true,push=true"
        yield f"- image: SOURCE_DATE_EPOCH={epoch} docker buildx build {words} {output} ."
        yield f"  its digest: docker buildx imagetools inspect {name} --format '{{{{.Manifest.Digest}}}}'"
    else:
        yield f"- image: {program} build --format docker --timestamp {epoch} {words} -t {name} ."
        yield f"  its digest is written by: {program} push --digestfile image-digest {name}"


def prepare(version: str) -> None:
    """Turn [Unreleased] of CHANGELOG.md into the section of this version, dated today (UTC)."""
    sections = changelog()
    found = list(prepare_problems(version, sections))
    if found:
        raise ReleaseError(*found)
    heading = f"## [Unreleased]\n\n## [{version}] - {datetime.now(UTC).date()}\n"
    text = CHANGELOG.read_text("utf-8")
    CHANGELOG.write_text(_HEADING.sub(lambda _: heading, text, count=1), "utf-8")
    say(f"CHANGELOG.md has the section {version}")
    for problem in version_problems(version):
        say(f"to do: {problem.error}: make it {version}")
    earlier = sections[1].name if sections[1:] else version
    say(f"to do: change what names it else: git grep -F {earlier} -- deploy docker-compose.yml scripts tests")
    say(f"to do: commit, then scripts/release {version}")


def prepare_problems(version: str, sections: Sequence[Section]) -> Iterator[Problem]:
    if git("status", "--porcelain", "--", CHANGELOG.name):
        yield Problem("CHANGELOG.md has changes that are not committed", "commit them")
    if has_tag(version) or version in {section.name for section in sections}:
        yield Problem(f"{version} has a section or a tag already", "take the next version")
    yield from number_problems(version, unreleased(sections), [each for each in sections if each.date])


def run(*argv: str, **more: Any) -> bytes:  # noqa: ANN401 -- subprocess's own keywords
    """What a program prints; CalledProcessError has what it says on stderr."""
    more.setdefault("cwd", ROOT)
    done: subprocess.CompletedProcess[bytes] = subprocess.run(argv, capture_output=True, check=True, **more)
    return done.stdout


def git(*words: str) -> str:
    return run("git", *words).decode().strip()


def say(text: str) -> None:
    sys.stderr.write(f"kms: {text}\n")


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/release", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("version", help="such as 0.3.0")
    parser.add_argument(
        "--prepare", action="store_true", help="date the entries of CHANGELOG.md, and do no more"
    )
    parser.add_argument(
        "--key", type=Path, help="SSH key that signs (KMS_RELEASE_KEY); without it nothing is signed"
    )
    parser.add_argument(
        "--documented", action="append", default=[], metavar="COMMIT", help="needs no entry of its own"
    )
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    named = parsed(words)
    key = named.key or (Path(os.environ["KMS_RELEASE_KEY"]) if os.environ.get("KMS_RELEASE_KEY") else None)
    try:
        numbers(named.version)
        if named.prepare:
            prepare(named.version)
        else:
            release(named.version, key and key.absolute(), named.documented)
    except ReleaseError as error:
        for problem in error.problems:
            say(f"error: {problem.error}")
            say(f"hint: {problem.hint}")
        return 1
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr.decode(errors="replace"))
        say(f"error: {shlex.join(error.cmd)} ended with {error.returncode}")
        say("hint: see its output above")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
