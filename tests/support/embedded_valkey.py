"""A Valkey server for tests: that of ``kms up`` without a supervisor, with the access list of deployments."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

from kms_cli.local.valkey import ValkeyFiles, answer, child, claim, find_binary
from kms_core.programs import tether
from kms_core.programs.supervisor import append_only
from kms_core.settings.redis_urls import for_celery
from kms_protocol.errors import Conflict, Unavailable
from support.programs import running

ACCESS_LIST: Final = Path(__file__).parents[2] / "deploy" / "valkey" / "users.acl"
RIGHTS: Final = ACCESS_LIST.read_text().partition("user kms on #PASSWORD_SHA256 ")[2].strip()
"""The rights of the service, as the access list writes them."""
POLL_S: Final = 0.002
DYING_S: Final = 1.0  # between a SIGKILL and the end of the process


class EmbeddedValkey:
    """A server for a ``with`` block, without a supervisor; ``options`` are further words of its command line.

    ``start`` after the server died starts it again with the same data and address. Start it from a thread
    that lives as long as the server should (see ``tether.spawn``).
    """

    def __init__(
        self, state_dir: Path, *, options: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> None:
        self._state_dir = state_dir
        self._options = options
        self._environ = environ or {}
        self._stack = ExitStack()
        self._files: ValkeyFiles | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def files(self) -> ValkeyFiles:
        """The files of the server. Raises Unavailable if it was not started."""
        if self._files is None:
            raise Unavailable("The embedded Valkey server is not started")
        return self._files

    @property
    def url(self) -> str:
        return self.files.url_of(0)

    @property
    def broker_url(self) -> str:
        return for_celery(self.url)

    @property
    def pid(self) -> int:
        """The process id, also after the server died. Raises Unavailable if it was not started."""
        if self._process is None:
            raise Unavailable("The embedded Valkey server is not started")
        return self._process.pid

    def start(self, *, timeout_s: float = 10.0) -> Self:
        """Start the server and wait until it answers (about 0.06 s; loading data does not count).

        Raises Unavailable with the end of the server's log if it ends or does not answer, Conflict if the
        state directory is in use, ConfigurationError as ``claim`` and ``find_binary``.
        """
        if self._process is not None and not _has_ended(self._process, DYING_S):
            raise Conflict("The embedded Valkey server is already running")
        if self._files is None:
            self._files = self._stack.enter_context(claim(self._state_dir, self._environ))
        server = child(self._files, self._environ)
        access_list = self._files.data_dir / "users.acl"
        access_list.write_text(f"user default on nopass {RIGHTS}\n")
        access_list.chmod(0o600)
        argv = [*server.argv, *self._options, "--aclfile", str(access_list)]
        with append_only(self._files.log_path) as output:
            self._process = tether.spawn(argv, env={}, output=output, pass_fds=server.pass_fds)
        try:
            _wait(self._process, self._files, timeout_s)
        except Unavailable:
            self.stop()
            raise
        return self

    def stop(self, *, grace_s: float = 10.0) -> None:
        """SIGTERM, after ``grace_s`` SIGKILL; then give up the state directory. Twice is once."""
        if self._process is not None:
            self._process.terminate()
            if not _has_ended(self._process, grace_s):
                self._process.kill()
                self._process.wait()
        self._process = self._files = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _has_ended(process: subprocess.Popen[bytes], wait_s: float) -> bool:
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait(process: subprocess.Popen[bytes], files: ValkeyFiles, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not (reply := answer(files.socket_path)).startswith(b"+PONG"):
        if process.poll() is not None:
            raise Unavailable(f"valkey-server ended with status {process.returncode}: {_log_tail(files)}")
        if reply.startswith(b"-LOADING"):
            deadline = time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            raise Unavailable(f"valkey-server did not answer in {timeout_s:g} s: {_log_tail(files)}")
        time.sleep(POLL_S)


def _log_tail(files: ValkeyFiles) -> str:
    """Return the last three lines of the log of the server, and its path."""
    lines = files.log_path.read_text(errors="replace")[-2048:].splitlines()[-3:]
    return " / ".join(line.strip() for line in lines if line.strip()) + f" (log: {files.log_path})"


@contextmanager
def unrestricted(folder: Path) -> Iterator[str]:
    """The URL of a server whose user may list and dump keys, which that of the embedded one may not."""
    socket = folder / "valkey.sock"
    argv = [str(find_binary(os.environ)), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
    with running([*argv, "--save", ""], folder / "log", socket.exists):
        yield f"unix://{socket}?db=0"
