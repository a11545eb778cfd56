"""``kms up``: hands the options over to ``up.run``."""

import click

from kms_cli.session import session
from kms_cli.up import Options, run


@click.command("up", short_help="Run the service here.")
@click.option("--bind", help="Address to listen on.", envvar="KMS_BIND")
@click.option("--port", type=click.IntRange(1, 65534), help="Port to listen on.", envvar="KMS_PORT")
def up_command(bind: str | None, port: int | None) -> int:
    """Run API, worker and an embedded Valkey until Ctrl-C; makes keys for development if there are none."""
    return run(Options(config=session().config, state_dir=session().state_dir, bind=bind, port=port))
