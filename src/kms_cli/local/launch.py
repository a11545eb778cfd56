"""``kms up``: hands the options over to ``up.run``."""

import click

from kms_cli.local.up import UpOptions, run
from kms_cli.session import session


@click.command("up", short_help="Run the service here.")
@click.option("--bind", help="Address to listen on.", envvar="KMS_BIND")
@click.option("--port", type=click.IntRange(1, 65534), help="Port to listen on.", envvar="KMS_PORT")
@click.option("--monitoring", is_flag=True, help="Run Prometheus too, two ports above (from the PATH).")
def up_command(bind: str | None, port: int | None, *, monitoring: bool) -> int:
    """Run API, worker and an embedded Valkey until Ctrl-C; makes keys for development if there are none."""
    given = session()
    return run(UpOptions(given.config, given.state_dir, bind, port, monitoring))
