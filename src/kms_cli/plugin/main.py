"""The program ``age-plugin-kms``, started by age tools. It wraps file keys by the service or in process."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Final, NoReturn

from kms_cli import terminal
from kms_cli.local.instances import address
from kms_cli.plugin.names import PluginTarget
from kms_cli.plugin.state_machines import PluginKeys, identity_v1, recipient_v1
from kms_client import Client
from kms_core import key_opening, keyring, secure_memory
from kms_core.age.header import FILE_LIMITS
from kms_core.age.plugin_protocol import Broken, PluginConnection
from kms_core.audit import AuditRecord
from kms_core.auth.policy import AllowAll, Principal
from kms_core.key_selection import SelectionRules
from kms_core.service import Kms
from kms_core.settings import files
from kms_core.settings.load import load as load_settings
from kms_protocol.context import Context
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, EXIT_USAGE, ConfigurationError

MACHINES: Final[Mapping[str, Callable[[PluginConnection, PluginKeys], None]]] = {
    "recipient-v1": recipient_v1,
    "identity-v1": identity_v1,
}
FLAG: Final = "--age-plugin="
USAGE: Final = (
    "age-plugin-kms is started by age, rage, sops and other age tools, which find it on the PATH.\n"
    "Pass the output of these commands to them:\n"
    "  kms recipient --context env=prod    to encrypt:  age -r age1kms1…\n"
    "  kms identity --context env=prod     to decrypt:  age -d -i FILE\n"
)


_YES: Final = frozenset({"1", "true", "t", "yes", "y", "on"})  # the values that the kms command accepts
LOCAL_USER: Final = Principal("local")


class KeysOfTargets:
    """Keys of the service, or of the settings file in this process, as a target says.

    Address and token of the service are found as by the ``kms`` command. A recipient may name another
    address, but the token is never sent there: the author of a recipient must not obtain tokens.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def wrap(self, file_key: bytes, target: PluginTarget) -> bytes:
        if target.in_process:
            return self._own.wrap(LOCAL_USER, file_key, target.context, key_id=target.key_id).stanza
        with self._client(target) as kms:
            return kms.wrap(file_key, context=dict(target.context.pairs), key_id=target.key_id).stanza

    def unwrap(self, stanzas: bytes, target: PluginTarget) -> bytes:
        if target.in_process:
            return self._own.unwrap(LOCAL_USER, stanzas, target.context, key_id=target.key_id).file_key
        with self._client(target) as kms:
            return kms.unwrap(stanzas, context=dict(target.context.pairs), key_id=target.key_id).file_key

    def _client(self, target: PluginTarget) -> Client:
        named = self._environ.get("KMS_SERVICE_URL")
        own = (named or address(self._environ)).rstrip("/")
        token_file = self._environ.get("KMS_TOKEN_FILE")
        url = target.url or own
        if token_file and url != own:
            raise ConfigurationError(
                f"The token in KMS_TOKEN_FILE is for {own}, and this recipient or identity names {url}: "
                f"if the token may go there, set KMS_SERVICE_URL={url}"
            )
        allow_http = self._environ.get("KMS_ALLOW_HTTP", "").lower() in _YES
        return Client(
            url, token_file=token_file, allow_http=allow_http, check_service=not (target.url or named)
        )

    @cached_property
    def _own(self) -> Kms:
        """The keys of the settings file, without the policy and the audit log of the service.

        The working directory is ignored (see ``run``). Raises ConfigurationError.
        """
        named = self._environ.get("KMS_CONFIG")
        if named and not Path(named).is_absolute():
            raise ConfigurationError("An age plugin requires an absolute path in KMS_CONFIG")
        settings = load_settings(files.for_command(None, self._environ, None, _say), self._environ)
        rules = SelectionRules(settings.kms.require_context, FILE_LIMITS)
        keys = keyring.build(settings, key_opening.of_process(settings))
        return Kms(keys, AllowAll(), _NoAudit(), rules)


class _NoAudit:
    """An audit log that discards records: a user with the keys could bypass any log."""

    def append(self, record: AuditRecord) -> str:
        del record
        return ""

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        del tenant, context
        return {}

    def check(self) -> None:
        pass


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one state machine over stdin and stdout. Return the exit code."""
    named = [arg.removeprefix(FLAG) for arg in args if arg.startswith(FLAG)]
    machine = MACHINES.get(named[0]) if len(named) == 1 == len(args) else None
    if machine is None:
        _say(f"unknown state machine {', '.join(named)}") if named else sys.stderr.write(USAGE)
        return EXIT_USAGE
    os.chdir("/")  # "plugins must not make any assumptions about the working directory"
    line = PluginConnection(sys.stdin.buffer, sys.stdout.buffer)
    try:
        machine(line, KeysOfTargets(environ))
    except Broken as exc:
        _say(str(exc))
        return EXIT_OTHER
    return 0


def main() -> NoReturn:
    """Entry point. age ends a plugin that it no longer needs by SIGINT."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    try:
        secure_memory.forbid_dumps()
        code = run(sys.argv[1:], os.environ)
    except ConfigurationError as exc:
        _say(exc.detail)
        code = EXIT_CONFIGURATION
    sys.stderr.flush()
    os._exit(code)  # without flushing stdout, which may be closed


def _say(text: str) -> None:
    sys.stderr.write(f"age-plugin-kms: {terminal.printable(text)}\n")


if __name__ == "__main__":
    main()
