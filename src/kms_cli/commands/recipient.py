"""``kms recipient``, ``kms identity``: name a key of the service for ``age``, ``rage`` and ``sops``."""

import click

from kms_cli import terminal
from kms_cli.age_file.keys import check_key_id
from kms_cli.options import context_option, key_option
from kms_cli.plugin.names import PluginTarget
from kms_cli.session import DEFAULT_URL, printed_as_json, session
from kms_client.settings import checked_address
from kms_protocol.context import Context
from kms_protocol.wire import ContextIn

in_process_option = click.option(
    "--in-process", is_flag=True, help="Use the keys of KMS_CONFIG on this machine, without a service."
)
with_url_option = click.option(
    "--with-url", is_flag=True, help="Include --url; otherwise the plugin uses KMS_SERVICE_URL."
)


@click.command(
    "recipient",
    epilog='Example: age -r "$(kms recipient --context env=prod)" -o backup.age backup.tar',
)
@context_option
@key_option
@in_process_option
@with_url_option
def recipient_command(context: ContextIn, key_id: str | None, *, in_process: bool, with_url: bool) -> None:
    """Print a recipient, age1kms1…, with which age tools encrypt for a key of the service.

    It contains the key id, the context and the address. It is not secret: using it requires a token.
    """
    target = _target(context, key_id, in_process=in_process, with_url=with_url)
    if not printed_as_json({"recipient": target.recipient()}):
        terminal.result(target.recipient())


@click.command(
    "identity",
    epilog="Example: kms identity --context env=prod > kms.id; age -d -i kms.id backup.age",
)
@context_option
@key_option
@in_process_option
@with_url_option
def identity_command(context: ContextIn, key_id: str | None, *, in_process: bool, with_url: bool) -> None:
    """Print an identity, AGE-PLUGIN-KMS-1…, with which age tools decrypt files of a context.

    It contains no key: decryption requires a token that allows "unwrap". Without --key-id it is for files of
    any key.
    """
    target = _target(context, key_id, in_process=in_process, with_url=with_url)
    if printed_as_json({"identity": target.identity(), "recipient": target.recipient()}):
        return
    terminal.result(f"# recipient: {target.recipient()}")
    terminal.result(target.identity())


def _target(context: ContextIn, key_id: str | None, *, in_process: bool, with_url: bool) -> PluginTarget:
    if in_process and with_url:
        raise click.UsageError("--in-process uses no service: leave out --with-url")
    url = checked_address(session().url or DEFAULT_URL) if with_url else None
    check_key_id(key_id)
    return PluginTarget(key_id, Context.parse(context), url, in_process)
