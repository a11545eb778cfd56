"""``kms run``: runs a program with decrypted values in its environment only.

The program replaces this process (execve): it receives the signals, its exit code is that of the command,
and no memory of this process remains.
"""

import io
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn, TypedDict, Unpack

import click
import msgspec

from kms_cli import terminal
from kms_cli.commands.secrets import ciphertext_in
from kms_cli.connection import connect
from kms_cli.options import FILE, context_option, key_option
from kms_protocol import small_files
from kms_protocol.errors import InvalidRequest, KmsError
from kms_protocol.wire import ContextIn

LIMIT_BYTES: Final = 2 * 1024 * 1024
_SEALED_TEXT: Final = "YWdlLWVuY3J5cHRpb24ub3JnL3Yx"  # the start of an age file in base64
_Decrypt = Callable[[bytes, str], str]  # takes a ciphertext, and what messages call it
_IGNORED: Final = ("SIGPIPE", "SIGXFSZ")  # ignored by Python, which a program would inherit
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RISKY_NAMES: Final = (  # compiled when it is first used: that takes a millisecond
    r"LD_.*|DYLD_.*|PATH|HOME|IFS|GCONV_PATH|GLIBC_TUNABLES|MALLOC_.*|OPENSSL_(CONF|ENGINES|MODULES)|KMS_.*"
    r"|ENV|SHELL|SHELLOPTS|BASH_ENV|BASH_FUNC.*|BASHOPTS|PS4|ZDOTDIR|(GNU)?MAKEFLAGS|MAKEFILES"
    r"|(.*_)?(EDITOR|PAGER|ASKPASS|(ADD)?OPTS|(PASS)?COMMAND|CMD(_ARGS)?|EXTERNAL_DIFF|RSH|GPG_EXEC|CONNECT_PROG)"
    r"|.*_((LOAD|LIBRARY|PLUGIN|MODULE)_?PATH|PLUGIN_DIR|(EXTRA_)?MODULES)|FPATH|JAVACMD|PIP_CONFIG_FILE|AWK(LIB)?PATH|ERL_LIBS"
    r"|ZIPOPT|PYTEST_PLUGINS|SSH_(SK_.*|PKCS11_HELPER)|MANPAGER|HGEDITOR|HGRCPATH|VISUAL|BROWSER|LESS(OPEN|CLOSE|KEY.*)?"
    r"|SVN_SSH|VIMINIT|EXINIT|PSQLRC|TAR_OPTIONS|GNUPGHOME|CURL_HOME|WGETRC|KRB5_CONFIG|CONTAINERS_CONF.*"
    r"|GIT_(SSH.*|EXEC_PATH|CONFIG.*|(COMMON_)?DIR|TEMPLATE_DIR)"
    r"|KUBECONFIG|AWS_(CONFIG|SHARED_CREDENTIALS)_FILE|CLOUDSDK_(CONFIG|PYTHON.*)|DOCKER_CONFIG|VAULT_CONFIG_PATH"
    r"|HELM_(PLUGINS|.*_HOME)|TF_CLI_.*|AZURE_(CONFIG|EXTENSION)_DIR|XDG_(CONFIG|DATA)_(HOME|DIRS)"
    r"|ANSIBLE_(CONFIG|LIBRARY|INVENTORY|.*_(PLUGINS|PATH|EXECUTABLE|INTERPRETER|ARGS|FILE))"
    r"|GO(FLAGS|ENV|ROOT|TOOLCHAIN|AUTH|CACHEPROG)|CC|CXX|(.*_)?(C|CXX|CPP|LD|RUST|RUSTDOC)FLAGS|CMAKE_.*|PKG_CONFIG|GCC_EXEC_PREFIX"
    r"|COMPILER_PATH|RUSTC.*|RUSTDOC|RUSTUP_.*|CARGO_(HOME|(BUILD|TARGET|ALIAS)_.*)|MAVEN_ARGS|JAVA_HOME"
    r"|(?i:NPM_CONFIG_(NODE_OPTIONS|SCRIPT_SHELL|PREFIX|(USER|GLOBAL)CONFIG))|YARN_(YARN_PATH|RC_FILENAME)"
    r"|ERL_[AZ]?FLAGS|R_(PROFILE|ENVIRON).*|GTK_MODULES|QT_PLUGIN_PATH"
    r"|PYTHON.*|PERL5.*|PERLLIB|RUBY(OPT|LIB)|GEM_(HOME|PATH)|BUNDLE_GEMFILE|NODE_OPTIONS|NODE_PATH"
    r"|_?JAVA_(TOOL_)?OPTIONS|JDK_JAVA_OPTIONS|CLASSPATH|COR(ECLR)?_.*PROFIL.*|(DOTNET|COMPlus)_GCName"
    r"|DOTNET_(STARTUP_HOOKS|ROOT|ADDITIONAL_DEPS)|LUA_(INIT|C?PATH).*|PHPRC|PHP_INI_SCAN_DIR"
)
"""Known names that select the code that programs load or run, or the service that ``kms`` uses.

Programs have more of them than any list: ``--only`` is what lets none through.
"""


def parse(text: str, where: str) -> dict[str, str]:
    """Read an environment file: a JSON object of strings, or lines as python-dotenv documents them.

    A value is taken as it is written: ``$`` has no meaning. Raises InvalidRequest for a line that is not
    NAME=value and for a name that is set twice; it names ``where`` and the line, never a value.
    """
    if text.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(text, type=dict[str, str])
        except msgspec.DecodeError:
            raise InvalidRequest(f"{where} is not a JSON object of strings") from None
    from dotenv.parser import parse_stream  # noqa: PLC0415 -- imports logging and tempfile

    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        name, value, source = binding.key, binding.value, binding.original
        if name is None and not binding.error:
            continue  # a comment, or the end
        line = source.line + source.string[: -len(source.string.lstrip())].count("\n")
        if not name or value is None or not _NAME.fullmatch(name):
            raise InvalidRequest(f"Line {line} of {where} is not NAME=value, or does not close a quote")
        if name in values:
            raise InvalidRequest(f"Line {line} of {where} sets {name} a second time")
        values[name] = value
    return values


def check(
    name: str, value: str, where: str, allowed: frozenset[str], only: frozenset[str] = frozenset()
) -> None:
    """Check a variable from an encrypted file, which another user may have written.

    Raises InvalidRequest for a NUL, and for a name that is not in ``only``; if that is empty, for one that is
    known to select code and is not in ``allowed``.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where} sets a name that is not valid in a shell")
    if only and name not in only:
        raise InvalidRequest(f"{where} sets {name}, which is none of --only: add --only {name} to pass it")
    if not only and re.fullmatch(_RISKY_NAMES, name) and name not in allowed:
        raise InvalidRequest(
            f"{where} sets {name}, which selects what programs load or run: allow it with --allow {name}"
        )
    if "\0" in value:
        raise InvalidRequest(f"The value of {name} in {where} contains a NUL, which an environment cannot")


class NotExecutable(KmsError):
    """A program that cannot be run. Its exit code is that of a shell, as those of its kinds."""

    code = "not_executable"
    exit_code = 126


class ProgramNotFound(NotExecutable):
    """A program that does not exist."""

    code = "program_not_found"
    exit_code = 127


class RunOptions(TypedDict):
    """Options of ``kms run``."""

    env_files: tuple[Path, ...]
    env: tuple[str, ...]
    allow: tuple[str, ...]
    only: tuple[str, ...]
    context: ContextIn
    key_id: str | None
    command: tuple[str, ...]


@click.command(
    "run",
    epilog="Example: kms run --env-file app.env.age --context env=prod -- ./deploy --all",
)
@click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=FILE,
    help="NAME=value lines or a JSON object: encrypted as a whole, or with encrypted values.",
)
@click.option("--env", multiple=True, metavar="NAME=FILE", help="The decrypted content of one file.")
@click.option("--allow", multiple=True, metavar="NAME", help="Allow a name that selects code, such as PATH.")
@click.option(
    "--only", multiple=True, metavar="NAME", help="Fail for every name but this one and further --only."
)
@context_option
@key_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(**given: Unpack[RunOptions]) -> None:
    """Decrypt values into the environment of COMMAND, and run it in place of this process.

    A value in a plain --env-file is decrypted if it is base64 of an encrypted text, or @FILE, relative to the
    file. Later values override earlier ones and the current environment. Nothing is written to disk, no value
    is passed as an argument, and the program leaves no core file.

    Well-known names that select code, such as LD_PRELOAD, need --allow. That list is never complete: if
    others may write the files, name all variables with --only.
    """
    if given["allow"] and given["only"]:
        raise click.UsageError("--only names all variables: leave out --allow")
    with connect() as kms:

        def decrypt(ciphertext: bytes, where: str) -> str:
            opened = kms.decrypt(ciphertext, context=given["context"], key_id=given["key_id"])
            try:
                return opened.plaintext.decode()
            except UnicodeDecodeError:
                raise InvalidRequest(f"{where} is not UTF-8 text") from None

        values = dict(_values(given, decrypt))
    if not values:
        raise click.UsageError("no values: give --env-file or --env")
    _exec(given["command"], values)


run_command.allow_interspersed_args = False  # options after COMMAND belong to it


def _values(given: RunOptions, decrypt: _Decrypt) -> Iterator[tuple[str, str]]:
    allowed, only = frozenset(given["allow"]), frozenset(given["only"])
    for path in given["env_files"]:
        for name, value in _of_file(path, decrypt).items():
            check(name, value, str(path), allowed, only)
            yield name, value
    for pair in given["env"]:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise click.UsageError("--env takes NAME=FILE")
        value = _content(Path(file), decrypt)
        check(name, value, "--env", allowed, only)
        yield name, value


def _of_file(path: Path, decrypt: _Decrypt) -> Mapping[str, str]:
    """Return the decrypted values of an environment file."""
    data = small_files.read(path, LIMIT_BYTES)
    sealed = ciphertext_in(data)
    if sealed is not None:
        return parse(decrypt(sealed, str(path)), str(path))
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is neither text nor an encrypted file") from None
    values = parse(text, str(path))
    return {name: _decrypted(name, value, path, decrypt) for name, value in values.items()}


def _decrypted(name: str, value: str, path: Path, decrypt: _Decrypt) -> str:
    if value.startswith("@"):
        return _content(path.parent / value[1:], decrypt)
    if not value.startswith(_SEALED_TEXT):
        return value
    sealed = ciphertext_in(value.encode())
    if sealed is None:
        raise InvalidRequest(
            f"The value of {name} in {path} begins as an encrypted text in base64, but is not one"
        )
    return decrypt(sealed, f"{name} in {path}")


def _content(path: Path, decrypt: _Decrypt) -> str:
    """Return the decrypted content of a file, without its final newline."""
    sealed = ciphertext_in(small_files.read(path, LIMIT_BYTES))
    if sealed is None:
        raise InvalidRequest(
            f"{path} is not an encrypted file: encrypt it with kms encrypt or kms encrypt-file"
        )
    return decrypt(sealed, str(path)).removesuffix("\n")


def _exec(command: tuple[str, ...], values: Mapping[str, str]) -> NoReturn:
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, {**os.environ, **values})  # noqa: S606 -- the user names the program
    except OSError as exc:  # EACCES also where a folder of the PATH may not be entered
        import shutil  # noqa: PLC0415 -- for an error alone

        is_name, name = "/" not in command[0], f'"{terminal.printable(command[0])}"'
        if isinstance(exc, FileNotFoundError) or (is_name and not shutil.which(command[0], os.F_OK)):
            raise ProgramNotFound(f"{name} is not on the PATH") from None
        raise NotExecutable(f"{name}: {terminal.plain(exc.strerror or '')}") from None
