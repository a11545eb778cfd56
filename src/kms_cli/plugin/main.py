"""The program ``age-plugin-kms``, which age tools start; people have ``kms recipient`` and ``identity``."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FrameType
from typing import Final, NoReturn

from kms_cli.plugin.keys import InProcess, OfService, PluginKeys
from kms_cli.plugin.names import PluginTarget
from kms_cli.plugin.protocol import Broken, PluginConnection
from kms_cli.plugin.state_machines import KeysFor, identity_v1, recipient_v1
from kms_core import secure_memory
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, EXIT_USAGE, ConfigurationError

MACHINES: Final[Mapping[str, Callable[[PluginConnection, KeysFor], None]]] = {
    "recipient-v1": recipient_v1,
    "identity-v1": identity_v1,
}
FLAG: Final = "--age-plugin="
USAGE: Final = (
    "age-plugin-kms is started by age, rage, sops and other age tools, which find it on the PATH.\n"
    "Give them what these print:\n"
    "  kms recipient --context env=prod    to encrypt:  age -r age1kms1…\n"
    "  kms identity --context env=prod     to decrypt:  age -d -i FILE\n"
)


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    """One conversation over stdin and stdout; the exit code."""
    named = [arg.removeprefix(FLAG) for arg in args if arg.startswith(FLAG)]
    machine = MACHINES.get(named[0]) if len(named) == 1 == len(args) else None
    if machine is None:
        sys.stderr.write(USAGE if not named else f"age-plugin-kms: it does not speak {', '.join(named)}\n")
        return EXIT_USAGE
    os.chdir("/")  # "plugins must not make any assumptions about the working directory"
    line = PluginConnection(sys.stdin.buffer, sys.stdout.buffer)
    try:
        machine(line, _keys(environ))
    except Broken as exc:
        sys.stderr.write(f"age-plugin-kms: {exc}\n")
        return EXIT_OTHER
    return 0


def main() -> NoReturn:
    """Entry point. Age ends a plugin by SIGINT when it needs no more of it."""
    signal.signal(signal.SIGINT, _ended)
    try:
        secure_memory.forbid_dumps()
        code = run(sys.argv[1:], os.environ)
    except ConfigurationError as exc:
        sys.stderr.write(f"age-plugin-kms: {exc.detail}\n")
        code = EXIT_CONFIGURATION
    sys.stderr.flush()
    os._exit(code)  # stdout may be closed by now, and nothing is left to be written


def _keys(environ: Mapping[str, str]) -> KeysFor:
    @cache
    def here() -> PluginKeys:
        return InProcess(environ)

    service = OfService(environ)

    def keys_for(target: PluginTarget) -> PluginKeys:
        return here() if target.in_process else service

    return keys_for


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    os._exit(0)


if __name__ == "__main__":
    main()
